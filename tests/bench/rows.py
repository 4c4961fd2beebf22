"""What benchmarks of modules share: modules run in processes of their own, a table of their rows, and the JSON file."""

from __future__ import annotations

import json
import multiprocessing
import os
import platform
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

Rows = list[dict[str, Any]]


@dataclass(frozen=True, slots=True)
class Row:
    """One line of the table. measured: a number, or several in words. limit: what it has to be, in words."""

    case: str
    measured: float | str
    limit: str
    holds: bool


def timed_rows(name: str, given: Iterable[Any]) -> tuple[Rows, float]:
    """Rows (dataclasses) of one module for the file, each of which is told when it is there, and the seconds that they
    took."""
    started, rows = time.monotonic(), []
    for row in given:
        rows.append({"module": name} | asdict(row) | {"holds": bool(row.holds)})
        holds = "" if row.holds else " DOES NOT HOLD"
        print(f"{name}, {time.monotonic() - started:.0f} s: {row.case}: {row.measured}{holds}", file=sys.stderr)
    return rows, time.monotonic() - started


def run_modules(
    run: Callable[..., tuple[Rows, float]],
    names: Sequence[str],
    jobs: int,
    *arguments: Any,
    done: Callable[[str, Rows], None] | None = None,
) -> Rows:
    """Rows of all modules in their order. run: of a module by its name and the arguments; `jobs` at a time. done: is
    told the rows of each as soon as they are there."""
    results: dict[str, Rows] = {}
    # Processes of their own, begun anew: no state is shared, and numpy's threads are not forked.
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(jobs, mp_context=context) as pool:
        running = {pool.submit(run, name, *arguments): name for name in names}
        for future in as_completed(running):
            name = running[future]
            results[name], seconds = future.result()
            print(f"{name}: {len(results[name])} rows, {seconds:.0f} s", file=sys.stderr, flush=True)
            if done is not None:
                done(name, results[name])
    return [row for name in names for row in results[name]]


def publish(path: Path, names: Sequence[str], rows: Rows, columns: Sequence[str], more: Mapping[str, Any]) -> int:
    """Print the table and write the file, in which rows of other modules stay as they were.

    columns: between `case` and `holds`. Returns the exit status: 1 where a row does not hold.
    """
    write_rows(path, names, rows, more)
    print(_table(rows, columns))
    return 0 if all(row["holds"] for row in rows) else 1


def write_rows(path: Path, names: Sequence[str], rows: Rows, more: Mapping[str, Any]) -> None:
    """The file with the rows of these modules; those of others stay as they were."""
    path.parent.mkdir(parents=True, exist_ok=True)
    machine = {"machine": platform.processor() or platform.machine(), "cores": os.cpu_count()}
    others = [row for row in earlier_rows(path) if row["module"] not in names]
    path.write_text(json.dumps({**more, **machine, "rows": others + rows}, indent=1, allow_nan=False) + "\n")


def earlier_rows(path: Path) -> Rows:
    """Of a file that was written before; none where it cannot be read."""
    try:
        rows: Rows = json.loads(path.read_text())["rows"]
    except (OSError, ValueError, KeyError):
        return []
    return rows


def _table(rows: Rows, columns: Sequence[str]) -> str:
    lines = [("case", *columns, "holds")]
    for row in rows:
        cells = (_cell(row[column]) for column in columns)
        lines.append((f"{row['module']}: {row['case']}", *cells, "yes" if row["holds"] else "NO"))
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join("  ".join(text.ljust(width) for text, width in zip(line, widths, strict=True)) for line in lines)


def _cell(value: float | str) -> str:
    return value if isinstance(value, str) else f"{value:.4g}"
