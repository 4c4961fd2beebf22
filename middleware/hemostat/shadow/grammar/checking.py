"""Whether the sets that were rebuilt are those that vLLM masked by, as far as what it returned shows that."""

from __future__ import annotations

from typing import Any

import numpy as np

from hemostat.shadow.grammar.reasons import GrammarFailure, GrammarReason
from hemostat_calibration.allowed_sets import AllowedSets
from hemostat_calibration.arrays import Bools, Ids
from hemostat_calibration.records import Candidates

IMPOSSIBLE_LOGPROB = -9998.0
"""What is less likely has a probability of 0: vLLM writes -9999 for -inf, which JSON does not have."""


def possible(candidates: Candidates) -> Bools:
    """Which candidates have a probability above 0, [T, K]; padding has none.

    >>> possible(Candidates(np.array([[4, 7, -1]], np.int32), np.array([[-0.1, -9999.0, -np.inf]]))).tolist()
    [[True, False, False]]
    """
    found: Bools = (candidates.ids >= 0) & (candidates.logprobs > IMPOSSIBLE_LOGPROB)
    return found


def shows_mask(candidates: Candidates) -> bool:
    """Whether an id was listed without a probability: then something restricted the tokens.

    >>> shows_mask(Candidates(np.array([[4, -1]], np.int32), np.array([[-0.1, -np.inf]])))
    False
    """
    return bool(((candidates.ids >= 0) & (candidates.logprobs <= IMPOSSIBLE_LOGPROB)).any())


def restricted(candidates: Candidates, output: Ids, top_k: int, sets: AllowedSets) -> Candidates:
    """The candidates [T, K] that are allowed, with padding in place of the others.

    output: the emitted ids, [T]. top_k: number of ids that vLLM was asked for. GrammarFailure (MISMATCH) where vLLM's
    list shows another set: an emitted or a possible id that is not allowed, an allowed one without a probability, or
    fewer possible ones than are allowed.

    >>> sets = AllowedSets(9, np.array([[0b110]], np.uint32), np.array([0], np.int32))
    >>> listed = Candidates(np.array([[2, 1, 5]], np.int32), np.array([[-0.1, -2.4, -9999.0]]))
    >>> restricted(listed, np.array([2], np.int32), 3, sets).ids.tolist()
    [[2, 1, -1]]
    """
    listed, can_be, allowed = candidates.ids >= 0, possible(candidates), sets.contains(candidates.ids)
    _agree(sets.contains(output[:, None])[:, 0], "an emitted id is not allowed")
    _agree(~(can_be & ~allowed).any(axis=1), "a listed id with a probability is not allowed")
    _agree(~(listed & ~can_be & allowed).any(axis=1), "an allowed id is listed without a probability")
    _agree(can_be.sum(axis=1) >= np.minimum(top_k, sets.support), "fewer ids have a probability than are allowed")
    return Candidates(np.where(can_be, candidates.ids, -1), np.where(can_be, candidates.logprobs, -np.inf))


def _agree(rows: Any, what: str) -> None:
    """rows: bool [T]; `Any`, since numpy's stubs take a sum along an axis for a scalar, too."""
    if not rows.all():
        raise GrammarFailure(GrammarReason.MISMATCH, f"{what} at position {int(np.argmin(rows))}")
