"""Measures one prompt: by how much the candidate is worse than the stable model, for each question."""

from __future__ import annotations

from collections.abc import Callable, Coroutine
from dataclasses import dataclass, replace
from enum import StrEnum
from typing import Any

from hemostat.gate.asked import Asked
from hemostat.gate.endpoint import Endpoint
from hemostat.gate.outcomes import Outcomes
from hemostat.reference.own_answers import Answer
from hemostat.reference.protocol import FailureReason, ReferenceFailure
from hemostat_calibration.arrays import Ids
from hemostat_calibration.gate.distance import Listed, distance_gain, sampled_distance
from hemostat_calibration.gate.verdict import Question

MARGINS = {"same": 0.02, "other": 0.05}
KIND_WEIGHTS = {"stable_tokens": 15.0, "own_answers": 15.0}
"""The weights in the test of failing in a kind. Both distances have four fifths of it, so that a candidate that is bad
in a small kind is found sooner."""
REFUSALS = frozenset({FailureReason.REFUSED, FailureReason.VOCABULARY, FailureReason.TOO_LONG})
"""The failures of a model that cannot score given tokens: they are outside of its vocabulary, or too many."""

At = Callable[[tuple[int, ...], Ids, Ids], Coroutine[Any, Any, Listed]]
"""A reference: its values of the output after the prompt, at the ids [T, K] that another model's list names."""


class Expect(StrEnum):
    """The expectation that the candidate has to meet."""

    SAME = "same"
    """The same model: another version, flag, kernel, GPU."""
    OTHER = "other"
    """Another checkpoint, which is to be at least as near to the reference."""


@dataclass(frozen=True, slots=True)
class Unit:
    """The evidence of one prompt. excess: D by question. note: who had an error, and which; "" otherwise. log_ratio:
    the mean of log(stable/candidate) on the stable model's tokens, nats, for people: an estimate of KL."""

    excess: dict[str, float]
    note: str = ""
    log_ratio: float | None = None
    stable_failed: bool = False
    """It is True if the stable model answered with an error, and the candidate did not."""


def questions(expect: Expect, margin: float, kind_margin: float) -> list[Question]:
    """Returns what is asked of the candidate's distances."""
    far = "from the stable model" if expect is Expect.SAME else "from the reference than the stable model"
    more = "far" if expect is Expect.SAME else "farther"
    return [
        Question("stable_tokens", f"{more} {far}, on the stable model's tokens", margin, kind_margin),
        Question("own_answers", f"{more} {far}, on its own answers", margin, kind_margin),
    ]


class Measuring:
    """Measures one prompt after another at both endpoints. reference: None with `Expect.SAME`."""

    def __init__(self, stable: Endpoint, candidate: Endpoint, reference: At | None, outcomes: Outcomes) -> None:
        self._stable = stable
        self._candidate = candidate
        self._reference = reference
        self._outcomes = outcomes

    async def measure(self, asked: Asked, seed: int) -> Unit:
        """Returns what the prompt shows. An error of the candidate's, or no token, counts 1 against it in both
        distances, and one of the stable model's 1 for it. Raises ReferenceFailure where the reference fails, and where
        both do or both have no token."""
        ids, most = asked.ids, asked.prompt.max_tokens
        try:
            stable = await self._stable.answer(ids, most, seed)
            stable_own = await self._stable.scores(ids, stable.ids) if len(stable.ids) else None
            stable_served = await self._stable.served(asked, seed, timed=self._outcomes.timed)
        except ReferenceFailure as failure:
            return await self._without_stable(asked, seed, failure)
        try:
            candidate = await self._candidate.answer(ids, most, seed)
            candidate_given = await self._candidate.scores(ids, stable.ids) if len(stable.ids) else None
            candidate_served = await self._candidate.served(asked, seed, timed=self._outcomes.timed)
        except ReferenceFailure as failure:
            return self._one_sided(asked, 1.0, f"the candidate failed: {failure}")
        if stable_own is None or candidate_given is None or not len(candidate.ids):
            if not len(stable.ids) and not len(candidate.ids):
                raise ReferenceFailure(FailureReason.EMPTY, "both answers have no token")
            if len(candidate.ids):
                return self._one_sided(asked, -1.0, "the stable model's answer has no token")
            return self._one_sided(asked, 1.0, "the candidate's answer has no token")
        distances = self._same if self._reference is None else self._other
        tokens, own = await distances(ids, stable, stable_own, candidate, candidate_given)
        log_ratio = float((stable.listed.emitted - candidate_given.emitted).mean())
        outcomes = self._outcomes.excess(asked.prompt, stable_served, candidate_served)
        return Unit({"stable_tokens": tokens, "own_answers": own, **outcomes}, log_ratio=log_ratio)

    async def _without_stable(self, asked: Asked, seed: int, failure: ReferenceFailure) -> Unit:
        """Returns what a prompt shows that the stable model failed."""
        await self._candidate.answer(asked.ids, asked.prompt.max_tokens, seed)
        await self._candidate.served(asked, seed, timed=False)
        return replace(self._one_sided(asked, -1.0, f"the stable model failed: {failure}"), stable_failed=True)

    def _one_sided(self, asked: Asked, excess: float, note: str) -> Unit:
        outcomes = self._outcomes.of_a_failure(asked.prompt, excess)
        return Unit({"stable_tokens": excess, "own_answers": excess, **outcomes}, note)

    async def _same(
        self, ids: tuple[int, ...], stable: Answer, stable_own: Listed, candidate: Answer, candidate_given: Listed
    ) -> tuple[float, float]:
        """Returns both distances from the stable model, less the distance of its generating from its scoring, which is
        the noise that two equal servers have."""
        noise = float(sampled_distance(stable.listed, stable_own, stable.ids).mean())
        given = float(sampled_distance(stable.listed, candidate_given, stable.ids).mean())
        own = await _own_distance(candidate, self._stable.scores(ids, candidate.ids))
        return given - noise, own - noise

    async def _other(
        self, ids: tuple[int, ...], stable: Answer, stable_own: Listed, candidate: Answer, candidate_given: Listed
    ) -> tuple[float, float]:
        """Returns by how much the candidate is farther from the reference, on the stable model's tokens and where each
        answers by itself."""
        assert self._reference is not None
        given = await self._reference(ids, stable.ids, stable.listed.ids)
        tokens = float(distance_gain(given, candidate_given, stable_own).mean())
        own = await _own_distance(candidate, self._reference(ids, candidate.ids, candidate.listed.ids))
        return tokens, own - float(sampled_distance(stable.listed, given, stable.ids).mean())


async def _own_distance(candidate: Answer, scores: Coroutine[Any, Any, Listed]) -> float:
    """Returns the candidate's distance, on its own answer, from the model that scores it. It is 1 if that model refuses
    these tokens, after it has scored the stable model's: to leave the prompt out would be a selection by its outcome.
    """
    try:
        scored = await scores
    except ReferenceFailure as failure:
        if failure.reason not in REFUSALS:
            raise
        return 1.0
    return float(sampled_distance(candidate.listed, scored, candidate.ids).mean())
