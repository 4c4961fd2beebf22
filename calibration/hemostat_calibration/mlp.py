"""A small network from inputs x to targets t through a bottleneck: t ≈ V y, y = linear x + offset + out silu(hidden x +
hidden_offset), of small squared error. Learned by AdamW (Loshchilov & Hutter 2019) on batches of rows, in float32.

It begins as a linear map that is given, so that what it ends as differs from that by what the rows speak for.
Everything that is drawn at random follows from a seed.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields, replace

import numpy as np
import numpy.typing as npt

from hemostat_calibration.families import silu
from hemostat_calibration.hidden import Singles

_BLOCK = 4096
"""Rows evaluated at a time."""


@dataclass(frozen=True, slots=True, eq=False)
class Network:
    """float32: linear [r, A], offset [r], hidden [H, A], hidden_offset [H], out [r, H], up V [d, r]."""

    linear: Singles
    offset: Singles
    hidden: Singles
    hidden_offset: Singles
    out: Singles
    up: Singles

    def code(self, x: Singles) -> Singles:
        """y, [T, r], of x [T, A]."""
        units: Singles = silu(x @ self.hidden.T + self.hidden_offset)
        code: Singles = x @ self.linear.T + self.offset + units @ self.out.T
        return code


@dataclass(frozen=True, slots=True)
class Training:
    """rate: the first step's, falling to 0 along a cosine. decay: of weights, a part of the rate."""

    units: int = 1024
    epochs: int = 12
    batch: int = 256
    rate: float = 1e-3
    decay: float = 0.05
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
    target: npt.NDArray[np.floating],
    training: Training,
    progress: Callable[[float], None] = lambda done: None,
) -> Iterator[Network]:
    """The network after each epoch. x: [n, A], target: [n, d], of any float type. progress: told the part done."""
    weights = {f.name: getattr(network, f.name).copy() for f in fields(network)}
    first = {name: np.zeros_like(value) for name, value in weights.items()}
    second = {name: np.zeros_like(value) for name, value in weights.items()}
    batches = max(1, len(x) // training.batch)
    steps, step = batches * training.epochs, 0
    for epoch in range(training.epochs):
        order = np.argsort(bits(training.seed + 1 + epoch, len(x)), kind="stable")
        for batch in np.array_split(order, batches):
            gradients = _gradients(weights, x[batch].astype(np.float32), target[batch].astype(np.float32))
            step += 1
            rate = training.rate * 0.5 * (1.0 + math.cos(math.pi * (step - 1) / steps))
            for name, gradient in gradients.items():
                m, v, w = first[name], second[name], weights[name]
                m += 0.1 * (gradient - m)
                v += 0.001 * (np.square(gradient) - v)
                if name in {"hidden", "out"}:
                    w *= 1.0 - rate * training.decay
                scale = rate * math.sqrt(1.0 - 0.999**step) / (1.0 - 0.9**step)
                w -= scale * m / (np.sqrt(v) + 1e-8)
            if step % 16 == 0:
                progress(step / steps)
        yield replace(network, **{name: value.copy() for name, value in weights.items()})


def gain(network: Network, x: npt.NDArray[np.floating], target: npt.NDArray[np.floating]) -> npt.NDArray[np.float64]:
    """½ |t|² − ½ |t − V y|² of every row, [n]."""
    found = np.empty(len(x))
    for start in range(0, len(x), _BLOCK):
        t = target[start : start + _BLOCK].astype(np.float32)
        image = network.code(x[start : start + _BLOCK].astype(np.float32)) @ network.up.T
        found[start : start + _BLOCK] = (image * (t - 0.5 * image)).sum(axis=1)
    return found


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


def _gradients(w: dict[str, Singles], x: Singles, target: Singles) -> dict[str, Singles]:
    """Of the mean of ½ |t − V y|²."""
    a = x @ w["hidden"].T + w["hidden_offset"]
    sigmoid = 0.5 + 0.5 * np.tanh(0.5 * a)
    units = a * sigmoid
    y = x @ w["linear"].T + w["offset"] + units @ w["out"].T
    error = y @ w["up"].T
    error -= target
    error /= len(x)
    by_y = error @ w["up"]
    by_a = by_y @ w["out"]
    by_a *= sigmoid + units * (1.0 - sigmoid)
    return {
        "up": error.T @ y,
        "linear": by_y.T @ x,
        "offset": by_y.sum(axis=0),
        "out": by_y.T @ units,
        "hidden": by_a.T @ x,
        "hidden_offset": by_a.sum(axis=0),
    }
