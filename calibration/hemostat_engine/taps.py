"""Passes what is known of tapped rows (log E_c[e^Δz], features, allowed ids) from the engine's thread to the agent's.

The queue is bounded; when it is full, steps are dropped and counted.
"""

from __future__ import annotations

import zlib
from array import array
from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from hemostat_calibration.arrays import little_endian
from hemostat_engine.library import Counters
from hemostat_engine.masks import FREE

MAX_STEPS = 2048
"""The largest number of decoding steps in the queue."""
MAX_BYTES = 64 << 20
"""The largest size of features and masks in the queue; above it steps are queued without them."""
MAX_RUNS_PER_MESSAGE = 1 << 14
"""The step that reaches it is still sent; the admin port accepts four times as many."""
UNKNOWN_NATS = 1e6
"""A value of this size and above, infinite or NaN is none."""


@dataclass(frozen=True, slots=True)
class TappedRow:
    """One tapped row of a step.

    row: its index in the step's reading. position: the position of the token in the output; None if only the device
    knows it. child: the number of the request among the ones with the same nonce. previous: the id at the position
    before; -1: not known. mask: see `Masks.index`.
    """

    row: int
    nonce: str
    applied: str | None
    position: int | None = None
    child: int = 0
    previous: int = -1
    mask: int = FREE


@dataclass(frozen=True, slots=True)
class SlotTap:
    """A tapped request of model runner V2, whose rows and positions only the device knows."""

    nonce: str
    applied: str | None
    prompt_len: int
    child: int = 0
    mask: int = FREE


@dataclass(frozen=True, slots=True)
class Reading:
    """The values of R rows of one decoding step, on the host; the copies to it may not be complete.

    versions: the P profiles that were evaluated. values: log E_c[e^Δz], float32 [P, R] in nats. clamped: whether the
    clamp binds somewhere in the row, bool [P, R].
    anchors: digest of the ids of `features`, float16 [R, N], centred logits; None without features (N is 0).
    places: slots, positions in the whole sequence of the token that the model was fed, and its id (-1: not known), int
    [R] each; None when the host knows whose rows these are.
    copied: the device's event after the copies, None when they are complete.
    """

    versions: tuple[str, ...]
    values: torch.Tensor
    clamped: torch.Tensor
    anchors: str | None
    features: torch.Tensor
    places: tuple[torch.Tensor, torch.Tensor, torch.Tensor] | None = None
    copied: Any = None


@dataclass(frozen=True, slots=True)
class Step:
    """A reading and its requests: `rows` when the host knows them, else `slots` by slot. masks: int32 [M, words]; None:
    none."""

    reading: Reading
    rows: Sequence[TappedRow] = ()
    slots: Mapping[int, SlotTap] = field(default_factory=dict)
    masks: npt.NDArray[np.int32] | None = None

    @property
    def nbytes(self) -> int:
        return int(self.reading.features.nbytes) + (0 if self.masks is None else self.masks.nbytes)

    def resolved(self) -> Iterable[tuple[TappedRow, int]]:
        """Yields every tapped row with its position in the output. Waits for the copies."""
        if self.reading.copied is not None:
            self.reading.copied.synchronize()
        if self.reading.places is None:
            return [(row, row.position) for row in self.rows if row.position is not None]
        result = []
        places = zip(*(values.tolist() for values in self.reading.places), strict=True)
        for row, (slot, pos, fed) in enumerate(places):
            tap = self.slots.get(slot)
            if tap is not None and (position := pos + 1 - tap.prompt_len) >= 0:
                previous = fed if position else -1
                result.append((TappedRow(row, tap.nonce, tap.applied, None, tap.child, previous, tap.mask), position))
        return result


@dataclass(slots=True)
class _Run:
    """Consecutive positions of one request with the same versions, applied profile and anchors."""

    nonce: str
    child: int
    start: int
    versions: tuple[str, ...]
    applied: str | None
    anchors: str | None
    values: list[npt.NDArray[np.float64]] = field(default_factory=list)
    """The values of each token, by version."""
    features: list[bytes] = field(default_factory=list)
    previous: array[int] = field(default_factory=lambda: array("i"))
    set_rows: array[int] = field(default_factory=lambda: array("i"))
    """The place in `sets` of each token's set, FREE or UNKNOWN."""
    sets: dict[bytes, int] = field(default_factory=dict)

    def add_set(self, mask: int, masks: npt.NDArray[np.int32] | None) -> int:
        """Returns the bytes that this set takes in addition to the others."""
        if mask < 0 or masks is None or (masks[mask] == -1).all():
            self.set_rows.append(min(mask, FREE))
            return 0
        words: bytes = masks[mask].astype("<i4", copy=False).tobytes()
        is_new = words not in self.sets
        self.set_rows.append(self.sets.setdefault(words, len(self.sets)))
        return len(words) if is_new else 0

    def continued_by(self, row: TappedRow, position: int, reading: Reading) -> bool:
        return (position, row.applied, reading.versions, reading.anchors) == (
            self.start + len(self.values),
            self.applied,
            self.versions,
            self.anchors,
        )

    def message(self) -> dict[str, Any]:
        numbers = np.array(self.values, "<f8").T
        body = {
            "nonce": self.nonce,
            "start": self.start,
            "tokens": len(self.values),
            "versions": {version: numbers[i].tobytes() for i, version in enumerate(self.versions)},
            "applied": self.applied,
            "child": self.child,
            "previous_ids": little_endian(self.previous),
        }
        if any(place != FREE for place in self.set_rows):
            sets = zlib.compress(b"".join(self.sets), 1) if self.sets else b""
            body |= {"set_rows": little_endian(self.set_rows), "sets": sets}
        return body if self.anchors is None else body | {"anchors": self.anchors, "features": b"".join(self.features)}


class Taps:
    """A bounded queue of steps. `push` (the engine's thread) never waits for the device; `drain` (the agent's) may."""

    def __init__(self, counters: Counters, max_steps: int = MAX_STEPS, max_bytes: int = MAX_BYTES):
        self._steps: deque[Step] = deque()
        self._max_steps = max_steps
        self._max_bytes = max_bytes
        # Each is written by one thread only, so no lock is needed.
        self._bytes_pushed = 0
        self._bytes_drained = 0
        self._counters = counters

    def __len__(self) -> int:
        return len(self._steps)

    def has_room(self, size: int) -> bool:
        """Returns True if `size` more bytes of features or masks may be pushed."""
        return self._bytes_pushed - self._bytes_drained + size <= self._max_bytes

    def push(self, step: Step) -> None:
        if len(self._steps) >= self._max_steps:
            self._counters.add("taps_dropped", len(step.rows) or len(step.slots))
            return
        self._bytes_pushed += step.nbytes
        self._steps.append(step)

    def drain(self, max_steps: int, max_bytes: int) -> list[dict[str, Any]]:
        """Returns the oldest steps, up to `max_steps` of them, `max_bytes` of features and distinct masks or
        MAX_RUNS_PER_MESSAGE, as runs of consecutive positions:
        `{"nonce", "start", "tokens", "versions": {version: nats}, "applied", "child", "previous_ids"}` (little-endian
        float64 [tokens], NaN where unknown; int32, the id before each position, -1: not known), and with features
        `{"anchors", "features"}`: little-endian float16 [tokens, N], a row of NaN where something is not finite; where
        something restricts a token, `{"sets", "set_rows"}`: int32 [sets, ceil(V / 32)] by zlib, the distinct masks, and
        int32 [tokens], which of them applies at each position, FREE or UNKNOWN."""
        runs: list[_Run] = []
        open_runs: dict[tuple[str, int], _Run] = {}
        clamped = drained = 0
        for _ in range(min(max_steps, len(self._steps))):
            if drained >= max_bytes or len(runs) >= MAX_RUNS_PER_MESSAGE:
                break
            step = self._steps.popleft()
            reading = step.reading
            resolved = step.resolved()
            drained += reading.features.nbytes
            self._bytes_drained += step.nbytes
            values, binds = reading.values.T.double().numpy(), reading.clamped.T.tolist()
            values[~(np.abs(values) < UNKNOWN_NATS)] = np.nan
            features = reading.features.numpy()
            features[~np.isfinite(features).all(axis=-1)] = np.nan
            for row, position in resolved:
                run = open_runs.get((row.nonce, row.child))
                if run is None or not run.continued_by(row, position, reading):
                    run = _Run(row.nonce, row.child, position, reading.versions, row.applied, reading.anchors)
                    open_runs[row.nonce, row.child] = run
                    runs.append(run)
                run.values.append(values[row.row])
                run.previous.append(row.previous)
                drained += run.add_set(row.mask, step.masks)
                run.features.append(features[row.row].astype("<f2", copy=False).tobytes())
                if row.applied in reading.versions:
                    clamped += binds[row.row][reading.versions.index(row.applied)]
        if clamped:
            self._counters.add("rows_clamped", clamped)
        return [run.message() for run in runs]
