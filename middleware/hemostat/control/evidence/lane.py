"""One stream of units: to the leader, and at the leader from all others to whoever uses them."""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable, Coroutine, Iterator, Sequence
from enum import StrEnum
from typing import Any

from hemostat.control.evidence.inbox import Inbox
from hemostat.control.evidence.outbox import Outbox
from hemostat.control.evidence.own_units import OwnUnits
from hemostat.control.evidence.positions import Positions
from hemostat.control.evidence.units import BATCHES, UNITS, SentUnit, Unit
from hemostat.control.model_identity import same_brief
from hemostat.metrics import names
from hemostat.metrics.samples import Sample
from hemostat.store.lease import Lease
from hemostat.store.protocol import MAX_ENTRIES, SharedStore, StoreFailure, StreamEntry

log = logging.getLogger("hemostat.evidence")


class UnitOutcome(StrEnum):
    """What became of units: values of `hemostat_evidence_units_total`."""

    SENT = "sent"
    DROPPED = "dropped"
    APPLIED = "applied"
    REPEATED = "repeated"
    LOST = "lost"
    FAILED = "failed"
    OTHER_MODELS = "other_models"


class Lane:
    """Lives in the control process's event loop.

    name: of the stream. positions_key: of the store's state, where the positions are written with, or after, what the
    units went into. use: called with each unit of the stream, once, and whether this replica had sent it
    before it led. models: those that units are about now, `model_identity.brief`; units about others are not used.
    on_change: called after a batch was used.
    prepare, ready, on_failure, clock, wall: see `Inbox`. max_entries: of the stream, about.
    """

    def __init__(
        self,
        name: str,
        store: SharedStore,
        lease: Lease,
        positions: Positions,
        positions_key: str,
        use: Callable[[Unit, bool], None],
        *,
        models: Callable[[], str],
        on_failure: Callable[[StoreFailure], None],
        on_change: Callable[[], None],
        clock: Callable[[], float],
        wall: Callable[[], float],
        prepare: Callable[[], Awaitable[None]] | None = None,
        ready: Callable[[], bool] = lambda: True,
        max_entries: int = MAX_ENTRIES,
    ) -> None:
        self.name = name
        self._positions = positions
        self._use_unit = use
        self._models = models
        self._replica = store.replica
        self._on_change = on_change
        stream = store.stream(name, max_entries)
        self.outbox = Outbox(stream, store.replica, on_failure)
        self.own = OwnUnits(store.replica, positions)
        lease.on_lost.append(lambda: self.outbox.add_again(self.own.take()))
        self.inbox = Inbox(
            stream,
            lease,
            use=self._use,
            persisted=lambda: Positions.of(store.get_state(positions_key)),
            on_failure=on_failure,
            on_persisted=self.own.forget,
            clock=clock,
            wall=wall,
            prepare=prepare,
            ready=ready,
        )
        self.applied = 0
        """Units of other replicas that were counted."""
        self.failed = 0
        """Units that could not be used: a bug, or a batch of another version."""
        self.other_models = 0
        """Units about models that are not those of this replica: one of both was replaced under the same name."""

    def loops(self) -> list[Coroutine[Any, Any, None]]:
        """What has to run, until cancelled."""
        return [self.outbox.run(), self.inbox.run()]

    def send(self, unit: Unit) -> None:
        """To the leader, soon."""
        self.outbox.add(UNITS.encode(SentUnit(self._models(), unit)))

    def count_own(self, unit: Unit) -> None:
        """This replica leads, and is about to count a unit of its own."""
        self.own.count(UNITS.encode(SentUnit(self._models(), unit)))

    def _use(self, entry: StreamEntry) -> None:
        """What cannot be used is counted, and the rest is used all the same."""
        own = entry.sender.partition(" ")[0] == self._replica  # `OwnUnits` adds a number to the name
        models = self._models()
        for number, sent in enumerate(self._decoded(entry), entry.first):
            # First: the states may be written at any moment from here on.
            if not self._positions.advance(entry.sender, number):
                continue
            self.applied += 1
            if sent is None:
                self.failed += 1
                continue
            if not same_brief(sent.models, models):
                self.other_models += 1
                continue
            try:
                self._use_unit(sent.unit, own)
            except Exception:
                self.failed += 1
                log.exception("a unit of another replica could not be used")
        self._on_change()

    def _decoded(self, entry: StreamEntry) -> Sequence[SentUnit | None]:
        """None for each unit of a batch that cannot be read."""
        try:
            return BATCHES.decode(entry.data)
        except ValueError as error:
            log.error("a batch of another replica cannot be read: %s", error)
            return [None] * entry.items

    # --- what is shown ---------------------------------------------------------------------------------------------

    def status(self) -> dict[str, Any]:
        """JSON-ready, since this process started. Units, but for bytes and seconds."""
        return {
            "waiting": self.outbox.waiting,
            "sent": self.outbox.sent,
            "sent_bytes": self.outbox.sent_bytes,
            "dropped": self.outbox.dropped,
            "applied": self.applied,
            "repeated": self._positions.repeated,
            "lost": self._positions.lost,
            "failed": self.failed,
            "other_models": self.other_models,
            "lag_seconds": self.inbox.lag_seconds,
        }

    def samples(self) -> Iterator[Sample]:
        counts = self.status()
        for outcome in UnitOutcome:
            yield Sample(names.EVIDENCE_UNITS, (self.name, outcome), counts[outcome])
        yield Sample(names.EVIDENCE_BYTES, (self.name,), self.outbox.sent_bytes)
        yield Sample(names.EVIDENCE_WAITING_UNITS, (self.name,), self.outbox.waiting)
        yield Sample(names.EVIDENCE_LAG_SECONDS, (self.name,), self.inbox.lag_seconds)
