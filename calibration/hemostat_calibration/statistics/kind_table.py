"""The kinds of traffic that are followed by themselves: the most frequent ones, in bounded memory.

Space-Saving (Metwally, Agrawal & El Abbadi, ICDT 2005): at most `MAX_COUNTED` names are counted. When a further one
comes, the least frequent name that is not followed leaves, and the new one takes over its count, of which that much may
be another's: count minus excess never exceeds how often the name was really seen. Counts decay: what was seen
`HALF_LIFE_SECONDS` ago counts half, so that after months of other traffic a new kind is soon among the frequent ones.

A free place is given at first sight. When all are taken, a name takes the place of the least frequent followed one
once it was certainly seen more than `TAKES_OVER` times as often, and at least `MIN_SEEN` times: what was learned about
a kind is lost with its place, so places must not change hands by chance.
"""

from __future__ import annotations

import json
import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from hemostat_calibration.elapsed import MAX_PAUSE_SECONDS, TimeBreak, elapsed
from hemostat_calibration.errors import InvalidArgumentError

MAX_COUNTED = 256
"""The largest number of names that are counted at a time."""
MAX_NAME_LENGTH = 200
"""The largest number of characters of a name; longer names are never followed."""
TAKES_OVER = 2
MIN_SEEN = 20
HALF_LIFE_SECONDS = 2 * 86_400.0
DECAY_SECONDS = 3_600.0
"""The seconds between two times at which all counts decay."""

Count = tuple[float, float]
"""A pair: the largest number of times that a name may have been seen, and how many of these may be another name's."""


@dataclass(frozen=True, slots=True)
class KindTable:
    """The table of counted and of followed names.

    limit: the number of names that are followed at a time. counts: by name, also for the names that are followed.
    followed: the followed names in order of arrival. decayed: the time at which counts decayed last, in seconds.

    >>> table = KindTable(limit=2)
    >>> for name in ["chat", "code", "json"]:
    ...     table = table.update(name)
    >>> table.followed
    ('chat', 'code')
    >>> for _ in range(60):
    ...     table = table.update("json").update("code")
    >>> table.followed
    ('code', 'json')
    """

    limit: int
    counts: Mapping[str, Count] = field(default_factory=dict)
    followed: tuple[str, ...] = ()
    decayed: float = 0.0

    def __post_init__(self) -> None:
        if not 1 <= self.limit < MAX_COUNTED:
            raise InvalidArgumentError(f"limit is {self.limit}: it must be from 1 to {MAX_COUNTED - 1}")

    def __contains__(self, name: str) -> bool:
        """Returns True if the name is followed."""
        return name in self.followed

    def seen(self, name: str) -> float:
        """Returns how often the name was certainly seen, decayed; 0 if it is not counted."""
        most, excess = self.counts.get(name, (0, 0))
        return most - excess

    @property
    def total(self) -> float:
        """The number of requests of all kinds so far, decayed."""
        return sum(most for most, _ in self.counts.values())

    def update(self, name: str, keep: Collection[str] = (), now: float = 0.0) -> KindTable:
        """Returns the table after a request of this kind. The result follows at most one name that this table did not,
        and lost at most one.

        "" and names that are too long are not counted. keep: followed names that must not lose their place. now:
        seconds, of any clock that goes on over restarts; at most `MAX_PAUSE_SECONDS` of it count at once.
        """
        if not 0 < len(name) <= MAX_NAME_LENGTH:
            return self
        counts, decayed = dict(self.counts), self.decayed
        if not 0.0 <= now - decayed < DECAY_SECONDS:
            factor = 0.5 ** (elapsed(decayed, now, MAX_PAUSE_SECONDS) / HALF_LIFE_SECONDS)
            counts = {other: (most * factor, excess * factor) for other, (most, excess) in counts.items()}
            decayed = now
        most, excess = counts.get(name, (0, 0))
        if name not in counts and len(counts) >= MAX_COUNTED:
            least = min((other for other in counts if other not in self.followed), key=lambda other: counts[other][0])
            most = excess = counts.pop(least)[0]
        counts[name] = (most + 1, excess)
        return KindTable(self.limit, counts, self.followed, decayed)._with_place(name, keep)

    def after_break(self, time_break: TimeBreak) -> KindTable:
        """Returns the same after the time was set: counts decay by the time that is known to have passed."""
        return replace(self, decayed=time_break.seen(self.decayed))

    def _with_place(self, name: str, keep: Collection[str]) -> KindTable:
        if name in self.followed:
            return self
        if len(self.followed) < self.limit:
            return replace(self, followed=(*self.followed, name))
        free = [other for other in self.followed if other not in keep]
        rarest = min(free, key=self.seen, default=None)
        if rarest is None or self.seen(name) < MIN_SEEN or self.seen(name) <= TAKES_OVER * self.seen(rarest):
            return self
        return replace(self, followed=(*(other for other in self.followed if other != rarest), name))

    def save(self) -> bytes:
        """Returns the table as JSON, at most about 60 kB; `load` reads it."""
        return json.dumps({"counts": self.counts, "followed": self.followed, "decayed": self.decayed}).encode()

    @classmethod
    def load(cls, data: bytes, limit: int) -> KindTable:
        """Returns the table that `save` wrote. Raises InvalidArgumentError if `data` was not made by `save`.

        limit: the largest number of followed names, which may be another than before; of too many, those seen most
        often stay.
        """
        try:
            stored = json.loads(data)
            counts, followed = _read(stored)
            decayed = float(stored["decayed"])
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
            raise InvalidArgumentError(f"not a table of kinds: {error}") from error
        table = cls(limit, counts, followed, decayed)
        dropped = sorted(followed, key=table.seen, reverse=True)[limit:]
        return replace(table, followed=tuple(name for name in followed if name not in dropped))


def _read(stored: Any) -> tuple[dict[str, Count], tuple[str, ...]]:
    counts = {str(name): (float(most), float(excess)) for name, (most, excess) in stored["counts"].items()}
    followed = tuple(stored["followed"])
    if len(counts) > MAX_COUNTED or len(set(followed)) < len(followed) or not counts.keys() >= set(followed):
        raise ValueError("the followed names are not among the counted ones")
    if any(not 0 <= excess <= most < math.inf for most, excess in counts.values()):
        raise ValueError("a count is below 0, or not finite")
    return counts, followed
