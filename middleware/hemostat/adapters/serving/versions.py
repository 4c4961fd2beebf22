"""The states of each version of an adapter at one engine, since the engine's last start, as one record a version.

    UNKNOWN ─┬─► LOADED ◄─► FAILED
             │      │          │
             └──────┴──────────┴─► REJECTED

A version may be in the server's list in each of these states: a client's request, or an earlier control process, may
have had it loaded. A new start of the engine ends all records.
"""

from __future__ import annotations

import random
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import Enum, auto
from typing import Final

from hemostat_calibration.backoff import Backoff

BACKOFF: Final = (1.0, 5.0, 15.0, 60.0)
"""Seconds before a version that could not be loaded is tried again, by how often in a row."""
MAX_VERSIONS: Final = 32
"""The largest number of versions that are remembered."""


class VersionState(Enum):
    """The state of a version at the engine."""

    UNKNOWN = auto()
    """It was not loaded from here."""
    LOADED = auto()
    """The server has answered that it has loaded it. If several engines share the address, one of them has."""
    FAILED = auto()
    """It could not be loaded, and is tried again."""
    REJECTED = auto()
    """A probe has failed: it is not used until the server is restarted."""


TRANSITIONS: Final[Mapping[VersionState, frozenset[VersionState]]] = {
    VersionState.UNKNOWN: frozenset({VersionState.LOADED, VersionState.FAILED, VersionState.REJECTED}),
    # Where several engines share the address, it is loaded again until all of them report it.
    VersionState.LOADED: frozenset({VersionState.LOADED, VersionState.FAILED, VersionState.REJECTED}),
    VersionState.FAILED: frozenset({VersionState.LOADED, VersionState.FAILED, VersionState.REJECTED}),
    VersionState.REJECTED: frozenset(),
}
"""From each state, the states that may follow it."""


class IllegalTransition(Exception):
    """A version cannot come from its state to this one: a mistake of the caller."""


@dataclass(slots=True)
class VersionRecord:
    """The record of one version. `Versions` changes it, and `AdapterHost` reads it."""

    state: VersionState = VersionState.UNKNOWN
    why: str = ""
    """The reason for FAILED or REJECTED, in one line."""
    backoff: Backoff = field(default_factory=lambda: Backoff(BACKOFF, random.random))


class Versions:
    """Owns the records, at most MAX_VERSIONS.

    >>> versions = Versions()
    >>> versions.failed("a", "rank 64 is too large")
    True
    >>> versions.reasons(VersionState.FAILED), versions.state("b")
    ({'a': 'rank 64 is too large'}, <VersionState.UNKNOWN: 1>)
    """

    def __init__(self) -> None:
        self._records: dict[str, VersionRecord] = {}

    def begin_anew(self) -> None:
        """Forgets all: the server was started again."""
        self._records.clear()

    def state(self, version: str) -> VersionState:
        return self._records[version].state if version in self._records else VersionState.UNKNOWN

    def reasons(self, state: VersionState) -> dict[str, str]:
        """Returns why each version that is in this state is in it."""
        return {version: record.why for version, record in self._records.items() if record.state is state}

    def may_load(self, version: str, now: float) -> bool:
        """Returns True if the time for another attempt has come. now: monotonic seconds."""
        return version not in self._records or self._records[version].backoff.may_try(now)

    def begin_load(self, version: str, now: float) -> None:
        """Notes an attempt: the next one waits, also after this one has succeeded."""
        self._record(version).backoff.failed(now)

    def loaded(self, version: str) -> None:
        self._move(version, VersionState.LOADED, "")

    def failed(self, version: str, why: str) -> bool:
        """Notes why it could not be loaded. Returns True if the reason is a new one."""
        before = self._record(version)
        new = (before.state, before.why) != (VersionState.FAILED, why)
        self._move(version, VersionState.FAILED, why)
        return new

    def reject(self, version: str, why: str) -> None:
        self._move(version, VersionState.REJECTED, why)

    def _move(self, version: str, state: VersionState, why: str) -> None:
        record = self._record(version)
        if state not in TRANSITIONS[record.state]:
            raise IllegalTransition(f"{version}: from {record.state.name} to {state.name}")
        record.state, record.why = state, why

    def _record(self, version: str) -> VersionRecord:
        if version not in self._records:
            while len(self._records) >= MAX_VERSIONS:
                # A rejected version that is forgotten would be loaded and probed again.
                oldest = min(self._records, key=lambda v: self._records[v].state is VersionState.REJECTED)
                del self._records[oldest]
            self._records[version] = VersionRecord()
        return self._records[version]
