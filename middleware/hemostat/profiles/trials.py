"""Candidates under test, in a queue, and what the tests of them and of the serving profiles have shown.

Invariants:
- Engines evaluate two profiles beside the applied one, so two candidates are tested at a time and the rest wait: no
  candidate is judged without the engine's numbers, and no alpha is spent on waiting.
- A test is of one profile in one scope, against what serves there. When that changes, the test begins anew.
- An evidence unit (`judging.evidence_unit`) counts once in a test. The guard's observations must be new draws of what
  is asked: retries and health checks are not, and would let chance properties of a few prompts look like evidence.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from hemostat.profiles.families import FAMILY_RULES
from hemostat_calibration import guard
from hemostat_calibration.guard import Role

MAX_TESTED = 2
"""Candidates tested at a time: as many as engines evaluate beside the applied profile (the plugin's
CANDIDATES_TAPPED)."""
MAX_QUEUED_CANDIDATES = 8
"""Candidates tested and waiting; see `lifecycle.Lifecycle.test`."""
MAX_COUNTED_UNITS = 50_000
"""Evidence units remembered as counted, over all tests."""

IMPORT = "import"
POOLED = "pooled"


@dataclass(frozen=True, slots=True)
class Candidate:
    """A profile that is to be tested on the requests of one scope.

    source: the family that proposed it, `IMPORT`, or `POOLED`: the pooled profile, tested against a scope's own.
    """

    version: str
    scope: str
    source: str

    @property
    def priority(self) -> int:
        """Lower is tested first."""
        rules = FAMILY_RULES.get(self.source)
        return rules.queue_priority if rules is not None else 0


class Trials:
    """The queue of candidates and the guard's state.

    gain_width: (version) -> high minus low of its Δz, nats: no gain over identity is below minus that.
    baseline: (scope) -> the version that serves there, None for identity.
    on_test_begun: called with a role and how many of its tests were begun, when that number grows.
    """

    def __init__(
        self,
        alpha: float,
        gain_width: Callable[[str], float],
        baseline: Callable[[str], str | None],
        on_test_begun: Callable[[Role, int], None],
    ) -> None:
        self._alpha = alpha
        self._gain_width = gain_width
        self._baseline = baseline
        self._on_test_begun = on_test_begun
        self._guard = guard.init(alpha)
        self._counted: OrderedDict[tuple[str, int, bytes], None] = OrderedDict()
        self._queue: list[Candidate] = []

    @property
    def queue(self) -> tuple[Candidate, ...]:
        """Candidates under test, then those that wait, in the order in which they will be tested."""
        return tuple(self._queue)

    @property
    def tested(self) -> list[Candidate]:
        return self._queue[:MAX_TESTED]

    @property
    def tested_versions(self) -> list[str]:
        return [candidate.version for candidate in self.tested]

    @property
    def waiting(self) -> list[Candidate]:
        return self._queue[MAX_TESTED:]

    @property
    def tests_begun(self) -> Mapping[Role, int]:
        """By role, over the store's life."""
        return self._guard.tests

    @property
    def running_tests(self) -> int:
        """Of candidates and of serving profiles."""
        return len(self._guard.running)

    def holds(self, version: str, scope: str) -> bool:
        """Whether this profile is under test in this scope, or waits for it."""
        return any((c.version, c.scope) == (version, scope) for c in self._queue)

    def has_proposal(self, scope: str, source: str) -> bool:
        """Whether a candidate of this source is under test in this scope, or waits for it."""
        return any((c.scope, c.source) == (scope, source) for c in self._queue)

    def resume(self, tests_begun: Mapping[Role, int]) -> None:
        """Go on from the counts that the store holds, or from this process's own where those are larger: alpha that was
        spent stays spent. All tests are dropped."""
        spent = {role: max(number, self._guard.tests[role]) for role, number in tests_begun.items()}
        self._guard = guard.init(self._alpha, spent)

    # --- the queue -------------------------------------------------------------------------------------------------

    def add(self, candidate: Candidate) -> None:
        """Append to the queue, behind the candidates of the same or a lower priority number."""
        self._queue.append(candidate)
        self._arrange()

    def has_waiting_equal(self, candidate: Candidate) -> bool:
        """Whether a candidate waits that has the same or a lower priority number."""
        return any(other.priority <= candidate.priority for other in self.waiting)

    def remove(self, matches: Callable[[Candidate], bool]) -> None:
        for candidate in [c for c in self._queue if matches(c)]:
            self._queue.remove(candidate)
            self._guard = guard.end_test(self._guard, _candidate_test(candidate))
        self._arrange()

    def restart(self, matches: Callable[[Candidate], bool]) -> None:
        """Begin the tests of these candidates anew: what they are compared with has changed."""
        for candidate in self.tested:
            if matches(candidate):
                self._begin(candidate)

    def _arrange(self) -> None:
        self._queue.sort(key=lambda candidate: candidate.priority)
        for candidate in self.waiting:
            self._guard = guard.end_test(self._guard, _candidate_test(candidate))
        for candidate in self.tested:
            if _candidate_test(candidate) not in self._guard.running:
                self._begin(candidate)

    def _begin(self, candidate: Candidate) -> None:
        name = _candidate_test(candidate)
        serving = self._baseline(candidate.scope)
        width = self._gain_width(candidate.version) + (self._gain_width(serving) if serving is not None else 0.0)
        begun = self._guard.running.get(name)
        if begun is not None and not begun.merit.observations and begun.width == width:
            return  # it has no observations: beginning anew would only spend alpha
        self._set_guard(guard.begin_test(self._guard, name, Role.CANDIDATE, width))

    # --- tests -----------------------------------------------------------------------------------------------------

    def watch_serving(self, version: str, scope: str, window: int) -> None:
        """Watch what serves a scope from now on, in windows of `window` held-out requests."""
        width = self._gain_width(version)
        self._set_guard(guard.begin_test(self._guard, _serving_test(scope), Role.SERVING, width, window))

    def unwatch_serving(self, scope: str) -> None:
        self._guard = guard.end_test(self._guard, _serving_test(scope))

    def observe_candidate(
        self, candidate: Candidate, unit: bytes, gain: tuple[float, float], tokens: int
    ) -> guard.Decision | None:
        """Add one held-out request with its mean gain per token over what serves (lower and upper end, nats).

        None when its unit has counted before.
        """
        return self._observe(_candidate_test(candidate), unit, gain, tokens)

    def observe_serving(self, scope: str, unit: bytes, gain: tuple[float, float], tokens: int) -> guard.Decision | None:
        """The same for what serves there, over identity."""
        return self._observe(_serving_test(scope), unit, gain, tokens)

    def decide_candidate(self, candidate: Candidate) -> guard.Decision:
        return guard.decide(self._guard, _candidate_test(candidate))

    def decide_serving(self, scope: str) -> guard.Decision:
        return guard.decide(self._guard, _serving_test(scope))

    def _observe(self, name: str, unit: bytes, gain: tuple[float, float], tokens: int) -> guard.Decision | None:
        counted = (name, guard.decide(self._guard, name).evidence.test, unit)
        if counted in self._counted:
            return None
        self._counted[counted] = None
        if len(self._counted) > MAX_COUNTED_UNITS:
            self._counted.popitem(last=False)
        self._set_guard(guard.update(self._guard, name, *gain, tokens))
        return guard.decide(self._guard, name)

    def _set_guard(self, state: guard.GuardState) -> None:
        before, self._guard = self._guard.tests, state
        for role, number in state.tests.items():
            if number > before[role]:
                self._on_test_begun(role, number)


def _candidate_test(candidate: Candidate) -> str:
    return f"candidate {candidate.version} {candidate.scope}"


def _serving_test(scope: str) -> str:
    return f"serving {scope}"
