"""The share that each client holds of what all clients of a relay share: memory for requests, and places for uploads.

    all ─► network ─► credential ─► holding: of one connection

Who holds most is asked level by level, so that a client neither gets a larger share by many connections, nor a network
by many credentials, which anybody can invent. What is taken from the largest until enough is free leaves the others
what they have, up to an equal share (max-min fairness).
"""

from __future__ import annotations

import heapq
from typing import Final, Protocol, cast

_WAITING: Final = -1
_SPARE_ENTRIES: Final = 16


class Owner(Protocol):
    """The owner of a holding: one connection of a client."""

    def give_way(self) -> None:
        """Gives back at least what the budget counts for the connection, and tells the client."""

    def give_way_upload(self) -> None:
        """Gives up the request whose body is being sent upstream, and tells the client."""

    def credential(self) -> bytes:
        """Returns the credential of the connection's request; b"" while its head is not complete. It is asked for only
        if there is not enough for all.
        """

    def uploads_slowly(self, now: float) -> bool:
        """Returns True if the body arrives so slowly that its place is better used for another one. now: event-loop
        time."""


class Share:
    """The size that is held by one network, by one of its credentials, or by one connection."""

    __slots__ = ("name", "order", "parent", "ranked", "size")

    def __init__(self, name: bytes | int) -> None:
        self.name = name
        self.size = 0
        self.order = 0
        """The order by age: the oldest of equal shares is the first."""
        self.parent: Group | None = None
        """None while nothing is held."""
        self.ranked = 0
        """The size in its newest entry of the parent's heap, which is never less than `size`; or _WAITING."""


class Group(Share):
    """A share that consists of others. Owns which of them is the largest."""

    __slots__ = ("_heap", "members")

    def __init__(self, name: bytes) -> None:
        super().__init__(name)
        self.members: dict[bytes | int, Share] = {}
        self._heap: list[tuple[int, int, Share]] = []
        """The largest first. Members that have shrunk are moved when they come to the top, so that most changes cost
        nothing."""

    def largest(self) -> Share | None:
        heap = self._heap
        while heap:
            rank, order, share = heap[0]
            if share.ranked != -rank or share.order != order or share.parent is not self:
                heapq.heappop(heap)  # a newer entry has replaced it
            elif share.size < share.ranked:
                share.ranked = share.size
                heapq.heapreplace(heap, (-share.size, order, share))
            else:
                return share
        return None

    def group(self, name: bytes, order: int) -> Group:
        """Returns the member of this name, or a new one."""
        result = self.members.get(name)
        if result is None:
            result = Group(name)
            self.join(result, order)
        return cast("Group", result)

    def join(self, share: Share, order: int) -> None:
        share.parent = self
        share.order = order
        self.members[share.name] = share

    def rank(self, share: Share) -> None:
        """Ranks a member that has grown beyond its entry, or is new."""
        if share.ranked != _WAITING:
            share.ranked = share.size
        heapq.heappush(self._heap, (-share.ranked, share.order, share))
        if len(self._heap) > 2 * len(self.members) + _SPARE_ENTRIES:
            for member in self.members.values():
                if member.ranked != _WAITING:
                    member.ranked = member.size
            self._heap = [(-member.ranked, member.order, member) for member in self.members.values()]
            heapq.heapify(self._heap)


class Holding(Share):
    """The share of one connection. `waiting` may change while it is empty."""

    __slots__ = ("network", "owner", "waiting")

    def __init__(self, owner: Owner | None, network: bytes) -> None:
        super().__init__(0)
        self.owner = owner
        """None once its connection is closed."""
        self.network = network
        self.waiting = False
        """It is True if the holding belongs to a complete request. Within one credential such holdings come after all
        others, and the newest first: who has waited for longest is next to be answered.
        """


class Shares:
    """Owns what everybody holds. All in constant time, or logarithmic in the number of holdings, amortized: while there
    is enough for all, it is only added up; a holding is ranked among the others, once, when a request has to be ended.

    >>> shares, small, large = Shares(), Holding(None, b"a"), Holding(None, b"b")
    >>> shares.add(small, 3); shares.add(large, 5)
    >>> shares.largest() is large, shares.size
    (True, 8)
    """

    __slots__ = ("_all", "_order", "_unranked", "size")

    def __init__(self) -> None:
        self.size = 0
        self._unranked: dict[Holding, None] = {}
        """The holdings without a rank, oldest first; they are younger than all that are ranked."""
        self._all = Group(b"")
        self._order = 0

    def add(self, holding: Holding, size: int) -> None:
        """Adds `size` to the holding; a negative size shrinks it."""
        self.size += size
        if holding.parent is not None:
            _grow(holding, size)
            return
        holding.size += size
        if holding.size:
            self._unranked[holding] = None
        else:
            self._unranked.pop(holding, None)

    def largest(self) -> Holding | None:
        """Returns the largest holding of the credential that holds most, in the network that holds most. The oldest of
        several is returned.
        """
        self._rank()
        return _largest(self._all)

    def larger(self, network: bytes, credential: bytes) -> Holding | None:
        """Returns the one to take from, so that this client can have one more: of who holds more than the client would
        then. None if there is none."""
        self._rank()
        group = self._all
        for name in (network, credential):
            most, own = group.largest(), group.members.get(name)
            if most is None:
                return None
            if most.size > (0 if own is None else own.size) + 1:
                return _largest(most)
            if own is None:
                return None
            group = cast("Group", own)
        return None

    def _rank(self) -> None:
        """Brings those that have come since into the order of all."""
        if not self._unranked:
            return
        unranked, self._unranked = self._unranked, {}
        for holding in unranked:
            self._order += 1
            credential = b"" if holding.owner is None else holding.owner.credential()
            group = self._all.group(holding.network, self._order).group(credential, self._order)
            size, holding.size = holding.size, 0
            holding.name = self._order
            group.join(holding, -self._order if holding.waiting else self._order)
            if holding.waiting:
                holding.ranked = _WAITING
                group.rank(holding)
            _grow(holding, size)


def _grow(holding: Holding, size: int) -> None:
    """Grows a holding that is ranked, and all that it is part of, by `size`. What is empty then is forgotten."""
    share: Share = holding
    while (parent := share.parent) is not None:
        share.size += size
        if share.size > share.ranked >= 0:
            parent.rank(share)
        share = parent
    share = holding
    while not share.size and (parent := share.parent) is not None:
        del parent.members[share.name]
        share.parent = None
        share.ranked = 0
        share = parent


def _largest(share: Share) -> Holding | None:
    result: Share | None = share
    while isinstance(result, Group):
        result = result.largest()
    return cast("Holding | None", result)
