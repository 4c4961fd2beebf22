"""What keeps the network from learning its rows by heart, and that it learns what is there."""

import numpy as np
import pytest

from hemostat_calibration import mlp
from hemostat_calibration.objective import Squared


def test_noise_is_standard_normal_and_of_its_seed() -> None:
    drawn = mlp.normal(3, 100_001)
    assert drawn.dtype == np.float32
    assert drawn.mean() == pytest.approx(0.0, abs=0.02)
    assert drawn.var() == pytest.approx(1.0, abs=0.02)
    assert (np.abs(drawn) > 2.0).mean() == pytest.approx(0.0455, abs=0.004)
    assert np.array_equal(drawn, mlp.normal(3, 100_001))
    assert abs(np.corrcoef(drawn, mlp.normal(4, 100_001))[0, 1]) < 0.02


@pytest.mark.parametrize("dropped", [0.0, 0.3, 0.5])
def test_units_are_left_out_at_random_and_their_mean_stays(dropped: float) -> None:
    kept = mlp._kept(5, 2000, mlp.Training(units=64, dropped=dropped))
    assert set(np.unique(kept)) <= {np.float32(0.0), np.float32(1.0 / (1.0 - dropped))}
    assert (kept == 0.0).mean() == pytest.approx(dropped, abs=0.01)
    assert kept.mean() == pytest.approx(1.0, abs=0.02)


def held_out_error(training: mlp.Training, rows: int) -> float:
    """Of a network from rows with noise, on others; 1 is that of the linear map 0 that it begins as."""
    rng = np.random.default_rng(0)
    x = rng.normal(size=(rows + 4000, 8)).astype(np.float32)
    bent = np.tanh(2.0 * x @ rng.normal(size=(8, 4)) / 3.0)
    t = (bent + rng.normal(size=bent.shape)).astype(np.float16)
    begun = mlp.begin(np.zeros((4, 8)), np.zeros(4), np.eye(4), training)
    found = mlp.train(
        begun, x, np.arange(rows), Squared(t), training, training.epochs, training.rate, lambda done: None
    )
    return float(np.square(found.image(x[rows:]) - bent[rows:]).mean() / np.square(bent[rows:]).mean())


def test_what_holds_it_back_pays_where_rows_are_few() -> None:
    free = mlp.Training(units=256, epochs=60, batch=64, rate=1e-2, given=1.0, decay=0.0, noise=0.0, dropped=0.0)
    held = mlp.Training(units=256, epochs=60, batch=64, rate=1e-2, given=1.0, decay=1.0, noise=0.3, dropped=0.5)
    assert held_out_error(held, 400) < 0.7 * held_out_error(free, 400)
    assert held_out_error(held, 400) < 0.5
