"""Which conversations have been scored: turns of one are alike, so each is one observation in each kind of traffic.

The first scored turn counts for figures with intervals, the alarm and learning; later ones only add to token counters
and histograms. There is no waiting for the end of a conversation, so which ones end early cannot bias a figure.
"""

from __future__ import annotations

from collections import OrderedDict

from hemostat_calibration.records import TokenRecord

MAX_UNITS = 50_000
"""Remembered; the oldest is forgotten first, after which its conversation counts once more."""


class SeenUnits:
    """limit: of the units that are remembered, about 200 bytes each."""

    def __init__(self, limit: int = MAX_UNITS) -> None:
        self._limit = limit
        self._seen: OrderedDict[tuple[bytes, str], None] = OrderedDict()

    def add(self, record: TokenRecord) -> bool:
        """Whether the record is the first of its conversation and kind. One without a conversation always is."""
        if not record.conversation:
            return True
        key = record.conversation, record.kind
        if key in self._seen:
            return False
        self._seen[key] = None
        if len(self._seen) > self._limit:
            self._seen.popitem(last=False)
        return True
