"""The kinds of traffic that are followed by themselves, for everything that keeps state by kind."""

from __future__ import annotations

from collections.abc import Callable, Collection

from hemostat.ipc.messages import REST_GRAMMAR_KIND, REST_KIND, rest_of
from hemostat_calibration.elapsed import TimeBreak
from hemostat_calibration.statistics.kind_table import KindTable


class FollowedKinds:
    """Owns the table of kinds. limit: kinds followed at a time. wall: Unix time, seconds. keep: kinds that must not
    lose their place."""

    def __init__(self, limit: int, wall: Callable[[], float], keep: Callable[[], Collection[str]]) -> None:
        self.limit = limit
        self._wall = wall
        self.table = KindTable(limit)
        self._keep = keep
        self.on_followed: Callable[[str], None] = lambda kind: None
        """A function that is called with a kind that is followed from now on; whoever keeps state by kind sets it."""
        self.on_evicted: Callable[[str], None] = lambda kind: None
        """A function that is called with a kind that is not followed any more, likewise."""

    @property
    def followed(self) -> frozenset[str]:
        """The followed kinds without `REST_KIND`, which is always there."""
        return frozenset(self.table.followed)

    def after_break(self, time_break: TimeBreak) -> None:
        """Notes that the clock was set."""
        self.table = self.table.after_break(time_break)

    def update(self, kind: str) -> str:
        """Counts one request, and returns what its kind is called from here on: its own name, or the rest's."""
        if kind not in (REST_KIND, REST_GRAMMAR_KIND):
            before, self.table = self.table, self.table.update(kind, self._keep(), self._wall())
            if self.table.followed != before.followed:
                for evicted in set(before.followed).difference(self.table.followed):
                    self.on_evicted(evicted)
                self.on_followed(kind)
        return kind if kind in self.table else rest_of(kind)
