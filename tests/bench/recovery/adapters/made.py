"""Adapters made as `hemostat adapt` makes them. Variants that need the same statistics share them."""

from __future__ import annotations

import functools
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from tests.bench.recovery.engine import Written
from tests.bench.recovery.log import say
from tests.bench.recovery.stages import Stages, cache_name

from hemostat.checkpoints.texts import Text
from hemostat_calibration.profiles.adapter import adapter_layers, adapter_profile
from hemostat_calibration.profiles.profile import CalibrationProfile
from hemostat_lab.adapters.build import BuildOptions, build
from hemostat_lab.adapters.distil import distil
from hemostat_lab.adapters.pair import CheckpointPair
from hemostat_lab.models.copies import Copy
from hemostat_lab.models.parts import Parts
from hemostat_lab.models.work_folder import WorkFolder

from .checkpoints import Pair
from .plan import Variant
from .scores import Tokens

LARGEST_RANK = {"kfac": 128, "full": 64, "diagonal": 64}
"""Corrections of this rank are solved for once; components are sorted, so that the first ones are those of less."""


@dataclass(frozen=True)
class LoadedCopies:
    """Copies of a pair, each loaded when it is first needed."""

    pair: Pair

    @functools.cached_property
    def reference(self) -> Copy:
        return Copy.load(self.pair.reference)

    @functools.cached_property
    def compressed(self) -> Copy:
        return Copy.load(self.pair.compressed)


@dataclass(frozen=True, slots=True)
class Made:
    """An adapter. tokens: that it was learned from, prompts included. seconds: of the statistics and all corrections
    that it shares with other variants, wall clock and of the processor."""

    profile: CalibrationProfile
    report: dict[str, Any]
    tokens: int
    seconds: float
    cpu_seconds: float


def up_to(texts: Sequence[Written], tokens: int) -> list[Written]:
    """The first texts that have at least `tokens` tokens together, prompts included: as `adapter.min_tokens` counts."""
    taken, total = [], 0
    for text in texts:
        if total >= tokens:
            break
        taken.append(text)
        total += len(text.prompt) + len(text.output)
    return taken


def made(stages: Stages, it: Pair, learning: Sequence[Written], variant: Variant) -> Made:
    """The variant's adapter for the pair, from the first of the texts."""
    if variant.distilled:
        return _distilled(stages, it, learning, variant)
    some = up_to(learning, variant.tokens)
    digests = [it.digests(), Tokens.of(some).digest]

    def make() -> Made:
        texts = [Text(text.prompt, text.output) for text in some]
        folder = stages.folder / cache_name("adapter-parts", [*digests, variant.metric]).removesuffix(".pickle")
        largest = BuildOptions(rank=LARGEST_RANK[variant.metric], metric=variant.metric, model="bench")
        options = BuildOptions(
            rank=variant.rank,
            max_rank=min(4 * variant.rank, LARGEST_RANK[variant.metric]) if variant.shared_out else None,
            shared_out=variant.shared_out,
            metric=variant.metric,
            model="bench",
        )
        progress = Progress(f"{it.scheme}, {variant.label}")
        with WorkFolder(folder, {"largest": largest.rank}, "bench-adapters") as work:
            parts, pair = Parts(work), CheckpointPair.open(it.reference, it.compressed)
            took = parts.get("seconds")
            if took is None:
                clock, processor = time.monotonic(), time.process_time()
                build(pair, texts, largest, parts, progress)
                spent = [time.monotonic() - clock, time.process_time() - processor]
                parts.put("seconds", {"seconds": torch.tensor(spent)})
            else:
                spent = took["seconds"].tolist()
            built = build(pair, texts, options, parts, progress)
        return Made(built.profile, built.report, sum(map(len, texts)), *spent)

    return stages.kept("adapter", [*digests, variant.label, LARGEST_RANK[variant.metric]], make)


def _distilled(stages: Stages, it: Pair, learning: Sequence[Written], variant: Variant) -> Made:
    """Trained from the variant that is not."""
    start = made(stages, it, learning, replace(variant, distilled=0))
    some = up_to(learning, variant.distilled)

    def make() -> Made:
        copies = LoadedCopies(it)
        texts = [Text(text.prompt, text.output) for text in some]
        result = distil(
            copies.reference,
            copies.compressed,
            adapter_layers(start.profile),
            texts,
            progress=Progress(f"{it.scheme}, {variant.label}"),
        )
        profile = adapter_profile(model="bench", vocab_size=copies.compressed.vocab_size, layers=result.layers)
        seconds, cpu_seconds = start.seconds + result.seconds, start.cpu_seconds + result.cpu_seconds
        report = start.report | {"distillation": result.report()}
        return Made(profile, report, sum(map(len, texts)), seconds, cpu_seconds)

    return stages.kept("adapter-distilled", [it.digests(), start.profile.version, Tokens.of(some).digest], make)


class Progress:
    """Of a build, a line now and then."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._said = time.monotonic()

    def __call__(self, stage: str, done: int, total: int) -> None:
        if time.monotonic() - self._said > 30:
            self._said = time.monotonic()
            say(f"{self._name}: {stage}, {done} of {total}")
