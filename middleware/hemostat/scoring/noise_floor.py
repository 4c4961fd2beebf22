"""The noise floor: how far each model diverges from itself, measured continuously on a part of the scored requests.

Decoding and prefill do not agree to the last bit, nor do two shapes of a batch. So the compressed model's own tokens
are scored again by prefill on its own server (`prompt_logprobs`), and on the reference in another batch shape. The
result is divergence that no compression caused; headline figures are also reported as their excess over it.

The cost: the compressed model's server prefills what it has just generated, for `shadow.floor_fraction` of the
scored requests, one at a time, within the shadow token budget. Failures are counted and have no other effect.
"""

from __future__ import annotations

import asyncio
import logging
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Protocol

import numpy as np
import numpy.typing as npt

from hemostat.measurement.figures import COMPRESSED, MODELS
from hemostat.metrics import names
from hemostat.metrics.samples import Sample
from hemostat.reference.protocol import ReferenceFailure, ReferenceScores, ScoreRequest
from hemostat.scoring.limits import TokenBudget
from hemostat_calibration.errors import InvalidRecordError
from hemostat_calibration.record_checks import validate
from hemostat_calibration.records import Arm, Candidates, Sampling, TokenRecord

log = logging.getLogger("hemostat.floor")

MAX_QUEUED_RECORDS = 8
"""The largest number of records that wait to be scored again; more are left out, and counted as `busy`."""
UNKNOWN_SAMPLING = Sampling(temperature=float("nan"))
"""The sampling of tokens for which it is not known what they were drawn from: there is no sampled-token estimate."""
MAX_FAILURES = 2
"""The number of failures in a row of one model after which its floor counts as failing."""
SCORED, BUSY, INTERNAL_ERROR = "scored", "busy", "internal_error"
"""Outcomes; others are the reasons of `ReferenceFailure` and `InvalidRecordError`."""


class SelfScorer(Protocol):
    """The part of `hemostat.reference.protocol.Reference` that is needed here."""

    async def score(self, request: ScoreRequest) -> ReferenceScores: ...


class NoiseFloorMeter:
    """Owns the queue of requests that both models score again, and the counts of how that ended.

    compressed: scores on the compressed models' own server.
    draw: uniform numbers in [0, 1). emit: is handed the name of the model (of `MODELS`) and a record with that model on
        both sides.
    """

    def __init__(
        self,
        *,
        fraction: float,
        draw: Callable[[], float],
        budget: TokenBudget,
        compressed: SelfScorer,
        emit: Callable[[str, TokenRecord], None],
        clock: Callable[[], float],
    ) -> None:
        self._fraction = fraction
        self._draw = draw
        self._budget = budget
        self._compressed = compressed
        self._emit = emit
        self._clock = clock
        self._queue: asyncio.Queue[tuple[npt.NDArray[np.int32], TokenRecord, SelfScorer]] = asyncio.Queue(
            MAX_QUEUED_RECORDS
        )
        self.outcomes: Counter[tuple[str, str]] = Counter()
        """The number of measurements by model and outcome."""
        self._in_a_row: Counter[str] = Counter()
        self.failing: dict[str, str] = {}
        """The models whose floor cannot be measured now, and why the last attempt failed."""

    def offer(self, prompt: npt.NDArray[np.int32], record: TokenRecord, reference: SelfScorer) -> None:
        """Offers a scored request; it is drawn by chance if it is taken. prompt: int32 [P]. reference: the reference of
        the record's model, which is asked for another batch shape.
        """
        if self._draw() < self._fraction:
            try:
                self._queue.put_nowait((prompt, record, reference))
            except asyncio.QueueFull:
                self.outcomes.update((model, BUSY) for model in MODELS)

    def samples(self) -> Iterator[Sample]:
        for labels, requests in self.outcomes.items():
            yield Sample(names.NOISE_FLOOR_REQUESTS, labels, requests)

    async def run(self) -> None:
        """Measures until it is cancelled."""
        while True:
            prompt, record, reference = await self._queue.get()
            for model in MODELS:
                try:
                    self._emit(model, await self._score_again(model, prompt, record, reference))
                except (ReferenceFailure, InvalidRecordError) as failure:
                    self._failed(model, str(failure.reason), str(failure))
                    log.warning("noise floor of the %s model: %s", model, failure)
                except Exception as error:
                    self._failed(model, INTERNAL_ERROR, f"{type(error).__name__}; see the log")
                    log.exception("noise floor of the %s model", model)
                else:
                    self.outcomes[model, SCORED] += 1
                    self._in_a_row.pop(model, None)
                    self.failing.pop(model, None)

    def _failed(self, model: str, outcome: str, why: str) -> None:
        self.outcomes[model, outcome] += 1
        self._in_a_row[model] += 1
        if self._in_a_row[model] > MAX_FAILURES:
            self.failing[model] = why

    async def _score_again(
        self, model: str, prompt: npt.NDArray[np.int32], record: TokenRecord, reference: SelfScorer
    ) -> TokenRecord:
        tokens = len(prompt) + record.tokens
        await self._budget.take(tokens, self._clock)
        first = self_record(record, model)
        request = ScoreRequest(prompt, record.output_ids, first.compressed.ids)
        if model == COMPRESSED:
            # The server may serve several models.
            scores = await self._compressed.score(replace(request, adapter=record.model))
        else:
            scores = await reference.score(replace(request, reshaped=True))
        return validate(
            replace(
                first,
                reference_at=scores.at,
                reference=scores.top,
                reference_emitted=scores.emitted,
                reference_entropy=scores.entropy,
            )
        )


def self_record(record: TokenRecord, model: str) -> TokenRecord:
    """Returns the record with `model` in the place of the compressed one; the reference's place is still to be filled
    in."""
    bare = replace(record, shifts={}, features=None, reference_hidden=None, arm=Arm.NONE)
    if model == COMPRESSED:
        return bare
    # The emitted token is among the reference's own ids where it was among those that it was asked for.
    return replace(
        bare,
        compressed=Candidates(record.reference.ids, record.reference.logprobs),
        compressed_emitted=record.reference_emitted,
        # The token was drawn from the compressed model, whose log-probability is known unless a profile was applied.
        drawn_emitted=record.compressed_emitted,
        sampling=UNKNOWN_SAMPLING if record.applied else record.sampling,
        applied=None,
        requested=None,
    )
