"""The kinds of traffic that are followed by themselves, for everything that keeps state by kind."""

from __future__ import annotations

from collections.abc import Callable, Collection

from hemostat.ipc.messages import REST_GRAMMAR_KIND, REST_KIND, rest_of
from hemostat_calibration.elapsed import TimeBreak
from hemostat_calibration.statistics.kind_table import KindTable


class FollowedKinds:
    """Owns the table of kinds. limit: kinds followed at a time. wall: Unix time, seconds.

    on_followed, on_evicted: called with a kind that is followed from now on, and with one that is not any more.
    keep: kinds that must not lose their place.
    """

    def __init__(
        self,
        limit: int,
        wall: Callable[[], float],
        *,
        on_followed: Callable[[str], None],
        on_evicted: Callable[[str], None],
        keep: Callable[[], Collection[str]],
    ) -> None:
        self.limit = limit
        self._wall = wall
        self.table = KindTable(limit)
        self._on_followed = on_followed
        self._on_evicted = on_evicted
        self._keep = keep

    @property
    def followed(self) -> frozenset[str]:
        """The followed kinds without `REST_KIND`, which is always there."""
        return frozenset(self.table.followed)

    def after_break(self, time_break: TimeBreak) -> None:
        """Notes that the clock was set."""
        self.table = self.table.after_break(time_break)

    def see(self, kind: str) -> str:
        """Counts one request, and returns what its kind is called from here on: its own name, or the rest's."""
        if kind not in (REST_KIND, REST_GRAMMAR_KIND):
            before, self.table = self.table, self.table.see(kind, self._keep(), self._wall())
            if self.table.followed != before.followed:
                for evicted in set(before.followed).difference(self.table.followed):
                    self._on_evicted(evicted)
                self._on_followed(kind)
        return kind if kind in self.table else rest_of(kind)
