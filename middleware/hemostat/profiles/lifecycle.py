"""The steps in the life of a profile: candidate, promoted, rolled back, dropped. Each is an event with its evidence.

What serves changes only here, in one kind of traffic at a time. `judging` (evidence), `proposals` (learning) and
`operators` decide.
"""

from __future__ import annotations

import logging
from typing import Any

from hemostat.ipc.messages import rest_of
from hemostat.profiles.candidates import Candidate, Origin, Proposed, Source
from hemostat.profiles.catalogue import MAX_ONE_PROFILE_BYTES, Catalogue, parameter_bytes
from hemostat.profiles.decisions import Decision, EventLog, Reason, evidence_json, pooled_gain
from hemostat.profiles.persistence import StateWriter
from hemostat.profiles.serving import KindState, ServedModel, ServingState
from hemostat.profiles.trials import MAX_QUEUED_CANDIDATES, Trials
from hemostat_calibration.errors import InvalidProfileError
from hemostat_calibration.guard.guard import DEFAULT_WINDOW, window_after_promotion
from hemostat_calibration.profiles.profile import CalibrationProfile

log = logging.getLogger("hemostat.calibration")


class Lifecycle:
    """Decides nothing itself: it carries decisions out, and records them as events."""

    def __init__(
        self,
        *,
        catalogue: Catalogue,
        serving: ServingState,
        trials: Trials,
        events: EventLog,
        writer: StateWriter,
    ) -> None:
        self._catalogue = catalogue
        self._serving = serving
        self._trials = trials
        self._events = events
        self._writer = writer

    # --- profiles held ---------------------------------------------------------------------------------------------

    def in_use(self) -> set[str]:
        """Versions that serve, are tested or wait for a test, or are the probe."""
        versions = {candidate.version for candidate in self._trials.queue} | set(self._serving.versions)
        return versions if self._catalogue.probe is None else versions | {self._catalogue.probe}

    def engine_versions(self) -> list[str]:
        """Returns the versions that engines should hold, most important first; adapters last, in the order of
        `adapter_versions`.

        In addition to the profile that they apply, engines evaluate the versions that come first: the candidates, so
        that they are tested in every kind whatever serves there. In `observe` nothing is applied, so what would serve
        comes first. Engines report the logits of the anchors of the first one that reads any.
        """
        serving = self._serving
        tested, selected = self._trials.tested_versions, serving.versions
        ordered = [*tested, *selected] if serving.mode == "auto" else [*selected[:1], *tested, *selected[1:]]
        adapters = self.adapter_versions()
        versions = [version for version in dict.fromkeys(ordered) if version not in adapters]
        probe = self._catalogue.probe
        if probe is not None and serving.mode != "off":
            anchors = self._catalogue.anchor_set(probe)
            if all(self._catalogue.anchor_set(version) != anchors for version in versions):
                versions.append(probe)
        return [*versions, *adapters]

    def adapter_versions(self) -> list[str]:
        """Returns the versions of the family `adapter` that engines should have loaded, most important first: what
        serves (or in `observe` would), and what is tested, so that it can serve as soon as it is proven."""
        ordered = dict.fromkeys([*self._serving.versions, *self._trials.tested_versions])
        return [version for version in ordered if self._catalogue.changes_weights(version)]

    def require_fit(self, profile: CalibrationProfile) -> None:
        """Raises InvalidProfileError if the profile does not fit the model, is too large to be kept, or cannot be
        applied."""
        size = parameter_bytes(profile)
        if size > MAX_ONE_PROFILE_BYTES:
            raise InvalidProfileError(
                f"profile has {size >> 20} MiB of parameters, above {MAX_ONE_PROFILE_BYTES >> 20}: "
                "choose a smaller rank"
            )
        self._serving.require_model(profile)

    def hold(self, profile: CalibrationProfile) -> None:
        """Adds it to the catalogue; what is evicted for it leaves the store too."""
        for version in self._catalogue.keep(profile, self.in_use()):
            self._writer.delete_profile(version)

    def forget(self, version: str) -> None:
        """Removes it from the catalogue and the queue; the store may keep it."""
        self._trials.remove(lambda c: c.version == version)
        self._catalogue.remove(version)

    # --- candidates ------------------------------------------------------------------------------------------------

    def test(self, profile: CalibrationProfile, source: Source) -> None:
        """Makes it a candidate. If the queue is full, the first of those that wait is dropped, if possible one whose
        test has not begun.

        It is stored, so that its test goes on after a restart.
        """
        if len(self._trials.queue) >= MAX_QUEUED_CANDIDATES:
            first = min(self._trials.waiting, key=self._trials.has_begun)
            self.drop(first, Reason.NEWER, "the queue is full")
        proposal = 1 + max((candidate.proposal for candidate in self._trials.queue), default=0)
        self.hold(profile)
        self._trials.enqueue(Candidate(profile.version, source, proposal))
        self._writer.put_profile(self._catalogue.stored(profile.version))
        self._writer.write_serving()

    def replace_proposals(self, profile: CalibrationProfile, why: str, evidence: dict[str, Any]) -> bool:
        """Tests a learned profile. It waits until the tests of earlier proposals of its family have ended, and takes
        the place of those whose tests have not begun.

        Returns False if it is in use already: then nothing changes.
        """
        if profile.version in self.in_use():
            return False
        source = Proposed(profile.family)
        earlier = [c for c in self._trials.queue if c.source == source]
        for old in earlier:
            if self._trials.has_begun(old):
                continue
            self.drop(old, Reason.NEWER, "replaced by a proposal that was learned from more tokens")
            if old.version not in self.in_use():
                self.forget(old.version)
                self._writer.delete_profile(old.version)
        self._events.record(Decision.PROPOSE, Reason.LEARNED, profile.version, why, evidence)
        self.test(profile, source)
        return True

    def drop(self, candidate: Candidate, reason: Reason, why: str) -> None:
        evidence = self.evidence(candidate)
        if candidate.version in self._serving.versions:
            why += "; it serves on where it was proven"
        self._trials.remove(lambda c: c == candidate)
        self._events.record(Decision.DROP, reason, candidate.version, why, evidence)
        self._writer.write_serving()

    def reject(self, version: str, why: str) -> None:
        """Rejects a version that an engine does not apply as it should: it is not tested, and serves only where it is
        pinned."""
        for candidate in [c for c in self._trials.queue if c.version == version]:
            self.drop(candidate, Reason.PROBE, why)
        for kind, state in list(self._serving.kinds.items()):
            if state.version == version and not state.pinned:
                self.roll_back(kind, Reason.PROBE, why, {})

    def evidence(self, candidate: Candidate) -> dict[str, Any]:
        """Returns the evidence of all kinds together, JSON-ready; {} if the version is not under test."""
        result = self._trials.evidence_by_kind(candidate)
        if not result:
            return {}
        return {
            "units": sum(each.units for each in result.values()),
            "tokens": sum(each.tokens for each in result.values()),
            **pooled_gain(result.values()),
            "kinds": {kind: evidence_json(each) for kind, each in result.items()},
        }

    # --- what serves -----------------------------------------------------------------------------------------------

    def promote(self, candidate: Candidate, kind: str) -> None:
        """Promotes a candidate in this kind on the evidence of its test."""
        proof = self._trials.evidence(candidate, kind)
        self.serve(candidate.version, kind, window_after_promotion(proof), chosen=False)
        self._events.record(
            Decision.PROMOTE,
            Reason.EVIDENCE,
            candidate.version,
            "better on held-out requests of this kind",
            evidence_json(proof),
            kind,
        )

    def serve(self, version: str, kind: str, window: int = DEFAULT_WINDOW, *, chosen: bool) -> None:
        """Lets a profile serve a kind from now on, watched in windows of `window` held-out units.

        Whoever calls this records the event afterwards: a process that is killed between the two writes has lost the
        event, and not what serves. `roll_back` records its event first.

        chosen: an operator chose it. The tests of other proposals in this
        kind end. The tests of imports, which were compared with what served before, begin anew. A newer build of the
        profile waits on: it will be compared with what serves from now on.
        """
        state = self._serving.kinds[kind]
        if state.version is not None and state.version != version:
            state.update_tried(state.version)
        state.version, state.window, state.chosen, state.held = version, window, chosen, ""
        self._serving.rolled_back = False
        self._trials.watch(kind, like=version)
        self._trials.freeze(version, kind)
        # Looked up first: what has begun is behind nothing.
        newer = {c.version for c in self._trials.queue if version in self._trials.behind(c)}
        self._trials.begin_in(kind, ends=lambda c: c.source is not Origin.IMPORT and c.version not in {version, *newer})
        self._writer.put_profile(self._catalogue.stored(version))
        self._serving_changed()

    def roll_back(self, kind: str, reason: Reason, why: str, evidence: dict[str, Any]) -> None:
        """Lets identity serve a kind again; nothing happens if it does already. Other kinds keep what serves them.

        With `Reason.OUTCOMES` the kind is held at identity until an operator releases it. evidence: JSON-ready.
        """
        state = self._serving.kinds.get(kind)
        if state is None or state.version is None:
            return
        version = state.version
        self._end_serving(kind, state)
        state.update_tried(version)
        self._serving.rolled_back = True
        if reason is Reason.OUTCOMES:
            state.held = why
        self._events.record(Decision.ROLL_BACK, reason, version, why, evidence, kind)
        self._trials.begin_in(kind, ends=lambda _: reason is Reason.OUTCOMES)
        self._serving_changed()

    def limit_adapters(self, limit: int, reason: Reason, why: str) -> None:
        """Limits the number of adapters that can serve. Of the serving ones, the adapters stay that an operator has
        pinned or chosen, then the ones with the most traffic."""
        kinds = self._serving.kinds
        adapters = [version for version in self._serving.versions if self._catalogue.changes_weights(version)]

        def importance(version: str) -> tuple[bool, bool]:
            states = [state for state in kinds.values() if state.version == version]
            return any(state.pinned for state in states), any(state.chosen for state in states)

        adapters.sort(key=importance, reverse=True)
        for version in adapters[limit:]:
            for kind in [name for name, state in kinds.items() if state.version == version]:
                self.roll_back(kind, reason, why, {})

    def release(self, kind: str) -> None:
        """Lets profiles be tested again, and serve, in a kind that was held at identity."""
        self._serving.kinds[kind].held = ""
        self._test_in(kind)
        self._serving_changed()

    def _end_serving(self, kind: str, state: KindState) -> None:
        state.version, state.pinned, state.chosen = None, False, False
        self._trials.unwatch(kind)

    def _serving_changed(self) -> None:
        self._writer.write_serving()
        self._writer.write_tests()

    # --- kinds -----------------------------------------------------------------------------------------------------

    def kind_followed(self, kind: str) -> None:
        """Gives a kind a place of its own from now on: identity serves it until a profile is proven there.

        Its requests belonged to the rest until now: what an operator has chosen for the rest goes on serving them. What
        a grammar restricts did not.
        """
        rest = self._serving.kinds.get(rest_of(kind))
        state = self._serving.kinds[kind] = self._serving.former.pop(kind, KindState())
        if not state.held and rest is not None and rest.chosen and rest.version is not None:
            state.version, state.window = rest.version, rest.window
            state.chosen, state.pinned = True, rest.pinned
            self._trials.watch(kind)
        self._writer.write_serving()

    def update_units(self, kind: str) -> None:
        """Counts a held-out unit of this kind; with the first one, tests begin there."""
        state = self._serving.kinds[kind]
        state.units += 1
        if state.units == 1:
            self._test_in(kind)

    def kind_evicted(self, kind: str) -> None:
        """Is told that another kind has taken this one's place: its requests belong to the rest from now on, and what
        served it is lost. What was tried there is remembered."""
        state = self._serving.kinds[kind]
        self._trials.forget_kind(kind)
        if state.version is not None:
            version = state.version
            self._end_serving(kind, state)
            why = "another kind of traffic is more frequent, and took its place"
            self._events.record(Decision.ROLL_BACK, Reason.EVICTED, version, why, {}, kind)
        self._serving.forget_kind(kind)
        self._serving_changed()

    def _test_in(self, kind: str) -> None:
        """Begins tests there: of the candidates, and of what serves other kinds already."""
        self._trials.begin_in(kind)
        for other in list(self._serving.kinds.values()):
            if other.version is None or any(c.version == other.version for c in self._trials.queue):
                continue
            candidate = Candidate(other.version, Origin.SERVING)
            if self._trials.is_wanted(candidate, kind) and len(self._trials.queue) < MAX_QUEUED_CANDIDATES:
                self._trials.enqueue(candidate)

    # --- the model -------------------------------------------------------------------------------------------------

    def set_model(self, model: ServedModel) -> None:
        """Sets the model once both models are known. What was learned or promoted for another model is dropped or
        rolled back."""
        self._serving.model = model
        unfit = {version for version in self._catalogue if not self._fits(version)}
        proposals = {c.version for c in self._trials.queue if c.source is not Origin.IMPORT}
        self._trials.remove(lambda c: c.version in unfit)
        for kind, state in list(self._serving.kinds.items()):
            if state.version in unfit:
                profile = self._catalogue[state.version]
                made_for = f"{profile.model or 'a model'} of {profile.vocab_size} ids"
                self.roll_back(kind, Reason.OTHER_MODEL, f"it was made for {made_for}", {})
        for version in list(self._catalogue):
            vocab_size = self._catalogue[version].vocab_size
            if vocab_size != model.vocab_size:
                log.error(
                    "profile %s is for a vocabulary of %d ids, the model has %d", version, vocab_size, model.vocab_size
                )
                self.forget(version)
            elif version in unfit & proposals:
                self.forget(version)

    def _fits(self, version: str) -> bool:
        try:
            self._serving.require_model(self._catalogue[version])
        except InvalidProfileError:
            return False
        return True
