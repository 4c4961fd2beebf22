"""`ProfileManager` composes the parts of a profile's life for the control process; no part knows it.

Invariants (the ones of what serves are in `serving`, the ones of tests in `trials`):
- A record is learned from or judged by, never both: decided by its evidence unit.
- A record of an adapter is of another model: what the others change is not learned from it.
- A constrained record is conditional on what a grammar allows: nothing is learned from it, and it is judged by in its
  own kind alone, whose profiles were proven on such records. Adapters are not judged there: their exact distances are
  not conditional.
- Learning pools all traffic. Serving does not: a profile serves a kind of traffic (`followed_kinds`) only on evidence
  of this kind, and leaves it by itself.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace

from hemostat.config.schema import Adapter, Calibration, Evidence
from hemostat.ipc.messages import REST_KIND, rest_of
from hemostat.metrics.samples import Sample
from hemostat.profiles.begun_tests import BegunTests
from hemostat.profiles.candidates import Origin
from hemostat.profiles.catalogue import Catalogue
from hemostat.profiles.decisions import EventLog, Reason
from hemostat.profiles.followed_kinds import FollowedKinds
from hemostat.profiles.gains import Gains
from hemostat.profiles.judging import Judge, is_held_out
from hemostat.profiles.lifecycle import Lifecycle
from hemostat.profiles.operators import Operator
from hemostat.profiles.persistence import StateWriter
from hemostat.profiles.proposals import Proposals
from hemostat.profiles.report import Report
from hemostat.profiles.restoring import Restoring
from hemostat.profiles.serving import ServedModel, ServingState
from hemostat.profiles.trials import Trials
from hemostat.scored_record import ScoredRecord
from hemostat.store.protocol import StoreWrites
from hemostat_calibration.elapsed import TimeBreak
from hemostat_calibration.profiles.adapter import ADAPTER
from hemostat_calibration.profiles.profile import CalibrationProfile
from hemostat_calibration.records import TokenRecord
from hemostat_calibration.statistics.split import held_out


class ProfileManager:
    """Lives in the control process's event loop. Its attributes are the parts, to be handed to whoever needs one.

    wall: Unix time, seconds.
    """

    def __init__(
        self,
        settings: Calibration,
        writes: StoreWrites,
        wall: Callable[[], float],
        *,
        evidence: Evidence | None = None,
        adapter: Adapter | None = None,
    ) -> None:
        evidence, adapter = evidence or Evidence(), adapter or Adapter()
        self._held_out_fraction = settings.held_out_fraction
        self._wall = wall
        self.catalogue = Catalogue(wall)
        self.serving = ServingState(
            settings.mode,
            changes_weights=self.catalogue.changes_weights,
        )
        self.events = EventLog(writes, wall)
        self.gains = Gains(self.catalogue.gain_width, self.catalogue.changes_weights)
        self.trials = Trials(
            settings.alpha,
            evidence.client_share,
            self.gains,
            self.serving,
            BegunTests(writes),
            evidence.cycle_seconds,
        )
        self.kinds = FollowedKinds(evidence.kinds, wall, keep=lambda: self.serving.fixed)
        self.writer = StateWriter(
            writes, settings.mode, wall, serving=self.serving, kinds=self.kinds, trials=self.trials
        )
        self.lifecycle = Lifecycle(
            catalogue=self.catalogue,
            serving=self.serving,
            trials=self.trials,
            events=self.events,
            writer=self.writer,
        )
        self.kinds.on_followed = self.lifecycle.kind_followed
        self.kinds.on_evicted = self.lifecycle.kind_evicted
        self.judge = Judge(
            wall,
            catalogue=self.catalogue,
            serving=self.serving,
            trials=self.trials,
            lifecycle=self.lifecycle,
            gains=self.gains,
        )
        self.proposals = Proposals(
            settings,
            catalogue=self.catalogue,
            serving=self.serving,
            trials=self.trials,
            lifecycle=self.lifecycle,
            writer=self.writer,
            min_tokens={ADAPTER: adapter.min_tokens},
        )
        self.operator = Operator(
            catalogue=self.catalogue,
            serving=self.serving,
            trials=self.trials,
            lifecycle=self.lifecycle,
            events=self.events,
            writer=self.writer,
        )
        self.restoring = Restoring(
            catalogue=self.catalogue,
            serving=self.serving,
            kinds=self.kinds,
            trials=self.trials,
            events=self.events,
            lifecycle=self.lifecycle,
            proposals=self.proposals,
            writer=self.writer,
        )
        self.report = Report(
            catalogue=self.catalogue,
            serving=self.serving,
            kinds=self.kinds,
            trials=self.trials,
            events=self.events,
            wall=wall,
        )

    def set_model_pair(self, model: str, vocab_size: int, names: frozenset[str] | None = None) -> None:
        """Takes the pair once both models are known and have the same token ids: profiles can be proposed and tested.
        Proposals begin anew if the models are others than before.

        model: the served name of the compressed one. names: all of its names, and the names of its adapters that the
        reference can score.
        """
        self.serving.names = names
        served = ServedModel(model, vocab_size)
        if served != self.serving.model:
            others = self.serving.model is not None
            self.lifecycle.set_model(served)
            if others:
                self.proposals.restart()
            else:
                self.proposals.update_proposed()

    def forget_evidence(self, why: str) -> None:
        """Forgets the evidence, since the models are others than the ones that it is about: identity serves, and all
        tests begin anew."""
        for kind in list(self.serving.kinds):
            self.lifecycle.roll_back(kind, Reason.OTHER_MODEL, why, {})
        self.trials.remove(lambda candidate: candidate.source is not Origin.IMPORT)
        for state in self.serving.kinds.values():
            state.tried, state.held = [], ""
        self.serving.former.clear()
        self.trials.restart()
        self.proposals.restart()

    def after_break(self, time_break: TimeBreak) -> None:
        """Notes that the clock was set: what has to span cycles of the traffic begins again, or goes on without the
        time that was lost. Evidence stays."""
        self.trials.guard.after_break(time_break)
        self.kinds.after_break(time_break)
        self.writer.after_break(time_break)

    # --- a scored record -------------------------------------------------------------------------------------------

    def is_held_out(self, record: TokenRecord) -> bool:
        """Returns True if the record's unit is for judging: nothing is ever learned from it."""
        return is_held_out(record, self._held_out_fraction)

    def learns_from(self, record: TokenRecord) -> bool:
        """Returns True if profiles that change logits are learned from the record now."""
        learned = record.adapter is None and not record.constraint and self.serving.uses(record)
        return learned and not self.is_held_out(record)

    def distance_versions(self, record: TokenRecord) -> tuple[str, ...]:
        """Returns the versions whose exact distances judging this record takes, `IDENTITY` first; none where it takes
        none."""
        if record.constraint or not self.serving.uses(record) or not self.is_held_out(record):
            return ()
        return self.trials.distance_versions(
            record.kind if record.kind in self.serving.kinds else REST_KIND, record.unit
        )

    @property
    def is_testing(self) -> bool:
        """It is True if a candidate is tested: see `awaits`."""
        return bool(self.trials.tested)

    def awaits(self, model: str, kind: str, unit: bytes) -> bool:
        """Returns True if a candidate's test can count a request of this served model, kind and unit, so that its score
        brings a decision nearer.
        """
        serving = self.serving
        if not serving.active or (serving.names is not None and model not in serving.names):
            return False
        place = kind if kind in serving.kinds else rest_of(kind)
        return held_out(unit, self._held_out_fraction) and self.trials.awaits(place, unit)

    def may_need_distances(self, unit: bytes) -> bool:
        """Returns True if a record of this unit may take distances: it is held out, and an adapter serves or is
        tested.
        """
        return bool(self.lifecycle.adapter_versions()) and held_out(unit, self._held_out_fraction)

    def calibrated_profile(self, record: TokenRecord) -> CalibrationProfile | None:
        """Returns the profile that the record's `calibrated` figures are about: the one that was served, or that would
        have been.
        """
        version = record.applied if record.applied is not None else self.serving.would_serve(record)
        return self.catalogue.get(version)

    def update(self, scored: ScoredRecord) -> None:
        """Judges by a record, if it is held out; if its kind is not followed, it counts as one of the rest. Tests know
        by themselves which units they have counted.
        """
        record = scored.record
        if not self.serving.uses(record):
            return
        kind = self._place(record)
        if kind is None:
            return
        if scored.fresh and record.adapter is None:
            self.trials.update_dependence(kind, record.client, scored.figures.kl_rc, self._wall())
        if self.is_held_out(record):
            self.judge.update(replace(scored, record=replace(record, kind=kind)))

    def _place(self, record: TokenRecord) -> str | None:
        """Counts a record, and returns the kind that it counts in; None if it counts in none."""
        self.writer.update()
        kind = record.kind
        if kind not in self.serving.kinds:
            if record.constraint:
                return None  # nothing serves the rest of what a grammar restricts
            kind = REST_KIND
        return kind

    # --- metrics ---------------------------------------------------------------------------------------------------

    def samples(self) -> Iterator[Sample]:
        """Yields the metrics of decisions, and of the profiles that serve or would, by kind."""
        yield from self.events.samples()
        yield from self.report.samples()

    # --- what engines, the reference and relays get ----------------------------------------------------------------

    def engine_versions(self) -> list[str]:
        """Returns the versions that engines should hold, most important first."""
        return self.lifecycle.engine_versions()

    def evaluated_profiles(self) -> tuple[CalibrationProfile, ...]:
        """Returns the profiles whose effect the reference computes for every scored request: those that change logits
        alone."""
        if self.serving.mode == "off":
            return ()
        not_evaluated = {self.catalogue.probe, *self.catalogue.adapters}
        versions = (version for version in self.engine_versions() if version not in not_evaluated)
        return tuple(self.catalogue[version] for version in versions)
