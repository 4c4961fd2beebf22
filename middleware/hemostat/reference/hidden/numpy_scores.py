"""The scores of `hemostat.reference.exact.scores_of`, with numpy: for machines without torch."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np
import numpy.typing as npt

from hemostat.reference.full_scores import Basis, ExactScores, Ids, check_request, chunks
from hemostat_calibration.allowed_sets import AllowedSets

Rows = npt.NDArray[np.float32]


def scores_of(
    logits: Callable[[slice], Rows],
    vocab_size: int,
    output: Ids,
    ids: Ids,
    functionals: Mapping[str, Rows | Basis],
    codes: Mapping[str, Rows],
    *,
    allowed: AllowedSets | None = None,
) -> ExactScores:
    """Returns what `hemostat.reference.exact.scores_of` returns. logits: returns float32 [n, V] of these positions,
    which may be written to.

    >>> z = np.log(np.array([[1, 2, 5]], np.float32))
    >>> output, ids = np.array([1], np.int32), np.array([[2, -1]], np.int32)
    >>> scores = scores_of(lambda rows: z[rows].copy(), 3, output, ids, {}, {})
    >>> scores.emitted.round(3).tolist(), scores.at.round(3).tolist(), scores.top_ids.tolist()
    ([-1.386], [[-0.47, nan]], [[2, 1]])
    >>> scores.entropy.round(3).tolist()
    [0.9]
    """
    tokens, width = ids.shape
    shapes = {n: (f.up if isinstance(f, Basis) else f).shape for n, f in functionals.items()}
    check_request(vocab_size, output, ids, shapes, codes, allowed)
    top = min(width, vocab_size)
    scores = ExactScores.empty(tokens, width, functionals)
    ups = {name: f.up.astype(np.float32).T for name, f in functionals.items() if isinstance(f, Basis)}
    for rows in chunks(tokens, vocab_size):
        logprobs = logits(rows)
        if allowed is not None:
            logprobs[~allowed.mask(rows)] = -np.inf
        logprobs -= logprobs.max(axis=1, keepdims=True)
        probabilities = np.exp(logprobs)
        total = probabilities.sum(axis=1, keepdims=True, dtype=np.float64).astype(np.float32)
        logprobs -= np.log(total)
        probabilities /= total
        given = np.take_along_axis(logprobs, np.maximum(ids[rows], 0), 1).astype(np.float64)
        scores.at[rows] = np.where(ids[rows] < 0, np.nan, given)
        scores.emitted[rows] = np.take_along_axis(logprobs, output[rows, None], 1)[:, 0]
        best = np.argpartition(logprobs, vocab_size - top, axis=1)[:, vocab_size - top :]
        values = np.take_along_axis(logprobs, best, 1)
        order = np.argsort(-values, axis=1, kind="stable")
        best, values = np.take_along_axis(best, order, 1), np.take_along_axis(values, order, 1)
        scores.top_ids[rows, :top] = np.where(np.isneginf(values), -1, best)
        scores.top_logprobs[rows, :top] = values
        for name, functional in functionals.items():
            if isinstance(functional, Basis):
                shift = np.clip(codes[name][rows] @ ups[name], -functional.clamp, functional.clamp)
                scores.expected[name][rows] = np.einsum("tv,tv->t", probabilities, shift)
            else:
                scores.expected[name][rows] = probabilities @ functional
        # p log p is 0 where p is 0, also where log p is -inf.
        np.multiply(probabilities, logprobs, out=logprobs, where=probabilities > 0)
        logprobs[probabilities == 0] = 0.0
        scores.entropy[rows] = -logprobs.sum(axis=1)
    return scores
