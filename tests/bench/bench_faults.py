"""What overload, faults and restarts do to clients, on real processes: `make bench-faults`.

A table with one line for each attack or fault, and build/bench/faults.json (`rows`: `module`, `case`, `before`,
`measured`, `limit`, `holds`). The cases are in tests/bench/faults/, one module for each subject; its TAKES says how
long it takes.

`--only NAME` runs one module (may be given several times); rows of the others stay in the file as they were. The exit
status is 1 where a row does not hold.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))

from tests.bench.faults import modules, planes  # noqa: E402  the root is no package
from tests.bench.rows import Rows, publish, run_modules, timed_rows  # noqa: E402

RESULT = ROOT / "build" / "bench" / "faults.json"


def run(name: str) -> tuple[Rows, float]:
    """Rows of one module, and seconds."""
    module = next(module for module in modules() if name == module.NAME)
    return timed_rows(name, module.rows())


def main(argv: Sequence[str] | None = None) -> int:
    names = [module.NAME for module in modules()]
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", action="append", choices=names, help="run this module only")
    parser.add_argument("--jobs", type=int, default=1, help="modules that run at a time; more disturb the timings")
    parser.add_argument("--runs", type=int, default=planes.RUNS, help="of random faults, in planes and database")
    parser.add_argument("--seed", type=int, default=planes.SEED, help="of these")
    arguments = parser.parse_args(argv)
    # Modules may run in processes of their own.
    os.environ |= {planes.RUNS_VARIABLE: str(arguments.runs), planes.SEED_VARIABLE: str(arguments.seed)}
    chosen = arguments.only or names
    rows = run_modules(run, chosen, arguments.jobs)
    return publish(RESULT, chosen, rows, ("before", "measured", "limit"), {})


if __name__ == "__main__":
    sys.exit(main())
