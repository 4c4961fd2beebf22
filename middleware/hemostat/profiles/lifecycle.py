"""The steps in the life of a profile: candidate, promoted, rolled back, dropped. Each is an event with its evidence.

What serves changes only here. `judging` (evidence), `proposals` (learning) and `operators` decide.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator
from typing import Any

from hemostat.metrics import names
from hemostat.metrics.samples import Sample
from hemostat.profiles.catalogue import Catalogue
from hemostat.profiles.decisions import Decision, EventLog, Reason, evidence_json
from hemostat.profiles.persistence import StateWriter
from hemostat.profiles.request_parameters import RequestParameters
from hemostat.profiles.scopes import ALL
from hemostat.profiles.serving import ServedModel, ServingState
from hemostat.profiles.trials import IMPORT, MAX_QUEUED_CANDIDATES, POOLED, Candidate, Trials
from hemostat_calibration import guard
from hemostat_calibration.profiles.profile import CalibrationProfile

log = logging.getLogger("hemostat.calibration")


class Lifecycle:
    """Counts of promotions and rollbacks are since this process started."""

    def __init__(
        self,
        *,
        catalogue: Catalogue,
        serving: ServingState,
        trials: Trials,
        events: EventLog,
        writer: StateWriter,
        requests: RequestParameters,
    ) -> None:
        self._catalogue = catalogue
        self._serving = serving
        self._scopes = serving.scopes
        self._trials = trials
        self._events = events
        self._writer = writer
        self._requests = requests
        self.promotions = 0
        self.rollbacks = 0

    def samples(self) -> Iterator[Sample]:
        yield Sample(names.PROFILE_PROMOTIONS, (), self.promotions)
        yield Sample(names.PROFILE_ROLLBACKS, (), self.rollbacks)

    # --- profiles held ---------------------------------------------------------------------------------------------

    def in_use(self) -> set[str]:
        """Versions that serve, are tested or wait for a test, are forced, or are the probe."""
        versions = {candidate.version for candidate in self._trials.queue} | self._scopes.selected()
        return versions | {v for v in (self._serving.forced, self._catalogue.probe) if v is not None}

    def engine_versions(self) -> list[str]:
        """Versions that engines should hold, most important first: engines evaluate those that come first, and report
        the logits of the anchors of the first one that reads any."""
        serving = self._serving
        held = [serving.forced, serving.selected, *self._trials.tested_versions, *serving.scope_profiles().values()]
        versions = list(dict.fromkeys(version for version in held if version is not None))
        probe = self._catalogue.probe
        if probe is not None and serving.mode != "off" and serving.forced is None:
            anchors = self._catalogue.anchor_set(probe)
            if all(self._catalogue.anchor_set(version) != anchors for version in versions):
                versions.append(probe)
        return versions

    def require_fit(self, profile: CalibrationProfile) -> None:
        """InvalidProfileError where the profile does not fit the model, or cannot be applied."""
        self._serving.require_model(profile)
        self._requests.require_fit(profile)

    def hold(self, profile: CalibrationProfile) -> None:
        """Add it to the catalogue; what is evicted for it leaves the store too."""
        for version in self._catalogue.add(profile, self.in_use()):
            self._writer.delete_profile(version)

    def forget(self, version: str) -> None:
        """Remove it from the catalogue and the queue; the store may keep it."""
        self._trials.remove(lambda c: c.version == version)
        self._catalogue.remove(version)

    # --- candidates ------------------------------------------------------------------------------------------------

    def test(self, profile: CalibrationProfile, scope: str, source: str) -> None:
        """Make it a candidate. Where the queue is full, the first of those that wait is dropped."""
        if len(self._trials.queue) >= MAX_QUEUED_CANDIDATES:
            self.drop(self._trials.waiting[0], Reason.NEWER, "the queue is full")
        self.hold(profile)
        self._trials.add(Candidate(profile.version, scope, source))

    def replace_proposals(
        self, scope: str, profiles: Iterable[CalibrationProfile], why: str, evidence: dict[str, Any]
    ) -> bool:
        """Test learned profiles of one family in place of that family's earlier candidates in this scope.

        False where all of them are in use already: then nothing changes.
        """
        fresh = [profile for profile in profiles if profile.version not in self.in_use()]
        if not fresh:
            return False
        family = fresh[0].family
        for old in [c for c in self._trials.queue if c.scope == scope and c.source == family]:
            self.drop(old, Reason.NEWER, "replaced by a proposal that was learned from more tokens")
            if old.version not in self.in_use():
                self.forget(old.version)
        for profile in fresh:
            self._events.record(Decision.PROPOSE, Reason.LEARNED, profile.version, scope, why, evidence)
            self.test(profile, scope, family)
        return True

    def drop(self, candidate: Candidate, reason: Reason, why: str) -> None:
        evidence = self.evidence(candidate)
        self._trials.remove(lambda c: c == candidate)
        self._events.record(Decision.DROP, reason, candidate.version, candidate.scope, why, evidence)

    def evidence(self, candidate: Candidate) -> dict[str, Any]:
        """JSON-ready; {} where it is not under test."""
        return evidence_json(self._trials.decide_candidate(candidate)) if candidate in self._trials.tested else {}

    # --- what serves -----------------------------------------------------------------------------------------------

    def promote(self, candidate: Candidate, proof: guard.Decision) -> None:
        """On evidence."""
        why = "better on held-out requests"
        evidence = evidence_json(proof)
        self._events.record(Decision.PROMOTE, Reason.EVIDENCE, candidate.version, candidate.scope, why, evidence)
        self.serve(candidate.version, candidate.scope, guard.window_after_promotion(proof.evidence))

    def serve(self, version: str, scope: str, window: int) -> None:
        """Let a profile serve a scope from now on, watched in windows of `window` held-out requests.

        The scope's other proposals leave the queue; tests against what served before begin anew.
        """
        state = self._scopes[scope]
        self.promotions += 1
        self._trials.unwatch_serving(scope)
        # Where the pooled profile has proven better than the scope's own, the scope has none of its own any more.
        own = scope == ALL or version != self._serving.selected
        state.selected, state.window, state.rolled_back = (version if own else None), window, False
        self._trials.remove(lambda c: c.scope == scope and (c.source != IMPORT or c.version == version))
        if own:
            self._trials.watch_serving(version, scope, window)
            self._writer.put_profile(self._catalogue.stored(version))
        self.serving_changed(scope)

    def roll_back(self, scope: str, reason: Reason, why: str, evidence: dict[str, Any]) -> None:
        """Let identity, or in a scope the pooled profile, serve again; nothing happens where the scope has none."""
        state = self._scopes[scope]
        version, state.selected = state.selected, None
        if version is None:
            return
        state.rolled_back = True
        self.rollbacks += 1
        unpinned = self._serving.pinned and scope == ALL
        self._serving.pinned = self._serving.pinned and not unpinned
        self._trials.unwatch_serving(scope)
        self._events.record(Decision.ROLL_BACK, reason, version, scope, why, evidence)
        self.serving_changed(scope, unpinned=unpinned)

    def serving_changed(self, scope: str, *, unpinned: bool = False) -> None:
        """Write what serves, and begin the tests anew that are compared with it.

        unpinned: what serves has also changed in scopes with a profile of their own, which the pinned one replaced.
        """
        self._writer.write_serving()
        self._trials.remove(lambda c: c.source == POOLED and scope in (ALL, c.scope))
        own = self._serving.scope_profiles()
        self._trials.restart(lambda c: unpinned or c.scope in (scope, ALL) or (scope == ALL and c.scope not in own))
        if scope == ALL and self._serving.selected is not None:
            for other in own:
                self._trials.add(Candidate(self._serving.selected, other, POOLED))

    # --- the model -------------------------------------------------------------------------------------------------

    def set_model(self, model: ServedModel) -> None:
        """Both models are known. What was learned or promoted for another model is dropped or rolled back."""
        self._serving.model = model
        proposals = {c.version for c in self._trials.queue if c.source != IMPORT}
        self._trials.remove(lambda c: c.source != IMPORT)
        for scope, state in self._scopes.items():
            selected = self._catalogue.get(state.selected)
            if selected is not None and (
                selected.vocab_size != model.vocab_size or selected.model not in {"", model.name}
            ):
                made_for = f"{selected.model or 'a model'} of {selected.vocab_size} ids"
                self.roll_back(scope, Reason.OTHER_MODEL, f"it was made for {made_for}", {})
        for version in list(self._catalogue):
            vocab_size = self._catalogue[version].vocab_size
            if vocab_size != model.vocab_size:
                log.error(
                    "profile %s is for a vocabulary of %d ids, the model has %d", version, vocab_size, model.vocab_size
                )
                if version == self._serving.forced:
                    self._serving.forced = None
                self.forget(version)
            elif version in proposals and version not in self.engine_versions():
                self.forget(version)
