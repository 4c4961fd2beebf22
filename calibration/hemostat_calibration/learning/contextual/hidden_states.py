"""Hidden states behind logits: z = W h, h the last hidden state after the final norm, W [V, d] the output embedding.

Logits are known up to a constant of the row (log-probabilities have lost it), so that everything here is centred over
the ids at hand.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from hemostat_calibration.arrays import Floats, Singles

METRIC_MASS = 0.999
"""The part of the mean distribution whose ids the Fisher metric sums over.

The ids left out are most of the vocabulary and hardly change the metric."""
_MIN_EIGENVALUE = 1e-12
"""The lower limit of the mean eigenvalue of a metric."""
_CHUNK = 1 << 24
"""The number of elements of a temporary array."""


@dataclass(frozen=True, slots=True, eq=False)
class HiddenStatePrior:
    """Normal distribution of hidden states before a row is seen. mean: float64 [d]; covariance: [d, d].

    noise: standard deviation of a logit as it is read, nats: engines compute it in bfloat16 and report it in float16.
    """

    mean: Floats
    covariance: Floats
    noise: float


def estimate_prior(hidden: Singles, noise: float) -> HiddenStatePrior:
    """Returns the mean and covariance of hidden states [n, d], shrunk a little towards isotropy, as n may be less than
    d.

    noise: standard deviation of a logit as it is read, nats.

    >>> estimate_prior(np.array([[1.0, 0.0], [3.0, 0.0]], np.float32), noise=0.01).mean.tolist()
    [2.0, 0.0]
    """
    rows = hidden.astype(np.float64)
    mean = rows.mean(axis=0)
    rows -= mean
    n, d = rows.shape
    covariance = rows.T @ rows / n
    shrink = d / (n + d)
    sphere = np.trace(covariance) / d
    return HiddenStatePrior(mean, (1.0 - 0.5 * shrink) * covariance + 0.5 * shrink * sphere * np.eye(d), noise)


def isotropic_prior(weight: Singles, noise: float) -> HiddenStatePrior:
    """Returns the prior where no hidden state has been seen: isotropic, such that logits spread by about 5 nats.

    >>> isotropic_prior(np.eye(2, dtype=np.float32), noise=0.01).covariance.tolist()
    [[25.0, 0.0], [0.0, 25.0]]
    """
    size = float(np.square(weight[: 1 << 14]).sum(axis=1).mean())
    d = weight.shape[1]
    return HiddenStatePrior(np.zeros(d), np.eye(d) * (25.0 / max(size, 1e-12)), noise)


def linear_recovery(weight: Singles, prior: HiddenStatePrior) -> tuple[Floats, Floats]:
    """Returns a [d] and K [d, N] with E[h | z] = a + K z for logits z at the ids of `weight` [N, d], centred over them.

    Gaussian conditioning: h = μ + Σ W̄ᵀ (W̄ Σ W̄ᵀ + σ²)⁻¹ (z − W̄ μ), W̄ the centred rows.

    >>> weight = np.array([[1.0, 0.0], [0.0, 1.0], [-1.0, -1.0]], np.float32)
    >>> a, k = linear_recovery(weight, isotropic_prior(weight, noise=1e-3))
    >>> (a + k @ (weight @ np.array([0.5, -0.25]))).round(3).tolist()
    [0.5, -0.25]
    """
    rows = weight.astype(np.float64)
    rows -= rows.mean(axis=0)
    cross = rows @ prior.covariance
    spread = cross @ rows.T + prior.noise**2 * np.eye(len(rows))
    gain = np.asarray(np.linalg.solve(spread, cross).T, dtype=np.float64)
    return prior.mean - gain @ (rows @ prior.mean), gain


def fisher_metric(weight: Singles, hidden: Singles, damping: float = 1e-3) -> tuple[Floats, Floats]:
    """Returns F [d, d] and r̄ [V]: E_r[Wᵀ (diag r − r rᵀ) W] and r = softmax(W h), averaged over hidden states [n, d].

    Half the squared length of a change of h in F is the KL divergence that it causes, to second order, nats. n of 512
    to 1500 suffices. damping: part of the mean eigenvalue that is added to all of them, so that directions that hardly
    matter are not made up. F is positive definite.

    >>> weight = np.array([[1.0], [-1.0]], np.float32)
    >>> metric, mean = fisher_metric(weight, np.zeros((4, 1), np.float32), damping=0.0)
    >>> metric.round(6).tolist(), mean.tolist()
    ([[1.0]], [0.5, 0.5])
    """
    mean = np.zeros(len(weight))
    moments = np.zeros((weight.shape[1], weight.shape[1]))
    step = max(1, _CHUNK // len(weight))
    for start in range(0, len(hidden), step):
        p = softmax(hidden[start : start + step] @ weight.T)
        mean += p.sum(axis=0, dtype=np.float64)
        embedded = (p @ weight).astype(np.float64)
        moments += embedded.T @ embedded
    mean /= len(hidden)
    likeliest = np.argsort(-mean)
    kept = likeliest[: int(np.searchsorted(np.cumsum(mean[likeliest]), METRIC_MASS)) + 1]
    metric = np.zeros_like(moments)
    for start in range(0, len(kept), 1 << 14):
        part = weight[kept[start : start + (1 << 14)]]
        metric += (part * mean[kept[start : start + (1 << 14)], None].astype(np.float32)).T @ part
    # The ids left out are represented by their share. Where all rows are nearly the same, rounding may leave a negative
    # eigenvalue.
    metric = metric / mean[kept].sum() - moments / len(hidden)
    metric = 0.5 * (metric + metric.T)
    least = damping * max(float(np.trace(metric)) / len(metric), _MIN_EIGENVALUE)
    metric += least * np.eye(len(metric))
    try:
        np.linalg.cholesky(metric)
    except np.linalg.LinAlgError:
        values, vectors = np.linalg.eigh(metric)
        metric = (vectors * np.maximum(values, least)) @ vectors.T
    return metric, mean


def softmax(logits: Singles) -> Singles:
    """Computes the softmax in place over the last axis, and returns its argument.

    >>> softmax(np.zeros((1, 2), np.float32)).tolist()
    [[0.5, 0.5]]
    """
    logits -= logits.max(axis=-1, keepdims=True)
    np.exp(logits, out=logits)
    logits /= logits.sum(axis=-1, keepdims=True)
    return logits
