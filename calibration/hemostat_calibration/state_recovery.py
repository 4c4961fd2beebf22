"""The compressed model's whole distribution, recovered from its logits at anchors, and its distances from r.

z = W h: the logits are a linear image of the last hidden state h (d numbers), W [V, d] the output embedding, which most
compressed checkpoints leave as it is. The engine hands out z at N anchor ids, centred, in float16. Given those, h is
estimated by least squares in the anchors' rows, with an isotropic prior (as in ridge regression):

    h | z ~ N(P W̄ᵀ z / σ², P),  P = (I/s² + W̄ᵀ W̄/σ²)⁻¹,

W̄ the rows at the anchors, centred, σ the rounding of a logit, s² such that logits spread by about 5 nats. Then
ĉ = softmax(W h).

How good that is, is known in two ways, and ĉ is used only where both are small (`records.MAX_RECOVERY_ERROR`):

- Predicted. To second order KL(c‖ĉ) = ½ Var_c(w·δ), δ the error of h. The second moment about any
  other point than the mean is larger, so its expectation is at most ½ Σ_i ĉ_i (w_i − w₀)ᵀ P (w_i − w₀), w₀ the mean of
  all rows. With N < d anchors P is of the prior's size in d − N directions; with N a little above d, of the rounding's.
- Observed. The engine also reports c at its likeliest ids, which the recovery does not use. KL(c‖ĉ) over these and one
  bucket is a lower bound of KL(c‖ĉ) (data processing inequality; Cover & Thomas, 2006, ch. 2.8), whatever is assumed:
  another W, a bias or a cap of the logits show there. Only ids count that are listed whatever was emitted (see
  `divergence.sampled_estimate`), so that whether ĉ is used does not depend on what was sampled.

ĉ is an estimate: no bound follows from it. Measured on SmolLM2 (d = 576) in bfloat16: KL(c‖ĉ) 0.0015 nats with 640
anchors, 0.0006 with 1,024, 0.13 with 576, 1.5 with 512 (`make bench-bounds`).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from hemostat_calibration.arrays import Floats, Ids, Singles

LOGIT_NOISE = 0.03
"""The standard deviation of a logit as engines hand it out, nats: computed in bfloat16, reported in float16."""
_PRIOR_VARIANCE = 25.0
"""The variance of a logit before any is read."""
_MIN_MASS = 1e-9


@dataclass(frozen=True, slots=True, eq=False)
class StateRecovery:
    """The recovery of hidden states from logits at anchors. gain: float32 [d, N], E[h | z] = gain z. factor: float32
    [d, d], A with P = A Aᵀ.
    """

    gain: Singles
    factor: Singles

    def states(self, features: Singles) -> Singles:
        """Returns hidden states, float32 [T, d], from logits at the anchors, float32 [T, N]; a row of NaN gives one.

        >>> weight = np.array([[1.0, 0.0], [0.0, 1.0], [-1.0, -1.0]], np.float32)
        >>> recovery = recover_states(weight, noise=1e-3)
        >>> recovery.states(np.array([[0.5, -0.25, -0.25]], np.float32)).round(3).tolist()
        [[0.5, -0.25]]
        """
        centred = features - features.mean(axis=1, keepdims=True)
        states: Singles = centred @ self.gain.T
        return states


def recover_states(weight: Singles, noise: float = LOGIT_NOISE) -> StateRecovery:
    """Returns the recovery for these anchors. weight: rows of W at the anchors, float32 [N, d], in the order of the
    features. noise: σ, nats.

    >>> recover_states(np.array([[1.0], [-1.0]], np.float32), noise=1e-3).gain.round(3).tolist()
    [[0.5, -0.5]]
    """
    rows = weight.astype(np.float64)
    size = float(np.square(rows).sum(axis=1).mean())
    rows -= rows.mean(axis=0)
    precision = rows.T @ rows / noise**2
    precision[np.diag_indices_from(precision)] += max(size, 1e-12) / _PRIOR_VARIANCE
    factor = np.linalg.inv(np.linalg.cholesky(precision)).T
    gain = factor @ (factor.T @ rows.T) / noise**2
    return StateRecovery(gain.astype(np.float32), factor.astype(np.float32))


def checked_ids(ids: Ids, logprobs: Floats) -> npt.NDArray[np.bool_]:
    """Returns which of the compressed side's candidates would be listed whatever had been emitted, bool [T, K].

    ids, logprobs: [T, K], -1 and -inf pad; the last two places may belong to the emitted token.

    >>> checked_ids(np.array([[5, 3, 8, -1]]), np.array([[-0.5, -1.0, -3.0, -np.inf]])).tolist()
    [[True, False, False, False]]
    """
    listed: npt.NDArray[np.bool_] = (ids >= 0) & (logprobs > logprobs[:, max(ids.shape[1] - 3, 0), None])
    return listed


def observed_error(ids: Ids, logprobs: Floats, recovered: Floats) -> Floats:
    """Returns KL(c‖ĉ) over `checked_ids` and one bucket, float64 [T], nats, at least 0.

    ids, logprobs: [T, K], the compressed side's candidates as the engine reported them. recovered: log ĉ at `ids`,
    [T, K].

    >>> ids, logprobs = np.array([[0, 1, 2, -1]]), np.array([[-0.5, -1.5, -3.0, -np.inf]])
    >>> [observed_error(ids, logprobs, logprobs - less).round(4).tolist() for less in (0.0, 0.1)]
    [[0.0], [0.0068]]
    """
    checked = checked_ids(ids, logprobs)
    with np.errstate(invalid="ignore"):
        c, log_ratio = np.where(checked, np.exp(logprobs), 0.0), np.where(checked, logprobs - recovered, 0.0)
    out = np.maximum(1.0 - c.sum(axis=1), _MIN_MASS)
    recovered_out = np.maximum(1.0 - np.where(checked, np.exp(recovered), 0.0).sum(axis=1), _MIN_MASS)
    error: Floats = np.maximum((c * log_ratio).sum(axis=1) + out * np.log(out / recovered_out), 0.0)
    return error
