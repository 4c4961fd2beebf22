"""What has been measured of each point so far, and its figures with intervals by request. Numpy."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from hemostat_calibration.divergence.trajectory import Survival
from hemostat_calibration.statistics.streaming import student_975
from hemostat_calibration.thresholds.curve import Curve
from hemostat_lab.doctor.estimates import Estimate
from hemostat_lab.doctor.pair import FLOOR, Scored, json_number
from hemostat_lab.doctor.report import Tokens
from hemostat_lab.doctor.sweep.outcomes import Outcome
from hemostat_lab.doctor.sweep.points import PLAIN, UNCHANGED, Line, Point


@dataclass(slots=True)
class Results:
    """texts: of a point, by the prompt's index. outcomes: by the task's number."""

    texts: dict[Point, dict[int, Scored]] = field(default_factory=dict)
    outcomes: dict[Point, dict[int, Outcome]] = field(default_factory=dict)

    def add(self, point: Point, texts: Sequence[Scored], outcomes: Sequence[Outcome]) -> None:
        self.texts.setdefault(point, {}).update({text.index: text for text in texts})
        self.outcomes.setdefault(point, {}).update({outcome.task: outcome for outcome in outcomes})

    @staticmethod
    def comparable(point: Point, texts: Sequence[Scored]) -> bool:
        """False where logits overflowed. A cut of the distribution alone makes KL infinite, but not TV unknown."""
        whole = [text.figures[name] for text in texts for name in ("kl_rc", "kl_cr") if point.drawing == PLAIN]
        return bool(np.isfinite(np.concatenate([*whole, *(text.figures["tv"] for text in texts)])).all())

    def measured(self, points: Sequence[Point]) -> list[Point]:
        """Those with at least two texts, which an interval needs."""
        return [point for point in points if len(self.texts.get(point, ())) > 1]

    def curve(self, line: Line) -> tuple[Curve, list[Point]] | None:
        """KL(r‖c) by setting, the noise floor at 0; None with fewer than two points of the line."""
        result = [(x, p) for x, p in zip(line.settings, line.points, strict=True) if self.measured([p])]
        if len(result) < 2:
            return None
        points = [point for _, point in result]
        return self._curve([0.0, *(x for x, _ in result)], [self.floor(), *map(self.divergence, points)]), points

    def excess(self, line: Line, points: Sequence[Point], level: float = 0.0) -> Curve:
        """KL(r‖c) above the noise floor of the same text and `level` nats per token."""
        settings, floor = dict(zip(line.points, line.settings, strict=True)), self.floor()
        least = {index: floor[index] + level * len(text.output) for index, text in self.texts[UNCHANGED].items()}
        above = [{n: value - least[n] for n, value in self.divergence(point).items()} for point in points]
        return self._curve([settings[point] for point in points], above)

    def alone(self, point: Point) -> Curve:
        """The point's KL(r‖c) as a curve of one setting, over all requests."""
        return self._curve([0.0], [self.divergence(point)])

    def divergence(self, point: Point) -> dict[int, float]:
        """Sum of KL(r‖c) over a text's tokens, by prompt."""
        return {index: float(text.figures["kl_rc"].sum()) for index, text in self.texts[point].items()}

    def floor(self) -> dict[int, float]:
        """Sum of the noise floor, by prompt; 0 where it could not be measured."""
        return {index: float(np.nan_to_num(text.figures[FLOOR]).sum()) for index, text in self.texts[UNCHANGED].items()}

    def mean_floor(self) -> float | None:
        """Per token; None where it could not be measured."""
        values = np.concatenate([text.figures[FLOOR] for text in self.texts[UNCHANGED].values()])
        return json_number(values.mean())

    def _curve(self, settings: Sequence[float], sums: Sequence[Mapping[int, float]]) -> Curve:
        texts = self.texts[UNCHANGED]
        order = sorted(texts)
        values = [[by_text.get(index, math.nan) for index in order] for by_text in sums]
        tokens = [float(len(texts[index].output)) for index in order]
        return Curve(np.array(settings), np.array(values), np.array(tokens))


def figures(texts: Sequence[Scored]) -> dict[str, Any]:
    """The figures of a point, each {"value", "low", "high"} with a 95 % interval by request; null: infinite."""
    tokens = Tokens.of(texts)
    sample, values = tokens.sample, tokens.figures
    with np.errstate(invalid="ignore"):  # a text that neither of two cut distributions can give
        ratio = sample.mean(values["logp_r"] - values["logp_c"])
    survival = Survival()
    for text in texts:
        survival = survival.update(np.clip(1.0 - text.figures["tv"], 0.0, 1.0))
    curve = survival.get()
    logarithm = _interval(ratio, len(texts))
    return {
        "requests": len(texts),
        "tokens": len(tokens.ids),
        "kl_rc": _kl(tokens, "kl_rc"),
        "kl_cr": _kl(tokens, "kl_cr"),
        "unbounded_share": float(np.mean(np.isinf(values["kl_rc"]))),
        "tv": _within(_interval(sample.mean(values["tv"]), len(texts)), 1.0),
        "same_top": _within(_interval(sample.mean(values["same_top"]), len(texts)), 1.0),
        "perplexity_ratio": {name: _exp(value) for name, value in logarithm.items()},
        "half_life": {
            "value": json_number(curve.half_life),
            "low": json_number(curve.half_life_low),
            "high": json_number(curve.half_life_high),
            "above": int(curve.positions[-1]),
        },
    }


def kl_rc(texts: Sequence[Scored]) -> dict[str, float | None]:
    """The figure `kl_rc` alone."""
    return _kl(Tokens.of(texts), "kl_rc")


def kl_interval(texts: Sequence[Scored]) -> tuple[float, float]:
    """Ends of the interval of KL(r‖c); infinite where they are not known."""
    interval = kl_rc(texts)
    low, high = interval["low"], interval["high"]
    return (0.0 if low is None else low, math.inf if high is None else high)


def outcomes(answers: Sequence[Outcome]) -> dict[str, Any]:
    """Shares of responses with Wilson's 95 % interval: JSON that parses, JSON with the right fields, right answers."""
    json = [outcome for outcome in answers if outcome.parses is not None]
    short = [outcome for outcome in answers if outcome.parses is None]
    return {
        "json_parses": share([bool(outcome.parses) for outcome in json]),
        "json_correct": share([outcome.correct for outcome in json]),
        "short_correct": share([outcome.correct for outcome in short]),
    }


def share(successes: Sequence[bool]) -> dict[str, Any]:
    """Wilson's interval (1927)."""
    n = len(successes)
    if not n:
        return {"value": None, "low": None, "high": None, "count": 0, "of": 0}
    p, z = sum(successes) / n, 1.959963984540054
    middle, half = (p + z * z / (2 * n)), z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    scale = 1 + z * z / n
    return {
        "value": p,
        "low": max((middle - half) / scale, 0.0),
        "high": min((middle + half) / scale, 1.0),
        "count": sum(successes),
        "of": n,
    }


def _kl(tokens: Tokens, name: str) -> dict[str, float | None]:
    return _within(_interval(tokens.sample.mean(tokens.figures[name]), tokens.sample.requests), math.inf)


def _interval(estimate: Estimate, requests: int) -> dict[str, float | None]:
    half = student_975(requests - 1) * estimate.by_request if requests > 1 else math.nan
    return {
        "value": json_number(estimate.value),
        "low": json_number(estimate.value - half),
        "high": json_number(estimate.value + half),
    }


def _within(interval: dict[str, float | None], most: float) -> dict[str, float | None]:
    """Cut off where the figure cannot be: below 0 and above `most`."""
    return {name: None if value is None else min(max(value, 0.0), most) for name, value in interval.items()}


def _exp(value: float | None) -> float | None:
    return None if value is None or value > 700.0 else math.exp(value)
