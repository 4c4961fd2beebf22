"""Small integers packed into 32-bit words."""

from __future__ import annotations

import torch

WORD_BITS = 32


def unpack_rows(words: torch.Tensor, bits: int) -> torch.Tensor:
    """Int32 [32 n / bits, columns] of words int32 [n, columns]: numbers of `bits` bits, from the lowest bit of the
    first row on. A number of 3 bits may begin in one word and end in the next.

    >>> unpack_rows(torch.tensor([[0x76543210]], dtype=torch.int32), 4)[:, 0].tolist()
    [0, 1, 2, 3, 4, 5, 6, 7]
    """
    if WORD_BITS % bits == 0:
        shifts = torch.arange(0, WORD_BITS, bits, dtype=torch.int32)[:, None]
        return (words.to(torch.int32)[:, None] >> shifts).bitwise_and_((1 << bits) - 1).flatten(0, 1)
    rows = words.to(torch.int64) & 0xFFFFFFFF
    first = torch.arange(len(words) * WORD_BITS // bits) * bits
    row, shift = first // WORD_BITS, first % WORD_BITS
    # The following word, for numbers that go on there; after the last one there is nothing.
    following = torch.cat([rows[1:], torch.zeros_like(rows[:1])])
    both = rows[row] | ((following[row] & ((1 << bits) - 1)) << WORD_BITS)
    return ((both >> shift[:, None]) & ((1 << bits) - 1)).to(torch.int32)


def pack_rows(numbers: torch.Tensor, bits: int) -> torch.Tensor:
    """The inverse of `unpack_rows`: int32 [rows · bits / 32, columns] of numbers [rows, columns]."""
    count = numbers.shape[0] * bits // WORD_BITS
    words = torch.zeros(count + 1, numbers.shape[1], dtype=torch.int64)
    first = torch.arange(numbers.shape[0]) * bits
    row, shift = first // WORD_BITS, first % WORD_BITS
    placed = numbers.to(torch.int64) << shift[:, None]
    words.index_add_(0, row, placed & 0xFFFFFFFF)
    words.index_add_(0, row + 1, placed >> WORD_BITS)
    return signed(words[:count])


def signed(words: torch.Tensor) -> torch.Tensor:
    """Int32 of the lowest 32 bits of int64."""
    low = words & 0xFFFFFFFF
    return torch.where(low >= 1 << 31, low - (1 << 32), low).to(torch.int32)
