"""The ids that a grammar allows at each position of an output, as packed bits."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from hemostat_calibration.arrays import Bools, Ids
from hemostat_calibration.errors import InvalidArgumentError

WORD_BITS = 32


@dataclass(frozen=True, slots=True)
class AllowedSets:
    """The allowed ids of T positions: the distinct sets, and which of them applies at each position.

    Positions inside one string of a JSON object mostly share their set, so that there are far fewer sets than
    positions.

    vocab_size: V.
    table: uint32 [U, ceil(V/32)]; bit i % 32 of word i // 32 is 1 where id i is allowed (the layout of xgrammar's
        bitmasks); bits from V on are 0.
    rows: int32 [T], the row of `table` at each position. Raises InvalidArgumentError if they do not fit each other, or
    a set is empty.

    >>> sets = AllowedSets(40, np.array([[0b101, 0b1], [0xFFFFFFFF, 0xFF]], np.uint32), np.array([0, 1, 0], np.int32))
    >>> sets.support.tolist()
    [3, 40, 3]
    >>> sets.contains(np.array([[0, 1], [1, 39], [32, -1]], np.int32)).tolist()
    [[True, False], [True, True], [True, False]]
    """

    vocab_size: int
    table: npt.NDArray[np.uint32]
    rows: Ids

    def __post_init__(self) -> None:
        width = words(self.vocab_size)
        if self.table.dtype != np.uint32 or self.table.ndim != 2 or self.table.shape[1] != width:
            raise InvalidArgumentError(
                f"table is {self.table.dtype} {self.table.shape}: it must be uint32 [sets, {width}]"
            )
        if self.rows.dtype != np.int32 or self.rows.ndim != 1:
            raise InvalidArgumentError(f"rows is {self.rows.dtype} {self.rows.shape}: it must be int32 [positions]")
        if self.rows.size and (self.rows.min() < 0 or self.rows.max() >= len(self.table)):
            raise InvalidArgumentError(
                f"rows run from {self.rows.min()} to {self.rows.max()}: table has {len(self.table)}"
            )
        spare = width * WORD_BITS - self.vocab_size
        if spare and (self.table[:, -1] >> np.uint32(WORD_BITS - spare)).any():
            raise InvalidArgumentError(f"table allows an id outside the vocabulary of {self.vocab_size}")
        if not self.table.any(axis=1).all():
            raise InvalidArgumentError("table has a set without any id")

    @property
    def tokens(self) -> int:
        """The number of positions, T."""
        return len(self.rows)

    @property
    def support(self) -> Ids:
        """The number of allowed ids at each position, int32 [T]."""
        # numpy 1.26 has no bitwise_count; set by set, for the unpacked bits take eight times the space.
        counts = np.array([np.unpackbits(words_of.view(np.uint8)).sum() for words_of in self.table], np.int32)
        support: Ids = counts[self.rows]
        return support

    def contains(self, ids: Ids) -> Bools:
        """Returns which of `ids`, [T, K], are allowed at their position, bool [T, K]; False for -1. All ids are below
        V.
        """
        at = np.maximum(ids, 0)
        word = self.table[self.rows[:, None], at // WORD_BITS]
        allowed: Bools = ((word >> (at % WORD_BITS).astype(np.uint32)) & np.uint32(1)).astype(np.bool_)
        return allowed & (ids >= 0)

    def mask(self, positions: slice) -> Bools:
        """Returns the sets of these positions as a mask, [n, V]."""
        words_of = np.ascontiguousarray(self.table[self.rows[positions]]).astype("<u4")
        bits = np.unpackbits(words_of.view(np.uint8), axis=1, bitorder="little")
        return bits[:, : self.vocab_size].astype(np.bool_)


def words(vocab_size: int) -> int:
    """Returns the number of words of one set, ceil(V / 32).

    >>> words(33)
    2
    """
    return -(-vocab_size // WORD_BITS)
