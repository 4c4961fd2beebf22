"""The basis in which maps are learned: half a squared length in it is KL divergence, to second order."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from hemostat_calibration.arrays import Floats, Ids, Indices, Singles
from hemostat_calibration.learning.contextual import hidden_states
from hemostat_calibration.learning.contextual.rows import TokenRows

METRIC_ROWS = 1024
"""The number of hidden states that the metric is averaged over."""
PRIOR_ROWS = 8
"""The number of hidden states that the prior is estimated from, times d."""


@dataclass(frozen=True, slots=True, eq=False)
class Basis:
    """The basis of maps. With the metric F = L Lᵀ (`hidden_states.fisher_metric`), hidden states are Lᵀ h here (see
    `objective`).

    embedding: float32 [V, d], (W − w̄) L⁻ᵀ.
    root: float64 [d, d], L.
    offset, gain: float64 [d] and [d, N], Lᵀ E[h_c | z] = offset + gain z.
    reads: float64 [min(A, d) + 1, A + 1]. Times x̃ = [x; 1] it gives the inputs that maps are learned from: the same
        estimate from the logits that the map reads (rotated into as many numbers where these are fewer than d), and 1.
        In these inputs a length is a difference that matters, so that one penalty fits all directions.
    mean: float64 [V], the reference's mean distribution. likeliest: ids by it, likeliest first, [V].
    """

    embedding: Singles
    root: Floats
    offset: Floats
    gain: Floats
    reads: Floats
    mean: Floats
    likeliest: Indices


def make_basis(
    weight: Singles, anchors: Ids, features: int, sample: Singles, prior: hidden_states.HiddenStatePrior
) -> Basis:
    """Returns the basis. weight: W, [V, d]. anchors: [N]; a map reads the first `features`. sample: hidden states [n,
    d].
    """
    metric, mean = hidden_states.fisher_metric(weight, sample[evenly_spread(np.arange(len(sample)), METRIC_ROWS)])
    root = np.asarray(np.linalg.cholesky(metric), dtype=np.float64)
    offset, gain = hidden_states.linear_recovery(weight[anchors], prior)
    turn = np.linalg.inv(root).T.astype(np.float32)
    embedding = weight @ turn
    embedding -= (mean @ weight).astype(np.float32) @ turn
    constant, by_x = (root.T @ a for a in hidden_states.linear_recovery(weight[anchors[:features]], prior))
    # x is centred over all anchors, which the first ones need not be.
    by_x -= by_x.mean(axis=1, keepdims=True)
    if features < len(root):
        # Fewer features than the hidden state has dimensions: rotated into as many numbers; lengths stay.
        rotated, by_x = np.linalg.qr(by_x)
        constant = rotated.T @ constant
    reads = np.zeros((len(by_x) + 1, features + 1))
    reads[:-1, :-1], reads[:-1, -1], reads[-1, -1] = by_x, constant, 1.0
    return Basis(embedding, root, root.T @ offset, root.T @ gain, reads, mean, np.argsort(-mean))


def hidden_sample(rows: Sequence[TokenRows], width: int) -> Singles | None:
    """Returns some of the reference's hidden states, spread over the rows, float32 [n, d]; None if there are
    none."""
    with_hidden = [r.hidden for r in rows if r.hidden is not None]
    if not with_hidden:
        return None
    total = sum(map(len, with_hidden))
    step = max(1, total // (PRIOR_ROWS * width))
    return np.concatenate(with_hidden)[::step].astype(np.float32)


def evenly_spread(indices: Indices, max_count: int) -> Indices:
    """Returns at most `max_count` of the indices, evenly spread over them.

    >>> evenly_spread(np.arange(10), 4).tolist()
    [0, 3, 6, 9]
    """
    if len(indices) <= max_count:
        return indices
    return indices[np.linspace(0, len(indices) - 1, max_count).astype(np.int64)]
