"""What the engines' plugins send: reports (JSON) and taps (msgpack), checked when they are decoded."""

from __future__ import annotations

from typing import Annotated, TypeVar

import msgspec
import numpy as np
import numpy.typing as npt

MAX_VERSIONS_PER_TAP = 16
MAX_POSITIONS = 1 << 18
"""Output positions of one tapped request."""

Name = Annotated[str, msgspec.Meta(min_length=1, max_length=64, pattern=r"^[A-Za-z0-9_-]+$")]
Version = Annotated[str, msgspec.Meta(pattern=r"^[0-9a-f]{32}$")]
Text = Annotated[str, msgspec.Meta(max_length=64)]
Count = Annotated[int, msgspec.Meta(ge=0)]

T = TypeVar("T")


class LoraState(msgspec.Struct, frozen=True):
    """What a rank's engine can do with adapters.

    slots: --max-loras. max_rank: --max-lora-rank. grouped: the CPU's operations are Hemostat's, which leave rows
    without an adapter untouched. loaded: all adapters in slots, the clients' own included. was_full: all slots were in
    use at some time since the engine's start.
    """

    slots: Annotated[int, msgspec.Meta(ge=1)]
    max_rank: Annotated[int, msgspec.Meta(ge=1)]
    grouped: bool
    loaded: Count
    was_full: bool


class EngineReport(msgspec.Struct, frozen=True):
    """One rank's report; the plugin sends one about every second."""

    boot_id: Name
    rank: Annotated[int, msgspec.Meta(ge=0, lt=1024)]
    world_size: Annotated[int, msgspec.Meta(ge=1, le=1024)]
    versions: Annotated[list[Version], msgspec.Meta(max_length=64)]
    vocab_size: Annotated[int, msgspec.Meta(ge=1)]
    counters: Annotated[dict[Text, Count], msgspec.Meta(max_length=64)]
    runner: Text
    """v1 | v2: the model runner of vLLM."""
    vllm: Text
    adapters: Annotated[list[Version], msgspec.Meta(max_length=64)] = []
    """Adapters of Hemostat's that this rank's engine has loaded."""
    lora: LoraState | None = None
    """None: the engine was started without --enable-lora, or the general plugin is not enabled."""


class TapRun(msgspec.Struct, frozen=True):
    """Consecutive output positions of one tapped request.

    versions: by profile version, log E_c[e^Δz] in nats for each of `tokens` positions from `start` on; None where the
    engine has no value.
    features: little-endian float16 [tokens, N], the centred logits at the N ids whose digest is `anchors`, a row of NaN
    where the engine has none. Either both fields are set or neither.
    """

    nonce: Name
    start: Annotated[int, msgspec.Meta(ge=0, lt=MAX_POSITIONS)]
    tokens: Annotated[int, msgspec.Meta(ge=1, le=MAX_POSITIONS)]
    versions: Annotated[dict[Version, list[float | None]], msgspec.Meta(max_length=MAX_VERSIONS_PER_TAP)]
    applied: Version | None
    anchors: Version | None = None
    features: bytes | None = None

    def matrix(self) -> npt.NDArray[np.float16] | None:
        """The features, [tokens, N]."""
        if self.features is None:
            return None
        return np.frombuffer(self.features, "<f2").astype(np.float16, copy=False).reshape(self.tokens, -1)


class TapMessage(msgspec.Struct, frozen=True):
    boot_id: Name
    taps: list[TapRun]


class InvalidEngineMessage(ValueError):
    """A message that the engine plugin does not send; the text names the field."""


_report_decoder = msgspec.json.Decoder(EngineReport)
_tap_decoder = msgspec.msgpack.Decoder(TapMessage)


def decode_report(body: bytes) -> EngineReport:
    """JSON to a report; InvalidEngineMessage names the invalid field."""
    report = _decode(_report_decoder, body)
    if report.rank >= report.world_size:
        raise InvalidEngineMessage(f"rank is {report.rank}: it must be below world_size, {report.world_size}")
    return report


def decode_tap(body: bytes) -> TapMessage:
    """msgpack to a tap message; InvalidEngineMessage names the invalid field."""
    message = _decode(_tap_decoder, body)
    for run in message.taps:
        if run.start + run.tokens > MAX_POSITIONS:
            raise InvalidEngineMessage(f"tap of {run.nonce} goes beyond position {MAX_POSITIONS}")
        for version, values in run.versions.items():
            if len(values) != run.tokens:
                raise InvalidEngineMessage(
                    f"tap of {run.nonce} has {len(values)} values for {version}, but tokens is {run.tokens}"
                )
        if (run.anchors is None) != (run.features is None):
            raise InvalidEngineMessage(f"tap of {run.nonce} has only one of anchors and features")
        if run.features is not None and (not run.features or len(run.features) % (2 * run.tokens)):
            raise InvalidEngineMessage(
                f"tap of {run.nonce} has {len(run.features)} bytes of features: not {run.tokens} rows of float16"
            )
    return message


def _decode(decoder: msgspec.json.Decoder[T] | msgspec.msgpack.Decoder[T], body: bytes) -> T:
    try:
        return decoder.decode(body)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise InvalidEngineMessage(str(error)) from None
