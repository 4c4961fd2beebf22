"""Candidates under test, in a queue, and the tests of them and of the serving profiles, by kind of traffic.

Invariants:
- Engines evaluate two profiles in addition to the applied one, so two candidates are tested at a time and the rest
  wait: no candidate is judged without the engine's numbers, and no alpha is spent on waiting.
- What is tested is finished before something newer takes its place: a proposal waits while an older one of its family
  is under test. A test that a family of a better priority displaces keeps its evidence, and goes on later.
  (Which units are left out meanwhile does not depend on their gains, so the evidence stays valid.)
- A candidate is tested in all kinds at once, in each against what serves there. When that changes, the
  test of this kind begins anew (an import) or ends (a proposal: the learner makes another one).
- A kind that appears later gets a test of its own. So does a profile that serves elsewhere already.
- An evidence unit (`TokenRecord.unit`) counts once in a test and kind; the guard remembers which have.
- The gains of a test are of one figure: of the total variation where the candidate, or what serves the kind, is an
  adapter, else nats (`Figure`). What serves a kind does not change within a test, so the figure does not either; the
  guard refuses gains of another one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from types import MappingProxyType

import numpy as np

from hemostat.profiles.begun_tests import BegunTests
from hemostat.profiles.candidates import Candidate, Proposed
from hemostat.profiles.gains import Gains, UnitGain
from hemostat.profiles.guard_keys import WATCH, GuardKey
from hemostat.profiles.paces import Paces
from hemostat.profiles.serving import KindState, ServingState
from hemostat_calibration.arrays import Floats
from hemostat_calibration.guard.decisions import Action, Admission, Decision, Evidence, Figure
from hemostat_calibration.guard.guard import Guard
from hemostat_calibration.profiles.profile import IDENTITY
from hemostat_calibration.records import TokenRecord

MAX_TESTED = 2
"""The number of candidates tested at a time: as many as engines evaluate in addition to the applied profile (the
plugin's MAX_TAPPED_CANDIDATES).
"""
MAX_QUEUED_CANDIDATES = 8
"""The largest number of candidates that are tested or wait; see `lifecycle.Lifecycle.test`."""

MAX_NOTED_NATS = 5.0
"""The limit at which a token's divergence, in nats, is clipped when it is only used to estimate how much units depend
on each other.
"""


class Trials:
    """The queue of candidates, and the guard.

    numbers: the numbers of tests and windows, which decide nothing before these are stored.
    cycle: of the traffic, seconds; see `Guard`.
    """

    def __init__(
        self,
        alpha: float,
        client_share: float,
        gains: Gains,
        serving: ServingState,
        numbers: BegunTests,
        cycle: float = 0.0,
    ) -> None:
        self._alpha = alpha
        self.client_share = client_share
        """The part of a test's units that one client may contribute."""
        self._gains = gains
        self._serving = serving
        self.numbers = numbers
        self.begun = 0
        """The number of tests and windows that have begun since this process started."""
        self._cycle = cycle
        self.guard = Guard(alpha, client_share, cycle)
        self._queue: list[Candidate] = []
        self._seen: dict[Candidate, int] = {}
        """The number of held-out requests since the test of each candidate began, or it was promoted."""
        self._paces = Paces()

    @property
    def queue(self) -> tuple[Candidate, ...]:
        """Candidates under test, then those that wait, in the order in which they will be tested."""
        return tuple(self._queue)

    @property
    def tested(self) -> list[Candidate]:
        return [candidate for candidate in self._queue if not self._older(candidate)][:MAX_TESTED]

    @property
    def tested_versions(self) -> list[str]:
        return [candidate.version for candidate in self.tested]

    @property
    def waiting(self) -> list[Candidate]:
        tested = self.tested
        return [candidate for candidate in self._queue if candidate not in tested]

    def has_begun(self, candidate: Candidate) -> bool:
        """Returns True if its test has begun: it is under test, or it was, and goes on when a place is free again."""
        return candidate.test in self.guard.names

    def _older(self, candidate: Candidate) -> list[Candidate]:
        """Returns the candidates that it waits for: of earlier proposals of its family, if its own test has
        not begun."""
        if not isinstance(candidate.source, Proposed) or self.has_begun(candidate):
            return []
        alike = (other for other in self._queue if other.source == candidate.source)
        return [other for other in alike if other.proposal < candidate.proposal]

    def behind(self, candidate: Candidate) -> list[str]:
        """Returns the versions of its family whose tests have to end before its own begins."""
        return [other.version for other in self._older(candidate)]

    def successors(self, candidate: Candidate) -> list[Candidate]:
        """Returns the candidates that wait for the end of this one's test: newer proposals of its family, and those for
        which any free place is enough."""
        waiting = {other: self._older(other) for other in self.waiting}
        return [other for other, older in waiting.items() if not older or candidate in older]

    @property
    def tests_begun(self) -> int:
        """The number of tests of candidates, over the store's life."""
        return self.guard.candidate_tests

    @property
    def has_seen_cycles(self) -> bool:
        """See `Guard.has_seen_cycles`."""
        return self.guard.has_seen_cycles

    def _note_begun(self) -> None:
        """Notes that a test or a window has begun: what it spends of alpha is written at once."""
        self.begun += 1
        self.spend()

    def spend(self) -> None:
        """Writes the numbers of all tests and windows that have begun, if they are new."""
        self.numbers.spend(self.guard)

    def noted_inflation(self, kind: str, units: int) -> float:
        """See `Guard.noted_inflation`."""
        return self.guard.noted_inflation(kind, units)

    def is_known(self, kind: str) -> bool:
        """See `Guard.is_known`."""
        return self.guard.is_known(kind)

    def holds(self, version: str) -> bool:
        """Returns True if this profile is under test, or waits for it."""
        return any(candidate.version == version for candidate in self._queue)

    def has_proposal(self, family: str) -> bool:
        """Returns True if a proposal of this family that serves nowhere yet is under test, or waits for it."""
        serving = self._serving.versions
        return any(c.source == Proposed(family) and c.version not in serving for c in self._queue)

    def resume(
        self,
        data: bytes | None,
        candidate_tests: int,
        queue: Iterable[Candidate],
        watched: Mapping[str, int] = MappingProxyType({}),
    ) -> None:
        """Goes on from stored tests. What this process itself or the store has counted as begun stays spent.

        data: of `Guard.save`; None: all tests begin anew. watched: by kind, the number of a window that was begun.
        Raises InvalidArgumentError if `data` is damaged; then nothing changes.
        """
        spent, windows = self.guard.candidate_tests, dict(self.guard.windows)
        if data is None:
            self.guard = Guard(self._alpha, self.client_share, self._cycle)
        else:
            self.guard = Guard.load(data, self._alpha, self.client_share, self._cycle)
        self.guard.raise_counts(max(spent, candidate_tests), windows)
        self.guard.raise_counts(0, watched)
        self._queue = list(queue)
        named = {WATCH, *(candidate.test for candidate in self._queue)}
        for name in self.guard.names:
            if name not in named:
                self.guard.end(name)
        self._end_other_figures()
        self._arrange()

    def _end_other_figures(self) -> None:
        """Ends the tests whose evidence is in another figure than it would be now: what serves a kind may be another
        profile than when its test was stored.
        """
        for candidate in self._queue:
            kinds = [kind for kind in self.guard.kinds(candidate.test) if kind in self._serving.kinds]
            served = {kind: self._serving.kinds[kind].version for kind in kinds}
            expected = {kind: self._gains.figure(candidate.version, version) for kind, version in served.items()}
            running = [kind for kind in kinds if self.guard.is_running(candidate.test, kind)]
            if any(self.guard.figure(candidate.test, kind) is not expected[kind] for kind in running):
                self.guard.end(candidate.test)
        for kind, state in self._serving.kinds.items():
            if self.guard.figure(WATCH, kind) not in (None, self._gains.figure(state.version, None)):
                self.guard.end_kind(WATCH, kind)

    # --- the queue -------------------------------------------------------------------------------------------------

    def enqueue(self, candidate: Candidate) -> None:
        """Appends to the queue, behind the candidates of the same or a lower priority number."""
        self._queue.append(candidate)
        self._arrange()

    def remove(self, matches: Callable[[Candidate], bool]) -> None:
        """Ends the tests of these candidates."""
        for candidate in [c for c in self._queue if matches(c)]:
            self._queue.remove(candidate)
            self._give_up(candidate)
        self._arrange()

    def restart(self) -> None:
        """Begins all tests of candidates anew, of other models."""
        self.guard.forget()
        for candidate in self._queue:
            self.guard.end(candidate.test)
        self._arrange()

    def _arrange(self) -> None:
        while True:
            self._queue.sort(key=lambda candidate: candidate.priority)
            tested = self.tested
            for candidate in tested:
                self._begin(candidate)
            over = [candidate for candidate in tested if self._is_over(candidate)]
            for candidate in over:
                self._queue.remove(candidate)
                self._give_up(candidate)
            if not over:
                return

    def _is_over(self, candidate: Candidate) -> bool:
        """Returns True if the candidate is under test in no kind any more, or serves them all. It waits for the first
        kind that it can be tested in."""
        states = self._serving.kinds.values()
        tested = any(map(_is_testable, states))
        serves_all = all(state.version == candidate.version for state in states)
        return (tested or serves_all) and not self.running_kinds(candidate)

    def _give_up(self, candidate: Candidate) -> None:
        for kind in self.running_kinds(candidate):
            self._serving.kinds[kind].update_tried(candidate.version)
        self.guard.end(candidate.test)

    # --- tests of candidates ---------------------------------------------------------------------------------------

    def running_kinds(self, candidate: Candidate) -> list[str]:
        """Returns the kinds in which it is under test now."""
        kinds = self.guard.kinds(candidate.test)
        return [kind for kind in kinds if kind in self._serving.kinds and self.guard.is_running(candidate.test, kind)]

    def is_wanted(self, candidate: Candidate, kind: str) -> bool:
        """Returns True if a test of this candidate would make sense in this kind."""
        state = self._serving.kinds[kind]
        new = candidate.version != state.version and candidate.version not in state.tried
        return new and _is_testable(state)

    def begin_in(self, kind: str, ends: Callable[[Candidate], bool] = lambda _: False) -> None:
        """Begins tests in a kind that appeared, changed what serves it, or may be served by a profile again.

        ends: of a candidate whose test there ends, and does not begin there again. The test of one that waits does not
        begin there either.
        """
        state = self._serving.kinds[kind]
        for candidate in self._queue:
            if ends(candidate) and (kind in self.running_kinds(candidate) or self.is_wanted(candidate, kind)):
                self.guard.end_kind(candidate.test, kind)
                state.update_tried(candidate.version)
        for candidate in self._queue:
            if self.has_begun(candidate) and self.is_wanted(candidate, kind):
                figure = self._gains.figure(candidate.version, state.version)
                self.guard.begin_kind(candidate.test, kind, self._gains.width(candidate.version, state.version), figure)
                self._note_begun()
        self._arrange()

    def update_seen(self) -> None:
        """Counts a held-out request, whether it counted in a test or not."""
        self._seen = {c: n for c, n in self._seen.items() if c in self._queue}
        self._seen.update({candidate: self.seen(candidate) + 1 for candidate in self.tested})

    def seen(self, candidate: Candidate) -> int:
        return self._seen.get(candidate, 0)

    def spans_cycle(self, candidate: Candidate, kind: str) -> bool:
        """See `Guard.spans_cycle`."""
        return self.guard.spans_cycle(candidate.test, kind)

    def freeze(self, version: str, kind: str) -> None:
        """Freezes the test of a profile that serves this kind now: nothing more is counted for it there."""
        for candidate in self._queue:
            if candidate.version == version and kind in self.running_kinds(candidate):
                self.guard.freeze(candidate.test, kind)
                self._seen.pop(candidate, None)

    def forget_kind(self, kind: str) -> None:
        """Ends all tests in a kind that is not followed any more."""
        self.guard.forget(kind)
        self.guard.end_kind(WATCH, kind)
        for candidate in self._queue:
            self.guard.end_kind(candidate.test, kind)

    def _begin(self, candidate: Candidate) -> None:
        """Begins the test of a candidate, if it has not begun: in all kinds that were seen, weighted by their share so
        far.
        """
        states = {kind: state for kind, state in self._serving.kinds.items() if self.is_wanted(candidate, kind)}
        if not self.has_begun(candidate) and states:
            version, gains = candidate.version, self._gains
            self.guard.begin_candidate(
                candidate.test,
                {kind: (gains.width(version, state.version), float(state.units)) for kind, state in states.items()},
                {kind: gains.figure(version, state.version) for kind, state in states.items()},
            )
            self._note_begun()

    # --- the watch of what serves ----------------------------------------------------------------------------------

    def watch(self, kind: str, like: str | None = None) -> None:
        """Watches what serves a kind from now on. like: the version whose test proved it, where there is one."""
        state = self._serving.kinds[kind]
        if state.version is None:
            return
        proof = next((c.test for c in self.tested if c.version == like and kind in self.guard.kinds(c.test)), None)
        figure = self._gains.figure(state.version, None)
        self.guard.begin_watch(WATCH, kind, self._gains.width(state.version, None), state.window, proof, figure)
        self._note_begun()

    def unwatch(self, kind: str) -> None:
        self.guard.end_kind(WATCH, kind)

    def is_watched(self, kind: str) -> bool:
        return self.guard.is_running(WATCH, kind)

    # --- evidence --------------------------------------------------------------------------------------------------

    def update_dependence(self, kind: str, client: bytes, divergences: Floats, now: float) -> None:
        """Notes a unit that was scored, whether it is judged by or not: the compressed model's own divergence by token,
        and when, in seconds."""
        known = divergences[np.isfinite(divergences)]
        if len(known):
            self.guard.update_dependence(kind, client, float(np.minimum(known, MAX_NOTED_NATS).mean()), now)

    def admit(self, test: GuardKey, record: TokenRecord) -> Admission:
        """Returns the decision whether the record's unit may count in this test; it is asked before anything is known
        of its gain."""
        windows = self.guard.windows if test == WATCH else {}
        admission = self.guard.admit(test, record.kind, record.unit, record.client)
        if test == WATCH and self.guard.windows != windows:
            self._note_begun()  # the next window
        return admission

    def update(self, test: GuardKey, record: TokenRecord, gain: UnitGain, now: float) -> None:
        """Counts an admitted record with its gain. now: Unix seconds."""
        names = test, record.kind, record.unit, record.client
        self.guard.update(*names, gain.lower, gain.upper, record.tokens, gain.kl, now)
        self._paces.update(test, record.kind, now)

    def update_gain(self, test: GuardKey, record: TokenRecord, gain: UnitGain, now: float) -> None:
        """Notes a record that the test is too full to count: how much gains depend on each other is estimated from it,
        too."""
        self.guard.update_gain_dependence(test, record.kind, gain.lower, now)

    def oppose(self, test: GuardKey, record: TokenRecord, gain: UnitGain) -> None:
        """Notes a record that a candidate's test has refused for its client's share: it can only prevent a
        promotion."""
        self.guard.oppose(test, record.kind, gain.lower, gain.figure)

    def distance_versions(self, kind: str, unit: bytes) -> tuple[str, ...]:
        """Returns the versions (`IDENTITY` first) whose exact distances the tests need of a held-out unit of a followed
        kind; none where no test that needs any can count it."""
        serving = self._serving.kinds[kind].version
        pairs: list[tuple[GuardKey, str, str | None]] = [(WATCH, serving, None)] if serving is not None else []
        pairs += [(c.test, c.version, serving) for c in self.tested]
        needed: dict[str, None] = {}
        for test, version, baseline in pairs:
            figure = self.guard.figure(test, kind)
            if figure is Figure.TOTAL_VARIATION and not self.guard.has_counted(test, kind, unit):
                needed |= dict.fromkeys((baseline or IDENTITY, version))
        # Identity is wanted in any case: what an adapter gains is shown against it.
        return (IDENTITY, *(version for version in needed if version != IDENTITY)) if needed else ()

    def awaits(self, kind: str, unit: bytes) -> bool:
        """Returns True if the test of a candidate can count a held-out unit of this kind. The call changes nothing."""
        return any(not self.guard.has_counted(candidate.test, kind, unit) for candidate in self.tested)

    def promotes(self, candidate: Candidate, kind: str) -> bool:
        """Returns True if its test proves it in this kind. None does before its number is stored: a process that is
        killed meanwhile has not spent the test's alpha."""
        stored = self.numbers.is_stored(self.guard.number(candidate.test, kind), None)
        return stored and self.guard.decide(candidate.test, kind).action is Action.PROMOTE

    def decide_serving(self, kind: str) -> Decision:
        """Returns what follows for the profile that serves the kind; as in `promotes`, nothing before the number is
        stored."""
        stored = self.numbers.is_stored(self.guard.number(WATCH, kind), kind)
        return self.guard.decide(WATCH, kind) if stored else Decision(Action.HOLD)

    def evidence(self, candidate: Candidate, kind: str) -> Evidence:
        return self.guard.evidence(candidate.test, kind)

    def units(self, candidate: Candidate, kind: str) -> tuple[int, int]:
        """Returns the number of units that counted in its test, and of those that were refused for their client's
        share."""
        return self.guard.units(candidate.test, kind)

    def seconds_for(self, candidate: Candidate, kind: str, units: int, now: float) -> float | None:
        """Returns the seconds that so many more units of its test take at the pace so far; None if that is not
        known. now: Unix seconds."""
        return self._paces.seconds(candidate.test, kind, units, now)

    def serving_evidence(self, kind: str) -> Evidence | None:
        """Returns the evidence about what serves the kind; None if no profile serves it."""
        return self.guard.evidence(WATCH, kind) if self.is_watched(kind) else None

    def evidence_by_kind(self, candidate: Candidate) -> Mapping[str, Evidence]:
        """Returns the evidence in the kinds in which it is or was under test; {} before its test has begun."""
        kinds = self.guard.kinds(candidate.test)
        return {kind: self.evidence(candidate, kind) for kind in kinds if kind in self._serving.kinds}


def _is_testable(state: KindState) -> bool:
    """Returns True if the kind was seen, and is not held at identity."""
    return state.units > 0 and not state.held
