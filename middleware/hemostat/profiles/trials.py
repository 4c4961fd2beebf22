"""Who is under test, and what the tests have shown: candidates in a line, the first ones tested, and what serves.

Invariants:
- Engines evaluate two profiles beside the applied one, so two candidates are tested at a time and the rest wait: nobody
  is judged by numbers that the engine never gave, and no alpha is spent on waiting.
- A test is of one profile in one scope, over what serves there. When that changes, or whose requests they are, the
  test begins anew.
- A prompt counts once in a test. The guard's observations must be new draws of what is asked: retries and health checks
  are not, and would let the chance likings of a few prompts look like evidence.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from hemostat_calibration import guard
from hemostat_calibration.guard import Role
from hemostat_calibration.profiles.families import TEMPERATURE_BIAS

TESTED_AT_ONCE = 2
"""As many as engines evaluate beside what is applied (the plugin's CANDIDATES_TAPPED)."""
PROMPTS_REMEMBERED = 50_000
"""Held-out prompts remembered as counted, over all tests."""


@dataclass(frozen=True, slots=True)
class Candidate:
    """A profile that is to be tested on the requests of one scope.

    source: the family that proposed it, `IMPORT`, or `POOLED`: what serves all the others, against a scope's own.
    """

    version: str
    scope: str
    source: str


IMPORT = "import"
POOLED = "pooled"


class Trials:
    """Lives in the control process's event loop.

    width: (version) -> high minus low of its Δz, nats: no gain over identity is below minus that.
    serves: (scope) -> the version that serves there, None for identity.
    spent: called with a role and how many of its tests were begun, when that number grows.
    """

    def __init__(
        self,
        alpha: float,
        width: Callable[[str], float],
        serves: Callable[[str], str | None],
        spent: Callable[[Role, int], None],
    ) -> None:
        self._alpha = alpha
        self._width = width
        self._serves = serves
        self._spent = spent
        self._guard = guard.init(alpha)
        self._judged: OrderedDict[tuple[str, int, bytes], None] = OrderedDict()
        self.line: list[Candidate] = []

    @property
    def tested(self) -> list[Candidate]:
        return self.line[:TESTED_AT_ONCE]

    @property
    def waiting(self) -> list[Candidate]:
        return self.line[TESTED_AT_ONCE:]

    @property
    def tests(self) -> Mapping[Role, int]:
        """How many of each kind were begun, over the store's life."""
        return self._guard.tests

    def resume(self, tests: Mapping[Role, int]) -> None:
        """What an earlier run of the process spent, or this one, stays spent. All tests are dropped."""
        spent = {role: max(number, self._guard.tests[role]) for role, number in tests.items()}
        self._guard = guard.init(self._alpha, spent)

    def add(self, candidate: Candidate) -> None:
        """To the end of the line, but temperature and bias, which rarely win much, let all others go first."""
        self.line.append(candidate)
        self._arrange()

    def equals_wait(self, candidate: Candidate) -> bool:
        """Whether one waits that has no less to be hoped from."""
        return any(_rank(other) <= _rank(candidate) for other in self.waiting)

    def remove(self, leaves: Callable[[Candidate], bool]) -> None:
        for candidate in [c for c in self.line if leaves(c)]:
            self.line.remove(candidate)
            self._guard = guard.end_test(self._guard, _name(candidate.version, candidate.scope))
        self._arrange()

    def restart(self, concerned: Callable[[Candidate], bool]) -> None:
        """Begin these tests anew: what they are compared with has changed."""
        for candidate in self.tested:
            if concerned(candidate):
                self._begin(candidate)

    def serve(self, version: str, scope: str, window: int) -> None:
        """Watch what serves from now on."""
        self._enter(guard.begin_test(self._guard, _serving(scope), Role.SERVING, self._width(version), window))

    def unserve(self, scope: str) -> None:
        self._guard = guard.end_test(self._guard, _serving(scope))

    def weigh_candidate(
        self, candidate: Candidate, prompt: bytes, gain: tuple[float, float], tokens: int
    ) -> guard.Decision | None:
        """One held-out request; None when its prompt has counted before."""
        return self._weigh(_name(candidate.version, candidate.scope), prompt, gain, tokens)

    def weigh_serving(self, scope: str, prompt: bytes, gain: tuple[float, float], tokens: int) -> guard.Decision | None:
        """The same for what serves there."""
        return self._weigh(_serving(scope), prompt, gain, tokens)

    def of_candidate(self, candidate: Candidate) -> guard.Decision:
        return guard.decide(self._guard, _name(candidate.version, candidate.scope))

    def of_serving(self, scope: str) -> guard.Decision:
        return guard.decide(self._guard, _serving(scope))

    def _weigh(self, name: str, prompt: bytes, gain: tuple[float, float], tokens: int) -> guard.Decision | None:
        counted = (name, guard.decide(self._guard, name).evidence.test, prompt)
        if counted in self._judged:
            return None
        self._judged[counted] = None
        if len(self._judged) > PROMPTS_REMEMBERED:
            self._judged.popitem(last=False)
        self._enter(guard.update(self._guard, name, *gain, tokens))
        return guard.decide(self._guard, name)

    def _arrange(self) -> None:
        self.line.sort(key=_rank)
        for candidate in self.waiting:
            self._guard = guard.end_test(self._guard, _name(candidate.version, candidate.scope))
        for candidate in self.tested:
            if _name(candidate.version, candidate.scope) not in self._guard.running:
                self._begin(candidate)

    def _begin(self, candidate: Candidate) -> None:
        name = _name(candidate.version, candidate.scope)
        serving = self._serves(candidate.scope)
        width = self._width(candidate.version) + (self._width(serving) if serving is not None else 0.0)
        begun = self._guard.running.get(name)
        if begun is not None and not begun.merit.observations and begun.width == width:
            return  # it has seen nothing, and need not spend another part of alpha
        self._enter(guard.begin_test(self._guard, name, Role.CANDIDATE, width))

    def _enter(self, state: guard.GuardState) -> None:
        before, self._guard = self._guard.tests, state
        for role, number in state.tests.items():
            if number > before[role]:
                self._spent(role, number)


def _rank(candidate: Candidate) -> bool:
    return candidate.source == TEMPERATURE_BIAS


def _name(version: str, scope: str) -> str:
    return f"candidate {version} {scope}"


def _serving(scope: str) -> str:
    return f"serving {scope}"
