"""Time that goes on evenly, and what a clock that was set leaves of the times that were noted before."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hemostat_calibration import alarm
from hemostat_calibration.alarm import outlier_engine
from hemostat_calibration.elapsed import (
    JUMP_SECONDS,
    MAX_PAUSE_SECONDS,
    MAX_SLEW,
    SteadyTime,
    StoredTime,
    TimeBreak,
    after_restart,
)
from hemostat_calibration.guard.decisions import Action, Admission
from hemostat_calibration.guard.guard import Guard
from hemostat_calibration.statistics.kind_table import KindTable

DAY, YEAR = 86_400.0, 365.25 * 86_400.0
NOW = 1.7e9
JUMPS = {"-50 years": -50.0 * YEAR, "+50 years": 50.0 * YEAR, "+3 days": 3.0 * DAY, "-1 hour": -3600.0}
each_jump = pytest.mark.parametrize("jump", JUMPS.values(), ids=list(JUMPS))


@each_jump
def test_a_wall_clock_that_is_set_is_a_break(jump: float) -> None:
    time, nothing = SteadyTime(NOW, 50.0).read(NOW + 10.0, 60.0)
    assert nothing is None
    time, time_break = time.read(NOW + 20.0 + jump, 70.0)
    assert time_break == TimeBreak(NOW + 20.0 + jump, jump, anew=True)
    assert time.at(75.0) == NOW + 25.0 + jump, "it goes on from there"
    assert time.read(NOW + 30.0 + jump, 80.0)[1] is None


@given(st.lists(st.tuples(st.floats(0.0, 3600.0), st.floats(-250.0, 250.0)), max_size=30))
def test_a_clock_that_is_adjusted_is_followed_slowly_and_never_back(steps: list[tuple[float, float]]) -> None:
    time, steady = SteadyTime(NOW, 0.0), 0.0
    for passed, off in steps:
        steady += passed
        before = time
        # About the true time, so that two readings in a row differ by less than what is a jump from it.
        wall = (
            NOW + steady + min(max(off, time.at(steady) - NOW - steady - 299.0), time.at(steady) - NOW - steady + 299.0)
        )
        time, time_break = time.read(wall, steady)
        assert time_break is None
        assert (1.0 - MAX_SLEW) * passed - 1e-3 <= time.now - before.now <= (1.0 + MAX_SLEW) * passed + 1e-3
        assert abs(time.now - wall) <= JUMP_SECONDS


def stored(now: float, steady: float, boot: str) -> StoredTime:
    return StoredTime(SteadyTime(now, steady), boot)


@each_jump
def test_over_a_restart_in_the_same_run_of_the_machine_a_jump_is_known(jump: float) -> None:
    before = stored(NOW, 1000.0, "boot")
    assert after_restart(before, stored(NOW + 40.0 * DAY, 1000.0 + 40.0 * DAY, "boot")) is None
    later = NOW + 60.0 + jump
    assert after_restart(before, stored(later, 1060.0, "boot")) == TimeBreak(later, jump, anew=True)
    at_once = NOW + jump
    assert after_restart(before, stored(at_once, 1000.0, "boot")) == TimeBreak(at_once, jump, anew=True)


@each_jump
@pytest.mark.parametrize("boots", [("boot", "another"), ("", "")])
def test_over_another_run_of_the_machine_the_wall_clock_is_not_believed(jump: float, boots: tuple[str, str]) -> None:
    before = stored(NOW, 1000.0, boots[0])
    assert after_restart(before, stored(NOW + JUMP_SECONDS, 5.0, boots[1])) is None
    time_break = after_restart(before, stored(NOW + jump, 5.0, boots[1]))
    assert time_break is not None
    assert time_break.lost == jump
    assert time_break.anew == (not 0.0 < jump <= MAX_PAUSE_SECONDS)


def test_a_clock_that_should_not_go_back_and_does_is_of_another_run() -> None:
    assert after_restart(stored(NOW, 1000.0, "boot"), stored(NOW + 60.0, 10.0, "boot")) is None
    time_break = after_restart(stored(NOW, 1000.0, "boot"), stored(NOW + DAY, 10.0, "boot"))
    assert time_break == TimeBreak(NOW + DAY, DAY, anew=False)


# --- who keeps times --------------------------------------------------------------------------------------------------


def observation(now: float, seed: int) -> alarm.Observation:
    spreads = np.abs(np.random.default_rng(seed).normal(0.0, 0.3, 32))
    return alarm.Observation(now, spreads, spreads)


def play(state: alarm.Alarm, begin: float, hours: int, seed: int) -> alarm.Alarm:
    for n in range(20 * hours):
        state = alarm.update(state, "chat", observation(begin + 180.0 * n, seed + n))
    return state


def gates(state: alarm.Alarm) -> tuple[bool, bool, bool]:
    """The baseline is known, a budget test runs, and the mix of kinds is known."""
    (kind,) = alarm.kind_readings(state)
    return kind.watched, state.budget_tests > 0, state.workload.complete


@each_jump
@pytest.mark.parametrize("anew", [True, False])
def test_the_alarms_gates_wait_for_a_cycle_of_known_time(jump: float, anew: bool) -> None:
    state = alarm.init(alarm.Settings(budget=0.5, cycle=DAY))
    state = play(state, NOW, 20, 0)
    at = NOW + 20 * 3600.0 + jump
    state = alarm.after_break(state, TimeBreak(at, jump, anew=anew))
    state = play(state, at, 3, 1000)
    assert gates(state) == (False, False, False)
    state = play(state, at + 3 * 3600.0, 22 if anew else 2, 2000)
    assert gates(state) == (True, True, True)


@each_jump
def test_bets_are_funded_by_known_time(jump: float) -> None:
    """A jump, and the same requests without one, leave the same evidence."""
    settings = alarm.Settings(budget=0.5, cycle=0.0, baseline_requests=40)
    begun = play(alarm.init(settings), NOW, 10, 0)
    at = NOW + 10 * 3600.0
    jumped = play(alarm.after_break(begun, TimeBreak(at + jump, jump, anew=True)), at + jump, 10, 1000)
    usual = play(begun, at, 10, 1000)
    for one, other in zip(alarm.readings(jumped), alarm.readings(usual), strict=True):
        assert one.log_evidence == pytest.approx(other.log_evidence, abs=1e-6)


@each_jump
def test_an_alarm_of_a_kind_does_not_end_because_the_clock_is_set(jump: float) -> None:
    state = alarm.init(alarm.Settings(budget=0.1, cycle=0.0, baseline_requests=0))
    for n in range(300):
        state = alarm.update(state, "chat", replace(observation(NOW + n, n), divergences=np.full(64, 1.0)))
    at = NOW + 300.0 + jump
    state = alarm.after_break(state, TimeBreak(at, jump, anew=True))
    state = alarm.update(state, "other", observation(at + 60.0, 0))
    assert [reading.kind for reading in alarm.readings(state) if reading.raised] == ["chat"]


def proven(guard: Guard, begin: float, hours: int, first: int) -> bool:
    for n in range(20 * hours):
        unit, client = (first + n).to_bytes(8, "big"), b"client %d" % (n % 9)
        guard.update_dependence(
            "chat", client, float(np.random.default_rng(first + n).normal(0.4, 0.1)), begin + 180.0 * n
        )
        if guard.admit("profile", "chat", unit, client) is Admission.ADMITTED:
            gain = float(np.random.default_rng(first + n + 7).normal(0.3, 0.05))
            guard.update("profile", "chat", unit, client, gain, gain, 60, now=begin + 180.0 * n)
    return guard.decide("profile", "chat").action is Action.PROMOTE


@each_jump
@pytest.mark.parametrize("anew", [True, False])
def test_nothing_is_promoted_before_cycles_of_known_time(jump: float, anew: bool) -> None:
    guard = Guard(cycle=DAY)
    guard.begin_candidate("profile", {"chat": (1.0, 1.0)})
    assert not proven(guard, NOW, 20, 0)
    at = NOW + 20 * 3600.0 + jump
    guard.after_break(TimeBreak(at, jump, anew=anew))
    assert not proven(guard, at, 24, 10_000)
    assert proven(guard, at + DAY, 25, 20_000)


@each_jump
def test_cycles_that_were_seen_stay_seen(jump: float) -> None:
    guard = Guard(cycle=DAY)
    guard.begin_candidate("profile", {"chat": (1.0, 1.0)})
    assert proven(guard, NOW, 50, 0)
    at = NOW + 50 * 3600.0 + jump
    guard.after_break(TimeBreak(at, jump, anew=True))
    assert proven(guard, at, 1, 10_000)


@each_jump
def test_engines_are_compared_with_those_that_were_active(jump: float) -> None:
    state, unit = outlier_engine.init(0.01), outlier_engine.Unit
    for n in range(40):
        state = outlier_engine.update(state, "chat", unit(f"engine {n % 2}", 0.5, 40), NOW + n)
    state = outlier_engine.update(state, "chat", unit("gone", 0.5, 40), NOW - 7200.0)
    at = NOW + 40.0 + jump
    state = outlier_engine.after_break(state, TimeBreak(at, jump, anew=True))
    ages = {name: at - test.last for name, test in state.tests.items()}
    assert ages == pytest.approx({"engine 0": 2.0, "engine 1": 1.0, "gone": 7240.0}, abs=1e-3)


@each_jump
def test_kinds_keep_their_places_where_the_clock_is_set(jump: float) -> None:
    table = KindTable(limit=1)
    for n in range(100):
        table = table.update("chat", now=NOW + n)
    table = table.after_break(TimeBreak(NOW + 100.0 + jump, jump, anew=True))
    for n in range(30):
        table = table.update("code", now=NOW + 100.0 + jump + n)
    assert table.followed == ("chat",)
    before = table.seen("chat")
    assert table.update("chat", now=NOW + jump + 2.0 * DAY).seen("chat") < before, "it goes on to decay"


def test_a_table_that_was_stored_by_another_clock_goes_on_to_decay() -> None:
    table = KindTable(limit=1)
    for n in range(100):
        table = table.update("chat", now=NOW + 50.0 * YEAR + n)
    table = table.update("chat", now=NOW)
    assert table.update("chat", now=NOW + 2.0 * DAY).seen("chat") < 60.0
