"""What becomes of sampled requests, and why: values of the labels of shadow requests, which both planes count.

Those of one place only are there: `hemostat.openai.requests`, `hemostat.openai.tokens`.
"""

from __future__ import annotations

from enum import StrEnum

from hemostat.ipc import sampled


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


class RelayDropReason(StrEnum):
    """Why a sampled request was dropped in the relay: values of the label `reason` of shadow requests."""

    LINK_FULL = "link_full"
    """The control process takes captures too slowly, or does not run."""
    HOOK_ERROR = "hook_error"
    """The interceptor raised an exception."""


class RepeatReason(StrEnum):
    """Why a request is sent again as the client wrote it: values of the label `reason` of repeated requests."""

    REFUSED = "refused"
    """The upstream's validation refused the request with what was added to it: nothing was computed."""
    TOO_LARGE = "too_large"
    """The upstream refused it as too large."""
    SERVER_ERROR = "server_error"
    """It ended in a server error; the answer may have been generated, and is generated twice."""
    ENCODED = "encoded"
    """The response is compressed in a way that cannot be read; it is generated twice."""


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
    OUTSIDE_SUFFIX = sampled.OUTSIDE_SUFFIX
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
    GRAMMAR_NOT_REPORTED = "grammar_not_reported"
    """The engine's plugin did not say at every position which ids the grammar allows."""
    GRAMMAR_TOO_LARGE = "grammar_too_large"
    """The sets of allowed ids are too large."""
    GRAMMAR_MISMATCH = "grammar_mismatch"
    """An emitted id, or a listed one with a probability, is not allowed; or a listed one without is."""
    GRAMMAR_UNKNOWN = "grammar_unknown"
    """The tokens were restricted, though nothing in the request restricts them."""
    GRAMMAR_NEEDS_FULL_VOCABULARY = "grammar_needs_full_vocabulary"
    """The reference gives only its top ids: its distribution over the allowed ids does not follow from them."""


class ScoringDropReason(StrEnum):
    """Why a capture was not scored, though it could have been at another time."""

    QUEUE_FULL = "queue_full"
    REFERENCE_NOT_READY = "reference_not_ready"
    BREAKER_OPEN = "breaker_open"
    INTERNAL_ERROR = "internal_error"
