"""The worlds of breaks find wrong rules."""

import numpy as np
from tests.bench.guard import breaks, most

from hemostat_calibration.thresholds import breaks as module
from hemostat_calibration.thresholds.breaks import Existence, break_existence, find_break

LIVES = 60


def test_the_interval_would_miss_if_it_ended_between_settings():
    """The bootstrap says nothing about the shape of a curve between two settings."""
    rng = np.random.default_rng(0)
    lives = [breaks.life(rng, breaks.BROKEN[0]) for _ in range(LIVES)]
    result = [(find_break(curve, breaks.counts(rng, breaks.REQUESTS)), at) for curve, at in lives]
    broken = [(estimate, at) for estimate, at in result if estimate.existence is Existence.FOUND]
    assert sum(not estimate.low <= at <= estimate.high for estimate, at in broken) <= most(len(broken), 0.05)
    assert sum(not estimate.raw_low <= at <= estimate.raw_high for estimate, at in broken) > most(len(broken), 0.05)


def test_any_rise_would_be_taken_for_a_break_in_a_line(monkeypatch):
    """Where the way up to a setting is not compared with the way after it."""

    def found():
        rng = np.random.default_rng(0)
        return sum(break_existence(breaks.life(rng, breaks.LINE)[0]) is Existence.FOUND for _ in range(LIVES))

    assert found() <= most(LIVES, 0.025)
    monkeypatch.setattr(module, "MIN_RATIO", 0.0)
    assert found() > LIVES // 2
