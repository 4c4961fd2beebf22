"""A small network from features x to images (`objective`) through a bottleneck: image = V y, y = linear x + offset +
out silu(middle u + middle_offset), u = silu(hidden x + hidden_offset). Learned by AdamW (Loshchilov & Hutter 2019) on
batches of rows, in float32.

It starts as a given linear map, so that it differs from that only where the rows give a reason. Tokens are few and
inputs many: overfitting is limited by noise on the inputs, dropout, weight decay, and a slow learning rate of the
linear part. All random numbers follow from a seed.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, fields

import numpy as np
import numpy.typing as npt

from hemostat_calibration.arrays import Singles
from hemostat_calibration.learning.contextual.objective import Objective
from hemostat_calibration.learning.contextual.seeded_numbers import bits, normal
from hemostat_calibration.profiles.families import silu

_STEPS_TO_FULL_RATE = 50
_LINEAR_PART = frozenset({"linear", "offset", "up"})
"""Parameters that start near their final values: they learn more slowly."""
_DECAYING = frozenset({"hidden", "middle", "out"})


@dataclass(frozen=True, slots=True, eq=False)
class Network:
    """A map from features to images.

    float32: linear [r, A], offset [r], hidden [H, A], hidden_offset [H], middle [G, H], middle_offset [G],
    out [r, G], up V [d, r]."""

    linear: Singles
    offset: Singles
    hidden: Singles
    hidden_offset: Singles
    middle: Singles
    middle_offset: Singles
    out: Singles
    up: Singles

    def code(self, x: Singles) -> Singles:
        """The code y, [T, r], of x [T, A]."""
        units: Singles = silu(silu(x @ self.hidden.T + self.hidden_offset) @ self.middle.T + self.middle_offset)
        code: Singles = x @ self.linear.T + self.offset + units @ self.out.T
        return code

    def image(self, x: Singles) -> Singles:
        """V y, [T, d], of x [T, A]."""
        image: Singles = self.code(x) @ self.up.T
        return image


@dataclass(frozen=True, slots=True)
class TrainingSettings:
    """How a network is trained.

    units: of either hidden layer. epochs: of the squared error.
    kl_stages: then, where hidden states are known, stages of KL itself over the `kl_ids` likeliest ids, each (epochs,
        learning rate); () has none.
    batch: rows. learning_rate: the largest one of the squared error; in each stage the rate falls to 0 along a cosine.
    linear_rate_factor: times the rate, for the linear map and V. weight_decay: of weights, a part of the rate.
    input_noise: standard deviation of what is added to inputs, whose mean variance is 1.
    dropout: part of the units that a row is computed without. seed: of all that is random.
    """

    units: int = 512
    epochs: int = 6
    kl_stages: tuple[tuple[int, float], ...] = ((3, 1e-4), (3, 3e-4))
    kl_ids: int = 16384
    batch: int = 256
    learning_rate: float = 2e-3
    linear_rate_factor: float = 0.1
    weight_decay: float = 0.3
    input_noise: float = 0.1
    dropout: float = 0.1
    seed: int = 0


def begin(
    linear: npt.NDArray[np.floating],
    offset: npt.NDArray[np.floating],
    up: npt.NDArray[np.floating],
    training: TrainingSettings,
) -> Network:
    """The network that computes the given linear map: its hidden units are random, their output weights 0.

    linear: [r, A]. offset: [r]. up: [d, r].

    >>> start = begin(np.eye(2), np.zeros(2), np.eye(2), TrainingSettings(units=3))
    >>> start.image(np.array([[1.0, -2.0]], np.float32)).tolist()
    [[1.0, -2.0]]
    """
    units, features = training.units, linear.shape[1]
    hidden = normal(training.seed, units * features).reshape(units, features) / math.sqrt(features)
    middle = normal(training.seed + 1, units * units).reshape(units, units) / math.sqrt(max(units, 1))
    return Network(
        linear=linear.astype(np.float32),
        offset=offset.astype(np.float32),
        hidden=hidden.astype(np.float32),
        hidden_offset=np.zeros(units, np.float32),
        middle=middle.astype(np.float32),
        middle_offset=np.zeros(units, np.float32),
        out=np.zeros((len(linear), units), np.float32),
        up=up.astype(np.float32),
    )


def train(
    network: Network,
    x: npt.NDArray[np.floating],
    rows: npt.NDArray[np.integer],
    loss: Objective,
    training: TrainingSettings,
    epochs: int,
    max_rate: float,
    progress: Callable[[float], None],
) -> Network:
    """The network after `epochs` over the chosen rows, by AdamW (Loshchilov & Hutter 2019) with a cosine schedule.

    x: inputs [n, A], of any float type. rows: indices into x. max_rate: learning rate at the start of the cosine.
    progress: called with the part that is done.

    >>> from hemostat_calibration.learning.contextual.objective import Squared
    >>> x = np.linspace(-1.0, 1.0, 64, dtype=np.float32)[:, None]
    >>> target, settings = (x**2).astype(np.float16), TrainingSettings(units=8, batch=16, input_noise=0.0, dropout=0.0)
    >>> start = begin(np.zeros((1, 1)), np.zeros(1), np.ones((1, 1)), settings)
    >>> end = train(start, x, np.arange(64), Squared(target), settings, 50, 0.02, lambda done: None)
    >>> bool(np.square(end.image(x) - target).mean() < 0.2 * np.square(target.astype(float)).mean())
    True
    """
    weights = {f.name: getattr(network, f.name).copy() for f in fields(network)}
    first = {name: np.zeros_like(value) for name, value in weights.items()}
    second = {name: np.zeros_like(value) for name, value in weights.items()}
    batches = max(1, len(rows) // training.batch)
    steps, step = batches * epochs, 0
    for epoch in range(epochs):
        order = rows[np.argsort(bits(training.seed + 1 + epoch, len(rows)), kind="stable")]
        for batch in np.array_split(order, batches):
            random = (training.seed + 1) * 1_000_003 + 3 * step
            inputs = x[batch].astype(np.float32)
            if training.input_noise:
                inputs += np.float32(training.input_noise) * normal(random, inputs.size).reshape(inputs.shape)
            kept = (_kept(random + 1, len(batch), training), _kept(random + 2, len(batch), training))
            gradients = _gradients(weights, inputs, batch, loss, kept)
            rate = max_rate * min(1.0, (step + 1) / _STEPS_TO_FULL_RATE)
            rate *= 0.5 * (1.0 + math.cos(math.pi * step / steps))
            step += 1
            unbiased = math.sqrt(1.0 - 0.999**step) / (1.0 - 0.9**step)
            for name, gradient in gradients.items():
                m, v, w = first[name], second[name], weights[name]
                m += 0.1 * (gradient - m)
                v += 0.001 * (np.square(gradient) - v)
                if name in _DECAYING:
                    w *= 1.0 - rate * training.weight_decay
                w -= (
                    rate
                    * unbiased
                    * (training.linear_rate_factor if name in _LINEAR_PART else 1.0)
                    * m
                    / (np.sqrt(v) + 1e-8)
                )
            if step % 8 == 0:
                progress(step / steps)
    return Network(**weights)


def _gradients(
    w: dict[str, Singles],
    x: Singles,
    rows: npt.NDArray[np.integer],
    loss: Objective,
    kept: tuple[Singles, Singles],
) -> dict[str, Singles]:
    """Gradients of the mean loss of the rows. kept: what the units of either layer are multiplied by."""
    first, by_a = _units(x @ w["hidden"].T + w["hidden_offset"], kept[0])
    units, by_b = _units(first @ w["middle"].T + w["middle_offset"], kept[1])
    y = x @ w["linear"].T + w["offset"] + units @ w["out"].T
    by_image = loss.slope(rows, y @ w["up"].T) / np.float32(len(x))
    by_y = by_image @ w["up"]
    by_b *= by_y @ w["out"]
    by_a *= by_b @ w["middle"]
    return {
        "up": by_image.T @ y,
        "linear": by_y.T @ x,
        "offset": by_y.sum(axis=0),
        "out": by_y.T @ units,
        "middle": by_b.T @ first,
        "middle_offset": by_b.sum(axis=0),
        "hidden": by_a.T @ x,
        "hidden_offset": by_a.sum(axis=0),
    }


def _units(a: Singles, kept: Singles) -> tuple[Singles, Singles]:
    """silu(a), and its slope, both times `kept`."""
    sigmoid = 0.5 + 0.5 * np.tanh(0.5 * a)
    units = a * sigmoid
    slope = kept * (sigmoid + units * (1.0 - sigmoid))
    units *= kept
    return units, slope


def _kept(seed: int, rows: int, training: TrainingSettings) -> Singles:
    """Dropout mask: 0 for units left out, more than 1 for the others, so that their mean is 1; [rows, units]."""
    drawn = bits(seed, rows * training.units).reshape(rows, training.units)
    kept = drawn >= np.uint64(int(training.dropout * 2.0**64))
    return kept.astype(np.float32) / np.float32(1.0 - training.dropout)
