"""The figure of the change test: how much the logits of both models differ at a token."""

from __future__ import annotations

import numpy as np

from hemostat_calibration.arrays import Floats
from hemostat_calibration.records import TokenRecord


def spread(record: TokenRecord) -> Floats:
    """Returns the standard deviation of log c − log r over the ids that both models gave, float64 [T] nats. It is NaN
    if they share fewer than 3.

    A constant added to all logits cancels out, so the standard deviation of the difference of the logits is the same.

    >>> from hemostat_calibration.records import Candidates
    >>> ids, log_c, log_r = np.array([[0, 1, 2]], np.int32), np.log([[0.7, 0.2, 0.1]]), np.log([[0.5, 0.4, 0.1]])
    >>> record = TokenRecord(
    ...     3, b"", ids[0, :1], Candidates(ids, log_c), log_r, Candidates(ids, log_r), log_c[:, 0], log_r[:, 0]
    ... )
    >>> spread(record).round(6).tolist()
    [0.525005]
    """
    with np.errstate(invalid="ignore"):
        difference = record.compressed.logprobs - record.reference_at
    return spread_of_differences(np.where(record.compressed.ids >= 0, difference, np.nan))


def spread_of_differences(difference: Floats) -> Floats:
    """Returns `spread` from the differences log c − log r, float64 [T, K] nats; NaN or infinite where either is not
    known.

    >>> spread_of_differences(np.array([[0.0, 1.0, 2.0], [0.0, 1.0, np.nan]])).tolist()
    [1.0, nan]
    """
    known = np.isfinite(difference)
    count = known.sum(axis=1)
    values = np.where(known, difference, 0.0)
    mean = values.sum(axis=1) / np.maximum(count, 1)
    square = np.where(known, (values - mean[:, None]) ** 2, 0.0).sum(axis=1)
    result: Floats = np.where(count >= 3, np.sqrt(square / np.maximum(count - 1, 1)), np.nan)
    return result
