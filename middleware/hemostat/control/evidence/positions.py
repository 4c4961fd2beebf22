"""Up to where the units of each sender were counted."""

from __future__ import annotations

import json
import logging
from collections import OrderedDict

from hemostat.store.protocol import StreamEntry

log = logging.getLogger("hemostat.evidence")

MAX_SENDERS = 512
"""Processes that are remembered; the one that was counted longest ago is forgotten."""


class Positions:
    """Owns the number of the last counted unit of each sender, and how many are missing before it."""

    def __init__(self) -> None:
        self._last: OrderedDict[str, int] = OrderedDict()
        self.lost = 0
        """Units that were never seen, though later ones of their sender were: they were pushed out of the stream."""
        self.repeated = 0
        """Units that were seen again."""

    def advance(self, sender: str, number: int) -> bool:
        """Whether the unit is to be counted now; False where it was before.

        >>> positions = Positions()
        >>> [positions.advance("a", number) for number in (1, 2, 2, 5)]
        [True, True, False, True]
        >>> positions.lost, positions.repeated
        (2, 1)
        """
        last = self.last(sender)
        if number <= last:
            self.repeated += 1
            return False
        self.lost += number - last - 1
        self._last[sender] = number
        self._last.move_to_end(sender)
        if len(self._last) > MAX_SENDERS:
            self._last.popitem(last=False)
        return True

    def last(self, sender: str) -> int:
        """Number of the sender's last counted unit; 0 where there is none."""
        return self._last.get(sender, 0)

    def covers(self, entry: StreamEntry) -> bool:
        """Whether the entry's units were counted."""
        return entry.last <= self.last(entry.sender)

    def save(self) -> str:
        return json.dumps(self._last)

    def restore(self, stored: str | None) -> None:
        """Take over what another replica, or an earlier process, wrote."""
        self._last = _read(stored)

    @classmethod
    def of(cls, stored: str | None) -> Positions:
        found = cls()
        found.restore(stored)
        return found


def _read(stored: str | None) -> OrderedDict[str, int]:
    if stored is None:
        return OrderedDict()
    try:
        return OrderedDict((str(sender), int(last)) for sender, last in json.loads(stored).items())
    except (ValueError, TypeError, AttributeError) as error:
        log.error("the stored positions of evidence cannot be read: units may count twice: %s", error)
        return OrderedDict()
