"""Evidence of this replica to the leader, and of all others to their users here where this replica leads."""

from __future__ import annotations

import logging
from collections.abc import Callable, Coroutine, Iterator
from typing import Any

from hemostat.evidence import units
from hemostat.evidence.checkpoint import POSITIONS_KEY, Checkpoint
from hemostat.evidence.inbox import Inbox
from hemostat.evidence.outbox import Outbox
from hemostat.evidence.positions import Positions
from hemostat.evidence.units import AlarmPart, JudgedPart, NoiseFloorUnit, OutcomeUnit, ScoredUnit
from hemostat.ipc.messages import OutcomeReport
from hemostat.measurement.alarms import Alarms
from hemostat.measurement.outcomes import Outcomes
from hemostat.metrics import names
from hemostat.metrics.samples import Sample
from hemostat.profiles.manager import ProfileManager
from hemostat.profiles.units import HeldOutUnit
from hemostat.shadow.seen_units import SeenUnits
from hemostat.store.lease import Lease
from hemostat.store.protocol import SharedStore, StoreFailure
from hemostat_calibration import alarm
from hemostat_calibration.arrays import Floats
from hemostat_calibration.divergence.per_token import TokenDivergence
from hemostat_calibration.divergence.record_gains import RecordGains
from hemostat_calibration.records import TokenRecord

log = logging.getLogger("hemostat.evidence")

STREAM = "evidence"


class UnitConsumers:
    """The users of evidence at the leader. A unit is used exactly as a request that the leader has scored itself.

    seen: of the leader's own requests, too.
    """

    def __init__(self, alarms: Alarms, profiles: ProfileManager, outcomes: Outcomes, seen: SeenUnits) -> None:
        self._alarms = alarms
        self._profiles = profiles
        self._outcomes = outcomes
        self._seen = seen

    def use(self, unit: units.Unit) -> None:
        match unit:
            case ScoredUnit():
                self._use_scored(unit)
            case NoiseFloorUnit(model, divergences):
                self._alarms.observe_noise_floor(model, units.unpacked(divergences))
            case OutcomeUnit(report):
                self._outcomes.receive(report)

    def _use_scored(self, unit: ScoredUnit) -> None:
        profiles = self._profiles
        kind = profiles.kinds.see(unit.kind)
        fresh = unit.fresh and self._seen.add_conversation(unit.unit if unit.recognized else b"", kind)
        if unit.alarm is not None and fresh:
            if unit.adapted:
                self._alarms.count(kind)
            else:
                divergences, spreads = units.unpacked(unit.alarm.divergences), units.unpacked(unit.alarm.spreads)
                self._alarms.observe_unit(kind, divergences, spreads)
        if unit.judged is not None and profiles.serving.active:
            judged, distances = unit.judged, units.unpacked_distances(unit.judged.distances)
            of_tests = HeldOutUnit(
                kind, unit.unit, unit.client, unit.tokens, fresh, unit.adapted, judged.gains.get, distances
            )
            profiles.judge_unit(of_tests, judged.scope, judged.constraint)


class EvidenceExchange:
    """Lives in the control process's event loop. Implements `hemostat.shadow.evidence_receiver.EvidenceReceiver`.

    checkpoint, positions: of the states that evidence goes into. on_failure: called with every failure of the store.
    on_change: called after evidence of other replicas was used.
    """

    def __init__(
        self,
        store: SharedStore,
        lease: Lease,
        checkpoint: Checkpoint,
        positions: Positions,
        consumers: UnitConsumers,
        profiles: ProfileManager,
        outcomes: Outcomes,
        *,
        on_failure: Callable[[StoreFailure], None],
        on_change: Callable[[], None],
        clock: Callable[[], float],
        wall: Callable[[], float],
    ) -> None:
        self._lease = lease
        self._checkpoint = checkpoint
        self._positions = positions
        self._consumers = consumers
        self._profiles = profiles
        self._outcomes = outcomes
        self._on_change = on_change
        stream = store.stream(STREAM)
        self.outbox = Outbox(stream, store.replica, on_failure)
        self.inbox = Inbox(
            stream,
            lease,
            positions,
            use=self._use,
            persisted=lambda: Positions.of(store.get_state(POSITIONS_KEY)),
            on_failure=on_failure,
            clock=clock,
            wall=wall,
        )
        self.failed = 0
        """Units that could not be used: a bug, or a batch of another version."""

    def loops(self) -> list[Coroutine[Any, Any, None]]:
        """What has to run, until cancelled."""
        return [self.outbox.run(), self.inbox.run()]

    # --- this replica's own ----------------------------------------------------------------------------------------

    @property
    def counts_here(self) -> bool:
        """Also while the store does not answer the last leader: it goes on watching what serves."""
        return self._lease.is_last_leader

    def note_own(self) -> None:
        self._checkpoint.note_own()

    def receive_outcome(self, report: OutcomeReport) -> None:
        """From a relay of this replica."""
        if self.counts_here:
            self._outcomes.receive(report)
            self._checkpoint.note_own_outcome()
        else:
            self._send(OutcomeUnit(report))

    def send_noise_floor(self, model: str, divergences: Floats) -> None:
        self._send(NoiseFloorUnit(model, units.packed(divergences)))

    def send_scored(
        self, record: TokenRecord, kind: str, figures: TokenDivergence | None, gains: RecordGains, *, fresh: bool
    ) -> None:
        counted = None
        if figures is not None and fresh:
            counted = AlarmPart(units.packed(figures.kl_rc), units.packed(alarm.spread(record)))
        unit = ScoredUnit(
            kind=kind,
            unit=record.unit,
            recognized=bool(record.conversation),
            client=record.client,
            tokens=record.tokens,
            fresh=fresh,
            adapted=record.adapter is not None,
            alarm=counted,
            judged=self._judged(record, gains),
        )
        self._send(unit)

    def _judged(self, record: TokenRecord, gains: RecordGains) -> JudgedPart | None:
        profiles = self._profiles
        if not profiles.serving.uses(record) or not profiles.is_held_out(record):
            return None
        over_identity = {}
        if record.adapter is None:
            of_tests = profiles.held_out_unit(record, gains, fresh=True)
            for version in profiles.trials.compared(record.kind):
                interval = of_tests.gain(version)
                if interval is not None:
                    over_identity[version] = interval
        scope, distances = profiles.scope_name(record), units.packed_distances(record.distances)
        return JudgedPart(scope, record.constraint, over_identity, distances)

    def _send(self, unit: units.Unit) -> None:
        self.outbox.add(units.UNITS.encode(unit))

    # --- of other replicas -----------------------------------------------------------------------------------------

    def _use(self, data: bytes) -> None:
        """One batch. What cannot be used is counted, and the rest is used all the same."""
        try:
            batch = units.BATCHES.decode(data)
        except ValueError as error:
            self.failed += 1
            log.error("a batch of evidence of another replica cannot be read: %s", error)
            return
        for unit in batch:
            try:
                self._consumers.use(unit)
            except Exception:
                self.failed += 1
                log.exception("evidence of another replica could not be used")
        self._on_change()

    # --- what is shown ---------------------------------------------------------------------------------------------

    def status(self) -> dict[str, Any]:
        """JSON-ready, since this process started. Units, but for bytes and seconds."""
        return {
            "waiting": self.outbox.waiting,
            "sent": self.outbox.sent,
            "sent_bytes": self.outbox.sent_bytes,
            "dropped": self.outbox.dropped,
            "applied": self.inbox.applied,
            "repeated": self._positions.repeated,
            "lost": self._positions.lost,
            "failed": self.failed,
            "lag_seconds": self.inbox.lag_seconds,
        }

    def samples(self) -> Iterator[Sample]:
        counts = self.status()
        for event in ("sent", "dropped", "applied", "repeated", "lost", "failed"):
            yield Sample(names.EVIDENCE_UNITS, (event,), counts[event])
        yield Sample(names.EVIDENCE_BYTES, (), self.outbox.sent_bytes)
        yield Sample(names.EVIDENCE_WAITING, (), self.outbox.waiting)
        yield Sample(names.EVIDENCE_LAG_SECONDS, (), self.inbox.lag_seconds)
