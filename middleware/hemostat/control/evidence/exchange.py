"""What a scored request, or an answer's outcome, proves: sent by followers, and used by the leader."""

from __future__ import annotations

from contextlib import AbstractContextManager

from hemostat.control.evidence import units
from hemostat.control.evidence.checkpoint import Checkpoint
from hemostat.control.evidence.lane import Lane
from hemostat.control.evidence.units import AlarmPart, EnginePart, JudgedPart, NoiseFloorUnit, OutcomeUnit, ScoredUnit
from hemostat.ipc.messages import OutcomeReport
from hemostat.measurement.alarms import Alarms
from hemostat.measurement.by_engine import ByEngine, engine_unit
from hemostat.measurement.outcomes import Outcomes
from hemostat.profiles.manager import ProfileManager
from hemostat.profiles.units import HeldOutUnit
from hemostat.shadow.seen_units import SeenUnits
from hemostat.store.lease import Lease
from hemostat_calibration import alarm
from hemostat_calibration.alarm import odd_engine
from hemostat_calibration.arrays import Floats
from hemostat_calibration.divergence.per_token import TokenDivergence
from hemostat_calibration.divergence.record_gains import RecordGains
from hemostat_calibration.records import TokenRecord


class UnitConsumers:
    """The users of evidence at the leader. A unit is used exactly as a request that the leader has scored itself.

    Of its own, sent before it led, the leader has already noted the conversation and the noise floor.

    seen: of the leader's own requests, too.
    """

    def __init__(
        self, alarms: Alarms, engines: ByEngine, profiles: ProfileManager, outcomes: Outcomes, seen: SeenUnits
    ) -> None:
        self._alarms = alarms
        self._engines = engines
        self._profiles = profiles
        self._outcomes = outcomes
        self._seen = seen

    def use(self, unit: units.Unit, *, own: bool) -> None:
        """own: this replica has scored it."""
        match unit:
            case ScoredUnit():
                self._use_scored(unit, own=own)
            case NoiseFloorUnit(model, divergences):
                if not own:
                    self._alarms.observe_noise_floor(model, units.unpacked(divergences))
            case OutcomeUnit(report):
                self._outcomes.receive(report)

    def _use_scored(self, unit: ScoredUnit, *, own: bool) -> None:
        profiles = self._profiles
        kind = profiles.kinds.see(unit.kind)
        conversation = unit.unit if unit.recognized else b""
        fresh = unit.fresh and (own or self._seen.add_conversation(conversation, kind))
        if unit.alarm is not None and fresh:
            if unit.adapted:
                self._alarms.count(kind)
            else:
                divergences, spreads = units.unpacked(unit.alarm.divergences), units.unpacked(unit.alarm.spreads)
                self._alarms.observe_unit(kind, divergences, spreads)
        if unit.engine is not None and fresh:
            of = unit.engine
            self._engines.observe_unit(kind, of.applied, odd_engine.Unit(of.engine, of.figure, of.tokens))
        if unit.judged is not None and profiles.serving.active:
            judged, distances = unit.judged, units.unpacked_distances(unit.judged.distances)
            of_tests = HeldOutUnit(
                kind, unit.unit, unit.client, unit.tokens, fresh, unit.adapted, judged.gains.get, distances
            )
            profiles.judge_unit(of_tests, judged.scope, judged.constraint)


class EvidenceExchange:
    """Lives in the control process's event loop. Implements `hemostat.shadow.evidence_receiver.EvidenceReceiver`.

    checkpoint: of the states that evidence goes into. lane: how units reach the leader.
    """

    def __init__(
        self, lane: Lane, lease: Lease, checkpoint: Checkpoint, profiles: ProfileManager, outcomes: Outcomes
    ) -> None:
        self.lane = lane
        self._lease = lease
        self._checkpoint = checkpoint
        self._profiles = profiles
        self._outcomes = outcomes

    @property
    def counts_here(self) -> bool:
        """Also while the store does not answer the last leader: it goes on watching what serves."""
        return self._lease.is_last_leader

    def unit(self) -> AbstractContextManager[None]:
        return self._checkpoint.unit()

    def receive_outcome(self, report: OutcomeReport) -> None:
        """From a relay of this replica."""
        unit = OutcomeUnit(report)
        if self.counts_here:
            with self._checkpoint.unit():
                self.lane.count_own(unit)
                self._outcomes.receive(report)
                self._checkpoint.note_own_outcome()
        else:
            self.lane.send(unit)

    def send_noise_floor(self, model: str, divergences: Floats) -> None:
        self.lane.send(NoiseFloorUnit(model, units.packed(divergences)))

    def share_scored(
        self, record: TokenRecord, kind: str, figures: TokenDivergence | None, gains: RecordGains, *, fresh: bool
    ) -> None:
        counted = answered = None
        if figures is not None and fresh:
            counted = AlarmPart(units.packed(figures.kl_rc), units.packed(alarm.spread(record)))
            if (of := engine_unit(record, figures)) is not None:
                answered = EnginePart(of.engine, record.applied or "", of.figure, of.tokens)
        unit = ScoredUnit(
            kind=kind,
            unit=record.unit,
            recognized=bool(record.conversation),
            client=record.client,
            tokens=record.tokens,
            fresh=fresh,
            adapted=record.adapter is not None,
            alarm=counted,
            engine=answered,
            judged=self._judged(record, gains),
        )
        if self.counts_here:
            self.lane.count_own(unit)
            self._checkpoint.note_own()
        else:
            self.lane.send(unit)

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
