"""What overload, faults and restarts do to clients, on real processes: `make bench-faults`.

A table with one line for each attack or fault, and build/bench/faults.json (`rows`: `module`, `case`, `before`,
`measured`, `limit`, `holds`). The cases are in tests/bench/faults/, one module for each subject; its TAKES says how
long it takes.

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

ROOT = Path(__file__).resolve().parents[2]
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))

from tests.bench.faults import modules  # noqa: E402  the root is no package

RESULT = ROOT / "build" / "bench" / "faults.json"


def run(name: str) -> tuple[list[dict[str, Any]], float]:
    """Rows of one module, and seconds."""
    started = time.monotonic()
    module = next(module for module in modules() if name == module.NAME)
    rows = [{"module": name} | asdict(row) | {"holds": bool(row.holds)} for row in module.rows()]
    return rows, time.monotonic() - started


def cell(value: float | str) -> str:
    return value if isinstance(value, str) else f"{value:.4g}"


def table(rows: Sequence[dict[str, Any]]) -> str:
    lines = [("case", "before", "measured", "limit", "holds")]
    for row in rows:
        case = f"{row['module']}: {row['case']}"
        lines.append((case, row["before"], cell(row["measured"]), row["limit"], "yes" if row["holds"] else "NO"))
    widths = [max(len(line[column]) for line in lines) for column in range(5)]
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
    parser.add_argument("--jobs", type=int, default=1, help="modules that run at a time; more disturb the timings")
    arguments = parser.parse_args(argv)
    chosen = arguments.only or names
    found: dict[str, list[dict[str, Any]]] = {}
    # Processes of their own, begun anew: no state is shared.
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(arguments.jobs, mp_context=context) as pool:
        running = {pool.submit(run, name): name for name in chosen}
        for future in as_completed(running):
            name = running[future]
            found[name], seconds = future.result()
            print(f"{name}: {len(found[name])} rows, {seconds:.0f} s", file=sys.stderr, flush=True)
    rows = [row for name in chosen for row in found[name]]
    RESULT.parent.mkdir(parents=True, exist_ok=True)
    result = {
        "machine": platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        "rows": earlier_rows(RESULT, chosen) + rows,
    }
    RESULT.write_text(json.dumps(result, indent=1, allow_nan=False) + "\n")
    print(table(rows))
    return 0 if all(row["holds"] for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
