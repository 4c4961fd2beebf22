"""May this profile serve? Held-out evidence in, promote, hold or roll back out.

Evidence is one number a request: the mean over its tokens of the gain (nats) of the profile over what serves without
it. Requests must be of the held-out side of the split, each counted once.

- A candidate is promoted when an always-valid lower bound of its mean gain is above 0.
- A serving profile is rolled back when an always-valid upper bound of its mean gain is below 0. It is watched in
  windows of `window` requests, so that old merit does not hide a change; each window spends its own part of alpha.

The k-th test of either kind spends alpha/(k(k+1)), which sums to alpha: over the whole run, however many candidates
and windows, however often one looks, the chance of ever promoting a profile that does not help is at most alpha, and
that of ever rolling one back that does not harm is at most alpha.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from enum import StrEnum

from hemostat_calibration import sequential
from hemostat_calibration.errors import InvalidArgumentError
from hemostat_calibration.sequential import LowerSequence


class Action(StrEnum):
    WAIT = "wait"
    """A candidate without enough evidence."""
    PROMOTE = "promote"
    HOLD = "hold"
    """A serving profile that nothing speaks against."""
    ROLL_BACK = "roll_back"


class Role(StrEnum):
    CANDIDATE = "candidate"
    SERVING = "serving"


@dataclass(frozen=True, slots=True)
class Evidence:
    """What a decision stands on. Gains in nats per token, averaged over requests.

    requests, tokens: held-out ones since this test began.
    mean_gain: of the bound that counts against the action (lower for a candidate, upper for a serving profile); NaN
        before the first request.
    lower: the mean gain is above it, always-valid at 1 − alpha; for a candidate, else -inf.
    upper: the mean gain is below it, likewise; for a serving profile, else inf.
    alpha: spent on this test. test: its number, k, among those of its kind.
    """

    requests: int
    tokens: int
    mean_gain: float
    lower: float
    upper: float
    alpha: float
    test: int


@dataclass(frozen=True, slots=True)
class Decision:
    action: Action
    version: str
    evidence: Evidence


@dataclass(frozen=True, slots=True)
class _Watch:
    """One running test; `sequence` is of the gains of a candidate, of the negated gains of a serving profile."""

    role: Role
    width: float
    test: int
    sequence: LowerSequence
    tokens: int = 0


@dataclass(frozen=True, slots=True)
class GuardState:
    """alpha: each error's share over the whole run. tests: how many of each kind were begun."""

    alpha: float
    window: int
    tests: Mapping[Role, int] = field(default_factory=lambda: {Role.CANDIDATE: 0, Role.SERVING: 0})
    watches: Mapping[str, _Watch] = field(default_factory=dict)


def init(alpha: float = 0.05, window: int = 1000) -> GuardState:
    """InvalidArgumentError unless 0 < alpha < 1 and window > 0."""
    if not 0.0 < alpha < 1.0:
        raise InvalidArgumentError(f"alpha is {alpha}: it must be between 0 and 1")
    if window < 1:
        raise InvalidArgumentError(f"window is {window}: it must be 1 or more")
    return GuardState(alpha, window)


def enter(state: GuardState, version: str, role: Role, width: float) -> GuardState:
    """Begin a test of `version`, dropping an older one of it.

    width: no gain is below −width. For a profile against identity that is the width of its Δz (`transform.shift_range`:
    high − low, at most 2 clamp); for one profile against another, the sum of theirs. The narrower, the sooner evidence
    suffices.
    """
    if not (math.isfinite(width) and width > 0.0):
        raise InvalidArgumentError(f"width is {width}: it must be a number above 0")
    test = state.tests[role] + 1
    watch = _Watch(role, width, test, sequential.init(-width, width))
    return replace(state, tests={**state.tests, role: test}, watches={**state.watches, version: watch})


def leave(state: GuardState, version: str) -> GuardState:
    """Forget `version`; nothing happens where it is not watched. What its test spent stays spent."""
    return replace(state, watches={name: watch for name, watch in state.watches.items() if name != version})


def observe(state: GuardState, version: str, lower: float, upper: float, tokens: int) -> GuardState:
    """Add one held-out request of `tokens` tokens, its mean gain between `lower` and `upper` (equal where exact).

    The lower end counts for a candidate, the upper for a serving profile: what is unknown never decides.
    InvalidArgumentError for a version that is not watched, or a gain outside of ±width.
    """
    watch = _watch(state, version)
    if not lower <= upper + 1e-9:
        raise InvalidArgumentError(f"gain is between {lower} and {upper}: lower must not be above upper")
    if watch.role is Role.SERVING and watch.sequence.observations >= state.window:
        state = enter(state, version, Role.SERVING, watch.width)
        watch = state.watches[version]
    gain = lower if watch.role is Role.CANDIDATE else -upper
    watch = replace(watch, sequence=sequential.update(watch.sequence, gain), tokens=watch.tokens + tokens)
    return replace(state, watches={**state.watches, version: watch})


def decide(state: GuardState, version: str) -> Decision:
    """What the evidence allows now. Looking changes nothing; acting on it (enter, leave) is the caller's."""
    watch = _watch(state, version)
    alpha = state.alpha / (watch.test * (watch.test + 1))
    bound = sequential.lower(watch.sequence, alpha)
    candidate = watch.role is Role.CANDIDATE
    if candidate:
        action = Action.PROMOTE if bound > 0.0 else Action.WAIT
    else:
        action = Action.ROLL_BACK if bound > 0.0 else Action.HOLD
    return Decision(
        action=action,
        version=version,
        evidence=Evidence(
            requests=watch.sequence.observations,
            tokens=watch.tokens,
            mean_gain=watch.sequence.mean if candidate else -watch.sequence.mean,
            lower=bound if candidate else -math.inf,
            upper=math.inf if candidate else -bound,
            alpha=alpha,
            test=watch.test,
        ),
    )


def _watch(state: GuardState, version: str) -> _Watch:
    if version not in state.watches:
        raise InvalidArgumentError(f"version {version[:32]} is not watched: enter it first")
    return state.watches[version]
