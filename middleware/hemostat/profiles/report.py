"""The views of profiles: status, list and description, JSON-ready; and their metrics by kind."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

from hemostat.ipc.messages import REST_KIND
from hemostat.metrics import names
from hemostat.metrics.samples import Sample
from hemostat.profiles.candidates import Candidate, stored_source
from hemostat.profiles.catalogue import Catalogue, parameter_bytes
from hemostat.profiles.decisions import EventLog, evidence_json, pooled_gain
from hemostat.profiles.followed_kinds import FollowedKinds
from hemostat.profiles.serving import KindState, ServingState
from hemostat.profiles.trials import Trials
from hemostat.report.formats import duration
from hemostat_calibration.errors import HemostatError
from hemostat_calibration.guard.decisions import Evidence, Figure
from hemostat_calibration.guard.wealth import MIN_CLIENTS
from hemostat_calibration.profiles.adapter import adapter_bytes, layer_names, max_rank
from hemostat_calibration.profiles.profile import IDENTITY, CalibrationProfile

MIN_UNITS_FOR_ESTIMATE = 10
"""The number of units below which nothing is said of how many more are needed."""


class Report:
    def __init__(
        self,
        *,
        catalogue: Catalogue,
        serving: ServingState,
        kinds: FollowedKinds,
        trials: Trials,
        events: EventLog,
        wall: Callable[[], float],
    ) -> None:
        """wall: Unix seconds."""
        self._wall = wall
        self._catalogue = catalogue
        self._serving = serving
        self._kinds = kinds
        self._trials = trials
        self._events = events

    def status(self) -> dict[str, Any]:
        trials = self._trials
        return {
            "mode": self._serving.mode,
            "pinned": self._serving.pinned,
            "candidates": [self._candidate(candidate) for candidate in trials.tested],
            "waiting": [self._waiting(candidate) for candidate in trials.waiting],
            "next_decision": self._next_decision(),
            "selected": self._selected(),
            "kinds": [self._kind(kind) for kind in self._order()],
            "client_share": {"limit": trials.client_share, "needs_clients": MIN_CLIENTS},
            "tests_begun": {"candidate": trials.tests_begun, "serving": sum(trials.guard.windows.values())},
        }

    def _order(self) -> list[str]:
        """Returns the most frequent kinds first."""
        kinds = self._serving.kinds
        return sorted(kinds, key=lambda kind: (-kinds[kind].units, -self._kinds.table.seen(kind), kind))

    def _candidate(self, candidate: Candidate) -> dict[str, Any]:
        """Returns a candidate with what its tests in all kinds have shown together."""
        result = self._trials.evidence_by_kind(candidate).values()
        return {
            **_names(candidate),
            "requests": sum(evidence.units for evidence in result),
            "tokens": sum(evidence.tokens for evidence in result),
            **pooled_gain(result),
        }

    def _waiting(self, candidate: Candidate) -> dict[str, Any]:
        """Returns a candidate with what it waits for, in words."""
        older = self._trials.behind(candidate)
        if older:
            why = f"waits until the test of {older[0][:8]}, an earlier build, has ended"
        elif self._trials.has_begun(candidate):
            why = "its test goes on when one of those that go first has ended"
        else:
            why = "waits until one of the tests has ended"
        return _names(candidate) | {"summary": why}

    def _selected(self) -> dict[str, Any] | None:
        """Returns the version that serves the largest part of what any serves, with the evidence of its watch there."""
        version = self._serving.selected
        if version is None:
            return None
        kind = next(kind for kind in self._order() if self._serving.kinds[kind].version == version)
        evidence = self._trials.serving_evidence(kind)
        return {"version": version, "requests": evidence.units if evidence else 0, **evidence_json(evidence)}

    def _next_decision(self) -> str:
        """Returns in words what the decision that comes next waits for, and for how long about; "" if nothing is under
        test."""
        tests = [(c, kind) for c in self._trials.tested for kind in self._trials.running_kinds(c)]
        if not tests:
            return ""
        candidate, kind = max(tests, key=lambda test: self._trials.evidence(*test).progress)
        evidence = self._trials.evidence(candidate, kind)
        family = "adapter" if self._catalogue.changes_weights(candidate.version) else "profile"
        name, units, more = f"{family} {candidate.version[:8]}", evidence.units, units_needed(evidence)
        if not units:
            return f"{name}: waits for its first held-out conversation"
        if evidence.log_e_adjusted >= evidence.needed:
            return f"{name}, {kind}: {self._lacks(candidate, kind, evidence)}"
        if more is None:
            return f"{name}: {units} conversations of {kind} so far"
        if not (self._trials.has_seen_cycles and self._trials.spans_cycle(candidate, kind)):
            left = ", over two cycles of the traffic"
        else:
            seconds = self._trials.seconds_for(candidate, kind, more, self._wall())
            left = "" if seconds is None else f", {duration(seconds)} left"
        return f"{name}: {units} of about {units + more} conversations of {kind}{left}"

    def _kind(self, kind: str) -> dict[str, Any]:
        state = self._serving.kinds[kind]
        watch = self._trials.serving_evidence(kind)
        tests = self._tests(kind)
        return {
            "kind": kind,
            "requests": round(self._requests(kind)),
            "share": self._requests(kind) / self._kinds.table.total if self._kinds.table.total else None,
            "held_out_units": state.units,
            "version": state.version,
            "chosen": state.chosen,
            "pinned": state.pinned,
            "held": state.held or None,
            "watch": _shown(watch) if watch is not None else None,
            "candidates": [
                {
                    "version": c.version,
                    "source": stored_source(c.source),
                    "summary": self._summary(c, kind, e),
                    **_shown(e),
                }
                for c, e in tests
            ],
            "summary": self._kind_summary(state, watch, kind, tests),
            "client_share": self._client_share(watch or (_nearest(tests)[1] if tests else None)),
        }

    def _requests(self, kind: str) -> float:
        """Returns how many requests of a kind were scored, where requests of two days ago count half. For `REST_KIND`
        all requests count that belong to no followed kind.
        """
        table = self._kinds.table
        followed = sum(table.seen(name) for name in table.followed)
        return table.total - followed if kind == REST_KIND else table.seen(kind)

    def _tests(self, kind: str) -> list[tuple[Candidate, Evidence]]:
        """Returns the tests of candidates that go on in this kind."""
        running = (c for c in self._trials.tested if kind in self._trials.running_kinds(c))
        return [(candidate, self._trials.evidence(candidate, kind)) for candidate in running]

    # --- in words --------------------------------------------------------------------------------------------------

    def _kind_summary(
        self, state: KindState, watch: Evidence | None, kind: str, tests: list[tuple[Candidate, Evidence]]
    ) -> str:
        if state.held:
            return f"held at identity until an operator releases it: {state.held}"
        if state.version is not None and watch is not None:
            how = "pinned by an operator" if state.pinned else _watch_words(watch)
            return f"{state.version[:8]} {'serves' if self._serving.mode == 'auto' else 'would serve'}; {how}"
        if tests:
            candidate, evidence = _nearest(tests)
            return f"identity; {candidate.version[:8]}: {self._summary(candidate, kind, evidence)}"
        return "identity; no profile is under test here" if state.units else "identity; no held-out conversation yet"

    def _summary(self, candidate: Candidate, kind: str, evidence: Evidence) -> str:
        """Returns in words what a candidate's test in one kind lacks, and if a newer build waits for its end."""
        lacks = self._lacks(candidate, kind, evidence)
        newer = any(candidate.version in self._trials.behind(other) for other in self._trials.waiting)
        return f"{lacks}; a newer build waits for the end of this test" if newer else lacks

    def _lacks(self, candidate: Candidate, kind: str, evidence: Evidence) -> str:
        if not evidence.units:
            return "no held-out conversation of this kind yet"
        if evidence.log_e_adjusted >= evidence.needed:
            if not self._trials.is_known(kind):
                return "enough evidence; how much requests depend on each other is not known yet (evidence.cycle_hours)"
            if not self._trials.spans_cycle(candidate, kind):
                return "enough evidence; its gains do not span a cycle of the traffic yet (evidence.cycle_hours)"
            if not evidence.mean_gain_by_token > 0.0:
                return "better by request, but not by token: long answers lose what short ones gain"
            if evidence.figure is Figure.TOTAL_VARIATION and not min(_kl_gains(evidence)) > 0.0:
                return "better in total variation, but not in KL"
            if self._serving.kinds[kind].pinned:
                return "proven better than the pinned profile"
            if (full := self._serving.why_no_room(candidate.version, {kind})) is not None:
                return f"proven, but {full}"
            return "proven"
        if evidence.units < MIN_UNITS_FOR_ESTIMATE:
            return f"not enough requests: {evidence.units} held-out conversations of this kind so far"
        done = f"{evidence.progress:.0%} of the evidence from {evidence.units} held-out conversations of this kind"
        more = units_needed(evidence)
        if more is not None:
            return f"{done}; needs about {more} more with gains like these"
        return f"{done}; its gain is {'not above 0' if evidence.mean_gain <= 0.0 else 'too small or too spread'} so far"

    def _client_share(self, evidence: Evidence | None) -> str:
        """Returns if a limit holds for what one client contributes to the test that matters most in a kind, and why."""
        if evidence is None:
            return "no test"
        clients = f"{evidence.clients} client{'' if evidence.clients == 1 else 's'}"
        if not evidence.client_share_active:
            return f"inactive: {clients} seen, needs {MIN_CLIENTS}"
        return f"active: {clients}, at most {self._trials.client_share:.0%} each, {evidence.refused} refused"

    # --- metrics ---------------------------------------------------------------------------------------------------

    def samples(self) -> Iterator[Sample]:
        """Yields what serves, and by kind the gain and the evidence; the kinds are bounded by `evidence.kinds`."""
        serving = self._serving.selected_by_kind if self._serving.mode != "off" else {}
        for kind in self._order():
            yield Sample(names.PROFILE_KIND_INFO, (kind, serving.get(kind, IDENTITY)), 1.0)
            watch = self._trials.serving_evidence(kind)
            if watch is not None and watch.units:
                yield from _gain_samples(kind, watch)
            tests = self._tests(kind)
            if tests:
                nearest = max((evidence for _, evidence in tests), key=lambda evidence: evidence.progress)
                yield Sample(names.PROFILE_KIND_EVIDENCE_RATIO, (kind,), nearest.progress)
                yield Sample(names.EFFECTIVE_REQUESTS, (kind, "gain"), nearest.effective_units)
                yield Sample(names.VARIANCE_INFLATION_RATIO, (kind, "gain"), nearest.inflation)

    # --- profiles --------------------------------------------------------------------------------------------------

    def profile_bytes(self, version: str) -> bytes | None:
        """Returns the profile as safetensors; None if it is not held."""
        profile = self._catalogue.get(version)
        return profile.to_bytes() if profile is not None else None

    def resolve(self, version: str) -> str:
        """Returns the whole version of the profile whose version begins like this. Raises HemostatError if several do.
        An unknown one is returned as it is."""
        result = [held for held in self._catalogue if held.startswith(version)]
        if len(result) > 1:
            raise HemostatError(f"several versions begin with {version}: {', '.join(result)}")
        return result[0] if result else version

    def listing(self) -> dict[str, Any]:
        """Returns all profiles and events, newest first."""
        return {
            "serving": self._serving.version or IDENTITY,
            "by_kind": self._serving.version_by_kind,
            "kinds": [
                {name: kind[name] for name in ("kind", "share", "version", "summary")}
                for kind in map(self._kind, self._order())
            ],
            "pinned": self._serving.pinned,
            "held": sorted(self._serving.held),
            "profiles": [self.describe(version) for version in reversed(self._catalogue)],
            "events": self._events.newest_first(),
        }

    def describe(self, version: str) -> dict[str, Any] | None:
        """Returns one profile with the events about it; None if it is not held."""
        profile = self._catalogue.get(version)
        if profile is None:
            return None
        adapter = _adapter_json(profile) if profile.changes_weights else None
        return {
            "version": version,
            "family": profile.family,
            "state": self._state(version),
            "kinds": [kind for kind, state in self._serving.kinds.items() if state.version == version],
            "created": self._catalogue.created(version),
            "clamp_nats": profile.clamp_nats if adapter is None else None,
            "clamp_kl_nats": profile.spec.kl_limit(profile.parameters),
            "vocab_size": profile.vocab_size,
            "bytes": parameter_bytes(profile),
            "metadata": dict(profile.metadata),
            "adapter": adapter,
            "evidence": self._events.newest_first(version),
        }

    def _state(self, version: str) -> str:
        if version in self._serving.versions:
            return "selected"
        if version in self._trials.tested_versions:
            return "candidate"
        if any(candidate.version == version for candidate in self._trials.waiting):
            return "waiting"
        return "probe" if version == self._catalogue.probe else "retired"


def _names(candidate: Candidate) -> dict[str, str]:
    return {"version": candidate.version, "source": stored_source(candidate.source)}


def _adapter_json(profile: CalibrationProfile) -> dict[str, Any]:
    """Returns an adapter's properties for JSON. rank: the largest of a layer. bytes: of the factors."""
    return {
        "rank": max_rank(profile),
        "layers": len(layer_names(profile.parameters)),
        "bytes": adapter_bytes(profile),
    }


def _gain_samples(kind: str, watch: Evidence) -> Iterator[Sample]:
    gains = {"request": watch.mean_gain, "token": watch.mean_gain_by_token}
    if watch.figure is Figure.TOTAL_VARIATION:
        for weighting, gain in gains.items():
            yield Sample(names.PROFILE_KIND_TOTAL_VARIATION_GAIN, (kind, weighting), gain)
        gains = dict(zip(gains, _kl_gains(watch), strict=True))
    for weighting, gain in gains.items():
        if math.isfinite(gain):
            yield Sample(names.PROFILE_KIND_GAIN_NATS, (kind, weighting), gain)


def _kl_gains(evidence: Evidence) -> tuple[float, float]:
    """Returns the gains in KL by unit and by token, nats, of a test whose gains are of the total variation; -inf where
    unknown."""
    result = evidence.mean_kl_gain, evidence.mean_kl_gain_by_token
    by_unit, by_token = (-math.inf if value is None else value for value in result)
    return by_unit, by_token


def _nearest(tests: list[tuple[Candidate, Evidence]]) -> tuple[Candidate, Evidence]:
    """Returns the candidate with the largest part of the evidence that it needs."""
    return max(tests, key=lambda test: test[1].progress)


def units_needed(evidence: Evidence) -> int | None:
    """Returns how many more units a candidate needs if they are like the units so far; None if that cannot be said."""
    if evidence.units < MIN_UNITS_FOR_ESTIMATE or evidence.log_e_adjusted <= 0.0:
        return None
    return max(1, math.ceil((evidence.needed / evidence.log_e_adjusted - 1.0) * evidence.units))


def _shown(evidence: Evidence) -> dict[str, Any]:
    """Returns the evidence of a test, JSON-ready. progress: the evidence as a part of what is needed. units_needed:
    about how many more units like these are needed.
    """
    candidate = not evidence.window
    more = units_needed(evidence) if candidate else None
    return {**evidence_json(evidence), "progress": evidence.progress, "units_needed": more}


def _watch_words(watch: Evidence) -> str:
    so_far = f"{watch.units} of the {watch.window} held-out conversations of its window"
    if not watch.units:
        return f"no held-out conversation in its window of {watch.window} yet"
    if watch.supported:
        return f"its gain was proven again, {so_far}"
    return f"its gain is to be proven again, {so_far}"
