"""Measures one scored record at the candidate: by how much the candidate is worse than the model that serves."""

from __future__ import annotations

from collections.abc import Callable, Coroutine, Mapping
from dataclasses import dataclass
from typing import Any

import msgspec
import numpy as np

from hemostat.gate.live.candidate import Candidate, likeliest
from hemostat.openai.repetition import ends_in_loop
from hemostat.openai.routes import FORMS, Form
from hemostat.reference.own_answers import TOP_K, Answer, listed_by
from hemostat.reference.protocol import FailureReason, ReferenceFailure, ReferenceScores, ScoreRequest
from hemostat.scored_record import ScoredRecord
from hemostat.scoring.capture_arrays import prompt_ids
from hemostat_calibration.arrays import Ids
from hemostat_calibration.gate.distance import Listed, distance_gain, listed_distance
from hemostat_calibration.gate.verdict import Question

STABLE_TOKENS, OWN_ANSWERS, BAD_ANSWERS = "stable_tokens", "own_answers", "bad_answers"
MARGINS = {"same": 0.02, "other": 0.05}
KIND_MARGIN = 0.15
BAD_MARGIN = 0.05
"""The largest difference of the shares of bad answers that is allowed, whatever the other margins are."""
DEFAULT_COMPLETION_TOKENS = 16
"""The number of tokens that a request of the form completions gets if it names none."""
REFUSALS = frozenset({FailureReason.REFUSED, FailureReason.VOCABULARY, FailureReason.TOO_LONG})
"""The failures of a model that cannot score given tokens: they are outside of its vocabulary, or too many."""
_LIMITS = ("max_completion_tokens", "max_tokens", "max_output_tokens")
_RENAMED = {"stop_sequences": "stop"}

Score = Callable[[ScoredRecord, ScoreRequest], Coroutine[Any, Any, ReferenceScores]]
"""Scores given tokens, as the reference does or the engine that answered the record. Raises ReferenceFailure."""


class CandidateFailed(Exception):
    """The candidate did not do what the model that serves has done."""

    def __init__(self, failure: ReferenceFailure) -> None:
        super().__init__(str(failure))
        self.reason = failure.reason


@dataclass(frozen=True, slots=True)
class Work:
    """A scored record that is to be measured. digest: see `stored.digest_of`. own: True if the candidate answers the
    prompt by itself, too."""

    scored: ScoredRecord
    digest: bytes
    own: bool

    @property
    def tokens(self) -> int:
        """The number of tokens of the prompt and the answer."""
        return len(self.scored.capture.prompt_token_ids) // 4 + self.scored.record.tokens


@dataclass(frozen=True, slots=True)
class Measured:
    """The figures of a record. excess: D by question. log_ratio: the mean of log(stable/candidate) on the tokens, nats.
    more: the number of tokens that the candidate has generated."""

    excess: Mapping[str, float]
    log_ratio: float
    generated: int = 0


def questions(expect: str, margin: float, kind_margin: float) -> tuple[Question, ...]:
    """Returns what is asked of the candidate."""
    far = "from the model that serves" if expect == "same" else "from the reference than the model that serves"
    more = "far" if expect == "same" else "farther"
    return (
        Question(STABLE_TOKENS, f"{more} {far}, on the tokens that were served", margin, kind_margin),
        Question(OWN_ANSWERS, f"{more} {far}, on its own answers", margin, kind_margin),
        Question(
            BAD_ANSWERS,
            "worse in its answers: more of them are empty, errors, or end in a repetition",
            BAD_MARGIN,
            max(kind_margin, BAD_MARGIN),
        ),
    )


def failed(own: bool) -> dict[str, float]:
    """Returns D of a record at which the candidate failed. own: see `Work`."""
    return dict.fromkeys((STABLE_TOKENS, OWN_ANSWERS, BAD_ANSWERS) if own else (STABLE_TOKENS,), 1.0)


class Measuring:
    """Measures one record after another.

    expect: same or other. stable: scores at the engine that answered. reference: scores at the reference. longest: the
    largest number of tokens of a prompt and its answer that is scored.
    """

    def __init__(self, expect: str, candidate: Candidate, stable: Score, reference: Score, longest: int) -> None:
        self._same = expect == "same"
        self._candidate = candidate
        self._stable = stable
        self._reference = reference
        self._longest = longest

    async def measure(self, work: Work) -> Measured:
        """Returns what the record shows. Raises CandidateFailed, and ReferenceFailure if another model fails."""
        scored = work.scored
        prompt, record = prompt_ids(scored.capture), scored.record
        k = min(TOP_K, scored.capture.top_k)
        served = Listed(record.compressed.ids[:, :k], record.compressed.logprobs[:, :k], record.compressed_emitted)
        given = await _of_candidate(self._candidate.scores(prompt, record.output_ids, served.ids))
        if self._same:
            again = await self._stable(scored, ScoreRequest(prompt, record.output_ids, served.ids))
            judge, own = served, likeliest(listed_by(again, served.ids), k)
        else:
            known = ~np.isnan(record.reference_at[:, :k]) & (served.ids >= 0)
            at = np.where(known, record.reference_at[:, :k], -np.inf)
            judge, own = Listed(np.where(known, served.ids, -1), at, record.reference_emitted), served
        excess = {STABLE_TOKENS: float(distance_gain(judge, given, own).mean())}
        log_ratio = float(np.clip(record.compressed_emitted - given.emitted, -50.0, 50.0).mean())
        if not work.own:
            return Measured(excess, log_ratio)
        before = float(listed_distance(served, own if self._same else judge).mean())
        answers, generated = await self._own_answer(scored, prompt, before, k)
        return Measured(excess | answers, log_ratio, generated)

    async def _own_answer(
        self, scored: ScoredRecord, prompt: Ids, before: float, k: int
    ) -> tuple[dict[str, float], int]:
        """Returns D of the candidate's own answer, and the number of its tokens. before: the distance of the model that
        serves on its own answer. Nothing follows from an answer that the gate itself has cut off, unless it ends in a
        repetition: such answers of the model that serves are too long to be scored, too."""
        limit, parameters, clients = parameters_of(scored, len(prompt), self._longest, self._candidate.longest)
        answer = await _of_candidate(self._candidate.answer(prompt, limit, parameters))
        loops = repeats(answer.ids)
        if answer.cut and not clients and not loops:
            return {}, len(answer.ids)
        empty = len(answer.ids) <= 1 and not answer.cut
        record = scored.record
        was_empty = record.tokens <= 1 and scored.capture.finish_reason != "length"
        bad = float(empty or loops) - float(was_empty or repeats(record.output_ids))
        if not len(answer.ids):
            return {OWN_ANSWERS: 1.0, BAD_ANSWERS: bad}, 0
        own = await self._own_distance(scored, prompt, answer, k)
        return {OWN_ANSWERS: own - before, BAD_ANSWERS: bad}, len(answer.ids)

    async def _own_distance(self, scored: ScoredRecord, prompt: Ids, answer: Answer, k: int) -> float:
        """Returns the candidate's distance from the judge on its own answer. It is 1 if the judge refuses its tokens,
        after it has scored the served ones: to leave them out would be a selection by the outcome."""
        listed = likeliest(answer.listed, k)
        score = self._stable if self._same else self._reference
        try:
            scores = await score(scored, ScoreRequest(prompt, answer.ids, listed.ids))
        except ReferenceFailure as failure:
            if failure.reason not in REFUSALS:
                raise
            return 1.0
        return float(listed_distance(listed, likeliest(listed_by(scores, listed.ids), k)).mean())


def parameters_of(
    scored: ScoredRecord, prompt: int, longest: int, candidates_longest: int | None
) -> tuple[int, dict[str, Any], bool]:
    """Returns the largest number of tokens of the candidate's answer, the client's own decoding parameters, and True
    if the number is the client's own. A parameter that the client leaves out is left out: so the servers' defaults are
    compared, too."""
    given = msgspec.json.decode(scored.capture.decoding or b"{}", type=dict[str, Any])
    wanted = [value for name in _LIMITS if isinstance(value := given.pop(name, None), int) and value > 0]
    if not wanted and FORMS[scored.capture.route] is Form.COMPLETIONS:
        wanted = [DEFAULT_COMPLETION_TOKENS]
    room = max(min(longest, candidates_longest or longest) - prompt - 1, 1)
    own = min(wanted, default=room + 1)
    parameters = {_RENAMED.get(name, name): value for name, value in given.items()}
    return min(own, room), parameters, own <= room


def repeats(ids: Ids) -> bool:
    """Returns True if an answer ends in a repetition, of its token ids.

    >>> repeats(np.array([5, *[7, 9] * 30], np.int32)), repeats(np.arange(60, dtype=np.int32))
    (True, False)
    """
    # Two characters for each token: a run of one token is a repetition, a run of one character is none.
    return ends_in_loop(
        "".join(f"{chr(256 + token % 40_000)}{chr(50_000 + token // 40_000)}" for token in ids.tolist())
    )


async def _of_candidate(work: Coroutine[Any, Any, Any]) -> Any:
    try:
        return await work
    except ReferenceFailure as failure:
        raise CandidateFailed(failure) from failure
