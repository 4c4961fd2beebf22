"""Chooses the engine that gets a request. It is pure.

A request of a conversation goes to the engine that its key falls to on a ring, so that later turns find the beginning
of the conversation in that engine's prefix cache: consistent hashing with bounded loads (Mirrokni, Thorup &
Zadimoghaddam, "Consistent Hashing with Bounded Loads", arXiv 1608.01350). An engine takes no more than BOUND times the
mean of the requests in progress; what is beyond that goes to the next one on the ring. When an engine leaves, only its
own conversations move. A request without a key goes to the engine with the fewest requests in progress.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from hashlib import blake2b
from typing import Final

BOUND: Final = 1.25
"""The factor 1 + ε of the paper."""
MIN_CAPACITY: Final = 4
"""An engine that computes requests in batches is not slowed by so few: below it, no conversation moves."""
POINTS: Final = 64
"""The number of points of each engine on the ring."""
UNAVAILABLE: Final = -1
"""The load of an engine that gets no requests."""
_SLOT_BITS: Final = 20
"""The number of lowest bits that do not count for a key's slot: keys that are equal but for these are in one slot.
There are 4,096 slots: as many as 64 engines (`group.MAX_ENGINES`) have points.
"""


class Balancer:
    """The ring of these engines. Owns whose turn it is among engines with the same load."""

    def __init__(self, names: Sequence[str]) -> None:
        points = sorted(
            (int.from_bytes(blake2b(f"{name} {point}".encode(), digest_size=4).digest(), "little"), index)
            for index, name in enumerate(names)
            for point in range(POINTS)
        )
        self._hashes = [point for point, _ in points]
        self._starts = [bisect_left(self._hashes, slot << _SLOT_BITS) for slot in range(1 << 32 - _SLOT_BITS)]
        """The first point in each slot or behind it, so that few points are left to search."""
        self._hashes.append(1 << 32)  # larger than every key, so that the search ends
        # Twice around, so that a search that begins anywhere ends before the list does.
        self._owners = 2 * [index for _, index in points]
        self._turn = 0

    def choose(self, loads: list[int], key: int | None) -> int:
        """Returns the index of an engine; -1 where none is available.

        loads: requests in progress at each engine, UNAVAILABLE for one that gets none. key: below 2**32, equal for all
        requests of a conversation; None: none is known. Loads are a list because compiled loops over lists are faster.

        >>> balancer = Balancer(["a:8000", "b:8000"])
        >>> balancer.choose([5, 2], None), balancer.choose([5, UNAVAILABLE], None), balancer.choose([-1, -1], 7)
        (1, 0, -1)
        """
        return self._least(loads) if key is None else self._on_ring(loads, key)

    def _least(self, loads: list[int]) -> int:
        self._turn += 1
        best, least = -1, 0
        for step in range(len(loads)):
            index = (self._turn + step) % len(loads)
            load = loads[index]
            if load != UNAVAILABLE and (best < 0 or load < least):
                best, least = index, load
        return best

    def _on_ring(self, loads: list[int], key: int) -> int:
        available = total = 0
        for load in loads:
            if load != UNAVAILABLE:
                available += 1
                total += load
        if not available:
            return -1
        # The request itself counts, so that an engine with the fewest is always below the capacity.
        capacity = max(BOUND * (total + 1) / available, float(MIN_CAPACITY))
        at = self._starts[key >> _SLOT_BITS]
        while self._hashes[at] <= key:
            at += 1
        while True:
            owner = self._owners[at]
            if UNAVAILABLE < loads[owner] < capacity:
                return owner
            at += 1
