"""The life of profiles: learn, propose, judge, serve, take back. Every decision is an event with its evidence.

Invariants:
- `serving` is a version only in mode `auto`, only one that the guard or the operator has promoted, and only once both
  models are known (`know`), so that what was kept from an earlier run does not meet another model.
- `off` ends serving, learning and judging at once.
- In `observe` the same happens as in `auto`, but for the serving: `selected` is what would serve.
- A forced profile (`calibration.force`, for tests) goes on every request, and nothing is learned meanwhile.
- A pinned profile serves all requests, is measured like any other, and is neither replaced nor taken back by itself.
- A record is learned from or judged by, never both: decided by its prompt.
- With `calibration.scope` other than `pooled`, a scope (a label, a route, a model) may have a profile of its own, which
  was better there than what serves all; every other request gets the pooled one.
- Of several replicas, only the one that leads (`store.lease`) proposes, tests and promotes; the others learn, so that
  any can go on, and take up what it has decided.
"""

from __future__ import annotations

import logging
import math
from collections import Counter, OrderedDict, deque
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import msgspec
import numpy as np
import numpy.typing as npt

from hemostat.config.schema import Calibration
from hemostat.profiles.trials import IMPORT, POOLED, Candidate, Trials
from hemostat.store.lease import Lease
from hemostat.store.protocol import StoredProfile, StoreWrites
from hemostat_calibration import guard
from hemostat_calibration.divergence.gain import gain
from hemostat_calibration.errors import HemostatError, InvalidProfileError
from hemostat_calibration.learning.temperature_bias import TemperatureBiasLearner, TemperatureBiasState
from hemostat_calibration.profiles.families import CONTEXTUAL, TEMPERATURE_BIAS
from hemostat_calibration.profiles.profile import IDENTITY, CalibrationProfile, temperature_bias
from hemostat_calibration.profiles.transform import anchors, anchors_digest, shift_range
from hemostat_calibration.records import TokenRecord
from hemostat_calibration.statistics.split import held_out

log = logging.getLogger("hemostat.calibration")

PROFILES_HELD = 32
"""The oldest of what neither serves nor is tested goes, from the store too."""
BYTES_HELD = 256 * 1024 * 1024
"""Likewise, by what the profiles weigh together."""
EVENTS_HELD = 200
LINE_AT_MOST = 8
"""Candidates, tested and waiting."""
SCOPES_FOLLOWED = 16
"""The first ones seen; the requests of others count as of none."""
SCOPES_APART = 4
"""That have a profile of their own at a time: with the pooled one, two candidates and the probe as many as an engine
holds."""
LOGIT_BIAS_AT_MOST = 300
"""Entries of `logit_bias` that `calibration.apply: request` sends."""
PROPOSE_AGAIN = 2
"""New candidates come when this many times more has been learned: each test spends some of alpha."""
REPLACE_TESTED = 4
"""The same while the last proposal is still under test, which would have to begin anew."""
AFTER_CONTEXTUAL = 4
"""Where a contextual learner is at work, temperature and bias, which rarely win much, let its first proposal go before
theirs until they have learned this many times `min_tokens`: earlier tests have more of alpha."""
PROPOSE_WITHIN = 500_000
"""More tokens than this are never waited for."""
PATIENCE = 500
"""Held-out requests after which an unproven candidate makes room for one of its kind that waits."""
LONGER_PATIENCE = 4 * PATIENCE
"""The same where temperature and bias wait for another kind."""
BATCH = 8
"""Learning records that are gathered before one update of the calibrator."""
ALL = ""
"""The scope of everything that has no scope of its own."""
SCOPES: Mapping[str, Callable[[TokenRecord], str]] = {
    "pooled": lambda record: ALL,
    "label": lambda record: record.label,
    "route": lambda record: record.route,
    "model": lambda record: record.model,
}
"""`calibration.scope` -> a record's scope."""
STATES = ("serving", "mode", "tests.candidate", "tests.serving")
"""What the store keeps of this, by name."""

DECISIONS = (
    ("propose", "learned"),
    ("import", "operator"),
    ("drop", "newer"),
    ("drop", "unproven"),
    ("promote", "evidence"),
    ("promote", "operator"),
    ("roll_back", "harm"),
    ("roll_back", "unsupported"),
    ("roll_back", "operator"),
    ("roll_back", "other_model"),
    ("pin", "operator"),
    ("unpin", "operator"),
    ("mode", "operator"),
)
"""Every decision with its reason."""


@dataclass(slots=True)
class _Seat:
    """One scope: what serves its requests, and what temperature and bias were learned from them."""

    selected: str | None = None
    window: int = guard.DEFAULT_WINDOW
    """In which `selected` is watched, held-out requests."""
    lost: bool = False
    """What served was taken back, and nothing has been promoted since."""
    learner: TemperatureBiasState | None = None
    batch: list[TokenRecord] = field(default_factory=list)
    proposed_at: dict[str, int] = field(default_factory=dict)
    """By family, the tokens that the last proposal was learned from."""


class _Kept(msgspec.Struct, frozen=True):
    """What the store keeps of what serves: by scope, version and window."""

    scope: str
    pinned: bool
    selected: dict[str, tuple[str, int]]


class Steering:
    """Lives in the control process's event loop; what it decides is written to `writes`.

    tempered: the server's own default temperature is known to be 1, so that `calibration.apply: request` may put
    another in its place. Where the model brings a default of its own, a temperature of ours would replace that one.
    """

    def __init__(
        self,
        settings: Calibration,
        writes: StoreWrites,
        wall: Callable[[], float],
        *,
        tempered: bool = False,
        lease: Lease | None = None,
    ) -> None:
        self._settings = settings
        self._lease = lease or Lease(shared=False)
        self._tempered = tempered
        self._writes = writes
        self._wall = wall
        self._family = TemperatureBiasLearner(
            # With |Δz| ≤ a, KL from identity is at most a²/2: Var Δz ≤ a² under every c e^{sΔz}, and KL is ∫ s Var ds.
            clamp_nats=min(settings.clamp_nats, math.sqrt(2.0 * settings.clamp_kl_nats)),
            min_tokens=settings.min_tokens,
            half_life_tokens=settings.half_life_tokens,
        )
        self._trials = Trials(
            settings.alpha,
            width=lambda version: width(self._profiles[version]),
            serves=lambda scope: self._seats[self._place(scope)].selected,
            spent=lambda role, number: writes.raise_state(f"tests.{role}", number),
        )
        self._seats: dict[str, _Seat] = {ALL: _Seat()}
        self._profiles: OrderedDict[str, CalibrationProfile] = OrderedDict()
        self._created: dict[str, float] = {}
        self._probe: str | None = None
        self._events: deque[dict[str, Any]] = deque(maxlen=EVENTS_HELD)
        self._as_request: tuple[str, dict[str, Any]] = ("", {})
        self.known: tuple[str, int] | None = None
        """Served name and number of ids of the compressed model, once both models are known."""
        self.mode: str = settings.mode
        self.forced: str | None = None
        self.pinned = False
        """What serves all requests is the operator's choice, and stays."""
        self.decisions = Counter(dict.fromkeys(DECISIONS, 0))
        self.promotions = 0
        self.rollbacks = 0

    # --- what serves -----------------------------------------------------------------------------------------------

    @property
    def selected(self) -> str | None:
        """What serves, or would serve, all requests whose scope has no profile of its own."""
        return self._seats[ALL].selected

    @property
    def serving(self) -> str | None:
        """Version that treated requests ask for."""
        return self.selected if self._serves else None

    @property
    def scoped(self) -> dict[str, str]:
        """The same by scope, for those that have a profile of their own."""
        return self._apart() if self._serves else {}

    @property
    def _serves(self) -> bool:
        return self.known is not None and self.mode == "auto" and self.forced is None

    @property
    def shown(self) -> str | None:
        """Version that the report and the console are about: what serves, or would."""
        return (self.forced or self.selected) if self.mode != "off" else None

    @property
    def candidates(self) -> list[str]:
        """Versions under test."""
        return [candidate.version for candidate in self._trials.tested]

    def wanted(self) -> list[str]:
        """What engines should hold, most important first: they evaluate those that come first, and hand out the anchors
        of the first that has any."""
        held = [self.forced, self.selected, *self.candidates, *self._apart().values()]
        versions = list(dict.fromkeys(v for v in held if v is not None))
        if self._probe is not None and self.mode != "off" and self.forced is None:
            digest = _digest(self._profiles[self._probe])
            if all(_digest(self._profiles[version]) != digest for version in versions):
                versions.append(self._probe)
        return versions

    def evaluated(self) -> tuple[CalibrationProfile, ...]:
        """Profiles whose effect the reference computes for every scored request."""
        versions = [version for version in self.wanted() if version != self._probe]
        return tuple(self._profiles[version] for version in versions) if self.mode != "off" else ()

    def held(self, version: str | None) -> CalibrationProfile | None:
        return self._profiles.get(version) if version is not None else None

    def stage_of(self, record: TokenRecord) -> CalibrationProfile | None:
        """What the record's `calibrated` figures are about: the profile that was served, or that would have been."""
        if record.applied is not None:
            return self.held(record.applied)
        place = self._place(self.scope_of(record))
        return self.held(self.shown if place == ALL or self.mode == "off" else self._seats[place].selected)

    def scope_of(self, record: TokenRecord) -> str:
        """Whose requests the record is one of; "" where all are pooled, or there are too many scopes."""
        scope = SCOPES[self._settings.scope](record)
        return scope if self._seat(scope) is not None else ALL

    def request_parameters(self) -> dict[str, Any]:
        """For a vLLM without the plugin (`calibration.apply: request`): the serving profile as sampling parameters."""
        profile = self.held(self.forced or self.serving)
        if self._settings.apply != "request" or profile is None or profile.family != TEMPERATURE_BIAS:
            return {}
        if self._as_request[0] != profile.version:
            self._as_request = (profile.version, as_request(profile))
        return self._as_request[1]

    def _apart(self) -> dict[str, str]:
        """Scopes that have a profile of their own; none while one is pinned or forced on all."""
        if self.pinned or self.forced is not None:
            return {}
        own = {scope: seat.selected for scope, seat in self._seats.items() if scope != ALL}
        return {scope: version for scope, version in own.items() if version is not None}

    def _place(self, scope: str) -> str:
        """The scope whose profile serves the requests of `scope`: itself or all."""
        return scope if scope in self._apart() else ALL

    def _seat(self, scope: str) -> _Seat | None:
        """None for one scope too many, or any but the one when all is pooled."""
        if scope not in self._seats and self._settings.scope != "pooled" and len(self._seats) <= SCOPES_FOLLOWED:
            self._seats[scope] = _Seat()
        return self._seats.get(scope)

    # --- learning --------------------------------------------------------------------------------------------------

    def know(self, model: str, vocab_size: int) -> None:
        """Both models are known and speak the same ids: learning can begin, anew when they are others than before.

        model: the served name of the compressed one.
        """
        if self.known == (model, vocab_size):
            return
        self.known = (model, vocab_size)
        proposals = [c.version for c in self._trials.line if c.source != IMPORT]
        self._trials.remove(lambda c: c.source != IMPORT)
        for scope, seat in self._seats.items():
            seat.learner, seat.batch = self._family.init(model, vocab_size), []
            seat.proposed_at.clear()
            selected = self.held(seat.selected)
            if selected is not None and (selected.vocab_size != vocab_size or selected.model not in {"", model}):
                made_for = f"{selected.model or 'a model'} of {selected.vocab_size} ids"
                self._take_back(scope, "other_model", f"it was made for {made_for}", {})
            elif selected is not None:
                # Kept from an earlier run, which had learned more than this one will have for a while.
                seat.proposed_at[selected.family] = _whole(selected.metadata.get("tokens"))
        for version, profile in list(self._profiles.items()):
            if profile.vocab_size != vocab_size:
                log.error("profile %s is for another vocabulary than the model's %d ids", version, vocab_size)
                if version == self.forced:
                    self.forced = None
                self._forget(version)
            elif version in proposals and version not in self.wanted():
                self._forget(version)

    def judges(self, record: TokenRecord) -> bool:
        """The record's prompt is held out: nothing is ever learned from it."""
        return held_out(record.prompt_key, self._settings.held_out_fraction)

    def learns(self, record: TokenRecord) -> bool:
        """The record may be learned from, now."""
        return self._uses(record) and not self.judges(record)

    def observe(self, record: TokenRecord) -> None:
        """Learn from a record, or judge by it; never both."""
        if not self._uses(record):
            return
        scope = self.scope_of(record)
        if self.judges(record):
            self._judge(record, scope)
            return
        for learning in dict.fromkeys((ALL, scope)):
            self._learn(record, learning)

    def probe(self, profile: CalibrationProfile) -> None:
        """A learner begins: engines are to hold this profile, whose anchors they hand out; it is not tested nor served.

        What the last one had learned is lost. Where it is not tested and does not serve, nothing is to be surpassed.
        """
        before, self._probe = self._probe, profile.version
        if before is not None and before != profile.version:
            self._forget(before)
        self._hold(profile)
        for scope, seat in self._seats.items():
            selected = self.held(seat.selected)
            if self._lined_up(scope, CONTEXTUAL):
                continue
            if selected is None or selected.family != CONTEXTUAL:
                seat.proposed_at.pop(CONTEXTUAL, None)
            elif _digest(selected) != _digest(profile):
                log.warning(
                    "profile %s, which serves %s, reads other anchors than the learner: engines hand out those of the "
                    "profile, and the learner has to do with the top ids until it is taken back",
                    selected.version,
                    scope or "all",
                )

    def awaits(self, tokens: int, scope: str = ALL) -> bool:
        """Whether a contextual proposal that was learned from `tokens` tokens, ever, would be taken now."""
        return (
            self.known is not None
            and self.mode != "off"
            and self.forced is None
            and self._settings.apply == "engine"
            and self._due(scope, CONTEXTUAL, tokens)
        )

    def propose(self, profile: CalibrationProfile, why: str, report: Mapping[str, Any], scope: str = ALL) -> bool:
        """Put a contextual profile to the test, in place of the last one of the scope; False when it is not wanted now.

        report: JSON-ready, shown as the event's evidence; `tokens` is the number of tokens learned from, ever.
        scope: whose requests it is for; "" is all.
        InvalidProfileError for another model's profile.
        """
        if not self.awaits(int(report["tokens"]), scope):
            return False
        self._check(profile)
        return self._propose(scope, [profile], why, int(report["tokens"]), dict(report))

    def _uses(self, record: TokenRecord) -> bool:
        known = self.known is not None and record.vocab_size == self.known[1]
        return known and self.mode != "off" and self.forced is None

    def _learn(self, record: TokenRecord, scope: str) -> None:
        """Temperature and bias, of a scope that is known."""
        seat = self._seats[scope]
        if seat.learner is None and self.known is not None:
            seat.learner = self._family.init(*self.known)
        seat.batch.append(record)
        if len(seat.batch) < BATCH or seat.learner is None:
            return
        # The batch is gone first: records that raise here must not come back for ever.
        batch, seat.batch = seat.batch, []
        seat.learner = learner = self._family.update(seat.learner, batch)
        least = self._settings.min_tokens
        if self._probe is not None and CONTEXTUAL not in seat.proposed_at:
            least *= AFTER_CONTEXTUAL
        few = learner.tokens < least or learner.requests < self._family.min_requests
        if few or not self._due(scope, TEMPERATURE_BIAS, learner.tokens):
            return
        pooled = self._seats[ALL].learner
        if scope != ALL and pooled is not None:
            learner = self._family.shrunk(learner, pooled, self._settings.min_tokens)
        proposal = self._family.propose(learner)
        if proposal is not None:
            made = variants(proposal, for_requests=self._settings.apply == "request", tempered=self._tempered)
            self._propose(scope, made, f"learned from {learner.tokens} tokens", learner.tokens, {})

    def _due(self, scope: str, family: str, tokens: int) -> bool:
        """Whether enough has been learned since the last proposal for another test to be worth its alpha."""
        seat = self._seat(scope)
        if (
            not self._lease.leads
            or seat is None
            or (scope != ALL and seat.selected is None and len(self._apart()) >= SCOPES_APART)
        ):
            return False
        last = seat.proposed_at.get(family, 0)
        if self._lined_up(scope, family):
            enough = REPLACE_TESTED * last
        elif seat.lost:
            enough = last + self._settings.min_tokens
        else:
            enough = PROPOSE_AGAIN * last
        return tokens >= min(enough, last + PROPOSE_WITHIN)

    def _lined_up(self, scope: str, family: str) -> bool:
        return any(c.scope == scope and c.source == family for c in self._trials.line)

    def _propose(
        self, scope: str, profiles: list[CalibrationProfile], why: str, tokens: int, report: dict[str, Any]
    ) -> bool:
        family = profiles[0].family
        self._seats[scope].proposed_at[family] = tokens
        profiles = [profile for profile in profiles if profile.version not in self._in_use()]
        if not profiles:
            return False
        for old in [c for c in self._trials.line if c.scope == scope and c.source == family]:
            self._drop(old, "newer", "a proposal that was learned from more takes its place")
            if old.version not in self._in_use():
                self._forget(old.version)
        for profile in profiles:
            self._decided("propose", "learned", profile.version, scope, why, report)
            self._test(profile, scope, family)
        return True

    def _test(self, profile: CalibrationProfile, scope: str, source: str) -> None:
        """Make it a candidate; where the line is full, the one that has waited longest makes room."""
        if len(self._trials.line) >= LINE_AT_MOST:
            self._drop(self._trials.waiting[0], "newer", "the line is full")
        self._hold(profile)
        self._trials.add(Candidate(profile.version, scope, source))

    def _drop(self, candidate: Candidate, reason: str, why: str) -> None:
        tested = candidate in self._trials.tested
        evidence = evidence_of(self._trials.of_candidate(candidate)) if tested else {}
        self._trials.remove(lambda c: c == candidate)
        self._decided("drop", reason, candidate.version, candidate.scope, why, evidence)

    # --- judging ---------------------------------------------------------------------------------------------------

    def _judge(self, record: TokenRecord, scope: str) -> None:
        """Held-out evidence: candidates against what serves this request now, what serves now against identity.

        The gain is of the models' own distributions on the tokens at hand, whatever arm they came from: both
        alternatives are computed on the same tokens, so that nothing depends on who was assigned to what.
        """
        if not self._lease.is_last_leader:
            return
        place = self._place(scope)
        selected = self._seats[place].selected
        now = self._won(record, selected) if selected is not None else (0.0, 0.0)
        if now is None:
            return
        for candidate in self._trials.tested if self._lease.leads else ():
            won = self._won(record, candidate.version) if candidate.scope in (scope, place) else None
            if won is None:
                continue
            over = (won[0] - now[1], won[1] - now[0])
            decision = self._trials.weigh_candidate(candidate, record.prompt_key, over, record.tokens)
            if decision is None or self.pinned:
                continue
            if decision.action is guard.Action.PROMOTE:
                self._promote(candidate, decision)
                return
            requests = decision.evidence.requests
            patience = PATIENCE if self._trials.equals_wait(candidate) else LONGER_PATIENCE
            if requests >= patience and self._trials.waiting:
                self._drop(candidate, "unproven", f"not proven by {requests} held-out requests, and others wait")
        if selected is not None:
            decision = self._trials.weigh_serving(place, record.prompt_key, now, record.tokens)
            if decision is not None and decision.reason is not None and not self.pinned:
                self._take_back(place, decision.reason, _WHY[decision.reason], evidence_of(decision))

    def _won(self, record: TokenRecord, version: str) -> tuple[float, float] | None:
        """Mean gain over identity of one request's tokens, as an interval; None where nothing is known of it.

        Left out is what the record says nothing about: a request that the engine spoke of, but not of this profile (it
        evaluates some at a time, and may not hold it yet), and a token whose features were lost. Neither depends on
        what the gain was. A token whose anchors are masked is left alone by the engine: its gain is 0.
        """
        profile = self._profiles[version]
        won, said = gain(record, profile), record.shifts.get(version)
        normalizer = np.full(record.tokens, np.nan) if said is None else said.log_normalizer
        if record.engine_boot and np.isnan(normalizer).all() and not won.exact.any():
            return None
        lower, upper = won.lower, won.upper
        if profile.family == CONTEXTUAL:
            features = record.features
            read: npt.NDArray[np.bool_] = np.zeros(record.tokens, dtype=np.bool_)
            if features is not None and features.anchors == _digest(profile):
                read = ~np.isnan(features.values.sum(axis=1))
            masked = ~read & ~won.exact & (np.abs(normalizer) < _ZERO_NATS)
            known = read | won.exact | masked
            if not known.any():
                return None
            lower, upper = np.where(masked, 0.0, lower)[known], np.where(masked, 0.0, upper)[known]
        return float(lower.mean()), float(upper.mean())

    def _promote(self, candidate: Candidate, decision: guard.Decision) -> None:
        evidence = evidence_of(decision)
        self._decided(
            "promote", "evidence", candidate.version, candidate.scope, "better on held-out requests", evidence
        )
        self._serve(candidate.version, candidate.scope, guard.window_after_promotion(decision.evidence))

    def _serve(self, version: str, scope: str, window: int) -> None:
        """From now on. The scope's other proposals are done; whoever is compared with what changed starts over."""
        seat = self._seats[scope]
        self.promotions += 1
        self._trials.unserve(scope)
        # What serves all has proven better than a scope's own: the scope has none of its own any more.
        own = scope == ALL or version != self.selected
        seat.selected, seat.window, seat.lost = (version if own else None), window, False
        self._trials.remove(lambda c: c.scope == scope and (c.source != IMPORT or c.version == version))
        if own:
            self._trials.serve(version, scope, window)
            profile = StoredProfile(version, self._profiles[version].to_bytes(), self._created[version])
            self._writes.put_profile(profile)
        self._changed(scope)

    def _take_back(self, scope: str, reason: str, why: str, evidence: dict[str, Any]) -> None:
        seat = self._seats[scope]
        version, seat.selected = seat.selected, None
        if version is not None:
            seat.lost = True
            self.rollbacks += 1
            unpinned = self.pinned and scope == ALL
            self.pinned = self.pinned and not unpinned
            self._trials.unserve(scope)
            self._decided("roll_back", reason, version, scope, why, evidence)
            self._changed(scope, unpinned=unpinned)

    def _changed(self, scope: str, *, unpinned: bool = False) -> None:
        """What serves this scope is another than before; unpinned: so it is in the scopes with a profile of their own,
        for which the pinned one stood in."""
        self._keep_serving()
        self._trials.remove(lambda c: c.source == POOLED and scope in (ALL, c.scope))
        apart = self._apart()
        self._trials.restart(lambda c: unpinned or c.scope in (scope, ALL) or (scope == ALL and c.scope not in apart))
        if scope == ALL and self.selected is not None:
            for place in apart:
                self._trials.add(Candidate(self.selected, place, POOLED))

    def _keep_serving(self) -> None:
        kept = {place: (seat.selected, seat.window) for place, seat in self._seats.items() if seat.selected is not None}
        self._writes.set_state("serving", _encode(_Kept(self._settings.scope, self.pinned, kept)))

    def _decided(
        self, decision: str, reason: str, version: str, scope: str, why: str, evidence: dict[str, Any]
    ) -> None:
        self.decisions[decision, reason] += 1
        event = {
            "at": self._wall(),
            "decision": decision,
            "reason": reason,
            "version": version,
            "scope": scope,
            "why": why,
            "evidence": evidence,
        }
        log.info("%s %s%s: %s %s", decision, version, f" for {scope}" if scope else "", why, evidence or "")
        self._events.append(event)
        self._writes.append_event(event)

    # --- what operators do -----------------------------------------------------------------------------------------

    def set_mode(self, mode: str) -> None:
        """off | observe | auto; `off` ends serving and learning at once. Outlives this process, while the
        configuration's own mode stays the same."""
        if mode != self.mode:
            self.mode = mode
            for seat in self._seats.values():
                seat.batch = []
            self._keep_mode()
            self._decided("mode", "operator", self.selected or IDENTITY, ALL, f"set to {mode} by the operator", {})

    def _keep_mode(self) -> None:
        self._writes.set_state("mode", f"{self._settings.mode} {self.mode}")

    def promote(self, version: str, scope: str = ALL) -> None:
        """Let a profile serve without the guard's word; it is watched like any other."""
        seat = self._named(scope)
        if self.pinned:
            raise HemostatError("a profile is pinned: unpin it first (hemostat profile pin --off)")
        if version == seat.selected:
            raise HemostatError(f"{version} serves there already")
        if scope != ALL and scope not in self._apart() and len(self._apart()) >= SCOPES_APART:
            raise HemostatError(f"{SCOPES_APART} scopes have profiles of their own, as many as engines hold")
        self._override("promote", version, scope)

    def pin(self, version: str) -> None:
        """Let a profile serve all requests, and go on, whatever the guard says, until it is unpinned."""
        self._checked(version)
        self.pinned = True
        if version == self.selected:
            self._decided("pin", "operator", version, ALL, "pinned by the operator", {})
            self._changed(ALL)
        else:
            self._override("pin", version, ALL)

    def unpin(self) -> None:
        """What was pinned goes on serving, and is judged again."""
        if not self.pinned or self.selected is None:
            raise HemostatError("nothing is pinned")
        self.pinned = False
        self._trials.serve(self.selected, ALL, self._seats[ALL].window)
        self._decided("unpin", "operator", self.selected, ALL, "unpinned by the operator", {})
        self._changed(ALL, unpinned=True)

    def rollback(self, why: str, scope: str | None = None) -> None:
        """Identity serves until another is promoted, in one scope (the pooled profile may take its place) or in all."""
        places = [scope] if scope is not None else list(self._seats)
        if scope is not None:
            self._named(scope)
        if not any(self._seats[place].selected for place in places):
            raise HemostatError("nothing to take back: identity serves")
        for place in places:
            self._take_back(place, "operator", why, {})

    def add(self, profile: CalibrationProfile, scope: str = ALL) -> str:
        """Import a profile: it becomes a candidate, and has to prove itself like any other."""
        self._check(profile)
        seat = self._named(scope)
        version = profile.version
        if version in (self._probe, self.forced, seat.selected) or any(
            (c.version, c.scope) == (version, scope) for c in self._trials.line
        ):
            return version
        why = "imported by the operator"
        read = self.held(self._probe)
        if read is not None and _digest(profile) not in {"", _digest(read)}:
            # Engines hand out one set of anchors.
            why += (
                "; it reads other anchors than the learner, which does without the engine's while this is in question"
            )
        self._decided("import", "operator", version, scope, why, {})
        self._test(profile, scope, IMPORT)
        self._writes.put_profile(StoredProfile(version, profile.to_bytes(), self._created[version]))
        return version

    def force(self, profile: CalibrationProfile) -> None:
        """Put this profile on every request."""
        self._hold(profile)
        self.forced = profile.version

    def restore(
        self, stored: Iterable[StoredProfile], states: Mapping[str, str | None], events: list[dict[str, Any]]
    ) -> None:
        """Take up what an earlier run kept: what served serves again, and goes on being judged.

        stored, events: newest first. states: by name, those of `STATES`.
        """
        self._events.extend(reversed(events))
        before, _, chosen = (states.get("mode") or "").partition(" ")
        if before == self._settings.mode and chosen in {"off", "observe", "auto"}:
            self.mode = chosen
        self._trials.resume({role: _whole(states.get(f"tests.{role}")) for role in guard.Role})
        kept = _decode(states.get("serving"))
        selected = {version for version, _ in kept.selected.values()}
        total = 0
        for n, item in enumerate(stored):
            held = self._profiles.get(item.version)
            total += len(item.data) if held is None else weight(held)
            if item.version not in selected and (n >= PROFILES_HELD or total > BYTES_HELD):
                self._writes.delete_profile(item.version)
                continue
            try:
                profile = held or item.read or CalibrationProfile.from_bytes(item.data, item.version)
            except InvalidProfileError as error:
                log.error("stored profile %s: %s", item.version, error)
                continue
            self._profiles[item.version] = profile
            self._profiles.move_to_end(item.version, last=False)
            self._created[item.version] = item.created
        for scope, (version, window) in kept.selected.items():
            seat = self._seat(scope) if scope == ALL or kept.scope == self._settings.scope else None
            room = scope == ALL or len(self._apart()) < SCOPES_APART
            if seat is not None and version in self._profiles and room:
                seat.selected, seat.window = version, max(1, window)
                self._trials.serve(version, scope, seat.window)
        self.pinned = kept.pinned and self.selected is not None

    def take_up(
        self, stored: Iterable[StoredProfile], states: Mapping[str, str | None], events: list[dict[str, Any]]
    ) -> None:
        """Go on from what another replica has written, as `restore` does from an earlier run's.

        stored: without data where the profile is held. A store that says nothing of what serves changes nothing.
        """
        if states.get("serving") is None:
            return
        stored = list(stored)
        self._trials.remove(lambda _: True)
        for scope, seat in self._seats.items():
            self._trials.unserve(scope)
            seat.selected = None
        stay = {item.version for item in stored} | {self.forced, self._probe}
        stay |= {version for version, _ in _decode(states.get("serving")).selected.values()}
        for version in [v for v in self._profiles if v not in stay]:
            self._forget(version)
        self._events.clear()
        self.mode = self._settings.mode
        self.restore(stored, states, events)
        for scope, seat in self._seats.items():
            selected = self.held(seat.selected)
            if selected is None or self.known is None:
                continue
            try:
                self._check(selected)
            except InvalidProfileError as error:
                log.error("what another replica lets serve cannot serve here: %s", error)
                self._trials.unserve(scope)
                seat.selected, self.pinned = None, self.pinned and scope != ALL
                continue
            seat.proposed_at[selected.family] = _whole(selected.metadata.get("tokens"))

    def keep(self, stored: Collection[str]) -> None:
        """Write all that a restart needs: the store may have lost it. stored: versions of the profiles that it has."""
        for version in {seat.selected for seat in self._seats.values()} - {None, *stored}:
            assert version is not None
            profile = StoredProfile(version, self._profiles[version].to_bytes(), self._created[version])
            self._writes.put_profile(profile)
        self._keep_serving()
        self._keep_mode()
        for role, number in self._trials.tests.items():
            self._writes.raise_state(f"tests.{role}", number)

    def _override(self, decision: str, version: str, scope: str) -> None:
        self._checked(version)
        tested = next((c for c in self._trials.tested if (c.version, c.scope) == (version, scope)), None)
        evidence = evidence_of(self._trials.of_candidate(tested)) if tested else {}
        said = "promoted" if decision == "promote" else "pinned"
        self._decided(decision, "operator", version, scope, f"{said} by the operator", evidence)
        self._serve(version, scope, guard.DEFAULT_WINDOW)

    def _checked(self, version: str) -> CalibrationProfile:
        """One that may serve; HemostatError says why not."""
        profile = self.held(version)
        if profile is None or version == self._probe:
            raise HemostatError(f"there is no profile {version}; hemostat profile list shows them")
        self._check(profile)
        return profile

    def _check(self, profile: CalibrationProfile) -> None:
        """InvalidProfileError where it does not fit the model, or cannot be applied."""
        if self.known is not None:
            model, vocab_size = self.known
            if profile.vocab_size != vocab_size:
                raise InvalidProfileError(
                    f"profile is for a vocabulary of {profile.vocab_size} ids, the model has {vocab_size}"
                )
            if profile.model not in {"", model}:
                raise InvalidProfileError(f"profile is for the model {profile.model}, not for {model}")
        if self._settings.apply != "request":
            return
        if profile.family != TEMPERATURE_BIAS:
            raise InvalidProfileError(
                f"calibration.apply: request cannot carry a profile of the family {profile.family}"
            )
        beta = float(profile.parameters["inverse_temperature"])
        if beta != 1.0 and not self._tempered:
            raise InvalidProfileError(
                f"profile has the temperature {1.0 / beta:.3g}, which would replace the server's own default: "
                "import one with 1, or set upstream.openai_sampling_defaults where the server has none"
            )

    def _named(self, scope: str) -> _Seat:
        """The scope that an operator names; HemostatError where there is none of that name."""
        if scope not in self._seats:
            kind = self._settings.scope
            if kind == "pooled":
                raise HemostatError(f"calibration.scope is pooled: there is no scope {scope[:80]!r}; leave it out")
            seen = ", ".join(sorted(place for place in self._seats if place != ALL)) or "none yet"
            raise HemostatError(f"no scored request was of the {kind} {scope[:80]!r}; seen: {seen}")
        return self._seats[scope]

    # --- what is shown ---------------------------------------------------------------------------------------------

    def status(self) -> dict[str, Any]:
        learner = self._seats[ALL].learner
        return {
            "mode": self.mode,
            "pinned": self.pinned,
            "learned_requests": learner.requests if learner else 0,
            "learned_tokens": learner.tokens if learner else 0,
            "candidates": [{**asdict(c), **evidence_of(self._trials.of_candidate(c))} for c in self._trials.tested],
            "waiting": [asdict(c) for c in self._trials.waiting],
            "selected": self._watched(ALL),
            "scope": self._settings.scope,
            "scopes": {scope: self._watched(scope) for scope in self._seats if scope != ALL},
            "forced": self.forced,
            "tests_begun": {str(role): number for role, number in self._trials.tests.items()},
        }

    def _watched(self, scope: str) -> dict[str, Any] | None:
        version = self._seats[scope].selected
        return {"version": version, **evidence_of(self._trials.of_serving(scope))} if version else None

    def listing(self) -> dict[str, Any]:
        return {
            "serving": self.serving or IDENTITY,
            "scoped": self.scoped,
            "pinned": self.pinned,
            "profiles": [self.describe(version) for version in reversed(self._profiles)],
            "events": list(reversed(self._events)),
        }

    def describe(self, version: str) -> dict[str, Any] | None:
        profile = self.held(version)
        if profile is None:
            return None
        return {
            "version": version,
            "family": profile.family,
            "state": self._state(version),
            "scopes": [scope for scope, seat in self._seats.items() if seat.selected == version],
            "created": self._created[version],
            "clamp_nats": profile.clamp_nats,
            "clamp_kl_nats": float(profile.parameters["kl_limit"]) if profile.family == CONTEXTUAL else None,
            "vocab_size": profile.vocab_size,
            "bytes": weight(profile),
            "metadata": dict(profile.metadata),
            "evidence": [e for e in reversed(self._events) if e["version"] == version],
        }

    def _state(self, version: str) -> str:
        if version == self.forced:
            return "forced"
        if any(seat.selected == version for seat in self._seats.values()):
            return "selected"
        if version in self.candidates:
            return "candidate"
        if any(c.version == version for c in self._trials.line):
            return "waiting"
        return "probe" if version == self._probe else "retired"

    # --- bookkeeping -----------------------------------------------------------------------------------------------

    def _hold(self, profile: CalibrationProfile) -> None:
        self._profiles[profile.version] = profile
        self._created.setdefault(profile.version, self._wall())
        self._profiles.move_to_end(profile.version)
        keep = {profile.version, *self._in_use()}
        total = sum(map(weight, self._profiles.values()))
        for version in [v for v in self._profiles if v not in keep]:
            if len(self._profiles) > PROFILES_HELD or total > BYTES_HELD:
                total -= weight(self._profiles[version])
                self._forget(version)
                self._writes.delete_profile(version)

    def _in_use(self) -> set[str | None]:
        """Versions that serve, are tested or wait to be, and the probe."""
        line = {candidate.version for candidate in self._trials.line}
        return {self.forced, self._probe} | {seat.selected for seat in self._seats.values()} | line

    def _forget(self, version: str) -> None:
        self._trials.remove(lambda c: c.version == version)
        if version == self._probe:
            self._probe = None
        self._profiles.pop(version, None)
        self._created.pop(version, None)


_WHY = {
    guard.Reason.HARM: "held-out requests speak against it",
    guard.Reason.UNSUPPORTED: "its gain is no longer supported: not proven anew within the window",
}
_ZERO_NATS = 1e-4
"""What the engine's log-normalizer of a row that it leaves alone may be off by."""


def _encode(kept: _Kept) -> str:
    return msgspec.json.encode(kept).decode()


def _decode(text: str | None) -> _Kept:
    try:
        return msgspec.json.decode(text or "", type=_Kept)
    except msgspec.DecodeError as error:
        if text:
            log.error("what served before cannot be read, identity serves: %s", error)
        return _Kept("pooled", False, {})


def _whole(text: str | None) -> int:
    return int(text) if text and text.isdecimal() else 0


def _digest(profile: CalibrationProfile) -> str:
    """Of its anchors; "" where it reads none."""
    ids = anchors(profile)
    return "" if ids is None else anchors_digest(ids)


def weight(profile: CalibrationProfile) -> int:
    """Bytes of its parameters."""
    return sum(array.nbytes for array in profile.parameters.values())


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
