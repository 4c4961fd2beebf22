"""What is compressed, how, and what must hold between the results."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from types import MappingProxyType
from typing import Protocol

import numpy as np
import numpy.typing as npt
from tests.bench.llmcompressor import compress
from tests.bench.recovery.log import say
from tests.bench.recovery.stages import cache_name

from hemostat.checkpoints.texts import Text
from hemostat_lab.compression.checkpoint_writer import BuildEnvironment, compress_with
from hemostat_lab.compression.frame import Method, Source
from hemostat_lab.compression.plan import LayerPlan, stored_bytes

from .texts import calibration, live


@dataclass(frozen=True, slots=True)
class Case:
    """A compressed checkpoint. size: bytes of its linear layers' weights and scales, in a format made for them.
    make: writes the folder, which does not exist yet. limit: of the mean KL(r‖c). of: name of the case that it
    improves: which part of its KL is recovered is said, too. live: number of texts on other prompts that it learned
    from, besides the texts to calibrate on."""

    name: str
    size: int
    make: Callable[[Path], None]
    limit: float | None = None
    of: str | None = None
    live: int = 0


@dataclass(frozen=True, slots=True)
class Must:
    """The mean KL(r‖c) of the case `better` is below that of `worse`, with an interval of the difference that does not
    reach 0. by: and by at least so much. not_above: or it may be equal: only an interval above 0 breaks it. asked:
    which is below is the question: the difference is printed and not judged."""

    better: str
    worse: str
    by: float = 0.0
    not_above: bool = False
    asked: bool = False


def slug(name: str) -> str:
    """For the name of a file."""
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


class Module(Protocol):
    """Cases of one subject."""

    NAME: str

    def cases(self, bench: Bench) -> Sequence[Case]: ...

    def musts(self) -> Sequence[Must]: ...


@dataclass(frozen=True)
class Bench:
    """reference: the checkpoint that is compressed. folder: where results are kept. learn: texts to calibrate on. live:
    number of the texts that checkpoints write to be trained on."""

    reference: Path
    folder: Path
    learn: Sequence[Text]
    seed: int
    live: int = 480

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

    def made(self, case: Case) -> Path:
        """The case's checkpoint, which is made once and kept."""
        folder = self.kept(case.name, self.learn)
        if not folder.exists():
            folder.parent.mkdir(parents=True, exist_ok=True)
            case.make(folder)
        return folder

    def copied(self, case: Case, folder: Path, beside: Mapping[str, bytes] = MappingProxyType({})) -> None:
        """As the case's `make`, from what was made before. beside: more files, by name. Nothing is half-written."""
        partial = folder.with_name(f"{folder.name}.part")
        shutil.rmtree(partial, ignore_errors=True)
        shutil.copytree(self.made(case), partial)
        for name, data in beside.items():
            (partial / name).write_bytes(data)
        partial.rename(folder)

    def live_texts(self, name: str, checkpoint: Path) -> list[Text]:
        """`live` texts that the checkpoint of this name writes to other prompts than those of `learn`, kept."""
        folder = self.kept(f"{name} live {self.live}", self.learn)
        return live(checkpoint, folder, len(self.learn), self.live, self.seed)

    def kept(self, name: str, learn: Sequence[Text]) -> Path:
        """Where something is kept that was made from texts."""
        made_from = [self.seed, [text.ids.tolist() for text in learn]]
        return self.folder / "made" / Path(cache_name(slug(name), made_from)).stem

    def ours(self, method: Method, folder: Path) -> None:
        """By `hemostat compress`; what is interrupted goes on."""
        with self.environment(folder) as environment:
            compress_with(self.reference, folder, method, self.ids, seed=self.seed, environment=environment)

    @contextmanager
    def environment(self, folder: Path) -> Iterator[BuildEnvironment]:
        """With finished work beside the folder, a gigabyte of gradients, which is removed once the folder is made."""
        work = folder.with_name(f"{folder.name}.work")
        yield BuildEnvironment(work=work, log=say, overwrite=True)
        shutil.rmtree(work, ignore_errors=True)  # not there where the folder was up to date

    def peer(self, script: Path, folder: Path, method: str, *arguments: str) -> None:
        """By llmcompressor, with a script of tests/bench/llmcompressor."""
        compress(script, self.reference, folder, [ids.tolist() for ids in self.ids], method, *arguments)
