"""The numbers of tapped requests, from when the engine sends them until the scorer takes them.

The buffer is not thread-safe: it lives in the control process's event loop. Time is passed in, monotonic seconds.
Requests, positions and bytes are bounded, and what is made of them by the output's length: an engine may name any
position.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import msgspec
import numpy as np
import numpy.typing as npt

from hemostat.engines.messages import MAX_POSITIONS, MAX_VERSIONS_PER_TAP, TapMessage, TapRun
from hemostat.metrics import names
from hemostat.metrics.samples import Sample
from hemostat_calibration.records import Features

MAX_TAPPED_REQUESTS = 4096
"""The largest number of tapped requests whose numbers wait to be taken; the oldest are dropped."""
TAP_SECONDS = 120.0
"""The time after the last run of a request after which its numbers are dropped if they were not used."""
MAX_WAITING_NUMBER_BYTES = 256 << 20
"""The largest size of the numbers that wait to be taken, of all requests; above it the requests that have waited
longest are dropped."""
MAX_WAITING_FEATURE_BYTES = 256 << 20
"""The largest size of the features that wait to be taken, of all requests; further ones are dropped, the other numbers
are kept."""
MAX_REQUEST_FEATURE_BYTES = 256 << 20
"""The largest size of the float32 features of one request; a longer request gets none."""


@dataclass(frozen=True, slots=True)
class TapResult:
    """The numbers of one request.

    applied: the version that the engine applied, None for identity.
    mixed: the engine changed `applied` during the request (it was preempted and admitted again): it cannot be compared.
    log_normalizer: by version, log E_c[e^Δz] in nats by output position, float64 [T]; NaN where it has none. Of the
    first MAX_VERSIONS_PER_TAP versions that the engine named.
    features: the logits at the anchors; None when the engine sent none.
    runs: as they came, which say which ids a grammar allows; a later one replaces an earlier one.
    """

    boot_id: str
    applied: str | None
    mixed: bool
    log_normalizer: Mapping[str, npt.NDArray[np.float64]]
    features: Features | None = None
    runs: Sequence[TapRun] = ()


@dataclass(slots=True)
class _Child:
    """The runs of one request of the engine's."""

    runs: list[TapRun] = field(default_factory=list)
    covered: int = 0
    """One more than the last position, while there is no gap before it."""
    tokens: int = 0

    def update(self, run: TapRun) -> None:
        self.runs.append(run)
        self.tokens += run.tokens
        if run.start <= self.covered:
            self.covered = max(self.covered, run.start + run.tokens)

    def fits(self, output: npt.NDArray[np.int32]) -> bool:
        """Returns True if its ids, as far as they are known, are the ids of the output, int32 [T].

        The numbers at a position depend on the ids before it only, so those are compared; the engine's plugin never
        knows the last id of an output. It may have gone on behind the output, whose end the API server found by a stop
        string.
        """
        for run in self.runs:
            if run.previous_ids is None:
                continue
            known = np.frombuffer(run.previous_ids, "<i4")
            places = np.arange(run.start, run.start + run.tokens) - 1
            given = (known >= 0) & (places >= 0) & (places < len(output))
            if (output[places[given]] != known[given]).any():
                return False
        return True


@dataclass(slots=True)
class _Tap:
    boot_id: str
    received_at: float
    children: dict[int, _Child] = field(default_factory=dict)
    tokens: int = 0
    taken: bool = False


class TapBuffer:
    """Owns the runs of tapped requests."""

    def __init__(self) -> None:
        self._taps: OrderedDict[str, _Tap] = OrderedDict()
        self.runs_dropped = 0
        """The number of runs that were not used in time, or that there was no room for."""
        self._number_bytes = 0
        self._feature_bytes = 0

    def update(self, message: TapMessage, now: float) -> None:
        """Keeps the numbers of a message until they are taken."""
        self.expire(now)
        for run in message.taps:
            tap = self._taps.get(run.nonce)
            if tap is None:
                tap = self._taps[run.nonce] = _Tap(message.boot_id, now)
            if tap.tokens + run.tokens > MAX_POSITIONS:
                self.runs_dropped += 1
                continue
            tap.tokens += run.tokens
            tap.received_at = now
            size = len(run.features or b"")
            if self._feature_bytes + size > MAX_WAITING_FEATURE_BYTES:
                run, size = msgspec.structs.replace(run, anchors=None, features=None), 0  # noqa: PLW2901
            self._feature_bytes += size
            self._number_bytes += run.size
            tap.children.setdefault(run.child, _Child()).update(run)
            self._taps.move_to_end(run.nonce)
        while len(self._taps) > MAX_TAPPED_REQUESTS or self._number_bytes > MAX_WAITING_NUMBER_BYTES:
            self._pop(next(iter(self._taps)))
            self.runs_dropped += 1

    def covered(self, nonce: str, output_ids: bytes | None = None) -> int:
        """Returns how many output positions have numbers, counted from the first without a gap.

        output_ids: see `take`.
        """
        tap = self._taps.get(nonce)
        result = None if tap is None else _find(tap, output_ids)
        return 0 if tap is None or result is None else tap.children[result].covered

    def take(self, nonce: str, tokens: int, output_ids: bytes | None = None) -> TapResult | None:
        """Returns the numbers of the first `tokens` output positions of one choice, and removes all of the choice's
        numbers; None if there are none.

        output_ids: the choice's ids, little-endian int32 [T], by which it is found among the choices of a request with
        several; of two with the same ids it is the first that was not taken, since their numbers are the same. None if
        the request has one choice.
        """
        tap = self._taps.get(nonce)
        result = None if tap is None else _find(tap, output_ids)
        if tap is None or result is None:
            return None
        child = tap.children.pop(result)
        self._removed(child)
        tap.tokens -= child.tokens
        tap.taken = True
        if not tap.children or output_ids is None:
            self._pop(nonce)
        length = min(tokens, max(run.start + run.tokens for run in child.runs))
        by_version: dict[str, npt.NDArray[np.float64]] = {}
        for run in child.runs:
            # A later run replaces an earlier one: a position is sent again after a rejected draft token, or in chunks.
            for version, values in run.versions.items():
                if version not in by_version:
                    if len(by_version) >= MAX_VERSIONS_PER_TAP:
                        continue
                    by_version[version] = np.full(length, np.nan)
                _put(by_version[version], run.start, np.frombuffer(values, "<f8"))
        applied = {run.applied for run in child.runs}
        features = _features(child.runs, length)
        return TapResult(tap.boot_id, child.runs[-1].applied, len(applied) > 1, by_version, features, child.runs)

    def expire(self, now: float) -> None:
        """Drops what was not taken within TAP_SECONDS."""
        while self._taps:
            nonce, tap = next(iter(self._taps.items()))
            if now - tap.received_at <= TAP_SECONDS:
                break
            self._pop(nonce)
            if not tap.taken:  # else what remains is of choices that are not scored
                self.runs_dropped += 1

    def samples(self) -> Iterator[Sample]:
        yield Sample(names.ENGINE_TAPS_DROPPED, (), self.runs_dropped)

    def _pop(self, nonce: str) -> _Tap | None:
        tap = self._taps.pop(nonce, None)
        for child in tap.children.values() if tap else ():
            self._removed(child)
        return tap

    def _removed(self, child: _Child) -> None:
        self._number_bytes -= sum(run.size for run in child.runs)
        self._feature_bytes -= sum(len(run.features or b"") for run in child.runs)


def _find(tap: _Tap, output_ids: bytes | None) -> int | None:
    """Returns the child that an output belongs to; see `TapBuffer.take`."""
    if output_ids is None:
        return min(tap.children, default=None)
    output = np.frombuffer(output_ids, "<i4")
    fitting = [number for number, child in tap.children.items() if child.fits(output)]

    def rank(number: int) -> tuple[bool, int, int]:
        # Of an answer that this output begins with too few positions are covered, of a longer one more than needed.
        covered = tap.children[number].covered
        return covered < len(output), abs(covered - len(output)), number

    return min(fitting, key=rank, default=None)


def _features(runs: list[TapRun], length: int) -> Features | None:
    """Returns the features at the anchors that were read last (they change with the versions held); a later run
    replaces an earlier one.
    """
    anchors = next((run.anchors for run in reversed(runs) if run.anchors is not None), None)
    matrices = [(run, matrix) for run in runs if run.anchors == anchors and (matrix := run.matrix()) is not None]
    if anchors is None or not matrices:
        return None
    count = matrices[-1][1].shape[1]
    if 4 * length * count > MAX_REQUEST_FEATURE_BYTES:
        return None
    values = np.full((length, count), np.nan, dtype=np.float32)
    for run, matrix in matrices:
        if matrix.shape[1] == count:
            _put(values, run.start, matrix)
    return Features(anchors, values)


def _put(into: npt.NDArray[Any], start: int, values: npt.NDArray[Any]) -> None:
    """Sets the rows from `start` on, as far as `into` has them."""
    target = into[start : start + len(values)]
    target[:] = values[: len(target)]
