"""What is shown of profiles: status, list and description, JSON-ready."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from hemostat.profiles.catalogue import Catalogue, parameter_bytes
from hemostat.profiles.decisions import EventLog, evidence_json
from hemostat.profiles.families import FAMILY_RULES
from hemostat.profiles.proposals import Proposals
from hemostat.profiles.scopes import ALL
from hemostat.profiles.serving import ServingState
from hemostat.profiles.trials import Trials
from hemostat_calibration.profiles.profile import IDENTITY


class Report:
    def __init__(
        self,
        *,
        catalogue: Catalogue,
        serving: ServingState,
        trials: Trials,
        events: EventLog,
        proposals: Proposals,
    ) -> None:
        self._catalogue = catalogue
        self._serving = serving
        self._trials = trials
        self._events = events
        self._proposals = proposals

    def status(self) -> dict[str, Any]:
        requests, tokens = self._proposals.learned()
        trials, scopes = self._trials, self._serving.scopes
        return {
            "mode": self._serving.mode,
            "pinned": self._serving.pinned,
            "learned_requests": requests,
            "learned_tokens": tokens,
            "candidates": [{**asdict(c), **evidence_json(trials.decide_candidate(c))} for c in trials.tested],
            "waiting": [asdict(c) for c in trials.waiting],
            "selected": self._selected(ALL),
            "scope": scopes.kind,
            "scopes": {scope: self._selected(scope) for scope in scopes if scope != ALL},
            "forced": self._serving.forced,
            "tests_begun": {str(role): number for role, number in trials.tests_begun.items()},
        }

    def _selected(self, scope: str) -> dict[str, Any] | None:
        """What serves a scope, with the evidence of its watch."""
        version = self._serving.scopes[scope].selected
        return {"version": version, **evidence_json(self._trials.decide_serving(scope))} if version else None

    def profile_bytes(self, version: str) -> bytes | None:
        """safetensors; None where the profile is not held."""
        profile = self._catalogue.get(version)
        return profile.to_bytes() if profile is not None else None

    def listing(self) -> dict[str, Any]:
        """All profiles and events, newest first."""
        return {
            "serving": self._serving.version or IDENTITY,
            "scoped": self._serving.version_by_scope,
            "pinned": self._serving.pinned,
            "profiles": [self.describe(version) for version in reversed(self._catalogue)],
            "events": self._events.newest_first(),
        }

    def describe(self, version: str) -> dict[str, Any] | None:
        """One profile with the events about it; None where it is not held."""
        profile = self._catalogue.get(version)
        if profile is None:
            return None
        return {
            "version": version,
            "family": profile.family,
            "state": self._state(version),
            "scopes": [scope for scope, state in self._serving.scopes.items() if state.selected == version],
            "created": self._catalogue.created(version),
            "clamp_nats": profile.clamp_nats,
            "clamp_kl_nats": FAMILY_RULES[profile.family].kl_limit(profile),
            "vocab_size": profile.vocab_size,
            "bytes": parameter_bytes(profile),
            "metadata": dict(profile.metadata),
            "evidence": self._events.newest_first(version),
        }

    def _state(self, version: str) -> str:
        if version == self._serving.forced:
            return "forced"
        if version in self._serving.scopes.selected():
            return "selected"
        if version in self._trials.tested_versions:
            return "candidate"
        if any(candidate.version == version for candidate in self._trials.waiting):
            return "waiting"
        return "probe" if version == self._catalogue.probe else "retired"
