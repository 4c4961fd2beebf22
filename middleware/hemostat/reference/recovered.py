"""Computes how far the reference is from the compressed model's recovered distribution, over the full vocabulary. It
uses torch and does no IO.

See `hemostat_calibration.state_recovery`.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import numpy.typing as npt
import torch

from hemostat_calibration.arrays import Floats, Ids
from hemostat_calibration.records import RecoveredDivergence
from hemostat_calibration.state_recovery import StateRecovery, observed_error, recover_states

BLOCK_ELEMENTS = 1 << 24
"""The number of elements of the output embedding that are converted to float32 at a time."""


class CompressedSide:
    """Owns what is computed once for a set of anchors: how hidden states follow from their logits, and how exactly."""

    def __init__(self, weight: torch.Tensor, anchors: Ids) -> None:
        """weight: W, [V, d]; logits are W h. anchors: [N].

        The first use costs V d² multiplications. Raises ValueError if an anchor is not in the vocabulary.
        """
        if not len(anchors) or int(anchors.min()) < 0 or int(anchors.max()) >= weight.shape[0]:
            raise ValueError(f"the anchors are not all in the reference's vocabulary of {weight.shape[0]}")
        self._weight = weight
        ids = torch.from_numpy(anchors.astype(np.int64)).to(weight.device)
        self._recovery = recover_states(weight[ids].float().cpu().numpy())
        self._variances = _variances(weight, self._recovery)

    def _product(self, states: torch.Tensor) -> torch.Tensor:
        # In float32, a block after the other: the rounding of a bfloat16 product would count as a distance.
        blocks = self._weight.split(max(1, BLOCK_ELEMENTS // self._weight.shape[1]))
        return torch.cat([states @ rows.float().T for rows in blocks], dim=-1)

    def of(self, features: npt.NDArray[np.float32], ids: Ids, logprobs: Floats) -> Comparison:
        """Returns the comparison for one request. features: [T, N]. ids, logprobs: [T, K], the compressed side's
        candidates.
        """
        states = torch.from_numpy(self._recovery.states(features)).to(self._weight.device)
        return Comparison(states, self._product, self._variances, ids, logprobs)


class Comparison:
    """Collects the figures of one request, some positions at a time."""

    def __init__(
        self,
        states: torch.Tensor,
        logits: Callable[[torch.Tensor], torch.Tensor],
        variances: torch.Tensor,
        ids: Ids,
        logprobs: Floats,
    ) -> None:
        self._states, self._logits, self._variances = states, logits, variances
        self._ids, self._logprobs = ids, logprobs
        self._sums = np.full((6, len(ids)), np.nan)
        self._at = np.full(ids.shape, np.nan)

    def update(self, rows: slice, log_r: torch.Tensor) -> None:
        """Compares some positions. log_r: the reference's log-probabilities at these positions, float32 [n, V]."""
        log_c = torch.log_softmax(self._logits(self._states[rows]), dim=-1)
        r, c = log_r.exp(), log_c.exp()
        mean = torch.logaddexp(log_r, log_c) - np.log(2.0)
        # A probability of 0 adds nothing, also where its logarithm is -inf.
        of_r, of_c = r > 0, c > 0
        figures = (
            torch.where(of_r, r * (log_r - log_c), 0.0).sum(-1),
            torch.where(of_c, c * (log_c - log_r), 0.0).sum(-1),
            0.5 * (torch.where(of_r, r * (log_r - mean), 0.0) + torch.where(of_c, c * (log_c - mean), 0.0)).sum(-1),
            (0.5 * (r - c).abs().sum(-1)).clamp(max=1.0),
            -torch.where(of_c, c * log_c, 0.0).sum(-1),
            0.5 * (c @ self._variances),
        )
        unknown = torch.isnan(self._states[rows, 0])
        for column, values in zip(self._sums, figures, strict=True):
            column[rows] = torch.where(unknown, torch.nan, values).double().cpu().numpy()
        ids = torch.from_numpy(np.maximum(self._ids[rows], 0).astype(np.int64)).to(log_c.device)
        self._at[rows] = log_c.gather(1, ids).double().cpu().numpy()

    def result(self) -> RecoveredDivergence:
        kl_rc, kl_cr, js, tv, entropy, predicted = self._sums
        observed = observed_error(self._ids, self._logprobs, self._at)
        # What is infinite (a probability of 0 in float32) or was not recovered is unknown as a whole.
        unknown = ~np.isfinite(self._sums).all(axis=0) | ~np.isfinite(observed)
        return RecoveredDivergence(
            *(
                np.where(unknown, np.nan, np.maximum(values, 0.0))
                for values in (kl_rc, kl_cr, js, tv, entropy, predicted, observed)
            )
        )


def _variances(weight: torch.Tensor, recovery: StateRecovery) -> torch.Tensor:
    """Returns float32 [V]: (w − w₀)ᵀ P (w − w₀) of all rows w of W, w₀ their mean."""
    factor = torch.from_numpy(recovery.factor).to(weight.device)
    block = max(1, BLOCK_ELEMENTS // weight.shape[1])
    origin = torch.zeros(weight.shape[1], dtype=torch.float32, device=weight.device)
    for rows in weight.split(block):
        origin += rows.float().sum(0)
    origin /= len(weight)
    return torch.cat([((rows.float() - origin) @ factor).square().sum(-1) for rows in weight.split(block)])
