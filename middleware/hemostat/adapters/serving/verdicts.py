"""The verdicts of the two probes from their numbers. Pure; log-probabilities are in nats.

The limits were set before the probes ran against a real engine and are generous to noise: what the probes have to
find, rows with another model's weights or factors with a wrong scale, moves log-probabilities by tenths of a nat.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from hemostat.adapters.serving.server import Completed
from hemostat_calibration.arrays import Floats

NOISE_FACTOR = 3.0
"""The multiple of the noise by which isolated rows may differ. The noise is the difference that the same requests show
without an adapter in the batch."""
ISOLATION_NATS = 1e-3
"""Added to that, for engines whose rows do not differ at all."""
WORST_FACTOR = 2.0
"""The multiple of the noise of the row that moves most: one contaminated row among many hardly changes the mean of
all."""
MIN_ROW_TOKENS = 4
"""A row of fewer tokens, whose text differs early, counts as so many in its mean."""
MAX_NOISE_NATS = 0.05
"""More noise than this among rows without an adapter, and the probe cannot say anything: it fails."""
MAX_BASE_NATS = 0.15
"""Mean difference of the engine without an adapter from our copy of the model, up to which the copy counts as the same
model: two implementations in bfloat16 differ by about 0.06, other weights by more than 0.3."""
AGREEMENT_FACTOR, AGREEMENT_NATS = 1.5, 0.01
"""With the adapter, the two may differ by so many times what they differ by without it, and so many nats. vLLM 0.32 and
our copy: 0.044 and 0.040 nats for an adapter whose effect is 0.61. On that model, at 0.057, a wrong scale is found
from 1.1 on, one decoder layer without its corrections too, a single linear layer mostly not."""
MIN_CORRELATION = 0.95
SLOPES = (0.8, 1.25)
"""The range of the factor from the adapter's effect on our copy to its effect at the engine. It is 1 if the engine
applies the adapter once, by its own scale."""
ERRORS = 3.0
"""Standard errors of that factor which are allowed on top."""
CLEAR_FACTOR = 5.0
"""An effect of more than so many times the difference without the adapter is large enough for `MIN_CORRELATION`: noise
of the same size with and without the adapter still leaves a correlation of 0.96."""


@dataclass(frozen=True, slots=True)
class Verdict:
    """The verdict of a probe. detail: one line with the figures."""

    passed: bool
    detail: str
    base_differs: bool = False
    """True if an agreement probe found that engine and copy are not the same model even without an adapter."""


@dataclass(frozen=True, slots=True)
class Moves:
    """The differences of rows from the same rows alone.

    mean, largest: of |Δ log-probability| of the tokens that were chosen alone, nats. worst: the largest mean of one
    row. texts: rows whose tokens differ. rows: all of them.
    """

    mean: float
    largest: float
    worst: float
    texts: int
    rows: int


def moves(alone: Iterable[Completed], beside: Iterable[Completed]) -> Moves:
    """Compare each row up to its first different token, that one included: after it the contexts differ.

    Where the token chosen alone is not among the other's most likely ones, the difference is at least that to the last
    of these.

    >>> text = Completed([7, 8], [-1.0, -1.0], [{7: -1.0}, {8: -1.0}])
    >>> moves([text], [Completed([7, 9], [-1.5, -0.5], [{7: -1.5}, {9: -0.5, 8: -2.0}])])
    Moves(mean=0.75, largest=1.0, worst=0.375, texts=1, rows=1)
    """
    result: list[float] = []
    worst = 0.0
    texts = rows = 0
    for text, other in zip(alone, beside, strict=True):
        rows += 1
        first = len(result)
        for t in range(len(other.tokens)):
            token = text.tokens[t]
            if other.tokens[t] == token:
                result.append(abs(text.logprobs[t] - other.logprobs[t]))
                continue
            texts += 1
            least = min(other.top[t].values(), default=-np.inf)
            result.append(abs(text.logprobs[t] - other.top[t].get(token, least)))
            break
        row = np.nan_to_num(result[first:], nan=np.inf)
        worst = max(worst, float(row.sum()) / max(len(row), MIN_ROW_TOKENS))
    values = np.nan_to_num(np.array(result), nan=np.inf)
    if not len(values):
        return Moves(0.0, 0.0, 0.0, texts, rows)
    return Moves(float(values.mean()), float(values.max()), worst, texts, rows)


def isolation(noise: Moves, beside: Moves) -> Verdict:
    """Returns a verdict that passes if rows without an adapter are left alone.

    noise: the moves in a batch with other rows without an adapter. The second argument: the moves in a batch with rows
    with adapters.

    Where rows do not differ at all without adapters, as on a CPU, a single one that is moved is found. Where they do,
    what can be found depends on it: at a noise of 0.02 nats on average one row of four that is moved by 0.2 always is,
    by 0.05 in two cases of three; at 0.05, by 0.2 nearly always.

    >>> isolation(Moves(0.0, 0.0, 0.0, 0, 8), Moves(0.0, 0.0, 0.0, 0, 8)).passed
    True
    >>> isolation(Moves(0.02, 0.1, 0.03, 0, 8), Moves(0.05, 0.6, 0.2, 1, 8)).passed, "one row of eight moves by 0.2"
    (False, 'one row of eight moves by 0.2')
    """
    allowed = NOISE_FACTOR * noise.mean + ISOLATION_NATS
    one_row = WORST_FACTOR * noise.worst + ISOLATION_NATS
    flips = beside.texts > noise.texts and beside.largest > NOISE_FACTOR * noise.largest + ISOLATION_NATS
    detail = (
        f"{beside.texts} of {beside.rows} texts without an adapter differ beside adapters, mean |Δ| {beside.mean:.4f} "
        f"nats, {beside.worst:.4f} in one row (beside rows without one: {noise.texts} of {noise.rows}, "
        f"{noise.mean:.4f}, {noise.worst:.4f})"
    )
    near = beside.mean <= allowed and beside.worst <= one_row
    return Verdict(near and not flips and noise.mean <= MAX_NOISE_NATS, detail)


def agreement(engine: tuple[Floats, Floats], copy: tuple[Floats, Floats], noise: float = 0.0) -> Verdict:
    """Returns a verdict that passes if the engine, with and without an adapter, is the same model as our copy.

    Each pair: log-probabilities of the same tokens, without and with the adapter, float64 [n]. noise: mean |Δ| of the
    engine from itself, of tokens it has generated and computed again as a prompt.

    >>> base, effect = np.full(250, -2.0), np.tile([0.3, -0.3], 125)
    >>> one, other = (base, base + effect), (base, base + 1.2 * effect)
    >>> agreement(one, one).passed, agreement(other, one).passed
    (True, False)
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
