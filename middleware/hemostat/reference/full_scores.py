"""Scores over the full vocabulary, and what they are asked for. This module needs no torch."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from hemostat_calibration.allowed_sets import AllowedSets
from hemostat_calibration.arrays import Floats, Ids

CHUNK_ELEMENTS = 1 << 24
"""The number of entries of one float32 log-softmax (64 MiB): positions are taken in chunks of this size."""


@dataclass(frozen=True, slots=True)
class Basis:
    """The function clip(up[v] · code, ±clamp) of the token v. up: float16 [V, r], of numpy or of torch, where the
    logits are."""

    up: Any
    clamp: float


@dataclass(frozen=True, slots=True)
class ExactScores:
    """The scores of T positions, in nats.

    at, top_logprobs: float64 [T, K]. top_ids: int32 [T, K]. emitted, entropy, expected[name]: float64 [T]. hidden:
    float32 [T, d], the input of the output embedding; None if it was not requested.
    """

    at: Floats
    top_ids: Ids
    top_logprobs: Floats
    emitted: Floats
    entropy: Floats
    expected: dict[str, Floats]
    hidden: npt.NDArray[np.float32] | None = None

    @classmethod
    def empty(cls, tokens: int, width: int, names: Iterable[str]) -> ExactScores:
        """Returns scores to be filled in place: T tokens, K = `width` ids."""
        return cls(
            at=np.full((tokens, width), np.nan),
            top_ids=np.full((tokens, width), -1, np.int32),
            top_logprobs=np.full((tokens, width), -np.inf),
            emitted=np.empty(tokens),
            entropy=np.empty(tokens),
            expected={name: np.empty(tokens) for name in names},
        )


def chunks(tokens: int, vocab_size: int) -> Iterator[slice]:
    """Yields the positions whose logits are computed together.

    >>> list(chunks(300, 131_072))
    [slice(0, 128, None), slice(128, 256, None), slice(256, 300, None)]
    """
    step = max(1, CHUNK_ELEMENTS // vocab_size)
    for start in range(0, tokens, step):
        yield slice(start, min(start + step, tokens))


def check_request(
    vocab_size: int,
    output: Ids,
    ids: Ids,
    bases: Mapping[str, Basis],
    codes: Mapping[str, npt.NDArray[np.float32]],
    allowed: AllowedSets | None,
) -> None:
    """Raises ValueError if an id is not in the vocabulary, or a basis fits neither it nor its code, or `allowed` fits
    neither the vocabulary nor T.

    codes: [T, r] of every basis [V, r].
    """
    tokens = len(output)
    largest = max(int(ids.max(initial=-1)), int(output.max()))
    if largest >= vocab_size or int(output.min()) < 0:
        raise ValueError(f"token id {largest} is not in the reference's vocabulary of {vocab_size}")
    if allowed is not None and (allowed.vocab_size, allowed.tokens) != (vocab_size, tokens):
        raise ValueError(
            f"the allowed ids are of a vocabulary of {allowed.vocab_size}, the reference's is {vocab_size}"
        )
    for name, basis in bases.items():
        size, rank = basis.up.shape
        if size != vocab_size:
            raise ValueError(f"{name} is for {size} ids: the reference has a vocabulary of {vocab_size}")
        code = codes.get(name)
        if code is None or code.shape != (tokens, rank):
            got = "none" if code is None else code.shape
            raise ValueError(f"the code of {name} has shape {got}: it must be {(tokens, rank)}")
