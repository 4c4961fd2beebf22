"""The worlds of dependent units can fail, and decide as the guard does."""

import numpy as np
import pytest
from tests.bench.guard import dependence as worlds
from tests.bench.guard import long_answers, most

from hemostat_calibration.guard.decisions import Action
from hemostat_calibration.guard.guard import Guard

LIVES = 60


@pytest.fixture
def short(monkeypatch):
    monkeypatch.setattr(worlds, "UNITS", 1000)


@pytest.mark.usefixtures("short")
@pytest.mark.parametrize("name", ["runs of 3 by one client", "runs of 20", "autoregression of 0.9"])
def test_units_taken_for_independent_would_promote_what_does_not_help(name):
    world, _ = worlds.NULLS[name]
    taken = worlds.lives_of(world, LIVES, np.random.default_rng(1), dependence=False)
    assert np.isfinite(taken).sum() > 1.5 * most(LIVES, 0.05)
    result = worlds.lives_of(world, LIVES, np.random.default_rng(0))
    assert np.isfinite(result).sum() <= most(LIVES, 0.05)


@pytest.mark.usefixtures("short")
def test_days_that_differ_would_promote_what_harms_if_only_many_batches_counted():
    world = worlds.templates(1.0)
    many = worlds.lives_of(world, LIVES, np.random.default_rng(0), history=worlds.DAY, in_cycles=False)
    assert np.isfinite(many).sum() > most(LIVES, 0.05)
    assert np.isfinite(worlds.lives_of(world, LIVES, np.random.default_rng(0))).sum() <= most(LIVES, 0.05)


@pytest.mark.parametrize("name", ["day and night ± 0.3 of the gains alone", "a slow walk of the gains alone"])
def test_gains_that_depend_where_the_divergence_does_not_would_promote_what_does_not_help(name):
    """If they did not have to span a cycle, and few long batches of them did not count."""
    world, _ = worlds.GAINS_ALONE[name]
    lives, rule = 120, {"held_out": worlds.HELD_OUT}
    before = worlds.lives_of(world, lives, np.random.default_rng(2), own_cycle=False, **rule)
    after = worlds.lives_of(world, lives, np.random.default_rng(2), **rule)
    assert np.isfinite(before).sum() > most(lives, 0.05) >= np.isfinite(after).sum()


def test_the_power_of_the_mixture_is_not_enough():
    each, mixture = worlds.mixed_first(500, np.random.default_rng(0))
    assert each <= most(500, 0.05)
    assert mixture > 1.2 * each


@pytest.mark.usefixtures("short")
@pytest.mark.parametrize(
    "name", ["autoregression of 0.33, one client, a spread of 0.4", "each client in runs of 10, interleaved"]
)
def test_what_some_hundred_conversations_tell_is_enough(name):
    """If `evidence.cycle_hours` is 0 and units were taken for independent, more would be promoted."""
    few = {"history": worlds.FEW, "in_cycles": False}
    taken = worlds.lives_of(worlds.SHORT[name], 120, np.random.default_rng(3), dependence=False, **few)
    result = worlds.lives_of(worlds.SHORT[name], 120, np.random.default_rng(3), **few)
    assert np.isfinite(taken).sum() > most(120, 0.05) >= np.isfinite(result).sum()


@pytest.mark.usefixtures("short")
@pytest.mark.parametrize("name", ["runs of 12", "runs of 6 of the gains alone, one client, a spread of 0.4"])
def test_dependence_that_begins_with_the_test_is_seen_in_its_gains(name):
    """The units noted before tell nothing of it. If units were taken for independent, more would be promoted."""
    world, few = worlds.late_worlds(worlds.FEW)[name], {"history": worlds.FEW, "in_cycles": False}
    taken = worlds.lives_of(world, 120, np.random.default_rng(4), dependence=False, **few)
    result = worlds.lives_of(world, 120, np.random.default_rng(4), **few)
    assert np.isfinite(taken).sum() > most(120, 0.05) >= np.isfinite(result).sum()


@pytest.mark.parametrize(("mean", "limit"), [(0.3, 24), (0.15, 48), (0.08, 96)])
def test_the_correction_costs_little_where_nothing_depends_on_anything(mean, limit):
    """A promotion takes at most 1.6 times the units of a test that knows the distribution."""
    rule = {"history": worlds.MIN_HISTORY, "held_out": worlds.HELD_OUT, "in_cycles": False}
    result = worlds.lives_of(worlds.independent(mean), 120, np.random.default_rng(0), **rule)
    assert np.median(result) <= limit


@pytest.mark.parametrize("mean", [0.08, 0.3])
def test_the_worlds_decide_as_the_guard_does(mean):
    stream = worlds.independent(mean)(np.random.default_rng(5), worlds.HISTORY + 1000, 3)
    result = worlds.promoted_at(stream, held_out=worlds.HELD_OUT)
    assert np.isfinite(result).any()
    for life in range(3):
        guard, promoted = Guard(client_share=1.0, cycle=float(worlds.DAY)), np.inf
        guard.begin_candidate("test", {"kind": (1.0, 1.0)})
        for at in range(len(stream.gains)):
            client = b"client %d" % stream.clients[at, life]
            guard.update_dependence("kind", client, float(stream.figure[at, life]), now=float(at))
            if at < worlds.HISTORY or at % worlds.HELD_OUT:
                continue
            gain = float(np.clip(stream.gains[at, life], -1.0, 1.0))
            guard.update("test", "kind", at.to_bytes(8, "big"), client, gain, gain, 50, now=float(at))
            if guard.decide("test", "kind").action is Action.PROMOTE:
                promoted = guard.evidence("test", "kind").units
                break
        assert promoted == result[life]


@pytest.mark.parametrize("factor", [4.0, 2.0])
def test_intervals_that_a_few_long_answers_carry_would_cover_too_rarely(factor):
    lives = 100
    world = long_answers.World(long_answers.CHAT, 0.005, 4000, factor)
    without = long_answers.lives_of(world, lives, np.random.default_rng(0), limit=False)
    assert without.held(once_met=True) < lives - most(lives, 0.05)
    assert long_answers.lives_of(world, lives, np.random.default_rng(0)).held(once_met=True) >= lives - most(
        lives, 0.05
    )


def test_of_long_answers_that_have_not_come_nothing_is_known():
    """The documentation says that this is left."""
    lives = 100
    world = long_answers.WORLDS["0.5 % of 4,000 tokens, × 4, runs of 5"]
    result = long_answers.lives_of(world, lives, np.random.default_rng(0))
    assert result.held(once_met=True) >= lives - most(lives, 0.05) > result.held()


def test_ordinary_answers_have_their_first_interval_after_some_fifty_requests():
    for name in ("answers of 1 to 256 tokens", "log-normal lengths, 0.6"):
        assert long_answers.lives_of(long_answers.WORLDS[name], 100, np.random.default_rng(0)).first <= 64.0
