"""The profiles and the counters of one rank, in host memory. The agent's thread writes, the engine's thread reads."""

from __future__ import annotations

import threading
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterable

from hemostat_calibration.errors import InvalidProfileError
from hemostat_calibration.profiles.profile import CalibrationProfile
from hemostat_engine.transform import HeldProfile

MAX_PROFILES = 8
"""Held at a time."""
MAX_REQUESTED = 32
"""Versions that requests named and that are not held; the oldest are forgotten."""


class Counters:
    """Cumulative counters of one rank, written by two threads."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._counts: Counter[str] = Counter()
        self._external: dict[str, Callable[[], int]] = {}

    def add(self, name: str, by: int = 1) -> None:
        with self._lock:
            self._counts[name] += by

    def add_external(self, name: str, read: Callable[[], int]) -> None:
        """A counter that is kept elsewhere: `read` returns its value."""
        self._external[name] = read

    def read(self) -> dict[str, int]:
        with self._lock:
            return dict(self._counts) | {name: read() for name, read in self._external.items()}


class Library:
    """At most `limit` profiles. The least recently bound one is evicted first, but never one that `hold` names.

    A running request keeps the HeldProfile that it was bound to, so an eviction never changes a running request.
    """

    def __init__(self, vocab_size: int, limit: int = MAX_PROFILES) -> None:
        self.vocab_size = vocab_size
        self._limit = limit
        self._lock = threading.Lock()
        self._held: OrderedDict[str, HeldProfile] = OrderedDict()
        self._hold: tuple[str, ...] = ()
        self._requested: OrderedDict[str, None] = OrderedDict()

    def get(self, version: str) -> HeldProfile | None:
        """The profile, or None; a missing version is then one of `missing()`."""
        with self._lock:
            held = self._held.get(version)
            if held is not None:
                self._held.move_to_end(version)
            else:
                self._requested[version] = None
                while len(self._requested) > MAX_REQUESTED:
                    self._requested.popitem(last=False)
            return held

    def put(self, profile: CalibrationProfile) -> bool:
        """Add `profile`; False if the library is full of versions that `hold` names.

        Raises InvalidProfileError if the profile is for another vocabulary size or its family is unknown.
        """
        if profile.vocab_size != self.vocab_size:
            raise InvalidProfileError(
                f"profile {profile.version} is for a vocabulary of {profile.vocab_size}, "
                f"this engine's is {self.vocab_size}"
            )
        version = profile.version
        held = HeldProfile(profile)
        with self._lock:
            self._requested.pop(version, None)
            if version not in self._held and len(self._held) >= self._limit:
                victim = next((v for v in self._held if v not in self._hold), None)
                if victim is None:
                    return False
                del self._held[victim]
            self._held[version] = held
            return True

    def hold(self, versions: Iterable[str]) -> None:
        """Set the versions that the control process asks for, most important first; the first `limit` count."""
        with self._lock:
            self._hold = tuple(dict.fromkeys(versions))[: self._limit]

    def missing(self) -> tuple[str, ...]:
        """Versions to fetch: those that `hold` names, then those that requests named."""
        with self._lock:
            versions = dict.fromkeys((*self._hold, *self._requested))
            return tuple(version for version in versions if version not in self._held)

    def forget(self, version: str) -> None:
        """Forget a version that a request named and that does not exist."""
        with self._lock:
            self._requested.pop(version, None)

    def versions(self) -> tuple[str, ...]:
        with self._lock:
            return tuple(self._held)

    def candidates(self) -> tuple[HeldProfile, ...]:
        """Held profiles that `hold` names, in its order, to be evaluated on any row: no adapters."""
        with self._lock:
            profiles = (self._held.get(version) for version in self._hold)
            return tuple(held for held in profiles if held is not None and not held.is_adapter)
