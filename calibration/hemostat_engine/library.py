"""The profiles that this rank holds, in host memory. The agent's thread writes, the engine's thread reads."""

from __future__ import annotations

import threading
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterable

from hemostat_calibration.errors import InvalidProfileError
from hemostat_calibration.profiles.profile import CalibrationProfile
from hemostat_engine.transform import HeldProfile

MAX_PROFILES = 8
MAX_REQUESTED = 32


class Counters:
    """Cumulative counts of one rank, from two threads."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._counts: Counter[str] = Counter()
        self._elsewhere: dict[str, Callable[[], int]] = {}

    def add(self, name: str, by: int = 1) -> None:
        with self._lock:
            self._counts[name] += by

    def counted_by(self, name: str, read: Callable[[], int]) -> None:
        """A count that is kept elsewhere, and read where counts are read."""
        self._elsewhere[name] = read

    def read(self) -> dict[str, int]:
        with self._lock:
            return dict(self._counts) | {name: read() for name, read in self._elsewhere.items()}


class Library:
    """At most `limit` profiles; the least recently bound goes first, never one that `hold` names.

    A running request keeps the HeldProfile that it was bound to, so dropping a version here never changes a request in
    the middle.
    """

    def __init__(self, vocab_size: int, limit: int = MAX_PROFILES) -> None:
        self.vocab_size = vocab_size
        self._limit = limit
        self._lock = threading.Lock()
        self._held: OrderedDict[str, HeldProfile] = OrderedDict()
        self._hold: tuple[str, ...] = ()
        self._wanted: OrderedDict[str, None] = OrderedDict()

    def get(self, version: str) -> HeldProfile | None:
        """The profile, or None; a version that is missing is remembered for `missing()`."""
        with self._lock:
            held = self._held.get(version)
            if held is not None:
                self._held.move_to_end(version)
            else:
                self._wanted[version] = None
                while len(self._wanted) > MAX_REQUESTED:
                    self._wanted.popitem(last=False)
            return held

    def put(self, profile: CalibrationProfile) -> bool:
        """Hold `profile`; False when everything held is still to be held and there is no room.

        Raises InvalidProfileError when it was made for another vocabulary, or for a newer engine plugin.
        """
        if profile.vocab_size != self.vocab_size:
            raise InvalidProfileError(
                f"profile {profile.version} is for a vocabulary of {profile.vocab_size}, "
                f"this engine's is {self.vocab_size}"
            )
        version = profile.version
        held = HeldProfile(profile)
        with self._lock:
            self._wanted.pop(version, None)
            if version not in self._held and len(self._held) >= self._limit:
                victim = next((v for v in self._held if v not in self._hold), None)
                if victim is None:
                    return False
                del self._held[victim]
            self._held[version] = held
            return True

    def hold(self, versions: Iterable[str]) -> None:
        """What the control process wants held, most important first; at most `limit` of them count."""
        with self._lock:
            self._hold = tuple(dict.fromkeys(versions))[: self._limit]

    def missing(self) -> tuple[str, ...]:
        """Versions to fetch: those to hold, then those that requests named."""
        with self._lock:
            asked = dict.fromkeys((*self._hold, *self._wanted))
            return tuple(version for version in asked if version not in self._held)

    def forget(self, version: str) -> None:
        """Stop wanting a version that a request named and nobody has."""
        with self._lock:
            self._wanted.pop(version, None)

    def versions(self) -> tuple[str, ...]:
        with self._lock:
            return tuple(self._held)

    def candidates(self) -> tuple[HeldProfile, ...]:
        """Held profiles that `hold` names, in its order."""
        with self._lock:
            found = (self._held.get(version) for version in self._hold)
            return tuple(held for held in found if held is not None)
