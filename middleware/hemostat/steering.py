"""The life of profiles: learn, propose, judge, serve, take back. Every decision is an event with its evidence.

Invariants:
- `serving` is a version only in mode `auto`, only one that the guard has promoted, and only once both models are known
  (`know`), so that what was kept from an earlier run does not meet another model.
- `off` ends serving, learning and judging at once.
- In `observe` the same happens as in `auto`, but for the serving: `selected` is what would serve.
- A forced profile (`calibration.force`, for tests) goes on every request, and nothing is learned meanwhile.
- A record is learned from or judged by, never both: decided by its prompt.
"""

from __future__ import annotations

import logging
import math
from collections import OrderedDict, deque
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict
from typing import Any

import numpy as np

from hemostat.config import Calibration
from hemostat.store import StoredProfile
from hemostat_calibration import guard
from hemostat_calibration.calibrator import TemperatureBias, TemperatureBiasState
from hemostat_calibration.divergence import gain
from hemostat_calibration.errors import HemostatError, InvalidProfileError
from hemostat_calibration.families import TEMPERATURE_BIAS
from hemostat_calibration.profile import IDENTITY, CalibrationProfile, temperature_bias
from hemostat_calibration.records import TokenRecord
from hemostat_calibration.split import held_out
from hemostat_calibration.transform import shift_range

log = logging.getLogger("hemostat.calibration")

PROFILES_HELD = 32
"""The oldest of what neither serves nor is tested goes, from the store too."""
EVENTS_HELD = 200
IMPORTS_TESTED = 4
"""Imported candidates at a time: with two proposals, the selected and a forced one, as many as an engine holds."""
LOGIT_BIAS_AT_MOST = 300
"""Entries of `logit_bias` that `calibration.apply: request` sends."""
PROPOSE_AGAIN = 4
"""New candidates come when this many times more has been learned: each restarts the evidence and spends some alpha."""
PROMPTS_REMEMBERED = 50_000
"""Held-out prompts remembered as counted, over all tests."""
BATCH = 8
"""Learning records that are gathered before one update of the calibrator."""


class Steering:
    """Lives in the control process's event loop; `save(method, *args)` queues a write of the store.

    tempered: the server's own default temperature is known to be 1, so that `calibration.apply: request` may put
    another in its place. Where the model brings a default of its own, a temperature of ours would replace that one.
    """

    def __init__(
        self,
        settings: Calibration,
        save: Callable[..., None],
        wall: Callable[[], float],
        *,
        tempered: bool = False,
    ) -> None:
        self._settings = settings
        self._tempered = tempered
        self._save = save
        self._wall = wall
        self._family = TemperatureBias(clamp_nats=settings.clamp_nats, min_tokens=settings.min_tokens)
        self._learner: TemperatureBiasState | None = None
        self._batch: list[TokenRecord] = []
        self._proposed: tuple[str, ...] = ()
        self._proposed_at = 0
        self._contextual: str | None = None
        self._contextual_at = 0
        self._probe: str | None = None
        self._guard = guard.init(settings.alpha)
        self._judged: OrderedDict[tuple[str, bytes], None] = OrderedDict()
        self._profiles: OrderedDict[str, CalibrationProfile] = OrderedDict()
        self._created: dict[str, float] = {}
        self._events: deque[dict[str, Any]] = deque(maxlen=EVENTS_HELD)
        self._as_request: tuple[str, dict[str, Any]] = ("", {})
        self.mode: str = settings.mode
        self.selected: str | None = None
        self.candidates: list[str] = []
        self.forced: str | None = None
        self.promotions = 0
        self.rollbacks = 0

    # --- what serves -----------------------------------------------------------------------------------------------

    @property
    def serving(self) -> str | None:
        """Version that treated requests ask for."""
        known = self._learner is not None
        return self.selected if known and self.mode == "auto" and self.forced is None else None

    @property
    def shown(self) -> str | None:
        """Version that the report and the console are about: what serves, or would."""
        return (self.forced or self.selected) if self.mode != "off" else None

    def wanted(self) -> list[str]:
        """What engines should hold, most important first."""
        held = (self.forced, self.selected, *self.candidates, self._probe)
        return list(dict.fromkeys(v for v in held if v is not None))

    def evaluated(self) -> tuple[CalibrationProfile, ...]:
        """Profiles whose effect the reference computes for every scored request."""
        versions = [version for version in self.wanted() if version != self._probe]
        return tuple(self._profiles[version] for version in versions) if self.mode != "off" else ()

    def held(self, version: str | None) -> CalibrationProfile | None:
        return self._profiles.get(version) if version is not None else None

    def stage_of(self, record: TokenRecord) -> CalibrationProfile | None:
        """What the record's `calibrated` figures are about: the profile that was served, or that would have been."""
        return self.held(record.applied or self.shown)

    def request_parameters(self) -> dict[str, Any]:
        """For a vLLM without the plugin (`calibration.apply: request`): the serving profile as sampling parameters."""
        profile = self.held(self.forced or self.serving)
        if self._settings.apply != "request" or profile is None or profile.family != TEMPERATURE_BIAS:
            return {}
        if self._as_request[0] != profile.version:
            self._as_request = (profile.version, as_request(profile))
        return self._as_request[1]

    # --- learning --------------------------------------------------------------------------------------------------

    def know(self, model: str, vocab_size: int) -> None:
        """Both models are known and speak the same ids: learning can begin, anew when they are others than before.

        model: the served name of the compressed one.
        """
        if self._learner is not None and (self._learner.model, self._learner.vocab_size) == (model, vocab_size):
            return
        self._learner = self._family.init(model, vocab_size)
        self._batch, self._proposed_at = [], 0
        for version in self._proposed:
            if version in self.candidates:
                self._forget(version)
        selected = self.held(self.selected)
        if selected is not None and (selected.vocab_size != vocab_size or selected.model not in {"", model}):
            self._take_back(f"it was made for {selected.model or 'a model'} of {selected.vocab_size} ids", {})
        for version in [v for v, profile in self._profiles.items() if profile.vocab_size != vocab_size]:
            log.error("profile %s is for another vocabulary than the model's %d ids", version, vocab_size)
            if version == self.forced:
                self.forced = None
            self._forget(version)

    def judges(self, record: TokenRecord) -> bool:
        """The record's prompt is held out: nothing is ever learned from it."""
        return held_out(record.prompt_key, self._settings.held_out_fraction)

    def learns(self, record: TokenRecord) -> bool:
        """The record may be learned from, now."""
        return self._uses(record) and not self.judges(record)

    def _uses(self, record: TokenRecord) -> bool:
        learner = self._learner
        return (
            self.mode != "off"
            and self.forced is None
            and learner is not None
            and record.vocab_size == learner.vocab_size
        )

    def observe(self, record: TokenRecord) -> None:
        """Learn from a record, or judge by it; never both."""
        learner = self._learner
        if learner is None or not self._uses(record):
            return
        if self.judges(record):
            self._judge(record)
            return
        self._batch.append(record)
        if len(self._batch) >= BATCH:
            # The batch is gone first: records that raise here must not come back for ever.
            batch, self._batch = self._batch, []
            self._learner = learner = self._family.update(learner, batch)
            self._propose(learner)

    def _propose(self, learner: TemperatureBiasState) -> None:
        """New candidates when enough more has been learned than for the last ones."""
        if learner.tokens < PROPOSE_AGAIN * self._proposed_at:
            return
        proposal = self._family.propose(learner)
        if proposal is None:
            return
        self._proposed_at = learner.tokens
        for old in self._proposed:
            if old in self.candidates:
                self._forget(old)
        made = variants(proposal, for_requests=self._settings.apply == "request", tempered=self._tempered)
        self._proposed = tuple(profile.version for profile in made)
        for profile in made:
            self._test(profile)
            self._decided("propose", profile.version, f"learned from {learner.tokens} tokens", {})

    def probe(self, profile: CalibrationProfile) -> None:
        """Let engines hold this profile, whose anchors they hand out; it is neither tested nor served."""
        before, self._probe = self._probe, profile.version
        if before is not None and before != profile.version:
            self._forget(before)
        self._hold(profile)

    def awaits(self, tokens: int, scope: str = "") -> bool:
        """Whether a contextual proposal that was learned from `tokens` tokens would be put to the test now."""
        enough = tokens >= PROPOSE_AGAIN * self._contextual_at
        return self._learner is not None and self.mode != "off" and self.forced is None and enough

    def propose(self, profile: CalibrationProfile, why: str, report: Mapping[str, Any], scope: str = "") -> bool:
        """Put a contextual profile to the test, in place of the one before; False when it is not wanted now.

        report: JSON-ready, shown as the event's evidence; `tokens` is the number of tokens learned from, ever.
        scope: whose requests it is for; "" is all.
        InvalidProfileError for another vocabulary than the model's.
        """
        if not self.awaits(int(report["tokens"]), scope):
            return False
        if self._learner is not None and profile.vocab_size != self._learner.vocab_size:
            raise InvalidProfileError(
                f"profile is for a vocabulary of {profile.vocab_size} ids, the model has {self._learner.vocab_size}"
            )
        if profile.version in self.wanted():
            return False
        if self._contextual in self.candidates:
            self._forget(self._contextual)
        self._contextual, self._contextual_at = profile.version, int(report["tokens"])
        self._test(profile)
        self._decided("propose", profile.version, why, dict(report))
        return True

    def _test(self, profile: CalibrationProfile) -> None:
        """Make it a candidate."""
        self._hold(profile)
        self._watch_candidate(profile.version)
        self.candidates.append(profile.version)

    # --- judging ---------------------------------------------------------------------------------------------------

    def _judge(self, record: TokenRecord) -> None:
        """Held-out evidence: every candidate against what serves now, what serves now against identity.

        The gain is of the models' own distributions on the tokens at hand, whatever arm they came from: both
        alternatives are computed on the same tokens, so that nothing depends on who was assigned to what.
        """
        serving = self.held(self.selected)
        now = gain(record, serving) if serving is not None else None
        for version in self.candidates:
            if not self._first_time(version, record.prompt_key):
                continue
            won = gain(record, self._profiles[version])
            low, high = (won.lower, won.upper) if now is None else (won.lower - now.upper, won.upper - now.lower)
            decision = self._weigh(version, float(low.mean()), float(high.mean()), record.tokens)
            if decision.action is guard.Action.PROMOTE:
                self._promote(version, decision)
                return
        if now is not None and self.selected is not None and self._first_time(self.selected, record.prompt_key):
            decision = self._weigh(self.selected, float(now.lower.mean()), float(now.upper.mean()), record.tokens)
            if decision.action is guard.Action.ROLL_BACK:
                self._take_back("held-out requests speak against it", evidence_of(decision))

    def _first_time(self, version: str, prompt: bytes) -> bool:
        """A prompt counts once in a test. The guard's observations must be new draws of what is asked: retries and
        health checks are not, and would let the chance likings of a few prompts look like evidence."""
        test = f"{version} {guard.decide(self._guard, version).evidence.test}"
        if (test, prompt) in self._judged:
            return False
        self._judged[test, prompt] = None
        if len(self._judged) > PROMPTS_REMEMBERED:
            self._judged.popitem(last=False)
        return True

    def _weigh(self, version: str, low: float, high: float, tokens: int) -> guard.Decision:
        self._guard = guard.observe(self._guard, version, low, high, tokens)
        return guard.decide(self._guard, version)

    def _watch_candidate(self, version: str) -> None:
        """Begin its test; the gain is over what serves now, so a change of that begins it anew."""
        serving = self.held(self.selected)
        span = width(self._profiles[version]) + (width(serving) if serving is not None else 0.0)
        self._guard = guard.enter(self._guard, version, guard.Role.CANDIDATE, span)

    def _watch_serving(self, version: str) -> None:
        self._guard = guard.enter(self._guard, version, guard.Role.SERVING, width(self._profiles[version]))

    def _promote(self, version: str, decision: guard.Decision) -> None:
        before, self.selected = self.selected, version
        self.promotions += 1
        # The other proposals, and what served before, are done; imports start over against the new one.
        for other in [v for v in (*self._proposed, self._contextual, before) if v is not None and v != version]:
            self._retire(other)
        self.candidates = [v for v in self.candidates if v != version]
        self._watch_serving(version)
        for candidate in self.candidates:
            self._watch_candidate(candidate)
        self._save("put_profile", StoredProfile(version, self._profiles[version].to_bytes(), self._created[version]))
        self._save("set_state", "selected", version)
        self._decided("promote", version, "better on held-out requests", evidence_of(decision))

    def _take_back(self, why: str, evidence: dict[str, Any]) -> None:
        version, self.selected = self.selected, None
        if version is not None:
            self.rollbacks += 1
            self._guard = guard.leave(self._guard, version)
            self._save("set_state", "selected", None)
            self._decided("roll_back", version, why, evidence)
            for candidate in self.candidates:
                self._watch_candidate(candidate)

    def _decided(self, decision: str, version: str, why: str, evidence: dict[str, Any]) -> None:
        event = {"at": self._wall(), "decision": decision, "version": version, "why": why, "evidence": evidence}
        log.info("%s %s: %s %s", decision, version, why, evidence or "")
        self._events.append(event)
        self._save("append_event", event)

    # --- what operators do -----------------------------------------------------------------------------------------

    def set_mode(self, mode: str) -> None:
        """off | observe | auto; `off` ends serving and learning at once. Outlives this process, while the
        configuration's own mode stays the same."""
        if mode != self.mode:
            self.mode = mode
            self._batch = []
            self._save("set_state", "mode", f"{self._settings.mode} {mode}")
            self._decided("mode", self.selected or IDENTITY, f"set to {mode} by the operator", {})

    def rollback(self, why: str) -> None:
        """Identity serves until the guard promotes another candidate."""
        if self.selected is None:
            raise HemostatError("nothing to take back: identity serves")
        self._take_back(why, {})

    def add(self, profile: CalibrationProfile) -> str:
        """Import a profile: it becomes a candidate, and has to prove itself like any other."""
        if self._learner is not None and profile.vocab_size != self._learner.vocab_size:
            raise InvalidProfileError(
                f"profile is for a vocabulary of {profile.vocab_size} ids, the model has {self._learner.vocab_size}"
            )
        if self._settings.apply == "request" and not self._tempered and profile.family == TEMPERATURE_BIAS:
            beta = float(profile.parameters["inverse_temperature"])
            if beta != 1.0:
                raise InvalidProfileError(
                    f"profile has the temperature {1.0 / beta:.3g}, which would replace the server's own default: "
                    "import one with 1, or set upstream.openai_sampling_defaults where the server has none"
                )
        version = profile.version
        if version not in self.wanted():
            imports = [v for v in self.candidates if v not in self._proposed]
            if len(imports) >= IMPORTS_TESTED:
                self._decided("drop", imports[0], "a newer import takes its place", self._evidence(imports[0]))
                self._retire(imports[0])
            self._test(profile)
            self._save("put_profile", StoredProfile(version, profile.to_bytes(), self._created[version]))
            self._decided("import", version, "imported by the operator", {})
        return version

    def force(self, profile: CalibrationProfile) -> None:
        """Put this profile on every request."""
        self._hold(profile)
        self.forced = profile.version

    def restore(
        self, stored: Iterable[StoredProfile], selected: str | None, mode: str | None, events: list[dict[str, Any]]
    ) -> None:
        """Take up what an earlier run kept: what served serves again, and goes on being judged.

        stored, events: newest first. selected, mode: the states of those names.
        """
        self._events.extend(reversed(events))
        before, _, chosen = (mode or "").partition(" ")
        if before == self._settings.mode and chosen in {"off", "observe", "auto"}:
            self.mode = chosen
        for n, item in enumerate(stored):
            if item.version != selected and n >= PROFILES_HELD:
                self._save("delete_profile", item.version)
                continue
            try:
                profile = CalibrationProfile.from_bytes(item.data, item.version)
            except InvalidProfileError as error:
                log.error("stored profile %s: %s", item.version, error)
                continue
            self._profiles[item.version] = profile
            self._profiles.move_to_end(item.version, last=False)
            self._created[item.version] = item.created
            if item.version == selected:
                self.selected = item.version
                self._watch_serving(item.version)

    # --- what is shown ---------------------------------------------------------------------------------------------

    def status(self) -> dict[str, Any]:
        learner = self._learner
        return {
            "mode": self.mode,
            "learned_requests": learner.requests if learner else 0,
            "learned_tokens": learner.tokens if learner else 0,
            "candidates": [self._evidence(version) for version in self.candidates],
            "selected": self._evidence(self.selected) if self.selected else None,
            "forced": self.forced,
        }

    def _evidence(self, version: str) -> dict[str, Any]:
        return {"version": version, **evidence_of(guard.decide(self._guard, version))}

    def listing(self) -> dict[str, Any]:
        return {
            "serving": self.serving or IDENTITY,
            "profiles": [self.describe(version) for version in reversed(self._profiles)],
            "events": list(reversed(self._events)),
        }

    def describe(self, version: str) -> dict[str, Any] | None:
        profile = self.held(version)
        if profile is None:
            return None
        state = (
            "forced"
            if version == self.forced
            else "selected"
            if version == self.selected
            else "candidate"
            if version in self.candidates
            else "retired"
        )
        return {
            "version": version,
            "family": profile.family,
            "state": state,
            "created": self._created[version],
            "clamp_nats": profile.clamp_nats,
            "vocab_size": profile.vocab_size,
            "metadata": dict(profile.metadata),
            "evidence": [e for e in reversed(self._events) if e["version"] == version],
        }

    # --- bookkeeping -----------------------------------------------------------------------------------------------

    def _hold(self, profile: CalibrationProfile) -> None:
        self._profiles[profile.version] = profile
        self._created.setdefault(profile.version, self._wall())
        self._profiles.move_to_end(profile.version)
        keep = {*self.wanted(), profile.version}
        for version in [v for v in self._profiles if v not in keep]:
            if len(self._profiles) > PROFILES_HELD:
                self._forget(version)
                self._save("delete_profile", version)

    def _retire(self, version: str) -> None:
        """Test it no more."""
        self.candidates = [v for v in self.candidates if v != version]
        self._guard = guard.leave(self._guard, version)

    def _forget(self, version: str) -> None:
        self._retire(version)
        self._profiles.pop(version, None)
        self._created.pop(version, None)


def width(profile: CalibrationProfile) -> float:
    """High minus low of its Δz, nats: no gain over identity is below minus that."""
    low, high = shift_range(profile)
    return max(float(high - low), 1e-6)


def evidence_of(decision: guard.Decision) -> dict[str, Any]:
    """JSON-ready: what is infinite or not there yet is None."""
    return {
        name: value if not isinstance(value, float) or math.isfinite(value) else None
        for name, value in asdict(decision.evidence).items()
    }


def as_request(profile: CalibrationProfile) -> dict[str, Any]:
    """Fields of the policy. vLLM adds the biases before it divides by the temperature: βz + b = (z + b/β)/(1/β).

    A temperature of 1 is not sent: it would stand in the way of the server's own default.
    """
    beta = float(profile.parameters["inverse_temperature"])
    bias = profile.parameters["bias"]
    return {
        "request_temperature": None if beta == 1.0 else 1.0 / beta,
        "request_logit_bias": {str(i): round(float(bias[i]) / beta, 4) for i in largest(bias) if bias[i] != 0.0},
    }


def largest(bias: np.ndarray[Any, np.dtype[np.float32]]) -> np.ndarray[Any, np.dtype[np.intp]]:
    """Ids of the `LOGIT_BIAS_AT_MOST` entries that are furthest from 0."""
    return np.argsort(-np.abs(bias), kind="stable")[:LOGIT_BIAS_AT_MOST]


def variants(proposal: CalibrationProfile, *, for_requests: bool, tempered: bool) -> list[CalibrationProfile]:
    """The forms of a proposal that are put to the test, each for itself.

    With the temperature left out, and as learned: E_r[Δz] of a bias is known exactly, that of a temperature only as a
    bound (it takes the compressed model's logits at every id), so the bias alone can often prove what both cannot. It
    comes first, since an earlier test has more of alpha.
    For requests (`calibration.apply: request`) only what a request can carry is tested; tempered: a temperature of ours
    may stand where the client sent none.
    """
    bias = np.array(proposal.parameters["bias"])
    if for_requests:
        kept = largest(bias)
        sparse = np.zeros_like(bias)
        sparse[kept] = bias[kept]
        bias = sparse
    temperatures = [1.0]
    if tempered or not for_requests:
        temperatures.append(1.0 / float(proposal.parameters["inverse_temperature"]))
    made = [
        temperature_bias(proposal.model, proposal.vocab_size, t, bias, proposal.clamp_nats, proposal.metadata)
        for t in temperatures
    ]
    return list({profile.version: profile for profile in made}.values())
