"""The profiles that this process holds, bounded by number and bytes."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Collection, Iterator

from hemostat.store.protocol import StoredProfile
from hemostat_calibration.profiles.profile import CalibrationProfile
from hemostat_calibration.profiles.transform import anchor_set, max_shift

MAX_PROFILES = 32
"""The number of profiles above which the oldest ones that are not in use are evicted, from the store too."""
MAX_PROFILE_BYTES = 1024 * 1024 * 1024
"""The same for the bytes of all parameters together."""
MAX_ONE_PROFILE_BYTES = 255 * 1024 * 1024
"""The largest size of one profile's parameters: the admin port takes files of up to 256 MiB. An adapter of rank 16 for
a model of 70B parameters has about 200 MiB.
"""
MIN_GAIN_WIDTH_NATS = 1e-6
"""The guard needs a width above 0, also of a profile that changes nothing."""


class Catalogue:
    """Owns the profiles by version, oldest first, with the time at which each was created.

    wall: Unix time, seconds.
    """

    def __init__(self, wall: Callable[[], float]) -> None:
        self._wall = wall
        self._profiles: OrderedDict[str, CalibrationProfile] = OrderedDict()
        self._created: dict[str, float] = {}
        self.adapters: set[str] = set()
        """The versions whose profile changes weights: adapters."""
        self.probe: str | None = None
        """The contextual learner's probe: a profile that does nothing, held by engines so that they report the logits
        of its anchors. Never tested, never serves."""

    def __contains__(self, version: str) -> bool:
        return version in self._profiles

    def __iter__(self) -> Iterator[str]:
        """Yields the versions, oldest first."""
        return iter(self._profiles)

    def __reversed__(self) -> Iterator[str]:
        return reversed(self._profiles)

    def __getitem__(self, version: str) -> CalibrationProfile:
        return self._profiles[version]

    def get(self, version: str | None) -> CalibrationProfile | None:
        return self._profiles.get(version) if version is not None else None

    def created(self, version: str) -> float:
        """Returns the Unix time at which the profile was first held, here or by whoever stored it."""
        return self._created[version]

    def keep(self, profile: CalibrationProfile, in_use: Collection[str]) -> list[str]:
        """Keeps a profile as the newest. Returns the versions that were evicted for it; none that is in use."""
        self._put(profile)
        self._created.setdefault(profile.version, self._wall())
        self._profiles.move_to_end(profile.version)
        evicted: list[str] = []
        total = sum(map(parameter_bytes, self._profiles.values()))
        for version in list(self._profiles):
            if version == profile.version or version in in_use:
                continue
            if len(self._profiles) > MAX_PROFILES or total > MAX_PROFILE_BYTES:
                total -= parameter_bytes(self._profiles[version])
                self.remove(version)
                evicted.append(version)
        return evicted

    def restore(self, profile: CalibrationProfile, created: float) -> None:
        """Holds a stored profile as the oldest."""
        self._put(profile)
        self._profiles.move_to_end(profile.version, last=False)
        self._created[profile.version] = created

    def remove(self, version: str) -> None:
        if version == self.probe:
            self.probe = None
        self._profiles.pop(version, None)
        self.adapters.discard(version)
        self._created.pop(version, None)

    def _put(self, profile: CalibrationProfile) -> None:
        self._profiles[profile.version] = profile
        if profile.changes_weights:
            self.adapters.add(profile.version)

    def changes_weights(self, version: str | None) -> bool:
        return version in self.adapters

    def stored(self, version: str) -> StoredProfile:
        """Returns the profile as the store holds it."""
        return StoredProfile(version, self._profiles[version].to_bytes(), self._created[version])

    def gain_width(self, version: str) -> float:
        return gain_width(self._profiles[version])

    def anchor_set(self, version: str) -> str:
        return anchor_set(self._profiles[version])


def parameter_bytes(profile: CalibrationProfile) -> int:
    return sum(array.nbytes for array in profile.parameters.values())


def gain_width(profile: CalibrationProfile) -> float:
    """Returns the width of the range of its Δz, nats: no gain over identity is below minus that."""
    return max(2.0 * max_shift(profile), MIN_GAIN_WIDTH_NATS)
