"""Remembers which conversations have been scored: turns of one are alike, so each is one observation in each kind of
traffic.

The first scored turn counts for figures with intervals, the alarm and learning; later ones only add to token counters
and histograms. There is no waiting for the end of a conversation, so which ones end early cannot bias a figure. A turn
belongs to the conversation of the request that it goes on with, whatever it begins with (`continuations`).
"""

from __future__ import annotations

import secrets
from collections import OrderedDict

from hemostat_calibration.arrays import Ids
from hemostat_calibration.records import TokenRecord
from hemostat_calibration.statistics.continuations import Continuations

MAX_UNITS = 50_000
"""The largest number of units that are remembered; the oldest is forgotten first, after which its conversation counts
once more.
"""


class SeenUnits:
    """The units that have been scored. limit: the number of units that are remembered, about 200 bytes each."""

    def __init__(self, limit: int = MAX_UNITS) -> None:
        self._limit = limit
        self._seen: OrderedDict[tuple[bytes, str], None] = OrderedDict()
        self._continuations = Continuations(secrets.token_bytes(32))

    def update(self, record: TokenRecord, prompt: Ids) -> bool:
        """Adds a record, and returns True if it is the first of its conversation and kind. A record without a
        conversation always is. prompt: int32 [P], its token ids.
        """
        if not record.conversation:
            return True
        conversation = self._continuations.conversation(prompt, record.conversation)
        if not record.partial:  # else its first output ids are not those that follow the prompt
            self._continuations.update(prompt, record.output_ids, conversation)
        key = conversation, record.kind
        if key in self._seen:
            return False
        self._seen[key] = None
        if len(self._seen) > self._limit:
            self._seen.popitem(last=False)
        return True
