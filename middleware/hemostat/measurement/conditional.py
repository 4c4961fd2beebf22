"""Figures of requests whose tokens a grammar restricts: conditional on the allowed ids, and apart from all others.

Where a grammar leaves few ids, both models agree for that reason alone, so that these figures say nothing of the
others' and are never added to them. They are exact wherever every allowed id is listed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from hemostat.measurement.by_kind import CONDITIONAL_METRICS, ByKind
from hemostat.measurement.dependence import NO_CYCLE, Cycle
from hemostat.measurement.figures import HEADLINE, RequestFigures, StageFigures
from hemostat.metrics import names
from hemostat.metrics.samples import Sample
from hemostat_calibration.divergence.gain import Gain, gain
from hemostat_calibration.divergence.per_token import TokenDivergence, calibrated
from hemostat_calibration.profiles.profile import CalibrationProfile
from hemostat_calibration.records import Arm, TokenRecord


class ConditionalFigures:
    """The conditional figures. cycle: of the traffic."""

    def __init__(self, cycle: Cycle = NO_CYCLE) -> None:
        self._cycle = cycle
        self._raw = StageFigures(cycle=cycle)
        self.by_kind = ByKind(CONDITIONAL_METRICS, cycle)
        self._tokens = {(str(arm), share): 0 for arm in Arm for share in ("exact", "bounds")}

    @property
    def tokens(self) -> int:
        """The number of scored tokens."""
        return sum(self._tokens.values())

    def update(
        self,
        record: TokenRecord,
        profile: CalibrationProfile | None,
        served: CalibrationProfile | None,
        *,
        held_out: bool,
        figures: TokenDivergence,
        fresh: bool,
        gain_of: Callable[[CalibrationProfile], Gain] | None = None,
        weight: float = 1.0,
    ) -> None:
        """Adds one constrained record; as `Measurements.update`."""
        if profile is not None and profile.changes_weights:
            profile = None
        own = record.adapter is None
        after = figures if profile is None or not own else calibrated(record, profile, served)
        gained = None
        if profile is not None and own and held_out:
            gained = gain(record, profile) if gain_of is None else gain_of(profile)
        raw = RequestFigures(figures)
        served_figures = raw if record.applied is None or after is figures else RequestFigures(after)
        interval = figures.bounds.kl_rc
        exact = int((interval.lower == interval.upper).sum())
        self._tokens[str(record.arm), "exact"] += exact
        self._tokens[str(record.arm), "bounds"] += record.tokens - exact
        self.by_kind.update_totals(record, served_figures.tokens)
        if fresh:
            if own:
                self._raw.update(raw.sums, record.client, weight)
            self.by_kind.update(record, raw if own else None, served_figures, profile, gained, weight)

    def forget(self) -> None:
        """Begins the figures anew. Counts of tokens go on."""
        self._raw = StageFigures(cycle=self._cycle)
        self.by_kind.forget()

    def report(self) -> dict[str, Any]:
        """Returns the figures, JSON-ready. `exact_tokens_share`: the share of the tokens whose divergence is known
        exactly, None without any token.
        """
        exact = sum(tokens for (_, share), tokens in self._tokens.items() if share == "exact")
        return {
            "conditional_on": "grammar",
            "exact_tokens_share": exact / self.tokens if self.tokens else None,
            "raw": self._raw.summary(),
            "kinds": self.by_kind.report(),
        }

    def samples(self) -> Iterator[Sample]:
        for name in HEADLINE:
            figure = self._raw.figure(name)
            for edge, value in zip(("mean", "low", "high"), (figure["estimate"], *figure["ci95"]), strict=True):
                if value is not None and np.isfinite(value):
                    yield Sample(names.CONDITIONAL_DIVERGENCE, (name, edge), value)
        yield from self.by_kind.samples()
