"""Figures of the served models that are compared with their reference, but that profiles are not for.

Headline figures, the noise floor and the alarm are of the calibrated model: a mean over two models describes neither.
"""

from __future__ import annotations

from collections import OrderedDict
from typing import Any

from hemostat.measurement.dependence import NO_CYCLE, Cycle
from hemostat.measurement.figures import MAX_TOKENS
from hemostat.measurement.measurements import Measurements
from hemostat_calibration.divergence.per_token import TokenDivergence
from hemostat_calibration.records import TokenRecord

MAX_MODELS = 16
"""The largest number of models with figures; the one that was not seen for the longest time is dropped."""


class OtherModels:
    """Owns the measurements of each model, in bounded memory. max_tokens: of a request. cycle: of the
    traffic."""

    def __init__(self, max_tokens: int = MAX_TOKENS, cycle: Cycle = NO_CYCLE) -> None:
        self._max_tokens = max_tokens
        self._cycle = cycle
        self._of: OrderedDict[str, Measurements] = OrderedDict()

    def update(self, model: str, record: TokenRecord, figures: TokenDivergence, *, fresh: bool) -> None:
        """Adds a record of a whole output of the model, with its raw figures. fresh: see `Measurements.update`."""
        result = self._measurements(model)
        if not record.constraint:
            result.update(record, None, None, figures=figures, fresh=fresh)
            return
        # Its kind may be one that is not followed; see the bound of `ByKind`.
        result.conditional.update(record, None, None, held_out=False, figures=figures, fresh=fresh)

    def update_noise_floor(self, model: str, side: str, record: TokenRecord) -> None:
        """Adds a record of the model with `side`, of `figures.MODELS`, on both sides."""
        self._measurements(model).update_noise_floor(side, record)

    def report(self, model: str) -> dict[str, Any]:
        """Returns for JSON the raw figures, the noise floor, the excess over it, and what is conditional on a
        grammar."""
        result = self._of.get(model) or Measurements(self._max_tokens, self._cycle)
        return {
            "raw": result.summary(None),
            "noise_floor": result.noise_floor(),
            "excess": result.excess(),
            "conditional": result.conditional.report(),
        }

    def forget(self, model: str) -> None:
        """Forgets what was measured of the model, because it, or its reference, is another one now."""
        self._of.pop(model, None)

    def _measurements(self, model: str) -> Measurements:
        result = self._of.pop(model, None) or Measurements(self._max_tokens, self._cycle)
        self._of[model] = result
        while len(self._of) > MAX_MODELS:
            self._of.popitem(last=False)
        return result
