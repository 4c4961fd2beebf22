"""What is compressed, how, and what must hold between the results."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Protocol

import numpy as np
import numpy.typing as npt
from tests.bench.llmcompressor import compress
from tests.bench.recovery.log import say

from hemostat.compression.checkpoint_writer import BuildEnvironment, compress_with
from hemostat.compression.frame import Method, Source
from hemostat.compression.plan import LayerPlan, stored_bytes
from hemostat.models.texts import Text

from .texts import calibration


@dataclass(frozen=True, slots=True)
class Case:
    """A compressed checkpoint. size: bytes of its linear layers' weights and scales, in a format made for them.
    make: writes the folder, which does not exist yet. limit: of the mean KL(r‖c)."""

    name: str
    size: int
    make: Callable[[Path], None]
    limit: float | None = None


@dataclass(frozen=True, slots=True)
class Must:
    """The mean KL(r‖c) of the case `better` is below that of `worse`, with an interval of the difference that does not
    reach 0. by: and by at least so much. not_above: or it may be equal: only an interval above 0 breaks it."""

    better: str
    worse: str
    by: float = 0.0
    not_above: bool = False


class Module(Protocol):
    """Cases of one subject."""

    NAME: str

    def cases(self, bench: Bench) -> Sequence[Case]: ...

    def musts(self) -> Sequence[Must]: ...


@dataclass(frozen=True)
class Bench:
    """reference: the checkpoint that is compressed. folder: where results are kept. learn: texts to calibrate on."""

    reference: Path
    folder: Path
    learn: Sequence[Text]
    seed: int

    @property
    def ids(self) -> list[npt.NDArray[np.int32]]:
        return [text.ids for text in self.learn]

    @cached_property
    def shapes(self) -> dict[str, tuple[int, int]]:
        """(outputs, inputs) of the linear layers but the head."""
        return Source.open(self.reference).shapes

    def size(self, plan: LayerPlan) -> int:
        """Of all linear layers with the same plan."""
        return sum(stored_bytes(*shape, plan) for shape in self.shapes.values())

    def with_texts(self, seed: int) -> Bench:
        """The same, with other texts of the same prompts to calibrate on."""
        return replace(self, learn=calibration(self.reference, self.folder / f"texts-{seed}", len(self.learn), seed))

    def ours(self, method: Method, folder: Path) -> None:
        """By `hemostat compress`; what is interrupted goes on."""
        environment = BuildEnvironment(work=folder.with_name(f"{folder.name}.work"), log=say, overwrite=True)
        compress_with(self.reference, folder, method, self.ids, seed=self.seed, environment=environment)

    def peer(self, script: Path, folder: Path, method: str, *arguments: str) -> None:
        """By llmcompressor, with a script of tests/bench/llmcompressor."""
        compress(script, self.reference, folder, [ids.tolist() for ids in self.ids], method, *arguments)
