"""What an operator decides: imports, and serving without statistical proof."""

from __future__ import annotations

from hemostat.profiles.catalogue import Catalogue
from hemostat.profiles.decisions import Decision, EventLog, Reason
from hemostat.profiles.families import anchor_set
from hemostat.profiles.lifecycle import Lifecycle
from hemostat.profiles.persistence import StateWriter
from hemostat.profiles.proposals import Proposals
from hemostat.profiles.scopes import ALL, MAX_SCOPE_PROFILES
from hemostat.profiles.serving import ServingState
from hemostat.profiles.trials import IMPORT, Trials
from hemostat_calibration import guard
from hemostat_calibration.errors import HemostatError
from hemostat_calibration.profiles.profile import IDENTITY, CalibrationProfile


class Operator:
    """Every method raises HemostatError, and changes nothing, where the action is not possible."""

    def __init__(
        self,
        *,
        catalogue: Catalogue,
        serving: ServingState,
        trials: Trials,
        lifecycle: Lifecycle,
        proposals: Proposals,
        events: EventLog,
        writer: StateWriter,
    ) -> None:
        self._catalogue = catalogue
        self._serving = serving
        self._scopes = serving.scopes
        self._trials = trials
        self._lifecycle = lifecycle
        self._proposals = proposals
        self._events = events
        self._writer = writer

    def set_mode(self, mode: str) -> None:
        """off, observe or auto; `off` ends serving and learning at once. Nothing happens where it is the mode already.

        It is kept over restarts, until the configured mode changes.
        """
        if mode == self._serving.mode:
            return
        self._serving.mode = mode
        self._proposals.discard_batches()
        self._writer.write_mode()
        version = self._serving.selected or IDENTITY
        self._record(Decision.MODE, version, ALL, f"set to {mode} by the operator")

    def import_profile(
        self, profile: CalibrationProfile, scope: str = ALL, why: str = "imported by the operator"
    ) -> str:
        """Make it a candidate, which has to prove itself like any other. Returns its version.

        Nothing happens where it is known there already.
        """
        self._lifecycle.require_fit(profile)
        state = self._scopes.named(scope)
        version = profile.version
        known = (self._catalogue.probe, self._serving.forced, state.selected)
        if version in known or self._trials.holds(version, scope):
            return version
        probe = self._catalogue.get(self._catalogue.probe)
        if probe is not None and anchor_set(profile) not in {"", anchor_set(probe)}:
            # Engines report one set of anchors.
            why += "; it reads other anchors than the learner: the learner gets no engine features while it is tested"
        self._record(Decision.IMPORT, version, scope, why)
        self._lifecycle.test(profile, scope, IMPORT)
        self._writer.put_profile(self._catalogue.stored(version))
        return version

    def promote(self, version: str, scope: str = ALL) -> None:
        """Let a profile serve without statistical proof; it is watched like any other."""
        state = self._scopes.named(scope)
        if self._serving.pinned:
            raise HemostatError("a profile is pinned: unpin it first (hemostat profile pin --off)")
        if version == state.selected:
            raise HemostatError(f"{version} serves there already")
        if not self._serving.has_room(scope):
            raise HemostatError(f"{MAX_SCOPE_PROFILES} scopes have profiles of their own, as many as engines hold")
        self._require_servable(version)
        self._serve(Decision.PROMOTE, version, scope, "promoted by the operator")

    def pin(self, version: str) -> None:
        """Let a profile serve all requests, whatever the evidence says, until it is unpinned."""
        self._require_servable(version)
        self._serving.pinned = True
        if version == self._serving.selected:
            self._record(Decision.PIN, version, ALL, "pinned by the operator")
            self._lifecycle.serving_changed(ALL)
        else:
            self._serve(Decision.PIN, version, ALL, "pinned by the operator")

    def unpin(self) -> None:
        """The pinned profile goes on serving, and is judged again."""
        selected = self._serving.selected
        if not self._serving.pinned or selected is None:
            raise HemostatError("nothing is pinned")
        self._serving.pinned = False
        self._trials.watch_serving(selected, ALL, self._scopes[ALL].window)
        self._record(Decision.UNPIN, selected, ALL, "unpinned by the operator")
        self._lifecycle.serving_changed(ALL, unpinned=True)

    def roll_back(self, why: str, scope: str | None = None) -> None:
        """Let identity serve until another profile is promoted, in one scope (the pooled profile may take its place)
        or, with None, in all."""
        scopes = [scope] if scope is not None else list(self._scopes)
        if scope is not None:
            self._scopes.named(scope)
        if not any(self._scopes[each].selected for each in scopes):
            raise HemostatError("nothing to roll back: identity serves")
        for each in scopes:
            self._lifecycle.roll_back(each, Reason.OPERATOR, why, {})

    def force(self, profile: CalibrationProfile) -> None:
        """Put this profile on every request (`calibration.force`)."""
        self._lifecycle.hold(profile)
        self._serving.forced = profile.version

    def _serve(self, decision: Decision, version: str, scope: str, why: str) -> None:
        candidate = next((c for c in self._trials.tested if (c.version, c.scope) == (version, scope)), None)
        evidence = self._lifecycle.evidence(candidate) if candidate is not None else {}
        self._events.record(decision, Reason.OPERATOR, version, scope, why, evidence)
        self._lifecycle.serve(version, scope, guard.DEFAULT_WINDOW)

    def _record(self, decision: Decision, version: str, scope: str, why: str) -> None:
        self._events.record(decision, Reason.OPERATOR, version, scope, why, {})

    def _require_servable(self, version: str) -> None:
        profile = self._catalogue.get(version)
        if profile is None or version == self._catalogue.probe:
            raise HemostatError(f"there is no profile {version}; hemostat profile list shows them")
        self._lifecycle.require_fit(profile)
