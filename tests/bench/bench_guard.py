"""Whether the guard, the alarm, the intervals and the tests of outcomes keep their guarantees: `make bench-guard`.

A table with one line for each simulated case, and build/bench/guard.json (`rows`: `module`, `case`, `measured`,
`limit`, `holds`). The worlds are in tests/bench/guard/, one module for each subject; its TAKES says how long it takes.
Counts have
the limits of a binomial distribution: "at most 5 %" is at most 64 of 1,000.

`--only NAME` runs one module (may be given several times); rows of the others stay in the file as they were. The exit
status is 1 where a row does not hold.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import platform
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parents[2]
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))

from tests.bench.guard import modules  # noqa: E402  the root is no package

RESULT = ROOT / "build" / "bench" / "guard.json"


def run(name: str, lives: int, seed: int) -> tuple[list[dict[str, Any]], float]:
    """Rows of one module, and seconds."""
    started = time.monotonic()
    module = next(module for module in modules() if name == module.NAME)
    rows = [{"module": name} | asdict(row) | {"holds": bool(row.holds)} for row in module.rows(lives, seed)]
    return rows, time.monotonic() - started


def cell(value: float | str) -> str:
    return value if isinstance(value, str) else f"{value:.4g}"


def table(rows: Sequence[dict[str, Any]]) -> str:
    lines = [("case", "measured", "limit", "holds")]
    for row in rows:
        case = f"{row['module']}: {row['case']}"
        lines.append((case, cell(row["measured"]), row["limit"], "yes" if row["holds"] else "NO"))
    widths = [max(len(line[column]) for line in lines) for column in range(4)]
    return "\n".join("  ".join(text.ljust(width) for text, width in zip(line, widths, strict=True)) for line in lines)


def earlier_rows(path: Path, without: Sequence[str]) -> list[dict[str, Any]]:
    """Rows of a file that was written before, but those of some modules; none where it cannot be read."""
    try:
        rows = json.loads(path.read_text())["rows"]
    except (OSError, ValueError, KeyError):
        return []
    return [row for row in rows if row["module"] not in without]


def main(argv: Sequence[str] | None = None) -> int:
    names = [module.NAME for module in modules()]
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", action="append", choices=names, help="run this module only")
    parser.add_argument("--lives", type=int, default=1000, help="simulated runs of each case")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="modules that run at a time")
    arguments = parser.parse_args(argv)
    chosen = arguments.only or names
    found: dict[str, list[dict[str, Any]]] = {}
    # Processes of their own, begun anew: no state is shared, and numpy's threads are not forked.
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(arguments.jobs, mp_context=context) as pool:
        running = {pool.submit(run, name, arguments.lives, arguments.seed): name for name in chosen}
        for future in as_completed(running):
            name = running[future]
            found[name], seconds = future.result()
            print(f"{name}: {len(found[name])} rows, {seconds:.0f} s", file=sys.stderr, flush=True)
    rows = [row for name in chosen for row in found[name]]
    RESULT.parent.mkdir(parents=True, exist_ok=True)
    result = {
        "lives": arguments.lives,
        "seed": arguments.seed,
        "machine": platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        "numpy": np.__version__,
        "rows": earlier_rows(RESULT, chosen) + rows,
    }
    RESULT.write_text(json.dumps(result, indent=1, allow_nan=False) + "\n")
    print(table(rows))
    return 0 if all(row["holds"] for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
