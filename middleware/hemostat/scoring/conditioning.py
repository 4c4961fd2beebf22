"""Reads what a grammar allowed from a capture under it: the sets of ids, and the candidates that are in them.

vLLM masks the logits by the grammar before it takes log-probabilities, so what it returns is conditional on the allowed
ids. The engine's plugin hands out the mask of each position with the tap. What it does not know, or does not fit what
vLLM listed, is skipped and counted.
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from typing import Any, Final

import numpy as np

from hemostat.engines.messages import FREE, UNKNOWN, TapRun
from hemostat.engines.taps import TapResult
from hemostat.ipc.messages import Capture
from hemostat.metrics.reasons import Unscored
from hemostat.reference.protocol import ReferenceInfo
from hemostat.scoring.capture_arrays import output_ids
from hemostat_calibration.allowed_sets import WORD_BITS, AllowedSets, words
from hemostat_calibration.arrays import Bools, Ids
from hemostat_calibration.errors import InvalidArgumentError
from hemostat_calibration.records import Candidates

MAX_TABLE_BYTES: Final = 32 << 20
"""The largest size of the distinct sets of one output."""
IMPOSSIBLE_LOGPROB: Final = -9998.0
"""The log-probability up to which an id counts as impossible: vLLM writes -9999 for -inf, which JSON does not have."""


class ConditioningFailure(Exception):
    """It is not known what was allowed at each position, for `reason`."""

    def __init__(self, reason: Unscored, message: str = "") -> None:
        super().__init__(message or reason.value)
        self.reason = reason


def condition(
    capture: Capture, candidates: Candidates, info: ReferenceInfo, tap: TapResult | None
) -> tuple[Candidates, AllowedSets | None]:
    """Returns the allowed ones of the candidates, and the sets; all of them, and None, if nothing in the request
    restricts its tokens. Raises ConditioningFailure if the sets are not known, or something restricted it all the same.

    candidates: of the output's last T tokens, [T, K].
    """
    if not capture.grammar:
        if shows_mask(candidates) or (tap is not None and any(run.sets for run in tap.runs)):
            raise ConditioningFailure(Unscored.GRAMMAR_UNKNOWN)
        return candidates, None
    if not info.full_vocabulary:
        raise ConditioningFailure(Unscored.GRAMMAR_NEEDS_FULL_VOCABULARY)
    if tap is None:
        raise ConditioningFailure(Unscored.GRAMMAR_NOT_REPORTED)
    output = output_ids(capture)
    first = len(output) - len(candidates.ids)
    sets = allowed_sets(tap.runs, slice(first, len(output)), info.vocab_size)
    return restricted(candidates, output[first:], capture.top_k, sets), sets


def allowed_sets(runs: Sequence[TapRun], positions: slice, vocab_size: int) -> AllowedSets:
    """Returns what the engine allowed at these positions of the output. Raises ConditioningFailure if the runs do not
    say so, or say what cannot be.
    """
    last = int(positions.stop)
    width = words(vocab_size)
    rows = np.full(last, UNKNOWN, np.int32)
    result: dict[bytes, int] = {}
    for run in runs:
        given = np.full(run.tokens, FREE, np.int32)
        if run.set_rows:
            given = np.frombuffer(run.set_rows, "<i4").astype(np.int32)
            sets = _unpacked(run.sets, int(given.max()) + 1, 4 * width)
            numbers = [result.setdefault(ids, len(result)) for ids in sets]
            if len(result) * 4 * width > MAX_TABLE_BYTES:
                raise ConditioningFailure(Unscored.GRAMMAR_TOO_LARGE)
            # A place below 0 means no set.
            given = np.where(given >= 0, np.array([*numbers, 0], np.int32)[np.maximum(given, -1)], given)
        # A later run replaces an earlier one: a position is sent again where a prompt came in chunks.
        target = rows[run.start : run.start + run.tokens]
        target[:] = given[: len(target)]
    rows = rows[positions]
    if (rows < FREE).any():
        raise ConditioningFailure(
            Unscored.GRAMMAR_NOT_REPORTED, f"position {positions.start + int(np.argmax(rows < FREE))}"
        )
    # The set of all ids comes last.
    table = np.frombuffer(b"".join(result) + b"\xff" * (4 * width), "<u4").astype(np.uint32).reshape(-1, width)
    if used := vocab_size % WORD_BITS:
        table[:, -1] &= np.uint32((1 << used) - 1)
    try:
        return AllowedSets(vocab_size, table, np.where(rows == FREE, np.int32(len(result)), rows))
    except InvalidArgumentError as error:
        raise ConditioningFailure(Unscored.GRAMMAR_MISMATCH, str(error)) from error


def _unpacked(packed: bytes, sets: int, size: int) -> list[bytes]:
    """Returns the sets of a run, of `size` bytes each."""
    if sets * size > MAX_TABLE_BYTES:
        raise ConditioningFailure(Unscored.GRAMMAR_TOO_LARGE)
    if sets <= 0:
        return []
    try:
        data = zlib.decompressobj().decompress(packed, sets * size + 1)
    except zlib.error as error:
        raise ConditioningFailure(Unscored.GRAMMAR_MISMATCH, str(error)) from error
    if len(data) != sets * size:
        shown = f"{len(data)} bytes of {sets} sets, not {size} each: another vocabulary than the reference's"
        raise ConditioningFailure(Unscored.GRAMMAR_MISMATCH, shown)
    return [data[start : start + size] for start in range(0, len(data), size)]


def possible(candidates: Candidates) -> Bools:
    """Returns which candidates have a probability above 0, bool [T, K]; padding has none.

    >>> possible(Candidates(np.array([[4, 7, -1]], np.int32), np.array([[-0.1, -9999.0, -np.inf]]))).tolist()
    [[True, False, False]]
    """
    result: Bools = (candidates.ids >= 0) & (candidates.logprobs > IMPOSSIBLE_LOGPROB)
    return result


def shows_mask(candidates: Candidates) -> bool:
    """Returns True if an id was listed without a probability: then something restricted the tokens.

    >>> shows_mask(Candidates(np.array([[4, -1]], np.int32), np.array([[-0.1, -np.inf]])))
    False
    """
    return bool(((candidates.ids >= 0) & (candidates.logprobs <= IMPOSSIBLE_LOGPROB)).any())


def restricted(candidates: Candidates, output: Ids, top_k: int, sets: AllowedSets) -> Candidates:
    """Returns the candidates [T, K] that are allowed, with padding in place of the others.

    output: the emitted ids, [T]. top_k: number of ids that vLLM was asked for. ConditioningFailure (GRAMMAR_MISMATCH)
    where vLLM's list shows another set: an emitted or a possible id that is not allowed, an allowed one without a
    probability, or fewer possible ones than are allowed.

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
    """Raises ConditioningFailure, which names the first position that is False. rows: bool [T]; `Any`, since numpy's
    stubs take a sum along an axis for a scalar, too.
    """
    if not rows.all():
        raise ConditioningFailure(Unscored.GRAMMAR_MISMATCH, f"{what} at position {int(np.argmin(rows))}")
