"""Several engines, of which not all hold the profile: which requests are in an arm, and what that does to figures."""

from __future__ import annotations

import math
from dataclasses import dataclass

import msgspec
import numpy as np
import pytest
from tests.support.wire import VERSION, Wire, chat, policy

from hemostat.hooks import ExchangeHook, Refusal
from hemostat.openai.routes import CHAT

HOLDER, OTHER = "10.0.0.1:8000", "10.0.0.2:8000"
ONE_HOLDS = policy(served=VERSION, held_by_engine={HOLDER: frozenset({VERSION})})
ALL_HOLD = policy(served=VERSION, held_by_engine=dict.fromkeys((HOLDER, OTHER), frozenset({VERSION})))


@dataclass
class Begun:
    exchange: ExchangeHook
    asked: bool
    """The engine is asked for the profile."""


def begin(wire: Wire, number: int, engine: str) -> Begun:
    """A request of a conversation of its own, at this engine."""
    exchange = wire.interceptor.begin("POST", CHAT.encode(), [], f"r{number}")
    assert exchange is not None
    assert not isinstance(exchange, Refusal)
    exchange.sent_to(engine, drawn=False)
    body = chat() | {"messages": [{"role": "user", "content": f"question {number}"}]}
    sent = exchange.request(msgspec.json.encode(body))
    assert not isinstance(sent, Refusal)
    return Begun(exchange, sent is not None and VERSION.encode() in sent.body)


def test_both_arms_are_at_the_engines_that_hold_the_profile_and_nowhere_else(wire: Wire) -> None:
    wire.interceptor.policy = ONE_HOLDS
    at_holder = [begin(wire, n, HOLDER) for n in range(60)]
    assert {begun.exchange.arm for begun in at_holder} == {"control", "treated"}
    assert all(begun.asked == (begun.exchange.arm == "treated") for begun in at_holder)
    for begun in (begin(wire, n, OTHER) for n in range(60)):
        assert (begun.exchange.arm, begun.exchange.comparison, begun.asked) == ("none", None, False)


@pytest.mark.parametrize(("fraction", "arm"), [(0.0, "treated"), (1.0, "control")])
def test_either_arm_is_left_where_another_engine_answers_that_holds_no_profile(
    wire: Wire, fraction: float, arm: str
) -> None:
    wire.interceptor.policy = msgspec.structs.replace(ONE_HOLDS, control_fraction=fraction)
    exchange = begin(wire, 0, HOLDER).exchange
    assert exchange.arm == arm
    exchange.sent_to(OTHER, drawn=False)
    assert (exchange.arm, exchange.comparison) == ("none", None)
    exchange.closed(complete=False)
    assert wire.calibration("none", "unknown") == 1


def test_an_arm_is_kept_where_the_other_engine_holds_the_profile_too(wire: Wire) -> None:
    wire.interceptor.policy = ALL_HOLD
    exchange = begin(wire, 0, HOLDER).exchange
    arm = exchange.arm
    exchange.sent_to(OTHER, drawn=False)
    assert exchange.arm == arm != "none"


def test_a_version_that_is_named_is_asked_for_at_engines_that_hold_it_alone(wire: Wire) -> None:
    wire.interceptor.policy = ONE_HOLDS
    fields = [(b"X-Hemostat-Calibration", VERSION.encode())]
    for engine, held in ((HOLDER, True), (OTHER, False)):
        exchange = wire.interceptor.begin("POST", CHAT.encode(), fields, "r")
        assert exchange is not None
        assert not isinstance(exchange, Refusal)
        exchange.sent_to(engine, drawn=False)
        sent = exchange.request(msgspec.json.encode(chat()))
        assert sent is not None
        assert not isinstance(sent, Refusal)
        assert (VERSION.encode() in sent.body) == held


# --- a world in which the wrong rule says that a good profile harms ---------------------------------------------------

EFFECT = -0.1
"""What the profile takes off the divergence of a request, nats."""
LEVELS = {HOLDER: 0.8, OTHER: 0.4}
"""Of untreated requests: the engine that holds the profile is the worse one."""
REQUESTS = 600


def estimate(figures: dict[str, list[float]]) -> tuple[float, float]:
    """Treated minus control, and its standard error."""
    treated, control = np.array(figures["treated"]), np.array(figures["control"])
    error = math.sqrt(treated.var(ddof=1) / len(treated) + control.var(ddof=1) / len(control))
    return float(treated.mean() - control.mean()), error


def test_treated_minus_control_is_the_effect_of_the_profile_and_not_of_the_engines(wire: Wire) -> None:
    rng = np.random.default_rng(0)
    right: dict[str, list[float]] = {"treated": [], "control": [], "none": []}
    asked_anyway: dict[str, list[float]] = {"treated": [], "control": []}
    control_anywhere: dict[str, list[float]] = {"treated": [], "control": []}
    for n in range(REQUESTS):
        engine, noise = (HOLDER, OTHER)[rng.integers(2)], 0.1 * rng.standard_normal()
        wire.interceptor.policy = ONE_HOLDS
        begun = begin(wire, n, engine)
        applied = EFFECT if begun.asked else 0.0
        right[begun.exchange.arm].append(LEVELS[engine] + applied + noise)
        # Two wrong rules, by the arm that a relay which takes both engines for holders gives the same request.
        wire.interceptor.policy = ALL_HOLD
        arm = begin(wire, n, engine).exchange.arm
        figure = LEVELS[engine] + (EFFECT if arm == "treated" and engine == HOLDER else 0.0) + noise
        asked_anyway[arm].append(figure)
        if arm == "control" or engine == HOLDER:
            control_anywhere[arm].append(figure)
    difference, error = estimate(right)
    assert abs(difference - EFFECT) < 4 * error
    assert error < abs(EFFECT) / 5
    diluted, error = estimate(asked_anyway)
    assert diluted > EFFECT / 2 - 4 * error, "identity counts as treated"
    confounded, error = estimate(control_anywhere)
    assert confounded > 4 * error, "the profile seems to harm: treated requests are at the worse engine"


def test_the_engine_of_sampled_requests_alone_is_drawn_and_the_capture_records_it(wire: Wire) -> None:
    wire.engine = HOLDER
    wire.send(CHAT, chat())
    assert [(capture.engine, capture.engine_drawn) for capture in wire.captures] == [(HOLDER, True)]
    wire.interceptor.policy = msgspec.structs.replace(ALL_HOLD, shadow_rate=0.0)
    assert not begin(wire, 0, HOLDER).exchange.draws_engine
