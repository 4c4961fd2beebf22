"""What becomes of sampled requests: how their captures end, and why.

The reasons for which a sampled request never becomes a capture are given in the relays (`hemostat.shadow.reports`,
`hemostat.openai.requests`, `hemostat.openai.tokens`); they are values of the same metric's label.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from enum import StrEnum

from hemostat.ipc.messages import Capture
from hemostat.measurement import coverage
from hemostat.metrics import names
from hemostat.metrics.samples import Sample
from hemostat.reference.protocol import ReferenceFailure
from hemostat_calibration.errors import InvalidRecordError


class Outcome(StrEnum):
    """Values of the label `outcome` of shadow requests."""

    SHADOWED = "shadowed"
    """Captured in the relay; one of the other outcomes follows."""
    SCORED = "scored"
    SKIPPED = "skipped"
    """It can never be scored."""
    DROPPED = "dropped"
    """It could not be scored now."""


class SkipReason(StrEnum):
    """Why a sampled request is skipped in the relay, or not sampled, and gets no profile.

    `Unscorable` and `ResponseFailure` are the other reasons. What the request itself shows is also a value of the label
    `reason` of calibration requests.
    """

    OPTED_OUT = "opted_out"
    """The client sent `X-Hemostat-Shadow: off`."""
    ON_NOT_ALLOWED = "on_not_allowed"
    """The client sent `X-Hemostat-Shadow: on`, and `shadow.allow_on` is not set."""
    ROUTE = "route"
    """Requests of this route cannot be scored."""
    BODY_TOO_LARGE = "body_too_large"
    """The request's body is too large to be read; it was passed on unread."""
    TOO_COMPLEX = "too_complex"
    """The request's body has too many values to be read; it was passed on unread."""
    BAD_JSON = "bad_json"
    """The request's body is not a JSON object."""


class ScoringSkipReason(StrEnum):
    """Why a capture can never be scored."""

    UNKNOWN_MODEL = "unknown_model"
    """The answer names a model that the server does not list."""
    NO_REFERENCE = "no_reference"
    """The served model, or the adapter's base model, has no matched reference."""
    NO_LOGPROBS = "no_logprobs"
    """The response's log-probabilities are malformed, or are not of its token ids."""
    MIXED_PROFILE = "mixed_profile"
    """The profile changed in the middle of the answer."""
    APPLIED_UNKNOWN = "applied_unknown"
    """The engine has not reported which profile it applied."""
    REFERENCE_TOO_LONG = "reference_too_long"
    """Longer than the reference's context."""
    OUTSIDE_SUFFIX = coverage.OUTSIDE_SUFFIX
    """Of tokens only: the others of this output were scored."""
    REFERENCE_NO_ADAPTER = "reference_no_adapter"
    """The reference does not serve the LoRA adapter any more."""
    NO_ANSWER = "no_answer"
    """vLLM's API server has not handed out the answer in time, where the response has no token ids."""
    ANSWER_MISMATCH = "answer_mismatch"
    """What it handed out is not the whole answer: other choices, or another number of tokens."""
    ANSWER_TOO_LONG = "too_long"
    """More tokens than `shadow.max_tokens`, of a response without token ids."""
    EMPTY_ANSWER = "empty"
    """The answer has no token, or its prompt has none."""


class ScoringDropReason(StrEnum):
    """Why a capture was not scored, though it could have been at another time."""

    QUEUE_FULL = "queue_full"
    REFERENCE_NOT_READY = "reference_not_ready"
    BREAKER_OPEN = "breaker_open"
    INTERNAL_ERROR = "internal_error"


def invalid_record(error: InvalidRecordError) -> str:
    """Reason of a skip: the record failed a check of its form."""
    return f"invalid_{error.reason}"


def reference_failed(failure: ReferenceFailure) -> str:
    """Reason of a drop."""
    return f"reference_{failure.reason}"


class EndingCounts:
    """Counts by outcome and reason, since the start. on_ending: is told of every capture that ends."""

    def __init__(self, on_ending: Callable[[Capture, str, str, int], None] | None = None) -> None:
        self._counts: Counter[tuple[Outcome, str]] = Counter()
        self._on_ending = on_ending

    def count(self, outcome: Outcome, reason: str = "", capture: Capture | None = None, left_out: int = 0) -> None:
        """left_out: of a scored capture, output tokens that were not scored."""
        self._counts[outcome, str(reason)] += 1
        if capture is not None and self._on_ending is not None:
            self._on_ending(capture, outcome.value, str(reason), left_out)

    @property
    def scored(self) -> int:
        return self._counts[Outcome.SCORED, ""]

    def by_reason(self, outcome: Outcome) -> dict[str, int]:
        return {reason: count for (which, reason), count in self._counts.items() if which == outcome}

    def samples(self) -> Iterator[Sample]:
        for labels, count in self._counts.items():
            yield Sample(names.SHADOW_REQUESTS, labels, count)
