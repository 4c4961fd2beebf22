"""A small network from features x to images (`objective`) through a bottleneck: image = V y, y = linear x + offset +
out silu(hidden x + hidden_offset). Learned by AdamW (Loshchilov & Hutter 2019) on batches of rows, in float32.

It begins as a linear map that is given, so that what it ends as differs from that by what the rows speak for.
Everything that is drawn at random follows from a seed.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, fields

import numpy as np
import numpy.typing as npt

from hemostat_calibration.families import silu
from hemostat_calibration.hidden import Singles
from hemostat_calibration.objective import Objective

_STEPS_TO_FULL_RATE = 50
_SLOW = 0.1
"""Of the rate, for V: it begins where it is about right, and everything else depends on it."""
_DECAYING = frozenset({"hidden", "out"})


@dataclass(frozen=True, slots=True, eq=False)
class Network:
    """float32: linear [r, A], offset [r], hidden [H, A], hidden_offset [H], out [r, H], up V [d, r]."""

    linear: Singles
    offset: Singles
    hidden: Singles
    hidden_offset: Singles
    out: Singles
    up: Singles

    def image(self, x: Singles) -> Singles:
        """[T, d], of x [T, A]."""
        units: Singles = silu(x @ self.hidden.T + self.hidden_offset)
        image: Singles = (x @ self.linear.T + self.offset + units @ self.out.T) @ self.up.T
        return image


@dataclass(frozen=True, slots=True)
class Training:
    """epochs: of the squared error, then exact_epochs of KL itself over the `exact_ids` likeliest ids, where hidden
    states are at hand. rate: the largest, falling to 0 along a cosine. decay: of weights, a part of the rate."""

    units: int = 1024
    epochs: int = 8
    exact_epochs: int = 3
    exact_ids: int = 8192
    batch: int = 256
    rate: float = 1e-3
    decay: float = 0.01
    seed: int = 0


def begin(
    linear: npt.NDArray[np.floating], offset: npt.NDArray[np.floating], up: npt.NDArray[np.floating], training: Training
) -> Network:
    """The linear map as a network whose units say nothing yet."""
    units, features = training.units, linear.shape[1]
    hidden = normal(training.seed, units * features).reshape(units, features) / math.sqrt(features)
    return Network(
        linear=linear.astype(np.float32),
        offset=offset.astype(np.float32),
        hidden=hidden.astype(np.float32),
        hidden_offset=np.zeros(units, np.float32),
        out=np.zeros((len(linear), units), np.float32),
        up=up.astype(np.float32),
    )


def train(
    network: Network,
    x: npt.NDArray[np.floating],
    rows: npt.NDArray[np.integer],
    objective: Objective,
    training: Training,
    epochs: int,
    progress: Callable[[float], None],
) -> Network:
    """The network after `epochs` over those `rows` of x, [n, A] of any float type. progress: told the part done."""
    weights = {f.name: getattr(network, f.name).copy() for f in fields(network)}
    first = {name: np.zeros_like(value) for name, value in weights.items()}
    second = {name: np.zeros_like(value) for name, value in weights.items()}
    batches = max(1, len(rows) // training.batch)
    steps, step = batches * epochs, 0
    for epoch in range(epochs):
        order = rows[np.argsort(bits(training.seed + 1 + epoch, len(rows)), kind="stable")]
        for batch in np.array_split(order, batches):
            gradients = _gradients(weights, x[batch].astype(np.float32), batch, objective)
            rate = training.rate * min(1.0, (step + 1) / _STEPS_TO_FULL_RATE)
            rate *= 0.5 * (1.0 + math.cos(math.pi * step / steps))
            step += 1
            unbiased = math.sqrt(1.0 - 0.999**step) / (1.0 - 0.9**step)
            for name, gradient in gradients.items():
                m, v, w = first[name], second[name], weights[name]
                m += 0.1 * (gradient - m)
                v += 0.001 * (np.square(gradient) - v)
                if name in _DECAYING:
                    w *= 1.0 - rate * training.decay
                w -= rate * unbiased * (_SLOW if name == "up" else 1.0) * m / (np.sqrt(v) + 1e-8)
            if step % 8 == 0:
                progress(step / steps)
    return Network(**weights)


def _gradients(
    w: dict[str, Singles], x: Singles, rows: npt.NDArray[np.integer], objective: Objective
) -> dict[str, Singles]:
    """Of the mean loss of the rows."""
    a = x @ w["hidden"].T + w["hidden_offset"]
    sigmoid = 0.5 + 0.5 * np.tanh(0.5 * a)
    units = a * sigmoid
    y = x @ w["linear"].T + w["offset"] + units @ w["out"].T
    by_image = objective.slope(rows, y @ w["up"].T) / np.float32(len(x))
    by_y = by_image @ w["up"]
    by_a = by_y @ w["out"]
    by_a *= sigmoid + units * (1.0 - sigmoid)
    return {
        "up": by_image.T @ y,
        "linear": by_y.T @ x,
        "offset": by_y.sum(axis=0),
        "out": by_y.T @ units,
        "hidden": by_a.T @ x,
        "hidden_offset": by_a.sum(axis=0),
    }


def bits(seed: int, count: int) -> npt.NDArray[np.uint64]:
    """Well-mixed 64-bit numbers: splitmix64 (Steele, Lea & Flood 2014) from a point that the seed gives."""
    start = (seed * 0xD1342543DE82EF95 + 0x2545F4914F6CDD1D) % 2**64
    z = np.arange(1, count + 1, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15) + np.uint64(start)
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))


def normal(seed: int, count: int) -> npt.NDArray[np.float64]:
    """Standard normal numbers (Box & Muller 1958)."""
    uniform = (bits(seed, 2 * count) >> np.uint64(11)).astype(np.float64) * 2.0**-53
    size = np.sqrt(-2.0 * np.log1p(-uniform[:count]))
    found: npt.NDArray[np.float64] = size * np.cos(2.0 * np.pi * uniform[count:])
    return found
