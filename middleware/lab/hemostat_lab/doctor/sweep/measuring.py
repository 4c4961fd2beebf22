"""One loaded model at each point, over the same texts. Torch.

The reference writes the texts (at each point's decoding), so every figure of a point is paired with the others by
request. Points are compared with the unchanged model at full vocabulary:

- KL both ways, total variation, the same most likely id, log-probabilities of the text. With a decoding strategy both
  distributions are those that are drawn from, unless the point changes the decoding only: then the strategy itself
  is measured, against sampling at temperature 1. Where a distribution is cut, KL is infinite at tokens that the other
  one may draw; total variation is not.
- Outcomes: responses to prompts with known answers, greedy or drawn with the point's strategy.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import msgspec
import numpy as np
import torch

from hemostat_lab.doctor.checkpoints import CheckpointPair, compare, noise_floor, scored_ids, to_floats
from hemostat_lab.doctor.kl_meter import Text, logits_of
from hemostat_lab.doctor.pair import FLOOR, Floats, Ids, Job, Scored, pack, unpack
from hemostat_lab.doctor.sweep.alterations import compressed, decode, drawn, restructured
from hemostat_lab.doctor.sweep.outcomes import MAX_TOKENS, Outcome, Task, judge
from hemostat_lab.doctor.sweep.points import PLAIN, UNCHANGED, Drawing, Point
from hemostat_lab.models.generation import generate

KEPT = ("kl_rc", "kl_cr", "tv", "same_top", "logp_r", "logp_c")


class Measured(msgspec.Struct, frozen=True):
    """A point on some of the texts and tasks. scored: `pair.pack`; the unchanged model's have `FLOOR`, too."""

    scored: bytes
    outcomes: list[Outcome]

    def texts(self) -> list[Scored]:
        return unpack(self.scored)


@dataclass(slots=True)
class Block:
    """Texts and tasks that are measured together, and what the reference makes of the texts, by drawing.

    tasks: (number, task, its prompt's ids).
    """

    jobs: Sequence[Job]
    tasks: Sequence[tuple[int, Task, Ids]]
    outputs: dict[Drawing, list[Ids]] = field(default_factory=dict)
    logits: dict[Drawing, list[torch.Tensor]] = field(default_factory=dict)
    """[T, V] each, in the model's dtype, undecoded; of two drawings at most: `PLAIN` and the last one."""


@contextmanager
def applied(model: Any, point: Point) -> Iterator[None]:
    """The model at this point but for its decoding; afterwards it is as before, bit by bit."""
    with compressed(model, point), restructured(model, point):
        yield


class SweptModel:
    """The reference, which is changed and put back."""

    def __init__(self, pair: CheckpointPair, seed: int) -> None:
        self.pair = pair
        self.model = pair.reference_model
        self.seed = seed

    def prepare(self, block: Block, drawing: Drawing) -> None:
        """Let the reference write the texts, once for each drawing, and score them."""
        if drawing in block.logits:
            return
        for other in [strategy for strategy in block.logits if strategy != PLAIN]:
            del block.logits[other]
        with torch.inference_mode():
            if drawing not in block.outputs:
                block.outputs[drawing] = self._write(block.jobs, drawing)
            block.logits[drawing] = [
                self._logits(self.model, job, output)
                for job, output in zip(block.jobs, block.outputs[drawing], strict=True)
            ]

    def measure(self, point: Point, block: Block) -> Measured:
        """Raises NotApplicableError."""
        self.prepare(block, point.drawing)
        with torch.inference_mode(), applied(self.model, point):
            return self._measure(self.model, point, block)

    def measure_other(self, block: Block) -> Measured:
        """COMPRESSED as it is."""
        self.prepare(block, PLAIN)
        with torch.inference_mode():
            return self._measure(self.pair.compressed_model, UNCHANGED, block)

    def _measure(self, model: Any, point: Point, block: Block) -> Measured:
        against = PLAIN if point.only_decoding else point.drawing
        unchanged = model is self.model and point == UNCHANGED
        scored = []
        for job, output, r in zip(block.jobs, block.outputs[point.drawing], block.logits[point.drawing], strict=True):
            c = r if unchanged or point.only_decoding else self._logits(model, job, output)
            figures = _figures(decode(r, against), decode(c, point.drawing), output)
            if unchanged:
                figures[FLOOR] = self._floor(job, output, r)
            scored.append(Scored(job.index, output, figures))
        return Measured(pack(scored), self._outcomes(model, point.drawing, block.tasks))

    def _outcomes(self, model: Any, drawing: Drawing, tasks: Sequence[tuple[int, Task, Ids]]) -> list[Outcome]:
        if not tasks:
            return []
        uniforms = [np.random.default_rng([self.seed, 1, number]).random(MAX_TOKENS) for number, _, _ in tasks]
        with drawn(model, drawing):
            texts = generate(
                model,
                [ids for _, _, ids in tasks],
                [MAX_TOKENS] * len(tasks),
                None if drawing == PLAIN else uniforms,
                self.pair.end_ids(),
            )
        return [
            judge(number, task, self.pair.decode(text.tolist()))
            for (number, task, _), text in zip(tasks, texts, strict=True)
        ]

    def _write(self, jobs: Sequence[Job], drawing: Drawing) -> list[Ids]:
        """Texts of the reference, with the same random numbers for each drawing; a text that a job has is kept."""
        with drawn(self.model, drawing):
            return scored_ids(self.model, jobs, [self.seed, 0], False, self.pair.end_ids())

    def _logits(self, model: Any, job: Job, output: Ids) -> torch.Tensor:
        return logits_of(model, Text(job.prompt, output), self.pair.device)

    def _floor(self, job: Job, output: Ids, r: torch.Tensor) -> Floats:
        """The reference's noise floor, [T]; NaN where the text cannot be split."""
        sequence = Text(job.prompt, output).sequence(self.pair.device)
        result = noise_floor(self.model, sequence, len(job.prompt) - 1, r)
        return np.full(len(output), np.nan) if result is None else result


def _figures(r: torch.Tensor, c: torch.Tensor, output: Ids) -> dict[str, Floats]:
    figures = compare(r, c, torch.from_numpy(output.astype(np.int64)).to(r.device))
    return {name: to_floats(figures[name]) for name in KEPT}
