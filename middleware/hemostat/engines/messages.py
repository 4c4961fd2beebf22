"""The messages of the engines' plugins: reports (JSON), taps and answers (msgpack), checked when they are decoded."""

from __future__ import annotations

from typing import Annotated, Any, TypeVar

import msgspec
import numpy as np
import numpy.typing as npt

from hemostat.ipc.messages import MAX_TOP
from hemostat_calibration.passive import PassiveCounts, PassiveRequest

MAX_VERSIONS_PER_TAP = 16
MAX_RUNS = 1 << 16
"""The largest number of runs in a tap message."""
RUN_BYTES, RUN_VERSION_BYTES = 512, 192
"""The memory that a run takes in addition to its numbers, about, and the memory that each of its versions takes."""
MAX_POSITIONS = 1 << 18
"""The largest number of output positions of one tapped request."""
FREE, UNKNOWN = -1, -2
"""The values in `TapRun.set_rows` in place of a set."""

EVENTS = frozenset(
    {
        *("requests_bound", "requests_unknown", "requests_declined", "requests_refused"),
        *("rows_applied", "rows_clamped", "rows_kl_clamped", "rows_masked", "steps_misfit"),
        *("features_dropped", "sets_unknown", "taps_sent", "taps_dropped"),
        *("profiles_refused", "profiles_failed", "profiles_missing", "fetch_errors", "report_errors", "agent_errors"),
        *("adapters_loaded", "adapters_failed", "adapters_evicted"),
    }
)
"""The events that the plugin counts, explained in deploy/metrics.py. Other names in a report come from another version
of the plugin."""

MAX_TENSORS = 1 << 16
MAX_CHILDREN = 1 << 14
"""The largest number of choices of one tapped request; vLLM's own limit."""

Name = Annotated[str, msgspec.Meta(min_length=1, max_length=64, pattern=r"^[A-Za-z0-9_-]+\Z")]
Version = Annotated[str, msgspec.Meta(pattern=r"^[0-9a-f]{32}\Z")]
Text = Annotated[str, msgspec.Meta(max_length=64)]
Fingerprint = Annotated[str, msgspec.Meta(max_length=64, pattern=r"^[A-Za-z0-9_.:-]*\Z")]
"""A fingerprint of weights, which is stored and logged."""
Count = Annotated[int, msgspec.Meta(ge=0, le=10**12)]
"""A counter's value. Its limit is more than an engine counts in years, and far below where a metric's float64 no longer
shows an increment.
"""

PluginVersion = Annotated[str, msgspec.Meta(max_length=64, pattern=r"^([0-9A-Za-z][0-9A-Za-z.+!_-]*)?\Z")]
"""A version of the plugin, which is a metric's label."""

T = TypeVar("T")


class LoraState(msgspec.Struct, frozen=True):
    """The abilities of a rank's engine to serve adapters.

    slots: the engine's --max-loras. max_rank: its --max-lora-rank. grouped: True if the CPU's operations are
    Hemostat's, which leave rows without an adapter untouched. loaded: the number of adapters in slots, the clients' own
    included. was_full: True if all slots were in use at some time since the engine's start.
    """

    slots: Annotated[int, msgspec.Meta(ge=1)]
    max_rank: Annotated[int, msgspec.Meta(ge=1)]
    grouped: bool
    loaded: Count
    was_full: bool


class RankReport(msgspec.Struct, frozen=True):
    """One rank's report; the plugin sends one about every second."""

    boot_id: Name
    rank: Annotated[int, msgspec.Meta(ge=0, lt=1024)]
    world_size: Annotated[int, msgspec.Meta(ge=1, le=1024)]
    versions: Annotated[list[Version], msgspec.Meta(max_length=64)]
    vocab_size: Annotated[int, msgspec.Meta(ge=1)]
    counters: Annotated[dict[Text, Count], msgspec.Meta(max_length=64)]
    runner: Text
    """The model runner of vLLM: v1 or v2."""
    vllm: Text
    adapters: Annotated[list[Version], msgspec.Meta(max_length=64)] = []
    """The adapters of Hemostat's that this rank's engine has loaded."""
    lora: LoraState | None = None
    """The engine's abilities to serve adapters; None if it was started without --enable-lora, or if the general plugin
    is not enabled.
    """
    answers: bool = False
    """It is True if the plugin hands out answers (`TapAnswer`)."""
    sets: bool = False
    """It is True if taps say which ids a grammar allows (`TapRun.set_rows`)."""
    model: Annotated[str, msgspec.Meta(max_length=256)] = ""
    """The first served name of the model that `weights` is of."""
    weights: Fingerprint = ""
    """The fingerprint of the weights that the engine has loaded (`hemostat_engine.weights`); "" if it is not known, and
    of an older plugin."""
    plugin: PluginVersion = ""
    """The version of the plugin; "" of an older plugin, which does not say it."""


class TapRun(msgspec.Struct, frozen=True):
    """Consecutive output positions of one tapped request.

    versions: by profile version, log E_c[e^Δz] in nats for each of `tokens` positions from `start` on: little-endian
    float64 [tokens], NaN where the engine has no value.
    features: little-endian float16 [tokens, N], the centred logits at the N ids whose digest is `anchors`, a row of NaN
    where the engine has none. Either both fields are set or neither.
    child: of the requests with the same nonce, which vLLM makes of one with several choices; in the order in which the
    engine admitted them.
    previous_ids: little-endian int32 [tokens], the id at the position before each, -1 where it is not known; None: of
    an older plugin.
    set_rows: little-endian int32 [tokens], which of the run's sets of ids is allowed at each position, FREE where every
    id is, UNKNOWN where that is not known; empty: nothing restricts any of them. sets: uint32 [sets, ceil(V / 32)],
    compressed with zlib; see `hemostat_calibration.allowed_sets`.
    """

    nonce: Name
    start: Annotated[int, msgspec.Meta(ge=0, lt=MAX_POSITIONS)]
    tokens: Annotated[int, msgspec.Meta(ge=1, le=MAX_POSITIONS)]
    versions: Annotated[dict[Version, bytes], msgspec.Meta(max_length=MAX_VERSIONS_PER_TAP)]
    applied: Version | None
    anchors: Version | None = None
    features: bytes | None = None
    child: Annotated[int, msgspec.Meta(ge=0, lt=MAX_CHILDREN)] = 0
    previous_ids: bytes | None = None
    set_rows: bytes = b""
    sets: bytes = b""

    @property
    def size(self) -> int:
        """The number of bytes that it takes without its features, about."""
        numbers = len(self.previous_ids or b"") + sum(map(len, self.versions.values()))
        numbers += len(self.set_rows) + len(self.sets)
        return RUN_BYTES + RUN_VERSION_BYTES * len(self.versions) + numbers

    def matrix(self) -> npt.NDArray[np.float16] | None:
        """Returns the features, [tokens, N]."""
        if self.features is None:
            return None
        return np.frombuffer(self.features, "<f2").astype(np.float16, copy=False).reshape(self.tokens, -1)


class TapMessage(msgspec.Struct, frozen=True):
    boot_id: Name
    taps: Annotated[list[TapRun], msgspec.Meta(max_length=MAX_RUNS)]


class TapAnswer(msgspec.Struct, frozen=True):
    """One whole choice of a request that asked for it (`hemostat_tap_top`), with T output positions.

    Arrays are little-endian bytes in the layout of `hemostat.ipc.messages.Capture`: candidates [T, top_k + 1], most
    likely first, padded with -1 and -inf, the emitted id among them; log-probabilities in nats, as vLLM takes them
    (`--logprobs-mode`, by default of the unmodified logits after a grammar's mask).
    call: number of this generation among those for the same nonce. choices: of this generation.
    """

    nonce: Name
    call: Annotated[int, msgspec.Meta(ge=0, lt=MAX_CHILDREN)]
    choice: Annotated[int, msgspec.Meta(ge=0, lt=MAX_CHILDREN)]
    choices: Annotated[int, msgspec.Meta(ge=1, le=MAX_CHILDREN)]
    prompt_ids: bytes
    """The ids of the prompt, int32 [P]."""
    token_ids: bytes
    """The emitted ids, int32 [T]."""
    top_k: Annotated[int, msgspec.Meta(ge=0, le=MAX_TOP)]
    candidate_ids: bytes
    """The ids of the candidates, int32 [T, top_k + 1]."""
    candidate_logprobs: bytes
    """The log-probabilities of the candidates, float32 [T, top_k + 1]."""
    emitted_logprobs: bytes
    """The log-probabilities of the emitted ids, float32 [T]."""
    finish_reason: Text
    request: PassiveRequest | None = None
    """The request, if the plugin has sampled it itself; None if a relay has."""

    @property
    def tokens(self) -> int:
        return len(self.token_ids) // 4

    @property
    def size(self) -> int:
        """The number of bytes."""
        return len(self.prompt_ids) + (4 + 2 * self.top_k) * len(self.token_ids)


class ChecksumMessage(msgspec.Struct, frozen=True):
    """The checksums of the weights in an engine's memory, for the request with this nonce. digests: by tensor, in the
    order of the model; empty if there are none, as `detail` says. facts: what kernels and layouts depend on."""

    nonce: Name
    digests: Annotated[
        dict[Annotated[str, msgspec.Meta(max_length=512)], Fingerprint], msgspec.Meta(max_length=MAX_TENSORS)
    ]
    facts: Annotated[dict[Text, Annotated[str, msgspec.Meta(max_length=256)]], msgspec.Meta(max_length=32)]
    seconds: Annotated[float, msgspec.Meta(ge=0.0)] = 0.0
    """The time that it took."""
    detail: Annotated[str, msgspec.Meta(max_length=256)] = ""


class AnswerMessage(msgspec.Struct, frozen=True):
    """A message of answers. dropped: the number of answers that the API server's process had no room for, or could not
    send, since its start.
    """

    boot_id: Name
    answers: Annotated[list[TapAnswer], msgspec.Meta(max_length=4096)]
    dropped: Count
    passive: PassiveCounts | None = None
    """The counts of what the plugin samples itself; None of an older plugin."""
    checksums: ChecksumMessage | None = None


class Trace(msgspec.Struct, frozen=True):
    """The engines that have answered requests with a nonce: the answer of POST /api/v1/engines/trace.

    engines: the ones that report, by boot id: their names, "" where that is not known. answered: the boot id of the
    engine that has answered, by nonce; a nonce whose engine is not known (yet) is missing. requests: signed
    `vllm_xargs` of further requests, by nonce.
    """

    engines: dict[str, str] = {}
    answered: dict[str, str] = {}
    requests: dict[str, dict[str, Any]] = {}


class InvalidEngineMessage(ValueError):
    """A message that the engine plugin does not send; the text names the field."""


_report_decoder = msgspec.json.Decoder(RankReport)
_answer_decoder = msgspec.msgpack.Decoder(AnswerMessage)
_tap_decoder = msgspec.msgpack.Decoder(TapMessage)


def decode_report(body: bytes) -> RankReport:
    """Returns a report, decoded from JSON. Raises InvalidEngineMessage, which names the invalid field."""
    report = _decode(_report_decoder, body)
    if report.rank >= report.world_size:
        raise InvalidEngineMessage(f"rank is {report.rank}: it must be below world_size, {report.world_size}")
    return report


def decode_tap(body: bytes) -> TapMessage:
    """Returns a tap message, decoded from msgpack. Raises InvalidEngineMessage, which names the invalid field."""
    message = _decode(_tap_decoder, body)
    for run in message.taps:
        if run.start + run.tokens > MAX_POSITIONS:
            raise InvalidEngineMessage(f"tap of {run.nonce} goes beyond position {MAX_POSITIONS}")
        for version, values in run.versions.items():
            if len(values) != 8 * run.tokens:
                raise InvalidEngineMessage(
                    f"tap of {run.nonce} has {len(values)} bytes of values for {version}: not {run.tokens} of float64"
                )
        if (run.anchors is None) != (run.features is None):
            raise InvalidEngineMessage(f"tap of {run.nonce} has only one of anchors and features")
        if run.features is not None and (not run.features or len(run.features) % (2 * run.tokens)):
            raise InvalidEngineMessage(
                f"tap of {run.nonce} has {len(run.features)} bytes of features: not {run.tokens} rows of float16"
            )
        if run.previous_ids is not None and len(run.previous_ids) != 4 * run.tokens:
            raise InvalidEngineMessage(
                f"tap of {run.nonce} has {len(run.previous_ids)} bytes of previous_ids: not {run.tokens} of int32"
            )
        if len(run.set_rows) not in {0, 4 * run.tokens}:
            raise InvalidEngineMessage(
                f"tap of {run.nonce} has {len(run.set_rows)} bytes of set_rows: not {run.tokens} of int32"
            )
    return message


def decode_answers(body: bytes) -> AnswerMessage:
    """Returns a message of answers, decoded from msgpack. Raises InvalidEngineMessage, which names the invalid
    field."""
    message = _decode(_answer_decoder, body)
    for answer in message.answers:
        size = len(answer.token_ids)
        expected = {
            "prompt_ids": len(answer.prompt_ids) // 4 * 4,
            "token_ids": size // 4 * 4,
            "candidate_ids": size * (answer.top_k + 1),
            "candidate_logprobs": size * (answer.top_k + 1),
            "emitted_logprobs": size,
        }
        for name, length in expected.items():
            if len(getattr(answer, name)) != length:
                raise InvalidEngineMessage(
                    f"answer of {answer.nonce} has {len(getattr(answer, name))} bytes of {name}: not {length}"
                )
        if answer.choice >= answer.choices:
            raise InvalidEngineMessage(f"answer of {answer.nonce}: choice {answer.choice} of {answer.choices}")
    return message


def _decode(decoder: msgspec.json.Decoder[T] | msgspec.msgpack.Decoder[T], body: bytes) -> T:
    try:
        return decoder.decode(body)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise InvalidEngineMessage(str(error)) from None
