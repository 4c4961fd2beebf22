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

from hemostat.measurement.dependence import NO_CYCLE, Cycle, Dependence, told
from hemostat.measurement.figures import MAX_TOKENS, ends_or_none
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
"""The endings of an output's thinking. ended: by the marker. cut: it did not end, because the length limit cut the
output. stopped: it did not end, though the model ended the output. none: there was no thinking."""
LENGTH_CUT = "length"
"""The finish_reason that vLLM gives an output that the length limit has cut."""


def ending(thinking: Thinking | None, finish_reason: str) -> str:
    """Returns how the thinking ended, one of `ENDINGS`."""
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
    """The number of tokens of thinking, by request that thinks."""
    bounded: RunningMean = field(init=False)
    """The same, for an interval that holds for any number of requests."""
    dependence: Dependence = field(init=False)
    """The dependence of the requests in the length, and in whether the thinking ends."""
    endless: Proportion = field(default_factory=Proportion)
    """The share of the requests that do not end their thinking, of all requests that think."""
    endings: Counter[str] = field(default_factory=Counter)
    """The number of records by ending. All records count."""
    tokens: int = 0
    """The number of tokens of thinking in all records."""

    def __post_init__(self) -> None:
        self.dependence = Dependence(2, self.cycle)
        self.bounded = RunningMean(0.0, float(self.max_tokens))

    def report(self) -> dict[str, Any]:
        v, v_endless = self.dependence.inflations().tolist()
        return {
            "requests": self.endless.requests,
            "endings": {name: self.endings[name] for name in ENDINGS},
            "tokens": interval(self.length, v, 0.0, float(self.max_tokens))
            | {"ci95_finite": ends_or_none(self.bounded.get(), 0.0, float(self.max_tokens))},
            "never_ended": _shown(self.endless.get(inflation=v_endless), v_endless)
            | told(self.endless.requests, v_endless),
        }


class ThinkingFigures:
    """The figures of records whose markers are known. max_tokens: the limit of a request's tokens. cycle: of the
    traffic.
    """

    def __init__(self, max_tokens: int = MAX_TOKENS, cycle: Cycle = NO_CYCLE) -> None:
        self._max_tokens = max_tokens
        self._arms = {str(arm): _Arm(max_tokens, cycle) for arm in Arm}

    def update(
        self, arm: str, thinking: Thinking | None, finish_reason: str, client: bytes = b"", *, fresh: bool
    ) -> None:
        """Adds a scored request. thinking: None if its output has none. client: the digest of whom it is from. fresh:
        it is an observation of its own.
        """
        into = self._arms[arm]
        how = ending(thinking, finish_reason)
        into.endings[how] += 1
        if thinking is None:
            return
        into.tokens += thinking.tokens
        if fresh:
            tokens = float(min(thinking.tokens, self._max_tokens))
            into.length = into.length.update(tokens, 1.0)
            into.dependence.update(np.array([tokens, float(how != ENDED)]), np.ones(2), client)
            into.bounded = into.bounded.update(tokens)
            into.endless = into.endless.update(how != ENDED)

    def forget(self) -> None:
        """Begins the figures of all arms anew. Counts of endings and of tokens go on."""
        for arm, figures in self._arms.items():
            self._arms[arm] = _Arm(self._max_tokens, figures.cycle, endings=figures.endings, tokens=figures.tokens)

    def report(self) -> dict[str, Any]:
        """JSON-ready; arms with a request that thinks, and treated minus control, with the larger v̂ of both arms: its
        intervals hold at every look, and are asymptotic where requests depend on each other."""
        treated, control = self._arms[Arm.TREATED], self._arms[Arm.CONTROL]
        shares = TwoArms(treated.endless.hits, treated.endless.requests, control.endless.hits, control.endless.requests)
        v, v_endless = np.maximum(treated.dependence.inflations(), control.dependence.inflations()).tolist()
        longer = confidence.difference(treated.length, control.length, inflation=v)
        return {
            "arms": {arm: figures.report() for arm, figures in self._arms.items() if sum(figures.endings.values())},
            "treated_minus_control": {
                "never_ended": _shown(shares.get(inflation=v_endless), v_endless),
                "tokens": interval_json(longer, v),
            },
        }

    def samples(self) -> Iterator[Sample]:
        for arm, figures in self._arms.items():
            yield Sample(names.THINKING_TOKENS, (arm,), figures.tokens)
            for name in ENDINGS:
                yield Sample(names.THINKING_REQUESTS, (arm, name), figures.endings[name])


def _shown(bounds: ConfidenceInterval, inflation: float) -> dict[str, Any]:
    """Returns a share, or a difference of shares, for JSON; it is NaN before both arms have a request."""
    return interval_json(bounds, inflation if math.isfinite(bounds.mean) else math.inf)
