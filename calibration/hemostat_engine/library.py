"""The profiles and the counters of one rank. The fetcher's thread puts profiles, the engine's thread reads them."""

from __future__ import annotations

import threading
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor

import torch

from hemostat_calibration.errors import InvalidProfileError
from hemostat_calibration.profiles.profile import CalibrationProfile
from hemostat_engine.captures import captures
from hemostat_engine.retries import first_line
from hemostat_engine.transform import CPU, HeldProfile, applied_parameters

MAX_PROFILES = 8
"""The number of profiles that are held at a time."""
MAX_REQUESTED = 32
"""The largest number of versions that requests named and that are not held; the oldest are forgotten."""
MAX_FAILED = 256
"""The largest number of versions that failed here, and are not loaded again."""
HEADROOM_BYTES = 256 << 20
"""The GPU memory that stays free in addition to a profile: what applying it takes for a moment, and some for vLLM
itself.
"""


class Counters:
    """The cumulative counters of one rank, written by two threads."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._counts: Counter[str] = Counter()
        self._external: dict[str, Callable[[], int]] = {}

    def add(self, name: str, by: int = 1) -> None:
        with self._lock:
            self._counts[name] += by

    def add_external(self, name: str, read: Callable[[], int]) -> None:
        """Adds a counter that is kept elsewhere: `read` returns its value."""
        self._external[name] = read

    def read(self) -> dict[str, int]:
        with self._lock:
            return dict(self._counts) | {name: read() for name, read in self._external.items()}


class Library:
    """Holds at most `limit` profiles. The least recently bound one is evicted first, but never one that `hold` names.

    A running request keeps the HeldProfile that it was bound to, so an eviction never changes a running request.
    """

    def __init__(self, vocab_size: int, device: torch.device = CPU, limit: int = MAX_PROFILES) -> None:
        self.vocab_size = vocab_size
        self._device = device
        self._limit = limit
        self._lock = threading.Lock()
        self._held: OrderedDict[str, HeldProfile] = OrderedDict()
        self._hold: tuple[str, ...] = ()
        self._requested: OrderedDict[str, None] = OrderedDict()
        self._failed: OrderedDict[str, None] = OrderedDict()
        if device.type == "cuda":
            captures.watch(torch.cuda.CUDAGraph)

    def get(self, version: str) -> HeldProfile | None:
        """Returns the profile, or None; a missing version is then one of `missing()`."""
        with self._lock:
            held = self._held.get(version)
            if held is not None:
                self._held.move_to_end(version)
            elif version not in self._failed:
                self._requested[version] = None
                while len(self._requested) > MAX_REQUESTED:
                    self._requested.popitem(last=False)
            return held

    def put(self, profile: CalibrationProfile) -> bool:
        """Loads `profile` onto the device and adds it; returns False if the library is full of versions that `hold`
        names.

        Raises InvalidProfileError if the profile is for another vocabulary size, its family is unknown, or the device
        has no memory for it, or is in a capture for too long.
        """
        if profile.vocab_size != self.vocab_size:
            raise InvalidProfileError(
                f"profile {profile.version} is for a vocabulary of {profile.vocab_size}, "
                f"this engine's is {self.vocab_size}"
            )
        version = profile.version
        with self._lock:
            self._requested.pop(version, None)
            if version in self._failed or not self._has_room(version):
                return False
        try:
            with captures.none():
                held = self._load(profile)
        except TimeoutError as error:
            raise InvalidProfileError(f"profile {version} is not loaded yet: {error}") from None
        with self._lock:
            if not self._has_room(version):
                return False
            if version not in self._held and len(self._held) >= self._limit:
                self._held.pop(self._victim() or "", None)
            self._held[version] = held
            return True

    def _has_room(self, version: str) -> bool:
        return version in self._held or len(self._held) < self._limit or self._victim() is not None

    def _victim(self) -> str | None:
        return next((version for version in self._held if version not in self._hold), None)

    def _load(self, profile: CalibrationProfile) -> HeldProfile:
        size = sum(4 * values.size for values in applied_parameters(profile).values())
        if (free := free_bytes(self._device)) is not None and free < size + HEADROOM_BYTES:
            raise InvalidProfileError(
                f"profile {profile.version} is not loaded: it takes {size >> 20} MiB of the device's memory, and "
                f"{HEADROOM_BYTES >> 20} MiB have to stay free; start vLLM with a lower --gpu-memory-utilization"
            )
        try:
            # A thread of its own, which ends: a second thread that uses PyTorch has a second OpenMP team for as long as
            # it lives, which made decoding a fifth slower (`make bench-engine`).
            with ThreadPoolExecutor(1, "hemostat-load") as thread:
                return thread.submit(HeldProfile, profile, self._device).result()
        except (RuntimeError, MemoryError) as error:  # torch.OutOfMemoryError is a RuntimeError
            # What follows the first sentence are sizes, other ones each time: it would be logged again.
            reason = first_line(str(error)).partition(". ")[0]
            raise InvalidProfileError(
                f"profile {profile.version} is not loaded: {type(error).__name__}: {reason}"
            ) from None

    def fail(self, version: str) -> None:
        """Notes that the profile failed: it is not held any more, and is not loaded again. Requests that run with it
        keep it."""
        with self._lock:
            self._held.pop(version, None)
            self._failed[version] = None
            while len(self._failed) > MAX_FAILED:
                self._failed.popitem(last=False)

    def hold(self, versions: Iterable[str]) -> None:
        """Sets the versions that the control process asks for, most important first; the first `limit` count."""
        with self._lock:
            self._hold = tuple(dict.fromkeys(versions))[: self._limit]

    def missing(self) -> tuple[str, ...]:
        """Returns the versions to fetch that `hold` names."""
        with self._lock:
            return self._absent(self._hold)

    def absent(self, versions: Iterable[str]) -> tuple[str, ...]:
        """Returns the versions that are neither held nor failed here."""
        with self._lock:
            return self._absent(versions)

    def requested(self) -> tuple[str, ...]:
        """Returns the versions to fetch that only requests named: clients choose them."""
        with self._lock:
            return self._absent(version for version in self._requested if version not in self._hold)

    def _absent(self, versions: Iterable[str]) -> tuple[str, ...]:
        return tuple(version for version in versions if version not in self._held and version not in self._failed)

    def forget(self, version: str) -> None:
        """Forgets a version that a request named and that does not exist."""
        with self._lock:
            self._requested.pop(version, None)

    def versions(self) -> tuple[str, ...]:
        with self._lock:
            return tuple(self._held)

    def candidates(self) -> tuple[HeldProfile, ...]:
        """Returns the held profiles that `hold` names, in its order."""
        with self._lock:
            return tuple(self._held[version] for version in self._hold if version in self._held)


def free_bytes(device: torch.device) -> int | None:
    """Returns the free bytes of a GPU's memory; None for another device."""
    return torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else None
