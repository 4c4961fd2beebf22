"""Outcomes of sampled requests, and the reasons for them: values of the labels of shadow requests, which both planes
count.

`Unscored` is the table of all reasons: one line each. Types, counts, the relays' rules and the reference follow it.
"""

from __future__ import annotations

from enum import Flag, StrEnum, auto
from typing import Final, Self


class Outcome(StrEnum):
    """The values of the label `outcome` of shadow requests."""

    SHADOWED = "shadowed"
    """It was captured in the relay; one of the other outcomes follows."""
    SCORED = "scored"
    SKIPPED = "skipped"
    """It can never be scored."""
    DROPPED = "dropped"
    """It could not be scored now."""


class CountedBy(Flag):
    """The part of Hemostat that finds a reason and counts it."""

    REQUEST = auto()
    """A relay, by the client's request alone. Such a request gets no profile either, so that the reason is also a value
    of the label `reason` of calibration requests."""
    RELAY = auto()
    """A relay, at any other moment."""
    CONTROL = auto()
    """The control process counts it."""
    PLUGIN = auto()
    """The plugin in vLLM, where it samples requests itself. It also counts some reasons of relays in their place."""


SKIPPED: Final = Outcome.SKIPPED
DROPPED: Final = Outcome.DROPPED
REQUEST: Final = CountedBy.REQUEST
RELAY: Final = CountedBy.RELAY
CONTROL: Final = CountedBy.CONTROL
PLUGIN: Final = CountedBy.PLUGIN


class Unscored(StrEnum):
    """The reason for which a sampled request is not scored: values of the label `reason` of shadow requests.

    Each reason has its outcome, the part that counts it, and its text in the reference. A value that ends in `…` is a
    family: a detail from `InvalidReason` or `FailureReason` takes the place of `…`.
    """

    outcome: Outcome
    counted_by: CountedBy
    meaning: str

    def __new__(cls, value: str, outcome: Outcome, counted_by: CountedBy, meaning: str) -> Self:
        made = str.__new__(cls, value)
        made._value_ = value
        made.outcome, made.counted_by, made.meaning = outcome, counted_by, meaning
        return made

    # fmt: off
    OPTED_OUT = "opted_out", SKIPPED, REQUEST, "the client sent `X-Hemostat-Shadow: off`"
    ON_NOT_ALLOWED = "on_not_allowed", SKIPPED, REQUEST, "the client sent `on`, and `shadow.allow_on` is not set"
    ROUTE = "route", SKIPPED, RELAY, (
        "none of `/v1/chat/completions`, `/v1/completions`, `/v1/responses` and `/v1/messages`"
    )
    ENCODED = "encoded", SKIPPED, REQUEST | RELAY, "the request's or the answer's body is compressed"
    BODY_TOO_LARGE = "body_too_large", SKIPPED, REQUEST, (
        "longer than 512 KiB, up to which a request is parsed, or the relay's memory for requests is nearly "
        "exhausted; it was forwarded unparsed"
    )
    TOO_COMPLEX = "too_complex", SKIPPED, REQUEST, (
        "has so many values that to parse it would delay other clients; it was forwarded unparsed"
    )
    BAD_JSON = "bad_json", SKIPPED, REQUEST, "the request is not a JSON object"
    INVALID = "invalid", SKIPPED, REQUEST, "a parameter is invalid; vLLM reports it to the client"
    LORA = "lora", SKIPPED, REQUEST, "the model is an adapter that the reference does not serve under the same name"
    NO_REFERENCE = "no_reference", SKIPPED, REQUEST | CONTROL, (
        "no reference was matched with the model: see `reference.models`"
    )
    N = "n", SKIPPED, REQUEST, (
        "more than 16 choices; or several with tools, in a stream without usage, where nothing shows lost ids; or "
        "several in an arm, where the engine's plugin does not report by choice which profile it applied"
    )
    BEAM_SEARCH = "beam_search", SKIPPED, REQUEST, "beam search"
    GRAMMAR = "grammar", SKIPPED, REQUEST, (
        "a grammar restricts the tokens (structured output, a forced or strict tool), and the engines' plugin does "
        "not say which ids it allows (there is none, vLLM masks in a way that is not known, or decodes "
        "speculatively), or no reference knows its whole vocabulary; or the request has `guided_…` parameters, which "
        "vLLM 0.32 ignores and older ones enforce"
    )
    ECHO = "echo", SKIPPED, REQUEST, "the prompt would be in the answer"
    CLIENT_LOGPROBS = "client_logprobs", SKIPPED, REQUEST, (
        "the client asks for alternatives of its own, or for a completion's logprobs as texts: these cannot be "
        "restored byte for byte from what Hemostat asks for. Without the engines' plugin such a request is scored "
        "from the ids of its tokens, unless `shadow.floor_fraction` is 0 or a grammar restricts it"
    )
    HIDDEN_REASONING = "hidden_reasoning", SKIPPED, REQUEST, "vLLM hides the reasoning's token ids"
    MULTIMODAL = "multimodal", SKIPPED, REQUEST, "images, audio or embeddings in the prompt"
    NO_TOKEN_IDS = "no_token_ids", SKIPPED, REQUEST | RELAY, (
        "the engine's plugin does not report the tokens, and the response does not name them: that of `/v1/messages` "
        "never does, that of `/v1/responses` does not for gpt-oss, and is not asked to where `shadow.floor_fraction` "
        "is 0, a grammar restricts the tokens, or vLLM keeps responses (`VLLM_ENABLE_RESPONSES_API_STORE`)"
    )
    BACKGROUND = "background", SKIPPED, REQUEST, (
        "the answer of `/v1/responses` is computed in the background and fetched later"
    )
    SERVER_STATE = "server_state", SKIPPED, REQUEST, (
        "the conversation's beginning is in vLLM's memory (`previous_response_id`)"
    )
    NO_ANSWER = "no_answer", SKIPPED, CONTROL, (
        "the engine's plugin did not report the answer in time; see `hemostat_engine_answers_total`"
    )
    ANSWER_MISMATCH = "answer_mismatch", SKIPPED, CONTROL, (
        "what the engine's plugin reported is not the whole answer: other choices, or another number of tokens than "
        "vLLM counted; so are all requests for which the server calls its own tools"
    )
    TOO_LONG = "too_long", SKIPPED, REQUEST | RELAY | CONTROL, "longer than `shadow.max_tokens`"
    LOGPROBS_REFUSED = "logprobs_refused", SKIPPED, RELAY, (
        "vLLM refused the additional parameters, or could not answer with them; raise its `--max-logprobs` to "
        "`shadow.top_k`. After three in a row, or three answers in a row that began and ended in an error, sampling "
        "pauses for 30 s or longer; requests that are drawn meanwhile are counted here, too"
    )
    ADAPTER_REFUSED = "adapter_refused", SKIPPED, RELAY, (
        "vLLM does not have the adapter that was asked for, or cannot load it"
    )
    UPSTREAM_ERROR = "upstream_error", SKIPPED, RELAY, (
        "the answer is an error of the server or ends in one, or Hemostat answered with an error because vLLM could "
        "not be reached or a limit was reached"
    )
    REQUEST_REFUSED = "request_refused", SKIPPED, RELAY, (
        "vLLM refuses the client's own request (status 4xx, except 408, 425, 429)"
    )
    INCOMPLETE = "incomplete", SKIPPED, RELAY, "the answer broke off, or the client disconnected"
    EMPTY = "empty", SKIPPED, RELAY | CONTROL, "no token in the answer"
    NO_LOGPROBS = "no_logprobs", SKIPPED, RELAY | CONTROL, (
        "the answer lacks the requested logprobs, or has NaN among them, which vLLM writes as null in a stream"
    )
    TOKEN_COUNT_MISMATCH = "token_count_mismatch", SKIPPED, RELAY, "the number of ids differs from vLLM's token count"
    TOOL_TOKENS_LOST = "tool_tokens_lost", SKIPPED, RELAY, (
        "the tool parser leaves out ids of streamed calls (vllm-project/vllm#27482; 0.32: none)"
    )
    RESPONSE_TOO_LARGE = "response_too_large", SKIPPED, RELAY, "more bytes than may be buffered to remove the logprobs"
    UNREADABLE = "unreadable", SKIPPED, RELAY, "the answer does not have vLLM's format"
    UNKNOWN_MODEL = "unknown_model", SKIPPED, CONTROL, "the answer names a model that the server does not list"
    MIXED_PROFILE = "mixed_profile", SKIPPED, CONTROL, "the profile changed in the middle of the answer"
    APPLIED_UNKNOWN = "applied_unknown", SKIPPED, CONTROL, "the engine has not reported which profile it applied"
    REFERENCE_TOO_LONG = "reference_too_long", SKIPPED, CONTROL, "longer than the reference's context"
    OUTSIDE_SUFFIX = "outside_suffix", SKIPPED, CONTROL, (
        "tokens of a scored request that are before its last `shadow.max_scored_tokens`"
    )
    REFERENCE_NO_ADAPTER = "reference_no_adapter", SKIPPED, CONTROL, "the reference no longer serves the adapter"
    GRAMMAR_NOT_REPORTED = "grammar_not_reported", SKIPPED, CONTROL, (
        "the engine's plugin did not say at every position which ids the grammar allows: it had no room "
        "(`sets_unknown` in `hemostat_engine_events_total`), the engine that answered has none, or its report was "
        "lost"
    )
    GRAMMAR_TOO_LARGE = "grammar_too_large", SKIPPED, CONTROL, (
        "the sets of ids that the grammar allows take more than 32 MiB"
    )
    GRAMMAR_MISMATCH = "grammar_mismatch", SKIPPED, CONTROL, (
        "the response lists another set of ids than the one that vLLM masked by: another vocabulary than the "
        "reference's, or ids that something else excluded"
    )
    GRAMMAR_UNKNOWN = "grammar_unknown", SKIPPED, CONTROL, (
        "vLLM masked ids, though nothing in the request restricts its tokens: it runs with `--tool-strict-level`, or "
        "a tool parser that restricts every call"
    )
    GRAMMAR_NEEDS_FULL_VOCABULARY = "grammar_needs_full_vocabulary", SKIPPED, CONTROL, (
        "the reference gives only its top ids, which say nothing of its distribution over the ids that the grammar "
        "allows"
    )
    INVALID_RECORD = "invalid_…", SKIPPED, CONTROL, (
        "the record failed validation (`ids`, `mass`, …): a bug here or in vLLM, see the log"
    )
    ENGINE_FAILED = "engine_…", DROPPED, CONTROL, (
        "the response named the ids of its tokens only, and the engine that answered could not compute their "
        "log-probabilities again: `down`, `timeout`, `refused`, `too_long`, …, see the log"
    )
    QUEUE_FULL = "queue_full", DROPPED, CONTROL, (
        "more came at once than the queue holds; relays then sample less, unless clients force it"
    )
    PLUGIN_BUSY = "plugin_busy", DROPPED, PLUGIN, (
        "the plugin in vLLM samples requests itself, and records 128 already, has sampled more than 50 a second, or "
        "holds more answers than the control process takes"
    )
    LINK_FULL = "link_full", DROPPED, RELAY, "the control process accepts captures too slowly, or does not run"
    HOOK_ERROR = "hook_error", DROPPED, RELAY, "a bug in the interceptor, see the log; the client was served"
    REFERENCE_NOT_READY = "reference_not_ready", DROPPED, CONTROL, (
        "the reference was not ready when the capture arrived or was to be scored"
    )
    BREAKER_OPEN = "breaker_open", DROPPED, CONTROL, (
        "the reference failed five times in a row; the circuit breaker is open for ten seconds"
    )
    SPOOLED = "spooled", SKIPPED, CONTROL, (
        "it is in the spool, to be scored later; see `spool.score`"
    )
    SPOOL_FULL = "spool_full", DROPPED, CONTROL, (
        "it was to be scored later, and the spool, which is more than half full, did not admit it; see "
        "`spool.max_bytes`"
    )
    SPOOL_FAILED = "spool_failed", DROPPED, CONTROL, (
        "it was to be scored later, and could not be written to `spool.path`, such as to a full disk; writing is tried "
        "again, see the log"
    )
    INTERNAL_ERROR = "internal_error", DROPPED, CONTROL, "a bug, see the log"
    REFERENCE_FAILED = "reference_…", DROPPED, CONTROL, (
        "the reference failed: `down`, `timeout`, `busy`, `refused`, `out_of_memory`, `too_large` (an answer longer "
        "than any to the request, not read to its end), `head` (the output embedding is not that of the server's "
        "model), `revision` (the server runs another model than the one that was checked), …, see the log"
    )
    # fmt: on

    def label(self, detail: str = "") -> str:
        """Returns the label's value.

        >>> Unscored.REFERENCE_FAILED.label("timeout"), Unscored.ECHO.label()
        ('reference_timeout', 'echo')
        """
        return self.value.replace("…", detail)

    @property
    def labels(self) -> tuple[str, str]:
        """The outcome and the reason; a family has none."""
        return self.outcome.value, self.value


UNJUDGED: Final = tuple(reason for reason in Unscored if REQUEST in reason.counted_by)
"""The reasons that are known before a request goes upstream."""


class FailedPart(StrEnum):
    """The part of Hemostat that failed for a request: values of the label `part` of internal errors."""

    CALIBRATION = "calibration"
    """Calibration could neither learn from a scored request nor judge by it."""
    OUTCOME = "outcome"
    """The outcome of a response could not be judged."""
    TRACING = "tracing"
    """A request could not be traced or logged."""


class RepeatReason(StrEnum):
    """The reason for which a request is sent again as the client wrote it: values of the label `reason` of repeated
    requests.
    """

    REFUSED = "refused"
    """The upstream's validation refused the request with what was added to it: nothing was computed."""
    TOO_LARGE = "too_large"
    """The upstream refused it as too large."""
    SERVER_ERROR = "server_error"
    """It ended in a server error; the answer may have been generated, and is generated twice."""
    ENCODED = "encoded"
    """The response is compressed in a way that cannot be read; it is generated twice."""
