"""The state that a restart needs: the keys and formats in the store, and their writes."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field

from hemostat.ipc.messages import REST_KIND
from hemostat.profiles.begun_tests import TESTS_BEGUN_KEY, WINDOWS_BEGUN_KEY
from hemostat.profiles.candidates import Candidate, read_source, stored_source
from hemostat.profiles.followed_kinds import FollowedKinds
from hemostat.profiles.serving import KindState, ServingState
from hemostat.profiles.trials import Trials
from hemostat.store.protocol import StateKey, StoredProfile, StoreWrites
from hemostat.store.states import read_state, write_state
from hemostat_calibration.elapsed import TimeBreak
from hemostat_calibration.errors import InvalidArgumentError
from hemostat_calibration.statistics.kind_table import KindTable

log = logging.getLogger("hemostat.calibration")

MODES = frozenset({"off", "observe", "auto"})

SERVING_KEY = StateKey("kinds")
"""The key of `StoredServing`, which has at most about 100 kB."""
TESTS_KEY = StateKey("tests")
"""The guard's tests and windows, `Guard.save`: usually some 100 kB, at most 4 MB."""
MODE_KEY = StateKey("mode")
"""The key of the configured mode and the one in force."""
PROPOSED_KEY = StateKey("proposed")
"""The key of the number of tokens that the last proposal of each family was learned from."""
SCHEMA = 1
"""The schema of what serves, of the mode and of what was proposed."""
STATE_KEYS = (SERVING_KEY, TESTS_KEY, TESTS_BEGUN_KEY, WINDOWS_BEGUN_KEY, MODE_KEY, PROPOSED_KEY)
"""The keys of profiles in the store's state."""
SAVE_SECONDS = 60.0
"""The time between two writes of tests that go on; what decides is written at once."""


@dataclass(frozen=True, slots=True)
class StoredKind:
    """A `KindState` as it is stored, with the number of the window in which its version was watched."""

    version: str | None
    window: int
    chosen: bool
    pinned: bool
    held: str
    units: int
    tried: list[str]
    watch: int


@dataclass(frozen=True, slots=True)
class StoredServing:
    """The state of serving as it is stored.

    table: `KindTable.save`. kinds: by name. queue: version, scope and source of each candidate; the scope is the part
    of the traffic that an earlier version learned it from, "" if that was all. former: `ServingState.former`, the
    versions that were tried and why the kind was held. proposals: the number of the proposal of each candidate in the
    queue; it is empty in what earlier versions have stored.
    """

    table: str = ""
    kinds: Mapping[str, StoredKind] = field(default_factory=dict)
    queue: list[tuple[str, str, str]] = field(default_factory=list)
    former: Mapping[str, tuple[list[str], str]] = field(default_factory=dict)
    proposals: list[int] = field(default_factory=list)

    def versions(self) -> set[str]:
        """Profiles that serve, and those in the queue."""
        return {kind.version for kind in self.kinds.values() if kind.version is not None} | {
            v for v, _, _ in self.queue
        }

    def kind_table(self, limit: int) -> KindTable:
        """Returns the table of kinds. If it is damaged, it has the kinds that were followed, which count from 0."""
        try:
            return KindTable.load(self.table.encode(), limit) if self.table else KindTable(limit)
        except InvalidArgumentError as error:
            log.error("the stored table of kinds cannot be read: %s", error)
            followed = tuple(name for name in self.kinds if name != REST_KIND)[:limit]
            return KindTable(limit, dict.fromkeys(followed, (0.0, 0.0)), followed)


@dataclass(frozen=True, slots=True)
class StoredMode:
    """The mode in force as it is stored, with the configured one of that time."""

    configured: str
    mode: str


@dataclass(frozen=True, slots=True)
class StoredProposed:
    """The number of tokens by family that the last proposals were learned from, as it is stored."""

    tokens: Mapping[str, int]


def stored_serving(states: Mapping[StateKey, str | None], report: Callable[[str], None]) -> StoredServing:
    """Returns what served; nothing serves if nothing is stored. report: see `read_state`."""
    return read_state(states, SERVING_KEY, StoredServing, SCHEMA, report) or StoredServing()


def stored_mode(states: Mapping[StateKey, str | None], configured: str) -> str | None:
    """Returns the mode that was set at run time; None if there is none, or the configured one has changed since."""
    stored = read_state(states, MODE_KEY, StoredMode, SCHEMA, log.error)
    return stored.mode if stored is not None and stored.configured == configured and stored.mode in MODES else None


def stored_proposed(states: Mapping[StateKey, str | None]) -> dict[str, int]:
    """Returns the number of tokens that the last proposal of each family was learned from. What cannot be read counts
    as nothing, since the next proposals are only made sooner then."""
    stored = read_state(states, PROPOSED_KEY, StoredProposed, SCHEMA, log.error)
    return {} if stored is None else dict(stored.tokens)


def whole_number(text: str | None) -> int:
    """Returns the number that a text is; 0 if it is none."""
    return int(text) if text and text.isdecimal() else 0


class StateWriter:
    """Writes to the store what `restoring` reads. configured_mode: `calibration.mode`. wall: Unix time, seconds."""

    def __init__(
        self,
        writes: StoreWrites,
        configured_mode: str,
        wall: Callable[[], float],
        *,
        serving: ServingState,
        kinds: FollowedKinds,
        trials: Trials,
    ) -> None:
        self._writes = writes
        self.configured_mode = configured_mode
        self._wall = wall
        self._serving = serving
        self._kinds = kinds
        self._trials = trials
        self._saved_at = wall()
        self._changed = False
        """It is True if records have changed something since the last `save`."""
        self._written_begun = 0
        """The value of `Trials.begun` when the tests were written."""
        self._held = False
        """See `one_commit`."""

    @contextmanager
    def one_commit(self) -> Iterator[None]:
        """Writes what serves and the tests once, at the end of several changes: a process that is killed before that
        has changed none of it.
        """
        self._held = True
        try:
            yield
        finally:
            self._held = False
        self.write_serving()
        self.write_tests()

    def write_serving(self) -> None:
        """Writes what serves by kind, the kinds that are followed, and the queue."""
        if self._held:
            return
        kinds = {name: self._stored_kind(name, state) for name, state in self._serving.kinds.items()}
        queue = [(c.version, "", stored_source(c.source)) for c in self._trials.queue]
        former = {name: (state.tried, state.held) for name, state in self._serving.former.items()}
        proposals = [candidate.proposal for candidate in self._trials.queue]
        table = self._kinds.table.save().decode()
        stored = StoredServing(table, kinds, queue, former, proposals)
        write_state(self._writes, SERVING_KEY, stored, SCHEMA)

    def _stored_kind(self, name: str, state: KindState) -> StoredKind:
        watch = self._trials.serving_evidence(name)
        return StoredKind(
            version=state.version,
            window=state.window,
            chosen=state.chosen,
            pinned=state.pinned,
            held=state.held,
            units=state.units,
            tried=state.tried,
            watch=watch.test if watch is not None else 0,
        )

    def write_tests(self) -> None:
        """Writes all tests and windows, as they are now."""
        if self._held:
            return
        self._saved_at, self._written_begun = self._wall(), self._trials.begun
        self._writes.set_state(TESTS_KEY, self._trials.guard.save().decode())

    def after_break(self, time_break: TimeBreak) -> None:
        """Notes that the clock was set."""
        self._saved_at = time_break.seen(self._saved_at)

    @property
    def _has_begun(self) -> bool:
        """It is True if a test or a window has begun since the tests were written. What it spends of alpha is written
        already, by `BegunTests`; the rest is written soon."""
        return self._trials.begun != self._written_begun

    def update(self) -> None:
        """Notes that a record was learned from or judged by."""
        self._changed = True

    def save(self) -> None:
        """Writes all that has changed with the records, if anything."""
        if self._changed or self._has_begun:
            self._changed = False
            self.write_serving()
            self.write_tests()

    def save_if_due(self) -> None:
        """Writes all tests if a test has begun, or if `SAVE_SECONDS` have passed since the last time."""
        if self._has_begun or self._wall() - self._saved_at >= SAVE_SECONDS:
            self.save()

    def write_mode(self) -> None:
        write_state(self._writes, MODE_KEY, StoredMode(self.configured_mode, self._serving.mode), SCHEMA)

    def write_proposed(self, tokens: Mapping[str, int]) -> None:
        """Writes the number of tokens that the last proposal of each family was learned from."""
        write_state(self._writes, PROPOSED_KEY, StoredProposed(dict(sorted(tokens.items()))), SCHEMA)

    def put_profile(self, profile: StoredProfile) -> None:
        self._writes.put_profile(profile)

    def delete_profile(self, version: str) -> None:
        self._writes.delete_profile(version)


def candidates(stored: StoredServing) -> list[Candidate]:
    """Returns the candidates of the queue that were learned from all traffic, in its order."""
    proposals = [*stored.proposals, *(0 for _ in stored.queue)]
    numbered = zip(stored.queue, proposals, strict=False)
    return [Candidate(version, read_source(source), n) for (version, scope, source), n in numbered if not scope]
