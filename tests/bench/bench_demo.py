"""Measures how long the demo takes to prove a repair: `make bench-demo` prints a table, and writes build/bench/demo/.

It runs `hemostat demo` to its end, `--runs` times (5 by default), one after the other, on real vLLM. A run that has a
result is not run again, so what was interrupted goes on; `make clean` or another folder of `--folder` begins anew.
Each run takes some five minutes on a quiet machine of two cores. Nothing else should run meanwhile: builder, judge,
reference and vLLM share the cores. The exit status is 1 where a run promoted nothing.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / "build" / "bench" / "demo"
RUNS = 5
HEADINGS = (
    "requests until the promotion",
    "seconds from the first request",
    "held-out conversations",
    "tokens of the build",
    "seconds of the build",
    "recovered KL, %",
    "KL control, nats",
    "KL treated, nats",
    "seconds in all",
)


def run(folder: Path, number: int) -> dict[str, Any]:
    """Returns the report of one run, with `wall_seconds`; one that is in the folder already is read."""
    result = folder / f"{number}.json"
    if result.exists():
        return json.loads(result.read_text())  # type: ignore[no-any-return]
    report, log = folder / "report.json", folder / f"{number}.log"
    report.unlink(missing_ok=True)
    command = [sys.executable, "-m", "hemostat", "demo", "--no-console"]
    outputs = ["--report", str(report), "--html", str(folder / f"{number}.html")]
    began = time.monotonic()
    with log.open("w") as output:
        ended = subprocess.run([*command, *outputs], stdout=output, stderr=subprocess.STDOUT, check=False)
    if ended.returncode:
        raise SystemExit(f"run {number}: the demo ended with {ended.returncode}; its lines are in {log}")
    content = json.loads(report.read_text()) | {"wall_seconds": time.monotonic() - began}
    # Under its own name only when it is whole: a run that was interrupted is repeated.
    report.write_text(json.dumps(content, indent=1) + "\n")
    report.replace(result)
    return content


def row(report: dict[str, Any]) -> list[float | None]:
    """Returns the values of HEADINGS of one run; None where it has none."""
    first = report["first_promotion"] or {}
    promoted = [event["evidence"] for event in report["decisions"] if event["decision"] == "promote"]
    built = (report.get("adapter") or {}).get("last_build") or {}
    ratio = report.get("recovered", {}).get("ratio")
    arms = report.get("arms", {})
    kl = [arms.get(arm, {}).get("kl_nats_estimate", {}).get("estimate") for arm in ("control", "treated")]
    return [
        first.get("requests"),
        first.get("seconds"),
        promoted[-1].get("units") if promoted else None,
        built.get("tokens"),
        built.get("wall_seconds"),
        None if ratio is None else 100 * ratio,
        *kl,
        report["wall_seconds"],
    ]


def show(value: float | None) -> str:
    return "–" if value is None else f"{value:,.3g}" if abs(value) < 10 else f"{value:,.0f}"


def table(rows: Sequence[Sequence[float | None]]) -> str:
    """Returns a line for each of HEADINGS: the value of each run, and their median."""
    lines = ["| | " + " | ".join(f"run {number}" for number in range(1, len(rows) + 1)) + " | median |"]
    lines.append("|---" * (len(rows) + 2) + "|")
    for heading, values in zip(HEADINGS, zip(*rows, strict=True), strict=True):
        known = [value for value in values if value is not None]
        middle = median(known) if len(known) == len(values) else None
        lines.append(f"| {heading} | {' | '.join(map(show, values))} | {show(middle)} |")
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--runs", type=int, default=RUNS)
    parser.add_argument("--folder", type=Path, default=FOLDER)
    options = parser.parse_args()
    options.folder.mkdir(parents=True, exist_ok=True)
    rows = []
    for number in range(1, options.runs + 1):
        rows.append(row(run(options.folder, number)))
        print(f"run {number}: {rows[-1][0]} requests, {rows[-1][1]} s until the promotion", file=sys.stderr, flush=True)
    print(table(rows))
    return 0 if all(values[0] is not None for values in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
