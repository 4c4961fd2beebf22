"""A small network from features x to images (`objective`) through a bottleneck: image = V y, y = linear x + offset +
out silu(middle u + middle_offset), u = silu(hidden x + hidden_offset). Learned by AdamW (Loshchilov & Hutter 2019) on
batches of rows, in float32.

It begins as a linear map that is given, so that what it ends as differs from that by what the rows speak for. Tokens
are few and inputs many: what keeps it from learning the rows by heart is noise on its inputs, units that are left out
at random, weights that decay, and a linear part that moves slowly or not at all.
Everything that is drawn at random follows from a seed.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, fields

import numpy as np
import numpy.typing as npt

from hemostat_calibration.learning.contextual.hidden_states import Singles
from hemostat_calibration.learning.contextual.objective import Objective
from hemostat_calibration.profiles.families import silu

_STEPS_TO_FULL_RATE = 50
_GIVEN = frozenset({"linear", "offset", "up"})
"""They begin where they are about right."""
_DECAYING = frozenset({"hidden", "middle", "out"})


@dataclass(frozen=True, slots=True, eq=False)
class Network:
    """float32: linear [r, A], offset [r], hidden [H, A], hidden_offset [H], middle [G, H], middle_offset [G],
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
        """y, [T, r], of x [T, A]."""
        units: Singles = silu(silu(x @ self.hidden.T + self.hidden_offset) @ self.middle.T + self.middle_offset)
        code: Singles = x @ self.linear.T + self.offset + units @ self.out.T
        return code

    def image(self, x: Singles) -> Singles:
        """[T, d], of x [T, A]."""
        image: Singles = self.code(x) @ self.up.T
        return image


@dataclass(frozen=True, slots=True)
class TrainingSettings:
    """units: of either layer. epochs: of the squared error. exact: then, where hidden states are at hand, stages of KL
    itself over the `exact_ids` likeliest ids, each so many epochs at such a rate; () has none. rate: the largest,
    falling to 0 along a cosine in each stage; given: part of it for the linear map and V. decay: of weights, a part of
    the rate. noise: standard deviation of what is added to inputs, whose mean variance is 1. dropped: part of the units
    that a row does without.
    """

    units: int = 512
    epochs: int = 6
    exact: tuple[tuple[int, float], ...] = ((3, 1e-4), (3, 3e-4))
    exact_ids: int = 16384
    batch: int = 256
    rate: float = 2e-3
    given: float = 0.1
    decay: float = 0.3
    noise: float = 0.1
    dropped: float = 0.1
    seed: int = 0


def begin(
    linear: npt.NDArray[np.floating],
    offset: npt.NDArray[np.floating],
    up: npt.NDArray[np.floating],
    training: TrainingSettings,
) -> Network:
    """The linear map as a network whose units say nothing yet."""
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
    objective: Objective,
    training: TrainingSettings,
    epochs: int,
    rate_at_most: float,
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
            random = (training.seed + 1) * 1_000_003 + 3 * step
            inputs = x[batch].astype(np.float32)
            if training.noise:
                inputs += np.float32(training.noise) * normal(random, inputs.size).reshape(inputs.shape)
            kept = (_kept(random + 1, len(batch), training), _kept(random + 2, len(batch), training))
            gradients = _gradients(weights, inputs, batch, objective, kept)
            rate = rate_at_most * min(1.0, (step + 1) / _STEPS_TO_FULL_RATE)
            rate *= 0.5 * (1.0 + math.cos(math.pi * step / steps))
            step += 1
            unbiased = math.sqrt(1.0 - 0.999**step) / (1.0 - 0.9**step)
            for name, gradient in gradients.items():
                m, v, w = first[name], second[name], weights[name]
                m += 0.1 * (gradient - m)
                v += 0.001 * (np.square(gradient) - v)
                if name in _DECAYING:
                    w *= 1.0 - rate * training.decay
                w -= rate * unbiased * (training.given if name in _GIVEN else 1.0) * m / (np.sqrt(v) + 1e-8)
            if step % 8 == 0:
                progress(step / steps)
    return Network(**weights)


def _gradients(
    w: dict[str, Singles],
    x: Singles,
    rows: npt.NDArray[np.integer],
    objective: Objective,
    kept: tuple[Singles, Singles],
) -> dict[str, Singles]:
    """Of the mean loss of the rows. kept: what the units of either layer are multiplied by."""
    first, by_a = _units(x @ w["hidden"].T + w["hidden_offset"], kept[0])
    units, by_b = _units(first @ w["middle"].T + w["middle_offset"], kept[1])
    y = x @ w["linear"].T + w["offset"] + units @ w["out"].T
    by_image = objective.slope(rows, y @ w["up"].T) / np.float32(len(x))
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
    """0 for units that are left out, more than 1 for the others, so that their mean is 1; [rows, units]."""
    drawn = bits(seed, rows * training.units).reshape(rows, training.units)
    kept = drawn >= np.uint64(int(training.dropped * 2.0**64))
    return kept.astype(np.float32) / np.float32(1.0 - training.dropped)


def bits(seed: int, count: int) -> npt.NDArray[np.uint64]:
    """Well-mixed 64-bit numbers: splitmix64 (Steele, Lea & Flood 2014) from a point that the seed gives."""
    start = (seed * 0xD1342543DE82EF95 + 0x2545F4914F6CDD1D) % 2**64
    z = np.arange(1, count + 1, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15) + np.uint64(start)
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))


def normal(seed: int, count: int) -> Singles:
    """Standard normal numbers (Box & Muller 1958)."""
    half = -(-count // 2)
    uniform = (bits(seed, 2 * half) >> np.uint64(40)).astype(np.float32) * np.float32(2.0**-24)
    size = np.sqrt(-2.0 * np.log1p(-uniform[:half]))
    angle = np.float32(2.0 * np.pi) * uniform[half:]
    found: Singles = np.concatenate([size * np.cos(angle), size * np.sin(angle)])[:count]
    return found
