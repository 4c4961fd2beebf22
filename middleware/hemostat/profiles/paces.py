"""The pace at which the units of a test come: with it, the units that a test still needs become a time.

In memory only: after a restart the pace is measured anew.
"""

from __future__ import annotations

from collections import OrderedDict

from hemostat.profiles.guard_keys import GuardKey

MIN_UNITS = 5
"""The number of units of a test below which nothing is said of its pace."""
MAX_TESTS = 256
"""The largest number of tests, each of one kind, whose pace is kept; the oldest is dropped."""


class Paces:
    """Owns when the first unit of each test came in each kind, and how many came after it.

    >>> paces = Paces()
    >>> for now in range(0, 60, 10):
    ...     paces.update("a test", "chat text", float(now))
    >>> paces.seconds("a test", "chat text", 12, 50.0), paces.seconds("a test", "code", 12, 50.0)
    (120.0, None)
    """

    def __init__(self) -> None:
        self._first: OrderedDict[tuple[GuardKey, str], tuple[float, int]] = OrderedDict()

    def update(self, test: GuardKey, kind: str, now: float) -> None:
        """Notes a unit. now: Unix seconds."""
        first, later = self._first.get((test, kind), (now, -1))
        self._first[test, kind] = first, later + 1
        if len(self._first) > MAX_TESTS:
            self._first.popitem(last=False)

    def seconds(self, test: GuardKey, kind: str, units: int, now: float) -> float | None:
        """Returns the seconds that so many more units take at the pace so far; None if that cannot be said."""
        first, later = self._first.get((test, kind), (now, 0))
        if later < MIN_UNITS or now <= first:
            return None
        return units * (now - first) / later
