"""The numbers of the tests of candidates, and of the windows of what serves: they are stored before these decide."""

from __future__ import annotations

from collections.abc import Mapping

from hemostat.store.protocol import StateKey, StoreWrites
from hemostat.store.spent_alpha import OTHERS, SpentAlpha
from hemostat_calibration.guard.guard import Guard

TESTS_BEGUN_KEY = StateKey("tests.candidate")
"""The store's key of the number of tests of candidates that were begun (`SpentAlpha`)."""
WINDOWS_BEGUN_KEY = StateKey("tests.windows")
"""The store's key of the number of windows of what serves that were begun, by kind (`SpentAlpha`)."""


class BegunTests:
    """Owns the numbers that were given, here and by earlier runs."""

    def __init__(self, writes: StoreWrites) -> None:
        self._candidates = SpentAlpha(TESTS_BEGUN_KEY, writes)
        self._windows = SpentAlpha(WINDOWS_BEGUN_KEY, writes)

    def spend(self, guard: Guard) -> None:
        """Writes the numbers of all tests and windows that have begun, if they are new."""
        self._candidates.spend({OTHERS: guard.candidate_tests})
        self._windows.spend(guard.windows)

    def is_stored(self, number: int, kind: str | None) -> bool:
        """Returns True if the number of a test is in the store, so that it may decide. kind: the kind of a watch; None
        for a candidate's test."""
        return self._candidates.is_stored(number) if kind is None else self._windows.is_stored(number, kind)

    def restore(self, states: Mapping[StateKey, str | None]) -> tuple[int, Mapping[str, int]]:
        """Returns the numbers of candidates' tests, and of windows by kind, that an earlier run has begun."""
        self._candidates.restore(states.get(TESTS_BEGUN_KEY))
        self._windows.restore(states.get(WINDOWS_BEGUN_KEY))
        return self._candidates.get(), self._windows.counts
