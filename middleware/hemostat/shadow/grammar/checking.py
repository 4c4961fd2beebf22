"""Whether the sets that were rebuilt are those that vLLM masked by, as far as what it returned shows that."""

from __future__ import annotations

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
    return bool(((candidates.ids >= 0) & ~possible(candidates)).any())


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


def _agree(rows: Bools, what: str) -> None:
    if not rows.all():
        raise GrammarFailure(GrammarReason.MISMATCH, f"{what} at position {int(np.argmin(rows))}")


def first_restricted(prompt: Ids, output: Ids, start: Ids, end: Ids) -> int:
    """Index of the first output position that vLLM restricts where a reasoning parser is set: the one after the end
    marker, T where there is none; 0 where the prompt has ended the reasoning already.

    start, end: the markers, each one or more ids; an empty `end` stands for no parser. As vLLM's parsers decide it
    (`reasoning/basic_parsers.py`).

    >>> ids = [np.array(a, np.int32) for a in ([1, 2], [5, 8, 6], [7], [8])]
    >>> first_restricted(*ids), first_restricted(ids[3], *ids[1:])
    (2, 0)
    """
    if not len(end):
        return 0
    last_end = _last(prompt, end)
    if last_end >= 0 and last_end > _last(prompt, start):
        return 0
    first = _positions(output, end)
    return int(first[0]) + len(end) if len(first) else len(output)


def _last(ids: Ids, marker: Ids) -> int:
    found = _positions(ids, marker)
    return int(found[-1]) if len(found) else -1


def _positions(ids: Ids, marker: Ids) -> Ids:
    if not len(marker) or len(ids) < len(marker):
        return np.zeros(0, np.int32)
    windows = np.lib.stride_tricks.sliding_window_view(ids, len(marker))
    found: Ids = np.nonzero((windows == marker).all(axis=1))[0].astype(np.int32)
    return found
