"""What the engines say: which profiles every rank holds, their counters, and the numbers of tapped requests.

Pure but for the time, which is passed in. Invariants:
- A version is acknowledged only while every rank of every live engine has lately said that it holds it.
- An engine is one boot id; a restart is a new one, and the old one counts until it has been silent long enough, so that
  a rolling restart never acknowledges too much.
- Everything is bounded: engines, ranks, versions, counters, tapped requests and positions.
"""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Annotated, TypeVar

import msgspec
import numpy as np
import numpy.typing as npt

from hemostat.metrics import names
from hemostat.metrics.samples import Sample
from hemostat_calibration.records import Features

EXPIRES_AFTER = 15.0
"""Seconds of silence after which a rank, and with it its engine, is gone."""
ENGINES_AT_MOST = 256
HOLD_AT_MOST = 8
"""Versions that an engine is asked to hold (the plugin holds as many)."""
TAPS_AT_MOST = 4096
"""Tapped requests whose numbers wait to be taken."""
TAP_EXPIRES_AFTER = 120.0
TAP_VERSIONS_AT_MOST = 16
POSITIONS_AT_MOST = 1 << 18
FEATURE_BYTES_AT_MOST = 256 << 20
"""Features that wait to be taken, of all requests; what comes on top goes without."""
FEATURE_BYTES_TAKEN = 256 << 20
"""Float32 features of one request; a longer one goes without."""

Name = Annotated[str, msgspec.Meta(min_length=1, max_length=64, pattern=r"^[A-Za-z0-9_-]+$")]
Version = Annotated[str, msgspec.Meta(pattern=r"^[0-9a-f]{32}$")]
Text = Annotated[str, msgspec.Meta(max_length=64)]
Count = Annotated[int, msgspec.Meta(ge=0)]


T = TypeVar("T")


class EngineReport(msgspec.Struct, frozen=True):
    """One rank's report; sent about once a second."""

    boot_id: Name
    rank: Annotated[int, msgspec.Meta(ge=0, lt=1024)]
    world_size: Annotated[int, msgspec.Meta(ge=1, le=1024)]
    versions: Annotated[list[Version], msgspec.Meta(max_length=64)]
    vocab_size: Annotated[int, msgspec.Meta(ge=1)]
    counters: Annotated[dict[Text, Count], msgspec.Meta(max_length=64)]
    runner: Text
    """v1 | v2: which of vLLM's model runners runs."""
    vllm: Text


class TapRun(msgspec.Struct, frozen=True):
    """Consecutive output positions of one tapped request.

    versions: by profile version, log E_c[e^Δz] in nats for each of `tokens` positions from `start` on; None where the
    engine had no number.
    features: little-endian float16 [tokens, N], the centred logits at the N ids whose digest is `anchors`, a row of NaN
    where the engine had none; both or neither.
    """

    nonce: Name
    start: Annotated[int, msgspec.Meta(ge=0, lt=POSITIONS_AT_MOST)]
    tokens: Annotated[int, msgspec.Meta(ge=1, le=POSITIONS_AT_MOST)]
    versions: Annotated[dict[Version, list[float | None]], msgspec.Meta(max_length=TAP_VERSIONS_AT_MOST)]
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
    """A message is not what the engine plugin sends; the text names the field."""


_report_decoder = msgspec.json.Decoder(EngineReport)
_tap_decoder = msgspec.msgpack.Decoder(TapMessage)


def decode_report(body: bytes) -> EngineReport:
    """JSON to a report; InvalidEngineMessage naming what is wrong."""
    report = _decode(_report_decoder, body)
    if report.rank >= report.world_size:
        raise InvalidEngineMessage(f"rank is {report.rank}: it must be below world_size, {report.world_size}")
    return report


def decode_tap(body: bytes) -> TapMessage:
    """msgpack to a tap message; InvalidEngineMessage naming what is wrong."""
    message = _decode(_tap_decoder, body)
    for run in message.taps:
        if run.start + run.tokens > POSITIONS_AT_MOST:
            raise InvalidEngineMessage(f"tap of {run.nonce} goes beyond position {POSITIONS_AT_MOST}")
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


@dataclass(frozen=True, slots=True)
class TapResult:
    """What the engine said about one request.

    applied: the version that it applied, None for identity.
    mixed: the engine changed `applied` on the way (a request that was set aside and admitted again): compare nothing.
    log_normalizer: by version, log E_c[e^Δz] in nats by output position, float64 [T]; NaN where it gave none.
    features: the logits at the anchors, as it read them; None when it handed out none.
    """

    boot_id: str
    applied: str | None
    mixed: bool
    log_normalizer: Mapping[str, npt.NDArray[np.float64]]
    features: Features | None = None


@dataclass(slots=True)
class _Rank:
    report: EngineReport
    heard_at: float


@dataclass(slots=True)
class _Tap:
    boot_id: str
    heard_at: float
    runs: list[TapRun] = field(default_factory=list)
    reaches: int = 0
    """One more than the last position, while there is no gap before it."""

    def feature_bytes(self) -> int:
        return sum(len(run.features or b"") for run in self.runs)


class EngineRegistry:
    """Not thread-safe: it lives in the control process's event loop."""

    def __init__(self) -> None:
        self._engines: OrderedDict[str, dict[int, _Rank]] = OrderedDict()
        self._taps: OrderedDict[str, _Tap] = OrderedDict()
        self._hold: tuple[str, ...] = ()
        self.leads, self.replica = True, ""
        """Of several replicas: whether this one decides, and what the nonces of its requests begin with."""
        self._gone: Counter[str] = Counter()
        self.taps_dropped = 0
        """Runs of tapped requests that nobody took in time, or that there was no room for."""
        self.features_dropped = 0
        """Runs whose features there was no room for."""
        self._feature_bytes = 0

    def want(self, versions: Iterable[str]) -> None:
        """What every engine is to hold, most important first: the serving profile, then candidates."""
        self._hold = tuple(dict.fromkeys(versions))[:HOLD_AT_MOST]

    def report(self, report: EngineReport, now: float) -> list[str]:
        """Take a rank's report; what it is to hold."""
        self._expire(now)
        ranks = self._engines.setdefault(report.boot_id, {})
        if any(rank.report.world_size != report.world_size for rank in ranks.values()):
            raise InvalidEngineMessage(f"world_size is {report.world_size}: other ranks of this engine say otherwise")
        ranks[report.rank] = _Rank(report, now)
        while len(self._engines) > ENGINES_AT_MOST:
            self._forget(next(iter(self._engines)))
        return list(self._hold)

    def acknowledged(self, now: float) -> frozenset[str]:
        """Versions that every rank of every live engine holds; empty while any rank is missing or silent."""
        self._expire(now)
        held: frozenset[str] | None = None
        for ranks in self._engines.values():
            size = next(iter(ranks.values())).report.world_size
            if len(ranks) < size or any(now - rank.heard_at > EXPIRES_AFTER for rank in ranks.values()):
                return frozenset()
            for rank in ranks.values():
                versions = frozenset(rank.report.versions)
                held = versions if held is None else held & versions
        return held or frozenset()

    def live(self, now: float) -> list[EngineReport]:
        """The last report of every live rank."""
        self._expire(now)
        return [rank.report for ranks in self._engines.values() for rank in ranks.values()]

    def counters(self, now: float) -> dict[str, int]:
        """The engines' counters added up, over engines that have gone too: they never go down.

        The ranks of one engine see the same requests, so the rank that counted most speaks for all.
        """
        self._expire(now)
        total = Counter(self._gone)
        for ranks in self._engines.values():
            total.update(_counted(ranks))
        return dict(total)

    def engines(self, now: float) -> int:
        """How many are live."""
        return len({report.boot_id for report in self.live(now)})

    def samples(self, now: float) -> Iterator[Sample]:
        yield Sample(names.ENGINES, (), self.engines(now))
        yield Sample(names.ENGINE_TAPS_DROPPED, (), self.taps_dropped)
        yield Sample(names.ENGINE_FEATURES_DROPPED, (), self.features_dropped)
        for event, count in self.counters(now).items():
            yield Sample(names.ENGINE_EVENTS, (event,), count)

    def tap(self, message: TapMessage, now: float) -> None:
        """Keep the numbers until they are taken, expire, or have to make room."""
        self._expire(now)
        for run in message.taps:
            tap = self._taps.get(run.nonce)
            if tap is None:
                tap = self._taps[run.nonce] = _Tap(message.boot_id, now)
            if sum(kept.tokens for kept in tap.runs) + run.tokens > POSITIONS_AT_MOST:
                self.taps_dropped += 1
                continue
            tap.heard_at = now
            size = len(run.features or b"")
            if self._feature_bytes + size > FEATURE_BYTES_AT_MOST:
                self.features_dropped += 1
                run, size = msgspec.structs.replace(run, anchors=None, features=None), 0  # noqa: PLW2901
            self._feature_bytes += size
            tap.runs.append(run)
            if run.start <= tap.reaches:
                tap.reaches = max(tap.reaches, run.start + run.tokens)
            self._taps.move_to_end(run.nonce)
        while len(self._taps) > TAPS_AT_MOST:
            self._pop(next(iter(self._taps)))
            self.taps_dropped += 1

    def tapped(self, nonce: str) -> int:
        """How many output positions, from the first on, the engine has spoken about."""
        tap = self._taps.get(nonce)
        return tap.reaches if tap else 0

    def take(self, nonce: str) -> TapResult | None:
        """Everything said about the request, once; None when nothing was."""
        tap = self._pop(nonce)
        if tap is None or not tap.runs:
            return None
        length = max(run.start + run.tokens for run in tap.runs)
        found: dict[str, npt.NDArray[np.float64]] = {}
        for run in tap.runs:
            # Later runs win: a position is said again when a draft token was rejected or a prompt came in pieces.
            for version, values in run.versions.items():
                if version not in found:
                    found[version] = np.full(length, np.nan)
                numbers = np.array([np.nan if v is None else v for v in values], dtype=np.float64)
                found[version][run.start : run.start + run.tokens] = numbers
        applied = {run.applied for run in tap.runs}
        return TapResult(tap.boot_id, tap.runs[-1].applied, len(applied) > 1, found, _features(tap.runs, length))

    def _pop(self, nonce: str) -> _Tap | None:
        tap = self._taps.pop(nonce, None)
        if tap is not None:
            self._feature_bytes -= tap.feature_bytes()
        return tap

    def _expire(self, now: float) -> None:
        for boot_id, ranks in list(self._engines.items()):
            # One rank that is silent alone keeps its engine here, and incomplete: nothing is acknowledged.
            if all(now - rank.heard_at > EXPIRES_AFTER for rank in ranks.values()):
                self._forget(boot_id)
        while self._taps:
            nonce, tap = next(iter(self._taps.items()))
            if now - tap.heard_at <= TAP_EXPIRES_AFTER:
                break
            self._pop(nonce)
            self.taps_dropped += 1

    def _forget(self, boot_id: str) -> None:
        self._gone.update(_counted(self._engines.pop(boot_id)))


def _features(runs: list[TapRun], length: int) -> Features | None:
    """What the runs say of the anchors that were read last (they change when what is held does); later runs win."""
    anchors = next((run.anchors for run in reversed(runs) if run.anchors is not None), None)
    matrices = [(run, matrix) for run in runs if run.anchors == anchors and (matrix := run.matrix()) is not None]
    if anchors is None or not matrices:
        return None
    count = matrices[-1][1].shape[1]
    if 4 * length * count > FEATURE_BYTES_TAKEN:
        return None
    values = np.full((length, count), np.nan, dtype=np.float32)
    for run, matrix in matrices:
        if matrix.shape[1] == count:
            values[run.start : run.start + run.tokens] = matrix
    return Features(anchors, values)


def _counted(ranks: Mapping[int, _Rank]) -> Counter[str]:
    most: Counter[str] = Counter()
    for rank in ranks.values():
        most |= Counter(rank.report.counters)
    return most
