"""What keeps the network from learning its rows by heart, and that it learns what is there."""

from dataclasses import asdict

import numpy as np
import pytest

from hemostat_calibration.learning.contextual import mlp
from hemostat_calibration.learning.contextual.objective import Squared
from hemostat_calibration.learning.contextual.seeded_numbers import normal
from hemostat_calibration.profiles.contextual import contextual_profile
from hemostat_calibration.profiles.transform import code

ROWS, A, H, G, R, D = 7, 4, 5, 6, 3, 8
SHAPES = {
    **{"linear": (R, A), "offset": (R,), "hidden": (H, A), "hidden_offset": (H,)},
    **{"middle": (G, H), "middle_offset": (G,), "out": (R, G), "up": (D, R)},
}


def weights(dtype: type = np.float64) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(1)
    return {name: rng.normal(size=shape).astype(dtype) for name, shape in SHAPES.items()}


def test_what_is_learned_is_what_a_profile_says() -> None:
    w = weights(np.float32)
    parts = {name: value for name, value in w.items() if name != "up"}
    profile = contextual_profile(model="", anchors=np.arange(A + 2), up=np.zeros((99, R)), clamp_nats=1.0, **parts)
    anchored = np.random.default_rng(2).normal(size=(ROWS, A + 2))
    x = (anchored - anchored.mean(1, keepdims=True))[:, :A].astype(np.float32)
    np.testing.assert_allclose(mlp.Network(**w).code(x), code(profile, anchored), rtol=1e-4, atol=1e-5)


def test_gradients_are_those_of_the_loss() -> None:
    """By central differences, with units left out."""
    rng = np.random.default_rng(3)
    w, x, t = weights(), rng.normal(size=(ROWS, A)), rng.normal(size=(ROWS, D))
    kept = tuple(2.0 * (rng.random((ROWS, units)) < 0.5) for units in (H, G))

    def loss() -> float:
        def silu(a: np.ndarray) -> np.ndarray:
            return a / (1.0 + np.exp(-a))

        first = kept[0] * silu(x @ w["hidden"].T + w["hidden_offset"])
        second = kept[1] * silu(first @ w["middle"].T + w["middle_offset"])
        image = (x @ w["linear"].T + w["offset"] + second @ w["out"].T) @ w["up"].T
        return 0.5 * float(np.square(image - t).sum(1).mean())

    found = mlp._gradients(w, x, np.arange(ROWS), Squared(t), kept)
    assert found.keys() == w.keys()
    for name, gradient in found.items():
        assert gradient.shape == w[name].shape
        assert np.abs(gradient).max() > 1e-3, name
        for at in np.ndindex(gradient.shape):
            before = w[name][at]
            ends = []
            for step in (1e-5, -1e-5):
                w[name][at] = before + step
                ends.append(loss())
            w[name][at] = before
            assert (ends[0] - ends[1]) / 2e-5 == pytest.approx(gradient[at], rel=1e-5, abs=1e-7), (name, at)


def test_every_step_and_layer_leaves_other_units_out(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    real = mlp._kept

    def spied(seed: int, rows: int, training: mlp.TrainingSettings) -> np.ndarray:
        seen.append(real(seed, rows, training))
        return seen[-1]

    monkeypatch.setattr(mlp, "_kept", spied)
    training = mlp.TrainingSettings(units=16, batch=ROWS, dropout=0.5)
    x, t = np.zeros((3 * ROWS, A), np.float32), np.zeros((3 * ROWS, D), np.float32)
    begun = mlp.begin(np.zeros((R, A)), np.zeros(R), np.ones((D, R)), training)
    mlp.train(begun, x, np.arange(len(x)), Squared(t), training, 2, 1e-3, lambda done: None)
    assert len(seen) == 12
    assert len({one.tobytes() for one in seen}) == 12


def test_weights_decay_and_what_was_given_does_not() -> None:
    class Content:
        def slope(self, rows: np.ndarray, image: np.ndarray) -> np.ndarray:
            return np.zeros_like(image)

    training = mlp.TrainingSettings(units=H, batch=ROWS, weight_decay=0.5, input_noise=0.0, dropout=0.0)
    square = {"middle": (H, H), "middle_offset": (H,), "out": (R, H)}
    ones = {name: np.ones(shape, np.float32) for name, shape in square.items()}
    before = mlp.Network(**{**weights(np.float32), **ones})
    x = np.ones((ROWS, A), np.float32)
    after = mlp.train(before, x, np.arange(ROWS), Content(), training, 1, 0.1, lambda done: None)
    smaller = {name for name, value in asdict(before).items() if not np.array_equal(value, getattr(after, name))}
    assert smaller == {"hidden", "middle", "out"}
    part = 1.0 - 0.5 * 0.1 / mlp._STEPS_TO_FULL_RATE
    np.testing.assert_allclose(after.middle, part * before.middle, rtol=1e-6)


def test_noise_is_standard_normal_and_of_its_seed() -> None:
    drawn = normal(3, 100_001)
    assert drawn.dtype == np.float32
    assert drawn.mean() == pytest.approx(0.0, abs=0.02)
    assert drawn.var() == pytest.approx(1.0, abs=0.02)
    assert (np.abs(drawn) > 2.0).mean() == pytest.approx(0.0455, abs=0.004)
    assert np.array_equal(drawn, normal(3, 100_001))
    assert abs(np.corrcoef(drawn, normal(4, 100_001))[0, 1]) < 0.02


@pytest.mark.parametrize("dropped", [0.0, 0.3, 0.5])
def test_units_are_left_out_at_random_and_their_mean_stays(dropped: float) -> None:
    kept = mlp._kept(5, 2000, mlp.TrainingSettings(units=64, dropout=dropped))
    assert set(np.unique(kept)) <= {np.float32(0.0), np.float32(1.0 / (1.0 - dropped))}
    assert (kept == 0.0).mean() == pytest.approx(dropped, abs=0.01)
    assert kept.mean() == pytest.approx(1.0, abs=0.02)


def held_out_error(training: mlp.TrainingSettings, rows: int) -> float:
    """Of a network from rows with noise, on others; 1 is that of the linear map 0 that it begins as."""
    rng = np.random.default_rng(0)
    x = rng.normal(size=(rows + 4000, 8)).astype(np.float32)
    bent = np.tanh(2.0 * x @ rng.normal(size=(8, 4)) / 3.0)
    t = (bent + rng.normal(size=bent.shape)).astype(np.float16)
    begun = mlp.begin(np.zeros((4, 8)), np.zeros(4), np.eye(4), training)
    found = mlp.train(
        begun, x, np.arange(rows), Squared(t), training, training.epochs, training.learning_rate, lambda done: None
    )
    return float(np.square(found.image(x[rows:]) - bent[rows:]).mean() / np.square(bent[rows:]).mean())


def test_what_holds_it_back_pays_where_rows_are_few() -> None:
    free = mlp.TrainingSettings(
        units=256,
        epochs=60,
        batch=64,
        learning_rate=1e-2,
        linear_rate_factor=1.0,
        weight_decay=0.0,
        input_noise=0.0,
        dropout=0.0,
    )
    held = mlp.TrainingSettings(
        units=256,
        epochs=60,
        batch=64,
        learning_rate=1e-2,
        linear_rate_factor=1.0,
        weight_decay=1.0,
        input_noise=0.3,
        dropout=0.5,
    )
    assert held_out_error(held, 400) < 0.7 * held_out_error(free, 400)
    assert held_out_error(held, 400) < 0.5
