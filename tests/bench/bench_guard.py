"""Whether the guard, the alarm, the intervals and the tests of outcomes keep their guarantees: `make bench-guard`.

A table with one line for each simulated case, and build/bench/guard.json (`rows`: `module`, `case`, `measured`,
`limit`, `holds`). The worlds are in tests/bench/guard/, one module for each subject; its TAKES says how long 1,000
lives take, all of them 30 minutes on one core at the default of 500. Counts have the limits of a binomial distribution:
"at most 5 %" is at most 35 of 500.

`--only NAME` runs one module (may be given several times), also one that needs more than a processor (`real`: a vLLM);
rows of the others stay in the file as they were. Rows of a module are written as soon as it is done; `--resume` goes on
after an interruption, without the modules whose rows are of the same code, lives and seed. The lives of `starvation`
with builds at any rate are written one by one, and an interrupted run goes on from them in any case. The exit status is
1 where a row does not hold.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parents[2]
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))

from tests.bench.guard import digest, modules  # noqa: E402  the root is no package
from tests.bench.rows import Rows, earlier_rows, publish, run_modules, timed_rows, write_rows  # noqa: E402

RESULT = ROOT / "build" / "bench" / "guard.json"


def run(name: str, lives: int, seed: int) -> tuple[Rows, float]:
    """Rows of one module, and seconds."""
    module = next(module for module in modules() if name == module.NAME)
    rows, seconds = timed_rows(name, module.rows(lives, seed))
    return [row | {"lives": lives, "seed": seed, "code": digest()} for row in rows], seconds


def main(argv: Sequence[str] | None = None) -> int:
    names = [module.NAME for module in modules()]
    simulated = [module.NAME for module in modules() if not getattr(module, "ONLY_BY_NAME", False)]
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", action="append", choices=names, help="run this module only")
    parser.add_argument("--lives", type=int, default=500, help="simulated runs of each case")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="modules that run at a time")
    parser.add_argument("--resume", action="store_true", help="skip modules with rows of this code, lives and seed")
    arguments = parser.parse_args(argv)
    chosen = arguments.only or simulated
    same = {"lives": arguments.lives, "seed": arguments.seed, "code": digest()}
    kept = [row for row in earlier_rows(RESULT) if row["module"] in chosen and row.items() >= same.items()]
    kept = kept if arguments.resume else []
    names = [name for name in chosen if name not in {row["module"] for row in kept}]
    more = {"lives": arguments.lives, "seed": arguments.seed, "numpy": np.__version__}

    def write(name: str, rows: Rows) -> None:
        write_rows(RESULT, [name], rows, more)

    rows = run_modules(run, names, arguments.jobs, arguments.lives, arguments.seed, done=write)
    return publish(RESULT, chosen, kept + rows, ("measured", "limit"), more)


if __name__ == "__main__":
    sys.exit(main())
