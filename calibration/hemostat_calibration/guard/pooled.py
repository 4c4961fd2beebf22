"""Decides from held-out evidence whether a profile may serve: promote, hold or roll back.

Evidence is one number for each request: the mean over its tokens of the gain (nats) of the profile over what serves
without it, known as an interval. As evidence for the profile its lower end counts, as evidence against it the upper
end. Requests must be of the held-out side of the split, each counted once in a test.

- A candidate is promoted when an always-valid lower bound of its mean gain is above 0.
- A serving profile is watched in windows of so many requests, so that an earlier gain does not hide a change. It is
  rolled back for *harm* as soon as an always-valid upper bound of its mean gain in the window is below 0, and as *no
  longer supported* at the window's end, unless by then a lower bound has been above 0 at some request of it.

Which errors are bounded, whatever the gains' distribution, as long as none is below −width:
- Promotion: the k-th test of a candidate spends alpha/(k(k+1)), which sums to alpha. Over the whole run, however many
  candidates, however often one looks, the chance of ever promoting a profile whose mean gain is at most 0 is at most
  alpha. (Mean gain: of a request given those before it, at most 0 at each of them.)
- Roll back for harm: the k-th window spends alpha/(k(k+1)) likewise: the chance of ever rolling back for harm a profile
  whose mean gain is at least 0 is at most alpha.
- Staying: a profile whose mean gain is at most 0 throughout a window outlasts it with a chance of at most alpha, each
  window anew (it stays for j windows with at most alpha^j).
- Rolling back a profile that helps is not bounded by alpha but by the window's length. To show a mean gain of g takes
  about (width/g)(log(1/alpha) + 0.5) requests, a little more where gains spread; a window of `WINDOWS_PER_PROOF` times
  what the promotion took leaves room for chance. Simulated with a spread of 2.5 times the mean between requests: a
  profile that goes on as it was when promoted outlasts more than 99 of 100 windows, one that has lost half of its
  gain more than 95, one that has lost two thirds 80.

A wide range has a cost that no method avoids: a loss of `width` once in n requests cannot be excluded by fewer than n
of them, so every valid bound needs in the order of width/gain requests. A smaller clamp makes proofs shorter.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from hemostat_calibration.errors import InvalidArgumentError
from hemostat_calibration.guard.decisions import Action, Reason, Role
from hemostat_calibration.statistics.sequential import LowerSequence

WINDOWS_PER_PROOF = 4
"""Length of a window, as a multiple of the number of requests that the promotion took."""
MIN_WINDOW = 200
DEFAULT_WINDOW = 1000
"""Requests, for a profile that the operator selected without statistical proof."""


@dataclass(frozen=True, slots=True)
class Evidence:
    """The evidence of a decision. Gains in nats per token, averaged over requests.

    requests, tokens: held-out ones since this test (for a serving profile: this window) began.
    mean_gain: of the end that counts against the action (lower for a candidate, upper for a serving profile); NaN
        before the first request.
    lower: the mean gain is above it, always-valid at 1 − alpha for a candidate, at 1 − the whole alpha for a serving
        profile.
    upper: the mean gain is below it, always-valid at 1 − alpha; of a serving profile only, else inf.
    alpha: spent on this test. test: its number, k, among those of its kind.
    window: length of the window; 0 for a candidate. supported: a lower bound has been above 0 in it.
    """

    requests: int
    tokens: int
    mean_gain: float
    lower: float
    upper: float
    alpha: float
    test: int
    window: int = 0
    supported: bool = False


@dataclass(frozen=True, slots=True)
class Decision:
    """What to do with the profile `name`. reason: of a roll back, else None."""

    action: Action
    name: str
    evidence: Evidence
    reason: Reason | None = None


@dataclass(frozen=True, slots=True)
class RunningTest:
    """One running test. merit: bound of the mean of the gains' lower ends. harm: of the negated upper ends, for a
    serving profile.

    window: 0 for a candidate.
    """

    role: Role
    width: float
    test: int
    merit: LowerSequence
    harm: LowerSequence
    window: int = 0
    supported: bool = False
    tokens: int = 0


@dataclass(frozen=True, slots=True)
class GuardState:
    """All tests. alpha: probability of each kind of error over the whole run. tests: number of each kind that began."""

    alpha: float
    tests: Mapping[Role, int] = field(default_factory=lambda: dict.fromkeys(Role, 0))
    running: Mapping[str, RunningTest] = field(default_factory=dict)


def init(alpha: float = 0.05, tests: Mapping[Role, int] | None = None) -> GuardState:
    """Before the first test. alpha: each error's share over the whole run.

    tests: how many of each kind an earlier part of the same run began; the alpha that they spent is not spent again.
    InvalidArgumentError unless 0 < alpha < 1 and no number is negative.

    >>> {role.value: number for role, number in init(0.05, {Role.CANDIDATE: 3}).tests.items()}
    {'candidate': 3, 'serving': 0}
    """
    if not 0.0 < alpha < 1.0:
        raise InvalidArgumentError(f"alpha is {alpha}: it must be between 0 and 1")
    begun = {role: (tests or {}).get(role, 0) for role in Role}
    for role, number in begun.items():
        if number < 0:
            raise InvalidArgumentError(f"tests of {role} is {number}: it must not be negative")
    return GuardState(alpha, begun)


def begin_test(state: GuardState, name: str, role: Role, width: float, window: int = DEFAULT_WINDOW) -> GuardState:
    """Begin a test, dropping an older one of that name. `name` is the caller's: what is tested, and where.

    width: no gain is below −width, nats. For a profile against identity that is the width of its Δz
        (`transform.shift_range`: high − low, at most 2 clamp); for one profile against another, the sum of theirs.
    window: requests, of a serving profile; a candidate has none.
    InvalidArgumentError unless width and window are above 0.

    >>> sorted(begin_test(init(), "a profile", Role.CANDIDATE, width=2.0).running)
    ['a profile']
    """
    if not (math.isfinite(width) and width > 0.0):
        raise InvalidArgumentError(f"width is {width}: it must be a number above 0")
    if window < 1:
        raise InvalidArgumentError(f"window is {window}: it must be 1 or more")
    test = state.tests[role] + 1
    nothing = LowerSequence.begin(-width, width)
    running = RunningTest(role, width, test, nothing, nothing, window if role is Role.SERVING else 0)
    return replace(state, tests={**state.tests, role: test}, running={**state.running, name: running})


def end_test(state: GuardState, name: str) -> GuardState:
    """Drop a test, if there is one of that name. The alpha that it spent is not spent again.

    >>> end_test(begin_test(init(), "a profile", Role.CANDIDATE, width=2.0), "a profile").running
    {}
    """
    return replace(state, running={other: running for other, running in state.running.items() if other != name})


def update(state: GuardState, name: str, lower: float, upper: float, tokens: int) -> GuardState:
    """Add one held-out request of `tokens` tokens, its mean gain between `lower` and `upper` nats (equal where exact).

    For a serving profile whose window is over, and which was not rolled back, this is the first of the next window.
    InvalidArgumentError for a name that is not under test, or a gain outside of ±width.

    >>> state = begin_test(init(), "a profile", Role.CANDIDATE, width=1.0)
    >>> for _ in range(50):
    ...     state = update(state, "a profile", 0.2, 0.2, tokens=20)
    >>> decide(state, "a profile").action.value
    'promote'
    """
    running = _running(state, name)
    if not lower <= upper + 1e-9:
        raise InvalidArgumentError(f"gain is between {lower} and {upper}: lower must not be above upper")
    serving = running.role is Role.SERVING
    if serving and running.merit.observations >= running.window:
        state = begin_test(state, name, Role.SERVING, running.width, running.window)
        running = state.running[name]
    merit = running.merit.update(lower)
    harm = running.harm.update(-upper) if serving else running.harm
    supported = running.supported or (serving and merit.get(state.alpha) > 0.0)
    running = replace(running, merit=merit, harm=harm, supported=supported, tokens=running.tokens + tokens)
    return replace(state, running={**state.running, name: running})


def decide(state: GuardState, name: str) -> Decision:
    """What the evidence allows now. It changes no state: the caller acts on it (`begin_test`, `end_test`).

    >>> state = begin_test(init(), "a profile", Role.CANDIDATE, width=1.0)
    >>> decide(state, "a profile").action.value
    'wait'
    """
    running = _running(state, name)
    alpha = state.alpha / (running.test * (running.test + 1))
    requests = running.merit.observations
    if running.role is Role.CANDIDATE:
        lower = running.merit.get(alpha)
        evidence = Evidence(requests, running.tokens, running.merit.mean, lower, math.inf, alpha, running.test)
        return Decision(Action.PROMOTE if lower > 0.0 else Action.WAIT, name, evidence)
    upper = -running.harm.get(alpha)
    reason = None
    if upper < 0.0:
        reason = Reason.HARM
    elif requests >= running.window and not running.supported:
        reason = Reason.UNSUPPORTED
    evidence = Evidence(
        requests=requests,
        tokens=running.tokens,
        mean_gain=-running.harm.mean,
        lower=running.merit.get(state.alpha),
        upper=upper,
        alpha=alpha,
        test=running.test,
        window=running.window,
        supported=running.supported,
    )
    return Decision(Action.HOLD if reason is None else Action.ROLL_BACK, name, evidence, reason)


def window_after_promotion(proof: Evidence) -> int:
    """Length, in requests, of the windows in which a profile is watched that was promoted on this evidence.

    >>> state = update(begin_test(init(), "a", Role.CANDIDATE, width=1.0), "a", 0.2, 0.2, tokens=20)
    >>> window_after_promotion(decide(state, "a").evidence)
    200
    """
    return max(MIN_WINDOW, WINDOWS_PER_PROOF * proof.requests)


def _running(state: GuardState, name: str) -> RunningTest:
    if name not in state.running:
        raise InvalidArgumentError(f"{name[:80]} is not under test: begin one first")
    return state.running[name]
