"""The sets of canaries that are in force, the states of every engine, and what of both outlasts the control process."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace

from hemostat.canaries.engine import (
    STATES_KEY,
    EngineCanaries,
    EngineState,
    EngineStates,
    Reading,
    served,
)
from hemostat.canaries.pace import HOUR_SECONDS, PaceState
from hemostat.canaries.texts import TextReading
from hemostat.engines.registry import EngineRegistry
from hemostat.store.protocol import BlobKey, StoreWrites
from hemostat_calibration import state_codec
from hemostat_calibration.canaries import OLDER_SCHEMAS, SCHEMA, CanarySet
from hemostat_calibration.canary_short import ShortState
from hemostat_calibration.elapsed import TimeBreak

BLOB_KEY = BlobKey("canaries")
"""The key of the sets in the store's blobs."""
MAX_SETS = 33
"""The largest number of sets, for the base model and adapters: beyond it the one that was taken first is forgotten."""


@dataclass(frozen=True, slots=True)
class _Stored:
    sets: Mapping[str, CanarySet] = field(default_factory=dict)
    """The sets by served name, in the order in which they were taken: the base model's is the first."""
    short: CanarySet | None = None
    """The short sequences of the base model."""
    prefix: CanarySet | None = None
    """The sequences of the base model behind a cached prefix."""


class Sets:
    """Owns the sets."""

    def __init__(self, writes: StoreWrites) -> None:
        self._writes = writes
        self._sets: dict[str, CanarySet] = {}
        self.short: CanarySet | None = None
        self.prefix: CanarySet | None = None
        self.taking_short = asyncio.Lock()
        """It is held while the set of short sequences is taken."""

    @property
    def base(self) -> CanarySet | None:
        return next(iter(self._sets.values()), None)

    def of(self, model: str) -> CanarySet | None:
        return self._sets.get(model)

    def put(self, taken: CanarySet) -> None:
        self._sets[taken.origin.model] = taken
        if len(self._sets) > MAX_SETS:
            del self._sets[list(self._sets)[1]]
        self._save()

    def clear(self) -> None:
        self._sets.clear()
        self.short = self.prefix = None
        self._save()

    def put_short(self, taken: CanarySet) -> None:
        self.short = taken
        self._save()

    def put_prefix(self, taken: CanarySet) -> None:
        self.prefix = taken
        self._save()

    def restore(self, stored: bytes) -> None:
        """Takes what an earlier run stored. Raises InvalidArgumentError."""
        read = state_codec.decode(_Stored, stored, SCHEMA, OLDER_SCHEMAS)
        self._sets, self.short, self.prefix = dict(read.sets), read.short, read.prefix

    def _save(self) -> None:
        self._writes.put_blob(BLOB_KEY, state_codec.encode(_Stored(self._sets, self.short, self.prefix), SCHEMA))


def _seen(short: ShortState, time_break: TimeBreak) -> ShortState:
    return replace(short, wholes=tuple(time_break.seen(at) for at in short.wholes))


RECENT_SECONDS = 2 * HOUR_SECONDS
"""The age up to which replays of other engines are compared."""


class CanaryStates:
    """Owns the stored states of engines that were reported, and stores them with the states of the ones that are.

    The canaries of an engine are a part of it. `Schedule` begins them; `Replays` and `Judge` change their readings; all
    store what they changed by `save`. wall: Unix time.
    """

    def __init__(self, engines: EngineRegistry, writes: StoreWrites, wall: Callable[[], float]) -> None:
        self._engines = engines
        self._writes = writes
        self._wall = wall
        self._gone: dict[str, EngineState] = {}
        """The states of engines that are not reported now; each is kept for an hour."""

    @property
    def current(self) -> dict[str, EngineCanaries]:
        """The canaries of the engines that have not left, by name."""
        return self._engines.parts(EngineCanaries)

    def restore(self, stored: bytes) -> None:
        """Takes what an earlier run stored. Raises InvalidArgumentError."""
        self._gone = dict(state_codec.decode(EngineStates, stored, SCHEMA, OLDER_SCHEMAS).engines)

    def save(self) -> None:
        """Stores the states of all engines, and of the ones that were reported within the last hour."""
        since = self._wall() - HOUR_SECONDS
        self._gone = {name: state for name, state in self._gone.items() if state.pace.looked_at > since}
        states = {name: engine.state() for name, engine in self.current.items()}
        self._writes.put_blob(STATES_KEY, state_codec.encode(EngineStates(self._gone | states), SCHEMA))

    def after_break(self, time_break: TimeBreak) -> None:
        """Notes that the clock was set: replays were as long ago as before, so that the budget lasts, and the same
        replays of engines are compared with each other."""
        self._gone = {
            name: replace(state, pace=state.pace.after_break(time_break), short=_seen(state.short, time_break))
            for name, state in self._gone.items()
        }
        for engine in self.current.values():
            engine.short = _seen(engine.short, time_break)
            for reading in (*engine.readings.values(), engine.prefix):
                reading.at = time_break.seen(reading.at)
                reading.lasting = {
                    against: (time_break.seen(at), count) for against, (at, count) in reading.lasting.items()
                }
        if self._gone or self.current:
            self.save()

    def stored_state(self, name: str) -> EngineState:
        """Removes and returns what was stored of an engine that is reported again; nothing is known of a new one."""
        return self._gone.pop(name, EngineState(PaceState(), {}))

    def keep(self, engine: EngineCanaries) -> None:
        """Keeps the state of an engine that has left."""
        self._gone[engine.name] = engine.state()

    def forget(self) -> None:
        """Forgets all readings: the set is replaced."""
        for engine in self.current.values():
            engine.forget()
        self._gone = {
            name: replace(
                state,
                readings={},
                texts=TextReading(),
                short=replace(state.short, since=None, found=None),
                prefix=Reading(),
            )
            for name, state in self._gone.items()
        }
        self.save()

    def alike(self, canaries: EngineCanaries, model: str) -> dict[str, Reading]:
        """Returns by engine the readings of the last hours of all engines that serve the same, this one among them."""
        readings = {}
        for name, other in self.current.items():
            reading = other.readings.get(model)
            if reading is None or reading.values is None or served(other.now) != served(canaries.now):
                continue
            if self._wall() - reading.at < RECENT_SECONDS:
                readings[name] = reading
        return readings

    def replayed(self) -> Iterator[tuple[EngineCanaries, str, Reading]]:
        """Yields the engines with their models and readings, as far as they were replayed."""
        for engine in self.current.values():
            for model, reading in engine.readings.items():
                if reading.found:
                    yield engine, model, reading
