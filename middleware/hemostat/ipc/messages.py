"""Messages between relays and the control process: captures and counters, and the policy back.

Each frame (`framing`) holds one msgpack-encoded message. The relay's first one is `Hello`; the control process answers
with `Refused` and closes, or with `Alive` or a `Policy`.
"""

from __future__ import annotations

import msgspec

from hemostat.ipc.framing import FrameReader, MessageCodec, frame
from hemostat.openai.kinds import is_conditional

PROTOCOL = 2
"""The version of the messages that both ends understand. It is raised if an older version could not read these, or
would misread them; a new field with a default value is ignored by it.
"""
MAX_MESSAGE_BYTES = 64 * 1024 * 1024
MAX_TOP = 128
"""The largest number of candidates at each position of an answer of the engine's plugin, in addition to the emitted
one.
"""
ID_BYTES = 4
"""The size of a token id in arrays of them: little-endian int32."""
MAX_HELLO_BYTES = 64 * 1024
"""The largest size of the first frame, which comes before the token is known."""
ALIVE_SECONDS = 2.0
"""The longest pause between two messages of the control process."""
REST_KIND = "rest"
"""The kind of all requests whose own kind is too rare to be followed by itself, and that no grammar restricts."""
REST_GRAMMAR_KIND = "rest grammar"
"""The kind of all requests whose own kind is too rare to be followed by itself, and that a grammar restricts: their
figures are conditional. No profile serves them.
"""


def rest_of(kind: str) -> str:
    """Returns the kind that a request belongs to whose own is not followed.

    >>> rest_of("chat text greedy"), rest_of("chat grammar greedy")
    ('rest', 'rest grammar')
    """
    return REST_GRAMMAR_KIND if is_conditional(kind) else REST_KIND


class Hello(msgspec.Struct, tag="hello", frozen=True):
    """A relay's first message. The first message of every protocol has the field `protocol`, so that any two versions
    can say which ones they speak.
    """

    protocol: int = 0
    token: str = ""
    """The relay token; not needed on a Unix socket."""
    process: str = ""
    """The name of the process among all relays, however often it connects."""
    pid: int = 0
    worker: int = 0
    compiled: bool = False
    """It is True if the relay's hot path is compiled."""
    upstreams: list[str] = []
    """The engines that it was given, as in `upstream.urls`."""


class Refused(msgspec.Struct, tag="refused", frozen=True):
    """The control process does not take the relay; it closes the connection."""

    why: str
    """The reason, in one line."""
    fault: bool = True
    """It is True if the configuration has to be corrected. Otherwise the relay finds another control process, or this
    one later.
    """


NOT_ACTIVE = Refused("not active", fault=False)
"""The refusal by a control process that is not the active one: another one is, or none is yet."""


class Alive(msgspec.Struct, tag="alive", frozen=True):
    """The control process is there, and its last policy is in force."""


class Capture(msgspec.Struct, tag="capture", frozen=True):
    """One choice of the complete response to a sampled request, to be scored. Arrays are little-endian bytes.

    `interception.intercepted_exchange` makes it, `scoring` reads it: at first it may have its candidates as JSON, or
    none of its tokens, and after `scoring.stages.CandidateCompletion` it has all of them as arrays.
    """

    request_id: str
    route: str
    model: str
    label: str
    arm: str
    requested: str | None
    """The profile version that the engine was asked to apply; None for identity."""
    nonce: str
    """The name that Hemostat gave the request among the engine's taps; "" without a tap."""
    stream: bool
    prompt_token_ids: bytes
    """The ids of the prompt, int32 [P]."""
    output_token_ids: bytes
    """The ids of the output, int32 [T]."""
    top_k: int
    candidate_ids: bytes
    """The ids of the candidates, int32 [T, top_k + 1], -1 pads; the emitted token is among them. With `logprobs` it is
    empty, as the next two are.
    """
    candidate_logprobs: bytes
    """The log-probabilities of the candidates, float32 [T, top_k + 1], nats, -inf pads."""
    emitted_logprobs: bytes
    """The log-probabilities of the emitted tokens, float32 [T], nats."""
    temperature: float
    """The temperature of the request; NaN if the sampling parameters are not known."""
    top_p: float
    sampling_top_k: int
    min_p: float
    finish_reason: str
    captured_at: float
    """The time when it came to the control process, by its monotonic clock; without meaning before."""
    traceparent: str = ""
    """The W3C trace context that went upstream with the request; "" if it is not traced."""
    kind: str = ""
    """The full name of the request's kind of traffic, fixed before it went upstream."""
    conversation: bytes = b""
    """A salted digest of 16 bytes, equal for every turn of one conversation; of the prompt where there is none."""
    client: bytes = b""
    """A salted digest of 8 bytes of the header that names the client; empty without the header."""
    adapter: str | None = None
    """The version of the adapter that the response says answered it: the log-probabilities are the adapted
    model's."""
    choice: int = 0
    """The number of this choice in the request."""
    choices: int = 1
    """The number of choices of the request; each is a capture of its own, and they share request_id, nonce and
    conversation.
    """
    tools: bool = False
    """It is True if tools were offered."""
    reasoning: bool = False
    """It is True if vLLM's parser found reasoning in the answer."""
    from_tap: bool = False
    """It is True if the response has no token ids: the tokens of all choices are what the engine's plugin reported
    under `nonce`. Only the first choice's capture is sent.
    """
    also_in_response: bool = False
    """It is True, for a capture with `from_tap`, if the response could have had the tokens, too, had it been asked for
    them.
    """
    engine: str = ""
    """The engine that answered (`EngineHealth.engine`)."""
    engine_drawn: bool = False
    """It is True if the relay drew the engine at random, whatever the request is."""
    generated: int = -1
    """The number of tokens of all choices together, by the response's usage; -1: it does not say."""
    logprobs: list[bytes] = []
    """The JSON of the response's `logprobs`, in pieces, as it came: it is parsed where the capture is scored. Empty
    where the candidates are here as arrays."""
    grammar: bool = False
    """It is True if a grammar restricted the tokens: then the log-probabilities are conditional on what it allows."""
    ids_only: bool = False
    """It is True if the response named ids only, and `top_k` is 0: the candidates are what the engine computes again,
    by prefill.
    """
    decoding: bytes = b""
    """The client's own decoding parameters, a JSON object (`requests.DECODING_KEYS`); empty if they are too long."""


class OutcomeReport(msgspec.Struct, frozen=True, array_like=True):
    """The outcome of what a client got in one arm of a comparison; see `hooks.Comparison`. Its size does not depend on
    the outcome.
    """

    kind: str
    version: str
    treated: bool
    conversation: bytes
    client: bytes
    bad: dict[str, bool]
    """It says if the answer is bad, by outcome that applies to the request
    (`hemostat_calibration.outcomes.Outcome`).
    """
    output_tokens: int | None
    drawn: float = 0.0
    """The number that belongs to the conversation (`hooks.Comparison.drawn`)."""


class OutcomeReports(msgspec.Struct, tag="outcomes", frozen=True):
    """The outcomes since the last such message of answers in an arm, for the conversations that are drawn."""

    reports: list[OutcomeReport]


class SampledCount(msgspec.Struct, frozen=True, array_like=True):
    """The count of sampled requests of one kind that ended in a relay, in one way."""

    kind: str
    """The full name; "" if the request's body was not read."""
    outcome: str
    """The outcome: skipped or dropped."""
    reason: str
    requests: float
    """A request of n choices of which one ended in this way counts 1/n."""
    unknown: float
    """The number of these requests whose generated tokens are not known."""
    tokens: int
    """The number of generated tokens of the other requests."""


class SampledCounts(msgspec.Struct, tag="sampled", frozen=True):
    """The counts since the last such message. Captures are not in it: the control process counts how they end."""

    counts: list[SampledCount]


class EngineHealth(msgspec.Struct, frozen=True, array_like=True):
    """The state of one engine as one relay knows it now, and what the relay has counted there since its start."""

    engine: str
    """The address, host:port."""
    state: str
    """The state: up, ejected or returning."""
    drained: bool
    outstanding: int
    """The number of requests in progress, with the ones that wait for a connection."""
    requests: int
    resent: int
    """The number of requests that were sent again, to another engine or to this one."""
    ejections: int


class Stats(msgspec.Struct, tag="stats", frozen=True):
    """The cumulative figures of one relay process since it started.

    counters: metric name -> label values, in the metric's order -> count.
    overhead_buckets: requests in each bucket of `OVERHEAD_BUCKETS` (not cumulative), and one more for those above.
    """

    counters: dict[str, dict[tuple[str, ...], float]]
    overhead_buckets: list[int]
    overhead_sum: float
    ready: bool
    engines: list[EngineHealth] = []


class Policy(msgspec.Struct, tag="policy", frozen=True):
    """The settings that every relay applies from now on."""

    generation: int
    mode: str
    """The mode: off, observe or auto."""
    shadow_rate: float
    shadow_allow_on: bool
    shadow_top_k: int
    shadow_max_tokens: int
    """The longest prompt + output that is scored."""
    scoring: bool
    """If it is False, nothing is sampled (no reference, vocabulary mismatch)."""
    tap: bool
    """If it is True, shadowed requests carry `hemostat_tap` (an engine plugin has reported)."""
    control_fraction: float
    acknowledged: frozenset[str]
    """The versions that every rank of every engine holds: what requests may ask for where there is one upstream
    address."""
    labels: frozenset[str]
    body_limit: int = 512 * 1024
    unscorable_models: frozenset[str] = frozenset()
    """The served names (LoRA adapters) that the reference cannot score with: neither scored nor calibrated."""
    nonce_prefix: str = ""
    """The beginning of the values of `hemostat_tap`: if several middlewares share an engine, each gets its own."""
    kinds: frozenset[str] = frozenset()
    """The kinds of traffic that are followed by themselves; requests of every other kind belong to `REST_KIND`."""
    serving_by_kind: dict[str, str] = {}
    """The version that the treated requests of a kind ask for, by kind; identity if the kind is absent."""
    salt: bytes = b""
    """The secret of the store: with it conversations and clients are hashed, and arms assigned."""
    client_header: str = "authorization"
    """The lower-case name of the header that names the client."""
    treat_unjudged: bool = False
    """It is True if requests that cannot be scored may get a profile too."""
    scorable_models: frozenset[str] | None = None
    """The served names whose records are compared with a matched reference; None: not known yet, nothing is
    excluded."""
    calibrated_models: frozenset[str] | None = None
    """The served names of the model that profiles are for, and of its adapters; None: not known yet, none is
    excluded."""
    adapters: frozenset[str] = frozenset()
    """The versions of the family `adapter`, which are asked for as the request's `model`."""
    base_models: frozenset[str] | None = None
    """The served names of the model that profiles are for, without its adapters; None: not known yet. A request for any
    other model, such as a client's own adapter, never gets an adapter of Hemostat's."""
    answered_name: str = ""
    """The name that the server answers as `model` whichever of `base_models` is asked for."""
    adapter_names: bool = False
    """It is True if adapters that are named by a profile's version are Hemostat's own: hidden from the list of models,
    and a request that names one is in no arm."""
    tap_tokens: bool = False
    """It is True if every engine's plugin reports token ids and the most likely tokens, by choice, where
    `hemostat_tap_top` asks.
    """
    prefer_plugin: bool = False
    """It is True, with `tap_tokens`, if the plugin is asked for the tokens of a request also where its response could
    contain them.
    """
    default_model: str = ""
    """The served name that answers a request without one; "" while it is not known."""
    scored_again: frozenset[str] = frozenset()
    """The forms (`openai.routes.Form`) whose responses are asked for ids only if they cannot be asked for logprobs: the
    engine computes these again.
    """
    grammars: bool = False
    """It is True if requests whose tokens a grammar restricts can be scored: every engine's plugin says which ids it
    allows."""
    drained: frozenset[str] = frozenset()
    """The engines (`EngineHealth.engine`) that get no new requests."""
    openai_sampling_defaults: bool = False
    """It is True if OpenAI's default holds for what a request leaves out of temperature, top_p, top_k, min_p and
    repetition_penalty.
    """
    outcome_fraction: float = 1.0
    """The part of the conversations in an arm whose outcomes are reported."""
    held_by_engine: dict[str, frozenset[str]] | None = None
    """The versions that requests to each engine may ask for, by `EngineHealth.engine`; an absent engine has none. It is
    None if there is one upstream address: then `acknowledged` holds.
    """

    secret: str = ""
    """The secret with which the relay signs the keys of `vllm_xargs` that make the engine's plugin act. It is empty if
    the control process is an older one: then the keys are not signed. It is never logged."""

    def held_at(self, engine: str) -> frozenset[str]:
        """Returns the versions that a request to this engine may ask for."""
        if self.held_by_engine is None:
            return self.acknowledged
        return self.held_by_engine.get(engine, frozenset())


OVERHEAD_BUCKETS = (0.00005, 0.0001, 0.00025, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1)
"""The edges of the buckets for the time that the relay itself adds to a request, in seconds."""

Message = Hello | Refused | Alive | Capture | OutcomeReports | SampledCounts | Stats | Policy

CODEC: MessageCodec[Message] = MessageCodec(Message)


def encode(message: Message) -> bytes:
    """Returns the message as one frame."""
    return frame(CODEC.encode(message))


class MessageReader:
    """Turns the bytes of a stream, in pieces of any size, into messages."""

    def __init__(self) -> None:
        self._frames = FrameReader(MAX_MESSAGE_BYTES)

    @property
    def missing(self) -> int:
        """The number of missing bytes of the message that has begun, as far as its length is known."""
        return self._frames.missing

    def feed(self, data: bytes) -> list[Message]:
        """Returns the messages that are complete with these bytes. Raises ValueError on a frame longer than
        MAX_MESSAGE_BYTES, and msgspec.DecodeError on a frame that is not a message.
        """
        return [CODEC.decode(body) for body in self._frames.feed(data)]
