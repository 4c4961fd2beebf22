"""The excess over the noise floor, where noise is comparable to the effect.

Both models' logits carry rounding noise that is drawn anew in every computation (decoding, prefill, another batch). A
self-comparison therefore holds two draws of it, and the comparison of the two models one of each. The world: a
vocabulary of 64 ids, a compression that costs 0.0048 nats per token without noise, and noise that adds 0.0022 nats to
the comparison and that each model also has against itself. The excess is computed from the records through
`Measurements`, as the status does it.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from tests.bench.guard import Row
from tests.support.records import Truth, log_softmax, make_record

from hemostat.measurement.figures import MODELS
from hemostat.measurement.measurements import Measurements
from hemostat_calibration.statistics.streaming import RatioEstimate

NAME = "excess"
TAKES = "2 minutes on one core"
VOCABULARY, TOKENS = 64, 24
NOISE = 0.0507
"""Standard deviation of a logit's rounding noise: a self-comparison has about 0.0022 nats."""
EFFECT = 0.1075
"""Standard deviation of what compression changes in a logit: 0.0048 nats."""
REQUESTS = 100
NAMES = ("kl_nats", "reverse_kl_nats", "js_nats")


def life(seed: int) -> tuple[dict[str, float], dict[str, dict[str, object]], dict[str, float]]:
    """One run of `REQUESTS` requests: the true divergences without noise, the excess, and the raw figures."""
    rng, measured = np.random.default_rng(seed), Measurements()
    true: dict[str, list[float]] = {name: [] for name in NAMES}
    for _ in range(REQUESTS):
        reference = 2.0 * rng.normal(size=(TOKENS, VOCABULARY))
        compressed = reference + EFFECT * rng.normal(size=reference.shape)

        def noisy(logits: np.ndarray) -> np.ndarray:
            return log_softmax(logits + NOISE * rng.normal(size=logits.shape))

        r, c = log_softmax(reference), log_softmax(compressed)
        middle = np.logaddexp(r, c) - np.log(2.0)
        for name, value in zip(NAMES, (kl(r, c), kl(c, r), 0.5 * (kl(r, middle) + kl(c, middle))), strict=True):
            true[name].append(float(value.mean()))
        decoded = noisy(compressed)
        emitted = np.array([rng.choice(VOCABULARY, p=np.exp(row) / np.exp(row).sum()) for row in decoded])
        measured.update(make_record(Truth(noisy(reference), decoded, emitted), VOCABULARY), None, None)
        for model, logits in zip(MODELS, (compressed, reference), strict=True):
            measured.update_noise_floor(model, make_record(Truth(noisy(logits), noisy(logits), emitted), VOCABULARY))
    raw = measured.summary(None)
    return {n: float(np.mean(v)) for n, v in true.items()}, measured.excess(), {n: raw[n]["estimate"] for n in NAMES}


def kl(p: np.ndarray, q: np.ndarray) -> np.ndarray:
    """KL(p‖q) of rows of log-probabilities."""
    total: np.ndarray = (np.exp(p) * (p - q)).sum(-1)
    return total


def rows(lives: int, seed: int) -> Iterator[Row]:
    """For each figure: what is true, what is told (mean over lives), and what subtracting both floors would tell."""
    result = [life(seed + n) for n in range(max(lives // 10, 5))]
    for name in NAMES:
        true = float(np.mean([run[0][name] for run in result]))
        told = [run[1][name]["estimate"] for run in result]
        floors = [run[2][name] - 2.0 * run[1][name]["floor"] for run in result]
        covered = sum(run[1][name]["ci95"][0] <= run[0][name] <= run[1][name]["ci95"][1] for run in result)
        spread = RatioEstimate()
        for estimate in told:
            spread = spread.update(estimate, 1.0)
        mean = spread.get()
        yield Row(
            f"excess of {name}: {len(result)} runs of {REQUESTS} requests",
            f"true {true:.4f}, told {mean.mean:.4f}; with both floors subtracted whole {np.mean(floors):.4f}; "
            f"true value within the interval in {covered} of {len(result)}",
            "told within 5 % of the true value; within the interval in all",
            abs(mean.mean / true - 1.0) <= 0.05 and covered == len(result),
        )
