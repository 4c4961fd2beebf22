"""A scored record around a token record, for whoever reads little of it."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import numpy.typing as npt
from tests.support.captures import sized_capture

from hemostat.scored_record import ScoredRecord, Use
from hemostat_calibration.records import TokenRecord


def evidence(
    record: TokenRecord, *, fresh: bool = True, divergences: npt.ArrayLike = (), held_out: bool = False
) -> ScoredRecord:
    """divergences: of the compressed model itself, nats by token; by default none is known."""
    figures: Any = SimpleNamespace(kl_rc=np.asarray(divergences, np.float64))
    capture = sized_capture(record.request_id)
    return ScoredRecord(record, capture, None, Use.FIGURES | Use.PROFILES, fresh, held_out, None, None, figures)
