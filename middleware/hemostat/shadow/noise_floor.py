"""The noise floor: how far each model is from itself, measured all the time on a part of what is shadowed.

Decoding and prefill do not agree to the last bit, nor do two shapes of a batch. So the compressed model's own tokens
are scored again by prefill on itself (its own server, `prompt_logprobs`), and the reference's answer again in another
shape. What comes out is divergence that no compression caused: headline figures are also told as their excess over it.

It costs the compressed model's server a prefill of what it has just written, on `shadow.floor_fraction` of the scored
requests, one at a time, from the shadow budget; whatever goes wrong is counted, and nothing else happens.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from dataclasses import replace
from typing import Protocol

import numpy as np
import numpy.typing as npt

from hemostat.reference.protocol import ReferenceFailure, ReferenceScores
from hemostat.shadow.assignment import uniform
from hemostat.shadow.limits import TokenBudget
from hemostat_calibration.arrays import Ids
from hemostat_calibration.errors import InvalidRecordError
from hemostat_calibration.records import Arm, Candidates, Sampling, TokenRecord, validate

log = logging.getLogger("hemostat.floor")

MODELS = ("compressed", "reference")
WAITING = 8
"""Records that may wait to be scored again; the rest is left out, and counted."""
FLOOR = b"hemostat floor"
UNKNOWN = Sampling(temperature=float("nan"))
"""Of tokens of which it is not known what they were drawn from: no sampled-token estimate."""


class Scores(Protocol):
    """Of `hemostat.reference.protocol.Reference`, what is needed here."""

    async def score(
        self, prompt: npt.NDArray[np.int32], output: npt.NDArray[np.int32], ids: Ids, *, reshaped: bool = False
    ) -> ReferenceScores: ...


class Floor:
    """Runs until cancelled.

    compressed: scores on the compressed model's own server. reference: the reference, asked to answer in another shape.
    sink: gets the name of the model (of `MODELS`) and a record in which that model stands on both sides.
    count: (model, outcome): `scored`, `busy`, or the reason of a failure.
    """

    def __init__(
        self,
        *,
        fraction: float,
        seed: int,
        budget: TokenBudget,
        compressed: Scores,
        reference: Scores,
        sink: Callable[[str, TokenRecord], None],
        count: Callable[[str, str], None],
        clock: Callable[[], float],
    ) -> None:
        self._fraction = fraction
        self._seed = seed
        self._budget = budget
        self._by = {"compressed": compressed, "reference": reference}
        self._sink = sink
        self._count = count
        self._clock = clock
        self._queue: asyncio.Queue[tuple[npt.NDArray[np.int32], TokenRecord]] = asyncio.Queue(WAITING)

    def offer(self, prompt: npt.NDArray[np.int32], record: TokenRecord) -> None:
        """A scored request; it is taken by a hash of its id."""
        key = record.request_id.encode("utf-8", "surrogateescape")
        if self._fraction > 0.0 and uniform(key, self._seed, FLOOR) < self._fraction:
            try:
                self._queue.put_nowait((prompt, record))
            except asyncio.QueueFull:
                for model in MODELS:
                    self._count(model, "busy")

    @property
    def waiting(self) -> int:
        return self._queue.qsize()

    async def run(self) -> None:
        while True:
            prompt, record = await self._queue.get()
            for model in MODELS:
                try:
                    self._sink(model, await self._again(model, prompt, record))
                except (ReferenceFailure, InvalidRecordError) as failure:
                    self._count(model, failure.reason)
                    log.warning("noise floor of the %s model: %s", model, failure)
                except Exception:
                    self._count(model, "internal_error")
                    log.exception("noise floor of the %s model", model)
                else:
                    self._count(model, "scored")

    async def _again(self, model: str, prompt: npt.NDArray[np.int32], record: TokenRecord) -> TokenRecord:
        tokens = len(prompt) + record.tokens
        while delay := self._budget.delay(tokens, self._clock()):  # noqa: ASYNC110  waits for time, not an event
            await asyncio.sleep(delay)
        self._budget.spend(tokens, self._clock())
        first = itself(record, model)
        ids = first.compressed.ids
        scores = await self._by[model].score(prompt, record.output_ids, ids, reshaped=model == "reference")
        return validate(
            replace(
                first,
                reference_at=scores.at,
                reference=scores.top,
                reference_emitted=scores.emitted,
                reference_entropy=scores.entropy,
            )
        )


def itself(record: TokenRecord, model: str) -> TokenRecord:
    """The record with `model` in the place of the compressed one; what stands for the reference is to be filled in."""
    bare = replace(record, shifts={}, features=None, reference_hidden=None, arm=Arm.NONE)
    if model == "compressed":
        return bare
    # The emitted token is among the candidates when it was given; the list is the reference's own.
    return replace(
        bare,
        compressed=Candidates(record.reference.ids, record.reference.logprobs),
        compressed_emitted=record.reference_emitted,
        # The token was drawn from the compressed model: known, unless a profile had a part in it.
        drawn_emitted=record.compressed_emitted,
        sampling=UNKNOWN if record.applied else record.sampling,
        applied=None,
        requested=None,
    )
