"""The decisions of an operator: imports, and serving without statistical proof."""

from __future__ import annotations

from collections.abc import Iterable

from hemostat.profiles.candidates import Origin
from hemostat.profiles.catalogue import Catalogue
from hemostat.profiles.decisions import Decision, EventLog, Reason
from hemostat.profiles.lifecycle import Lifecycle
from hemostat.profiles.persistence import StateWriter
from hemostat.profiles.serving import ServingState
from hemostat.profiles.trials import Trials
from hemostat_calibration.errors import HemostatError
from hemostat_calibration.profiles.profile import IDENTITY, CalibrationProfile
from hemostat_calibration.profiles.transform import anchor_set


class Operator:
    """Every method raises HemostatError, and changes nothing, if the action is not possible.

    kind: the kind of traffic, which is followed or is `REST_KIND`; None means all kinds.
    """

    def __init__(
        self,
        *,
        catalogue: Catalogue,
        serving: ServingState,
        trials: Trials,
        lifecycle: Lifecycle,
        events: EventLog,
        writer: StateWriter,
    ) -> None:
        self._catalogue = catalogue
        self._serving = serving
        self._trials = trials
        self._lifecycle = lifecycle
        self._events = events
        self._writer = writer

    def set_mode(self, mode: str) -> None:
        """Sets the mode to off, observe or auto; `off` ends serving and learning at once. Nothing happens if it is the
        mode already. It is kept over restarts, until the configured mode changes.
        """
        if mode == self._serving.mode:
            return
        self._serving.mode = mode
        self._writer.write_mode()
        self._record(Decision.MODE, self._serving.selected or IDENTITY, f"set to {mode} by the operator")

    def import_profile(self, profile: CalibrationProfile) -> str:
        """Makes it a candidate, which has to prove itself like any other. Returns its version.

        Nothing happens if it is known there already.
        """
        self._lifecycle.require_fit(profile)
        version = profile.version
        serves_all = all(state.version == version for state in self._serving.kinds.values())
        if version == self._catalogue.probe or serves_all or self._trials.holds(version):
            return version
        why = "imported by the operator"
        probe = self._catalogue.get(self._catalogue.probe)
        if probe is not None and anchor_set(profile) not in {"", anchor_set(probe)}:
            # Engines report one set of anchors.
            why += "; it reads other anchors than the learner: the learner gets no engine features while it is tested"
        self._events.record(Decision.IMPORT, Reason.OPERATOR, version, why, {})
        for state in (*self._serving.kinds.values(), *self._serving.former.values()):
            state.tried = [other for other in state.tried if other != version]
        self._lifecycle.test(profile, Origin.IMPORT)
        return version

    def promote(self, version: str, kind: str | None = None) -> None:
        """Lets a profile serve without statistical proof; it is watched like any other."""
        kinds = self._serving.named(kind)
        if any(self._serving.kinds[each].pinned for each in kinds):
            raise HemostatError("a profile is pinned there: unpin it first (hemostat profile pin --off)")
        others = [each for each in kinds if self._serving.kinds[each].version != version]
        if not others:
            raise HemostatError(f"{version} serves there already")
        self._require_servable(version, kinds)
        for each in others:
            self._serve(Decision.PROMOTE, version, each, "promoted by the operator")

    def pin(self, version: str, kind: str | None = None) -> None:
        """Lets a profile serve, whatever the evidence says, until it is unpinned."""
        kinds = self._serving.named(kind)
        self._require_servable(version, kinds)
        for each in kinds:
            state = self._serving.kinds[each]
            state.pinned = True
            if version == state.version:
                self._writer.write_serving()
                self._record(Decision.PIN, version, "pinned by the operator", each)
            else:
                self._serve(Decision.PIN, version, each, "pinned by the operator")

    def unpin(self, kind: str | None = None) -> None:
        """Unpins the pinned profile: it goes on serving, and is judged again, in a window that begins now."""
        pinned = [each for each in self._serving.named(kind) if self._serving.kinds[each].pinned]
        if not pinned:
            raise HemostatError("nothing is pinned")
        for each in pinned:
            state = self._serving.kinds[each]
            state.pinned = False
            self._trials.watch(each)
            self._record(Decision.UNPIN, state.version or IDENTITY, "unpinned by the operator", each)
        self._writer.write_serving()
        self._writer.write_tests()

    def roll_back(self, why: str, kind: str | None = None) -> None:
        """Lets identity serve until another profile is promoted."""
        kinds = [each for each in self._serving.named(kind) if self._serving.kinds[each].version is not None]
        if not kinds:
            raise HemostatError("nothing to roll back: identity serves")
        for each in kinds:
            self._lifecycle.roll_back(each, Reason.OPERATOR, why, {})

    def release(self, kind: str | None = None) -> None:
        """Lets profiles be tested and serve again in kinds that are held at identity."""
        held = [each for each in self._serving.named(kind) if self._serving.kinds[each].held]
        if not held:
            raise HemostatError("nothing is held at identity there")
        for each in held:
            why = f"released by the operator; it was held: {self._serving.kinds[each].held}"
            self._record(Decision.RELEASE, IDENTITY, why, each)
            self._lifecycle.release(each)

    def _serve(self, decision: Decision, version: str, kind: str, why: str) -> None:
        candidate = next((c for c in self._trials.tested if c.version == version), None)
        evidence = self._lifecycle.evidence(candidate) if candidate is not None else {}
        shown = evidence.get("kinds", {}).get(kind, {})
        self._lifecycle.serve(version, kind, chosen=True)
        self._events.record(decision, Reason.OPERATOR, version, why, shown, kind)

    def _record(self, decision: Decision, version: str, why: str, kind: str = "") -> None:
        self._events.record(decision, Reason.OPERATOR, version, why, {}, kind)

    def _require_servable(self, version: str, kinds: Iterable[str]) -> None:
        profile = self._catalogue.get(version)
        if profile is None or version == self._catalogue.probe:
            raise HemostatError(f"there is no profile {version}; hemostat profile list shows them")
        self._lifecycle.require_fit(profile)
        if (full := self._serving.why_no_room(version, set(kinds))) is not None:
            hint = "roll one back first" if self._serving.max_adapters else "adapter.engine of the status says why"
            raise HemostatError(f"{full}: {hint}")
