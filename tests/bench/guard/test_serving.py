"""A profile that serves and does no harm is not taken back where units depend on each other."""

import numpy as np
import pytest
from tests.bench.guard import most, serving

LIVES = 30


@pytest.mark.parametrize("name", ["runs of 20", "runs of 5 of the gains alone"])
def test_units_taken_for_independent_would_take_back_what_does_no_harm(name, monkeypatch):
    monkeypatch.setattr(serving, "UNITS", 600)
    independent, back = serving.lives_of(serving.WORLDS[name], LIVES, np.random.default_rng(0), 0.0)
    assert independent > 1.5 * most(LIVES, 0.05)
    assert back <= most(LIVES, 0.05)
