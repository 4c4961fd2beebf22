"""Two revisions measured in turns: a module that prints its figures as JSON, each time in a process of its own."""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
ONE_CORE = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1")
CHILD = "--child"
"""The argument with which the module prints its figures."""


def measured(module: str, tree: Path = ROOT) -> dict[str, Any]:
    """Returns the figures of `python -m MODULE --child`, on one core, with the packages of `tree`, and the benchmark of
    this revision. numpy counts its threads once, at its start."""
    path = os.pathsep.join(str(part) for part in (tree / "middleware", tree / "calibration", ROOT))
    environment = os.environ | ONE_CORE | {"PYTHONPATH": path}
    command = [sys.executable, "-m", module, CHILD]
    done = subprocess.run(command, cwd=ROOT, env=environment, check=True, capture_output=True, text=True)
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result


def compared(module: str, tree: Path, rounds: int, texts: Mapping[str, str], unit: str) -> None:
    """Prints the medians of both revisions, and the median ratio with the least and the largest of the rounds. texts:
    what each figure is."""
    pairs = [(measured(module, tree), measured(module)) for _ in range(rounds)]
    print(f"{unit:<66} {'before':>9} {'now':>9}  now/before [least, most]")
    for key, text in texts.items():
        before, now = (statistics.median(pair[n][key] for pair in pairs) for n in (0, 1))
        ratios = sorted(pair[1][key] / pair[0][key] for pair in pairs)
        middle = statistics.median(ratios)
        print(f"{text:<66} {_cell(before)} {_cell(now)}  {middle:.2f} [{ratios[0]:.2f}, {ratios[-1]:.2f}]")


def _cell(value: float) -> str:
    return f"{value:>9,.0f}" if value >= 100.0 else f"{value:>9.2f}"
