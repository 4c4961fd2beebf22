"""Streams of requests on which intervals of means per token were found to cover too rarely, and two that drift.

Each world gives, for `streams` independent streams of `requests` requests: x and n, the sum of a figure between 0 and
RANGE over a request's tokens and their number, and the conditional means of x, n and x/n given the past; each [S, T].
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

RANGE = 20.0
"""Nats at which a token's KL is clipped."""
MAX_TOKENS = 4096
"""Default of `shadow.max_tokens`."""
LONG = 4000

Streams = tuple[Any, Any, Any, Any, Any]
World = Callable[[np.random.Generator, int, int], Streams]


def _lengths(rng: np.random.Generator, shape: tuple[int, int]) -> tuple[Any, float]:
    return rng.integers(40, 201, shape).astype(np.float64), 120.0


def pareto(rng: np.random.Generator, streams: int, requests: int) -> Streams:
    """A request's mean divergence is Pareto 1.5 from 0.05 on, clipped at RANGE."""
    shape = (streams, requests)
    n, mean_n = _lengths(rng, shape)
    least, power = 0.05, 1.5
    value = np.minimum(least * (1.0 + rng.pareto(power, shape)), RANGE)
    # E[min(X, c)] = ∫ P(X > u) du up to c.
    mean = least + least / (power - 1.0) * (1.0 - (RANGE / least) ** (1.0 - power))
    return value * n, n, np.full(shape, mean * mean_n), np.full(shape, mean_n), np.full(shape, mean)


def correlated(rng: np.random.Generator, streams: int, requests: int) -> Streams:
    """Length and divergence are both log-normal with one common factor: the long requests are the bad ones."""
    shape = (streams, requests)
    n, x = _correlated(rng, shape)
    many_n, many_x = _correlated(np.random.default_rng(7), (4000, 1000))
    means = (many_x.mean(), many_n.mean(), (many_x / many_n).mean())
    return x, n, *(np.full(shape, mean) for mean in means)


def _correlated(rng: np.random.Generator, shape: tuple[int, int]) -> tuple[Any, Any]:
    z = rng.standard_normal(shape)
    n = np.clip(np.round(40.0 * np.exp(1.2 * z)), 1, LONG)
    return n, np.minimum(0.05 * np.exp(1.2 * z), RANGE) * n


def rare_long(rng: np.random.Generator, streams: int, requests: int) -> Streams:
    """0.5 % of requests have 4,000 tokens at 1 nat, the others one token at 0.05."""
    shape = (streams, requests)
    long = rng.random(shape) < 0.005
    n = np.where(long, float(LONG), 1.0)
    x = np.where(long, 1.0 * LONG, 0.05)
    means = (0.005 * LONG + 0.995 * 0.05, 0.005 * LONG + 0.995, 0.005 * 1.0 + 0.995 * 0.05)
    return x, n, *(np.full(shape, mean) for mean in means)


def bursts(rng: np.random.Generator, streams: int, requests: int) -> Streams:
    """0.1 % of requests diverge by 10 nats at every token, the others by 0.05 on average."""
    shape = (streams, requests)
    n, mean_n = _lengths(rng, shape)
    value = np.where(rng.random(shape) < 0.001, 10.0, 0.1 * rng.random(shape))
    mean = 0.001 * 10.0 + 0.999 * 0.05
    return value * n, n, np.full(shape, mean * mean_n), np.full(shape, mean_n), np.full(shape, mean)


def drift(rng: np.random.Generator, streams: int, requests: int) -> Streams:
    """The mean divergence rises evenly from 0.05 to 0.5, the mean length falls from 160 to 80."""
    share = np.linspace(0.0, 1.0, requests)
    return _moving(rng, streams, 0.05 + 0.45 * share, 160.0 - 80.0 * share)


def steps(rng: np.random.Generator, streams: int, requests: int) -> Streams:
    """Mean divergence and length change every 100 requests, between 0.05 and 0.6, 120 and 60."""
    odd = (np.arange(requests) // 100) % 2
    return _moving(rng, streams, np.where(odd, 0.6, 0.05), np.where(odd, 60.0, 120.0))


def _moving(rng: np.random.Generator, streams: int, mean: Any, mean_n: Any) -> Streams:
    shape = (streams, len(mean))
    n = np.clip(rng.poisson(mean_n, shape), 1, LONG).astype(np.float64)
    x = mean * rng.gamma(2.0, 0.5, shape) * n
    return np.minimum(x, RANGE * n), n, *(np.broadcast_to(array, shape) for array in (mean * mean_n, mean_n, mean))


WORLDS: dict[str, World] = {
    "Pareto 1.5 by request, clipped at 20": pareto,
    "length correlated with divergence": correlated,
    "0.5 % with 4,000 tokens among ones of 1": rare_long,
    "0.1 % bursts of 10 nats": bursts,
    "drift": drift,
    "steps": steps,
}


def truth(mean_x: Any, mean_n: Any) -> Any:
    """After every request: Σ E[x]/Σ E[n], the ratio by token, [S, T]."""
    return mean_x.cumsum(-1) / mean_n.cumsum(-1)


def running(x: Any, n: Any, looks: Any) -> tuple[Any, ...]:
    """What `confidence.reach` wants at some looks (counts from 1): t, mean x, mean n, second moments, third ones."""
    at = looks - 1
    sums = [part.cumsum(-1)[:, at] for part in (x, n, x**2, x * n, n**2)]
    mean_x, mean_n = sums[0] / looks, sums[1] / looks
    xx, xn, nn = sums[2] - looks * mean_x**2, sums[3] - looks * mean_x * mean_n, sums[4] - looks * mean_n**2
    cubes = [part.cumsum(-1)[:, at] for part in (x**3, x**2 * n, x * n**2, n**3)]
    return looks, mean_x, mean_n, xx, xn, nn, cubes
