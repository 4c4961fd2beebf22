"""The compressed checkpoints that adapters are made for: those of `hemostat compress`, and GPTQ and AWQ by
llmcompressor, which has an environment of its own below build/."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from tests.bench.llmcompressor import QUANTIZE, compress
from tests.bench.recovery.engine import Written
from tests.bench.recovery.log import say

from hemostat_lab.demo.checkpoints import cached_checkpoints

from .texts import checkpoint_digest

CALIBRATION_TEXTS = {"gptq": 240, "awq": 64}
"""AWQ runs every text once for each point of its grid."""
GROUP_SIZE = 64
"""The width of SmolLM2, 576, is not a multiple of 128."""
AWQ_GRID = 10


@dataclass(frozen=True, slots=True)
class Pair:
    """The folders of a compressed checkpoint and of the reference that it was made from."""

    scheme: str
    reference: Path
    compressed: Path

    def digests(self) -> list[str]:
        return [checkpoint_digest(self.reference), checkpoint_digest(self.compressed)]


def pair(scheme: str, build: Path, calibration: Sequence[Written]) -> Pair:
    """scheme: one of `hemostat compress`, or "gptq" or "awq", which are calibrated on the first texts."""
    reference = cached_checkpoints("w4a16", say).reference
    if scheme not in CALIBRATION_TEXTS:
        return Pair(scheme, reference, cached_checkpoints(scheme, say).compressed)
    folder = build / f"checkpoint-{scheme}"
    if not folder.exists():
        texts = [[int(i) for i in (*text.prompt, *text.output)] for text in calibration[: CALIBRATION_TEXTS[scheme]]]
        compress(QUANTIZE, reference, folder, texts, scheme, str(GROUP_SIZE), str(AWQ_GRID))
    return Pair(scheme, reference, folder)
