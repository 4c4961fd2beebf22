"""Power laws through measured points, and what follows for a model that no machine here holds."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from hemostat_calibration.statistics.streaming import student_975


@dataclass(frozen=True, slots=True)
class Law:
    """y = factor · x ** exponent, by least squares of logarithms. half_width: of the exponent, 95 %, from how far the
    points are from the line; infinite for two points."""

    factor: float
    exponent: float
    half_width: float

    @classmethod
    def through(cls, xs: Sequence[float], ys: Sequence[float]) -> Law:
        """
        >>> found = Law.through([1, 2, 4], [3, 12, 48])
        >>> round(found.factor, 6), round(found.exponent, 6)
        (3.0, 2.0)
        """
        x, y = np.log(xs), np.log(ys)
        slope = float(((x - x.mean()) * (y - y.mean())).sum() / ((x - x.mean()) ** 2).sum())
        left = y - y.mean() - slope * (x - x.mean())
        free = len(xs) - 2
        error = math.sqrt(float((left**2).sum()) / free / float(((x - x.mean()) ** 2).sum())) if free else math.inf
        return cls(math.exp(float(y.mean()) - slope * float(x.mean())), slope, student_975(max(free, 1)) * error)

    def at(self, x: float) -> float:
        return float(self.factor * x**self.exponent)


@dataclass(frozen=True, slots=True)
class Assumed:
    """What the computed figures take for given. Nothing of it was measured."""

    parameters: float = 70e9
    layers: int = 80
    width: int = 8192
    linears_by_layer: int = 7
    peak_flops: float = 989e12
    """Of an H100 in bfloat16, without sparsity, by its data sheet."""
    utilization: float = 0.4
    requests_per_second: float = 10.0
    prompt_tokens: int = 1000
    output_tokens: int = 250
    share: float = 0.01
    adapter_tokens: int = 100_000

    def gpu_seconds(self, flops: float) -> float:
        return flops / (self.peak_flops * self.utilization)


def computed(given: Assumed, solve: Law) -> Mapping[str, float]:
    """solve: CPU seconds of one correction by the layer's width. A forward pass takes 2 operations for each parameter
    and token, a backward pass 4; an adapter takes both models forwards and the reference backwards."""
    tokens = given.share * given.requests_per_second * 86_400 * (given.prompt_tokens + given.output_tokens)
    return {
        "scored tokens a day, prompts included": tokens,
        "GPU seconds a day to measure": given.gpu_seconds(2 * given.parameters * tokens),
        "GPU seconds for the statistics of an adapter": given.gpu_seconds(8 * given.parameters * given.adapter_tokens),
        "CPU seconds for the corrections of an adapter": given.layers * given.linears_by_layer * solve.at(given.width),
    }
