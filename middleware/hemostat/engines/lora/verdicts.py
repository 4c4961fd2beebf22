"""What the numbers of the two probes say. Pure: numbers in, verdicts out; log-probabilities in nats.

The limits were set before the probes ran against a real engine and are generous to noise: what the probes have to
find, rows with another model's weights or factors with a wrong scale, moves log-probabilities by tenths of a nat.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from hemostat.engines.lora.server import Completed
from hemostat_calibration.arrays import Floats

NOISE_FACTOR = 3.0
"""Of the noise that the same requests show without an adapter in the batch, by which isolated rows may differ."""
ISOLATION_NATS = 1e-3
"""Added to that, for engines whose rows do not differ at all."""
MAX_NOISE_NATS = 0.1
"""More noise than this among rows without an adapter, and the probe cannot say anything: it fails."""
MAX_BASE_NATS = 0.15
"""Mean difference of the engine without an adapter from our copy of the model, up to which the copy counts as the same
model: two implementations in bfloat16 differ by about 0.06, other weights by more than 0.3."""
AGREEMENT_FACTOR, AGREEMENT_NATS = 2.0, 0.02
"""With the adapter, the two may differ by so many times what they differ by without it, and so many nats."""
MIN_CORRELATION = 0.95
SLOPES = (0.8, 1.25)
"""Of the adapter's effect at the engine on its effect on our copy: a factor of 1 where it is applied once, by its own
scale."""
ERRORS = 3.0
"""Standard errors of that factor which are allowed on top."""
CLEAR_FACTOR = 5.0
"""An effect of more than so many times the difference without the adapter is large enough for `MIN_CORRELATION`: noise
of the same size with and without the adapter still leaves a correlation of 0.96."""


@dataclass(frozen=True, slots=True)
class Verdict:
    """Of a probe. detail: one line with the figures."""

    passed: bool
    detail: str
    base_differs: bool = False
    """Of an agreement probe: engine and copy are not the same model even without an adapter."""


@dataclass(frozen=True, slots=True)
class Moves:
    """How far rows differ from the same rows alone.

    mean, largest: of |Δ log-probability| of the tokens that were chosen alone, nats. texts: rows whose tokens differ.
    rows: all of them.
    """

    mean: float
    largest: float
    texts: int
    rows: int


def moves(alone: Iterable[Completed], beside: Iterable[Completed]) -> Moves:
    """Compare each row up to its first different token, that one included: after it the contexts differ.

    Where the token chosen alone is not among the other's most likely ones, the difference is at least that to the last
    of these.
    """
    found: list[float] = []
    texts = rows = 0
    for one, other in zip(alone, beside, strict=True):
        rows += 1
        for t in range(len(other.tokens)):
            token = one.tokens[t]
            if other.tokens[t] == token:
                found.append(abs(one.logprobs[t] - other.logprobs[t]))
                continue
            texts += 1
            least = min(other.top[t].values(), default=-np.inf)
            found.append(abs(one.logprobs[t] - other.top[t].get(token, least)))
            break
    values = np.nan_to_num(np.array(found), nan=np.inf)
    if not len(values):
        return Moves(0.0, 0.0, texts, rows)
    return Moves(float(values.mean()), float(values.max()), texts, rows)


def isolation(noise: Moves, beside: Moves) -> Verdict:
    """Whether rows without an adapter are left alone.

    noise: beside other rows without an adapter. beside: beside rows with adapters.
    """
    allowed = NOISE_FACTOR * noise.mean + ISOLATION_NATS
    flips = beside.texts > noise.texts and beside.largest > NOISE_FACTOR * noise.largest + ISOLATION_NATS
    detail = (
        f"{beside.texts} of {beside.rows} texts without an adapter differ beside adapters, mean |Δ| {beside.mean:.4f} "
        f"nats (beside rows without one: {noise.texts} of {noise.rows}, {noise.mean:.4f})"
    )
    return Verdict(beside.mean <= allowed and not flips and noise.mean <= MAX_NOISE_NATS, detail)


def agreement(engine: tuple[Floats, Floats], copy: tuple[Floats, Floats], noise: float = 0.0) -> Verdict:
    """Whether the engine with and without an adapter is the model that our copy is with and without it.

    Each pair: log-probabilities of the same tokens, without and with the adapter, float64 [n]. noise: mean |Δ| of the
    engine from itself, of tokens it has generated and computed again as a prompt.
    """
    without = float(np.abs(engine[0] - copy[0]).mean())
    adapted = float(np.abs(engine[1] - copy[1]).mean())
    effect, expected = engine[1] - engine[0], copy[1] - copy[0]
    size = float(np.abs(expected).mean())
    clear = size > CLEAR_FACTOR * without
    correlation, slope, error = _fit(expected, effect)
    detail = (
        f"mean |Δ| to our copy {without:.3f} nats without it, {adapted:.3f} with it, {len(effect)} tokens; "
        f"effect {size:.3f}, correlation {correlation:.3f}, factor {slope:.2f}"
    )
    if not np.isfinite(without + adapted):
        return Verdict(False, f"log-probabilities that are not finite ({detail})", not np.isfinite(without))
    if without > MAX_BASE_NATS + NOISE_FACTOR * noise:
        return Verdict(False, detail, base_differs=True)
    near = adapted <= AGREEMENT_FACTOR * without + AGREEMENT_NATS
    once = SLOPES[0] - ERRORS * error <= slope <= SLOPES[1] + ERRORS * error
    return Verdict(near and once and (correlation >= MIN_CORRELATION or not clear), detail)


def _fit(x: Floats, y: Floats) -> tuple[float, float, float]:
    """Correlation of y with x; slope of y on x through the origin, and its standard error (infinite where x is 0)."""
    square = float(x @ x)
    if not square > 0.0:
        return 0.0, 0.0, float("inf")
    slope = float(x @ y) / square
    error = float(np.sqrt(np.mean((y - slope * x) ** 2) / square))
    spread = float(x.std() * y.std())
    correlation = float(((x - x.mean()) * (y - y.mean())).mean()) / spread if spread > 0.0 else 0.0
    return correlation, slope, error
