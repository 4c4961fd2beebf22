"""Counts how many tests of one sort have begun: the alpha that they spent is spent once, whatever happens to the
process.

The alpha of a test follows from its number. So a number must not be given twice, and two rules make sure of that:

- A number is stored before its test decides anything (`SpentAlpha.is_stored`). If a process is killed before that, the
  test could not decide, so that it has spent nothing. While the store is away, tests that have begun before go on and
  decide, and a new one only collects evidence.
- Numbers are stored apart from the state of the tests, in a format that does not change with it: a whole number, or a
  JSON object of whole numbers by name. So they can be read where that state is damaged, or of another version.

The alarm, the outlier engine, the guard and the trials of outcomes spend alpha so. Canaries do not: each of their
replays errs with the same probability, whatever its number, and their budget of tokens bounds how many there are. It is
stored before a replay is sent (`until_written`). See `hemostat_calibration.canaries`.
"""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import Mapping

from hemostat.store.protocol import StateKey, StoreWrites

log = logging.getLogger("hemostat.store")

LOOK_SECONDS = 0.05
"""The seconds between two looks if a write has happened."""
MAX_NAMES = 256
"""The largest number of names that are counted each by itself; the ones that began longest ago share one count, which
is the largest of theirs."""
OTHERS = ""
"""The name of that count, and of the only one where tests of a sort have no names."""


async def until_written(writes: StoreWrites) -> None:
    """Returns once all that is queued now is in the store."""
    write = writes.queued()
    while not writes.has_written(write):  # noqa: ASYNC110  the writer is told of no waiter
        await asyncio.sleep(LOOK_SECONDS)


class SpentAlpha:
    """The numbers of the tests of one sort. Lives in the control process's event loop. key: of the store's state."""

    def __init__(self, key: StateKey, writes: StoreWrites) -> None:
        self.key = key
        self._writes = writes
        self._counts: dict[str, int] = {}
        """The counts by name; the name that began last is at the end."""
        self._stored: dict[str, int] = {}
        """The counts by name that a restart would find."""
        self._waiting: dict[str, tuple[int, int]] = {}
        """The numbers by name that are not stored yet, each with the write that it waits for."""

    @property
    def counts(self) -> Mapping[str, int]:
        """The largest number that was given, by name."""
        return self._counts

    def get(self, name: str = OTHERS) -> int:
        """Returns the largest number that was given under this name: the next test has the next one."""
        return self._counts.get(name, self._counts.get(OTHERS, 0))

    def spend(self, numbers: Mapping[str, int]) -> None:
        """Tests with these numbers begin, by name. Numbers that were given already change nothing."""
        new = {name: number for name, number in numbers.items() if number > self.get(name)}
        if not new:
            return
        for name, number in new.items():
            self._counts.pop(name, None)
            self._counts[name] = number
        self._share_oldest()
        self._writes.set_state(self.key, _written(self._counts))
        write = self._writes.queued()
        self._waiting.update((name, (self.get(name), write)) for name in new)

    def _share_oldest(self) -> None:
        named = [name for name in self._counts if name != OTHERS]
        for name in named[: max(len(named) - MAX_NAMES, 0)]:
            number, others = self._counts.pop(name), self._counts.get(OTHERS, 0)
            self._counts[OTHERS] = max(number, others)
            self._waiting.pop(name, None)
            self._stored[OTHERS] = max(self._stored.pop(name, 0), self._stored.get(OTHERS, 0))

    def is_stored(self, number: int, name: str = OTHERS) -> bool:
        """Returns True if the number is in the store, so that its test may decide."""
        for waiting, (given, write) in list(self._waiting.items()):
            if self._writes.has_written(write):
                del self._waiting[waiting]
                self._stored[waiting] = given
        return number <= self._stored.get(name, self._stored.get(OTHERS, 0))

    def restore(self, stored: str | None) -> None:
        """Goes on from what an earlier run stored."""
        if stored is None:
            return
        self._counts = _read(stored, self.key)
        self._stored = dict(self._counts)


def _written(counts: Mapping[str, int]) -> str:
    return str(counts[OTHERS]) if counts.keys() == {OTHERS} else json.dumps(counts)


def _read(text: str, key: str) -> dict[str, int]:
    """Returns all numbers that can be read."""
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        value = None
    named = value if isinstance(value, dict) else {OTHERS: value}
    counts = {name: number for name, number in named.items() if type(number) is int and number >= 0}
    if len(counts) < len(named):
        log.error("the stored numbers of tests under %r are damaged: %.100s", key, text)
    return counts
