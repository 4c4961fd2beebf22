"""The length of a reasoning model's thinking, and how often it does not end, by arm.

A compressed model may think longer than the original, or never write the end marker (vllm-project/llm-compressor#2680).
The unit is the request that is an observation of its own: the first one of its conversation and kind. The lengths are
of what was generated: one that was cut by the length limit counts as long as it is, so that a mean is a lower bound of
where thinking would end.

What is longer than `shadow.max_tokens` is not scored, and not in these figures: a limit below the longest answers hides
the thinking that does not end.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from hemostat.measurement.dependence import NO_CYCLE, Cycle, Dependence
from hemostat.measurement.figures import MAX_TOKENS, ends_or_none, finite
from hemostat.measurement.gains import interval, interval_json
from hemostat.metrics import names
from hemostat.metrics.samples import Sample
from hemostat_calibration.reasoning import Thinking
from hemostat_calibration.records import Arm
from hemostat_calibration.statistics import confidence
from hemostat_calibration.statistics.confidence import ConfidenceInterval, MeanSequence, Proportion
from hemostat_calibration.statistics.running_mean import RunningMean
from hemostat_calibration.statistics.two_arms import TwoArms

ENDED, CUT, STOPPED, NONE = ENDINGS = ("ended", "cut", "stopped", "none")
"""How an output's thinking ended: by the marker; not, because the length limit cut the output; not, though the model
ended the output; there was none."""
LENGTH_CUT = "length"
"""vLLM's finish_reason of an output that the length limit has cut."""


def ending(thinking: Thinking | None, finish_reason: str) -> str:
    """One of `ENDINGS`."""
    if thinking is None:
        return NONE
    if thinking.ended:
        return ENDED
    return CUT if finish_reason == LENGTH_CUT else STOPPED


@dataclass(slots=True)
class _Arm:
    max_tokens: int
    cycle: Cycle
    length: MeanSequence = field(default_factory=MeanSequence)
    """Tokens of thinking, by request that thinks."""
    bounded: RunningMean = field(init=False)
    """The same, for an interval that holds for any number of requests."""
    dependence: Dependence = field(init=False)
    """Of the length."""
    endless: Proportion = field(default_factory=Proportion)
    """Requests that think and do not end it, of those that think."""
    endings: Counter[str] = field(default_factory=Counter)
    """Of all records."""
    tokens: int = 0
    """Of thinking, of all records."""

    def __post_init__(self) -> None:
        self.dependence = Dependence(1, self.cycle)
        self.bounded = RunningMean(0.0, float(self.max_tokens))

    def report(self) -> dict[str, Any]:
        v, endless = self.dependence.inflation(), self.endless.get()
        return {
            "requests": self.endless.requests,
            "endings": {name: self.endings[name] for name in ENDINGS},
            "tokens": interval(self.length, v, 0.0, float(self.max_tokens))
            | {"ci95_finite": ends_or_none(self.bounded.get(), 0.0, float(self.max_tokens))},
            "never_ended": _shown(endless, known=bool(self.endless.requests)),
        }


class ThinkingFigures:
    """Of records whose markers are known. max_tokens: of a request. cycle: of the traffic."""

    def __init__(self, max_tokens: int = MAX_TOKENS, cycle: Cycle = NO_CYCLE) -> None:
        self._max_tokens = max_tokens
        self._arms = {str(arm): _Arm(max_tokens, cycle) for arm in Arm}

    def add(self, arm: str, thinking: Thinking | None, finish_reason: str, *, fresh: bool) -> None:
        """A scored request. thinking: None where its output has none. fresh: it is an observation of its own."""
        into = self._arms[arm]
        how = ending(thinking, finish_reason)
        into.endings[how] += 1
        if thinking is None:
            return
        into.tokens += thinking.tokens
        if fresh:
            tokens = float(min(thinking.tokens, self._max_tokens))
            into.length = into.length.update(tokens, 1.0)
            into.dependence.add(np.array([tokens]), np.ones(1))
            into.bounded = into.bounded.update(tokens)
            into.endless = into.endless.update(how != ENDED)

    def report(self) -> dict[str, Any]:
        """JSON-ready; arms with a request that thinks, and treated minus control: exact for the share (anytime-valid),
        asymptotic for the mean length."""
        treated, control = self._arms[Arm.TREATED], self._arms[Arm.CONTROL]
        shares = TwoArms(treated.endless.hits, treated.endless.requests, control.endless.hits, control.endless.requests)
        both = bool(treated.endless.requests and control.endless.requests)
        v = max(treated.dependence.inflation(), control.dependence.inflation())
        longer = confidence.difference(treated.length, control.length, inflation=v)
        return {
            "arms": {arm: one.report() for arm, one in self._arms.items() if sum(one.endings.values())},
            "treated_minus_control": {
                "never_ended": _shown(shares.get(), known=both),
                "tokens": interval_json(longer, v),
            },
        }

    def samples(self) -> Iterator[Sample]:
        for arm, one in self._arms.items():
            yield Sample(names.THINKING_TOKENS, (arm,), one.tokens)
            for name in ENDINGS:
                yield Sample(names.THINKING_REQUESTS, (arm, name), one.endings[name])


def _shown(found: ConfidenceInterval, *, known: bool) -> dict[str, Any]:
    if not known or math.isnan(found.mean):
        return {"estimate": None, "ci95": [None, None]}
    return {"estimate": finite(found.mean), "ci95": [finite(found.low), finite(found.high)]}
