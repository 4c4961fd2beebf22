"""Traffic of one domain, code: an adapter from it, one from all traffic, the compression calibrated on it, and more
bits.

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
    # Of two by one name the one that makes the checkpoint, and not a copy of it: a copy would be made of the copy.
    known = {case.name: case for case in (*adapters.cases(bench), *quantization.cases(bench))}
    start, general = known[START], known[f"{START}, rank {RANK}"]
    return [
        Case(START, start.size, partial(bench.copied, start)),
        known[MORE_BITS],
        Case(f"{START}, calibrated on code", start.size, partial(_calibrated, bench)),
        general,
        Case(f"{START}, rank {RANK} from code", general.size, partial(_adapted, bench, start, 1), of=START),
        Case(f"{START}, rank {RANK} from both", general.size, partial(_adapted, bench, start, 2), of=START),
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


def _adapted(bench: Bench, start: Case, kinds: int, folder: Path) -> None:
    """kinds: 1: from code alone; 2: from as many texts, of which half are those that the start was calibrated on."""
    half = len(bench.learn) // kinds
    adapters.adapted(bench, start, RANK, False, folder, [*_of_code(bench).learn[:half], *bench.learn[half:]])
