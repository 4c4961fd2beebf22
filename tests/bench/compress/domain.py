"""Traffic of one domain, code: an adapter from it, the compression calibrated on it, and more bits.

`--judge-code` measures there; without it the same checkpoints are measured elsewhere, on open questions.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

from . import adapters, quantization
from .cases import Bench, Case, Must
from .texts import calibration

NAME = "domain"
START = "W4A16 descent"
MORE_BITS = "5 bits descent"
RANK = 16


def cases(bench: Bench) -> Sequence[Case]:
    known = {case.name: case for case in (*quantization.cases(bench), *adapters.cases(bench))}
    start = known[START]
    return [
        start,
        known[MORE_BITS],
        Case(f"{START}, calibrated on code", start.size, partial(_calibrated, bench)),
        known[f"{START}, rank {RANK}"],
        Case(f"{START}, rank {RANK} from code", known[f"{START}, rank {RANK}"].size, partial(_adapted, bench, start)),
    ]


def musts() -> Sequence[Must]:
    """None: which is better is the question."""
    return []


def _of_code(bench: Bench) -> Bench:
    texts = calibration(bench.reference, bench.folder / "texts", len(bench.learn), bench.seed, of_code=True)
    return replace(bench, learn=texts)


def _calibrated(bench: Bench, folder: Path) -> None:
    known = {case.name: case for case in quantization.cases(_of_code(bench))}
    known[START].make(folder)


def _adapted(bench: Bench, start: Case, folder: Path) -> None:
    adapters.adapted(bench, start, RANK, False, folder, _of_code(bench).learn)
