"""Canaries behind a shared prefix, which is in the engine's prefix cache: answers are decoded after blocks of the cache
that another request has written.

All sequences begin with the same tokens, which one request computes before. The prefix is as long as long prompts of
the traffic are, within bounds. Only the answers are scored, by decoding. The test is the one of
`hemostat_calibration.canaries`; the same answers without a prefix are part of the base model's set. A fault of the
prefix cache, or of decoding behind a long context, concerns all sequences, so that it has votes.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence

import numpy as np

from hemostat_calibration.canaries import MIN_SEQUENCES, Canary

BLOCK = 128
"""The prefix is a multiple of so many tokens, and so of the blocks of the prefix cache: of 128 on a CPU, of 16 on a
GPU."""
MIN_PREFIX, MAX_PREFIX = 512, 1_536
"""The bounds of the prefix's tokens, where the model's context allows them. Two replays of the longest and a replay of
the base model's set are within the budget of an hour."""
OWN_PROMPT, ANSWER = 9, 20
"""The largest numbers of tokens of a sequence behind the prefix: of its prompt, and of its answer."""
MAX_LENGTHS = 1_000
QUANTILE = 0.9


class PromptLengths:
    """The lengths of the last MAX_LENGTHS prompts, in tokens.

    >>> lengths = PromptLengths()
    >>> for length in (10, 20, 3000):
    ...     lengths.update(length)
    >>> lengths.get()
    2404
    """

    def __init__(self) -> None:
        self._lengths: deque[int] = deque(maxlen=MAX_LENGTHS)

    def update(self, length: int) -> None:
        self._lengths.append(length)

    def get(self) -> int:
        """Returns the 90th percentile; 0 before the first prompt."""
        return int(np.quantile(list(self._lengths), QUANTILE)) if self._lengths else 0


def prefix_sequences(canaries: Sequence[Canary], length: int, max_model_len: int = 0) -> tuple[Canary, ...]:
    """Returns the sequences of a set behind a shared prefix, which is made of the set's tokens; empty if the model's
    context, or the set, is too short.

    length: of the prefix, in tokens, as far as the bounds allow. max_model_len: 0 where it is not known.

    >>> canaries = [Canary("chat", np.arange(30, dtype=np.int32), np.arange(40, dtype=np.int32))] * 50
    >>> made = prefix_sequences(canaries, 600)
    >>> len(made), made[0].cached, len(made[0].prompt), made[0].scored, cost(made)
    (16, 640, 649, 20, 1121)
    >>> prefix_sequences(canaries, 600, 100)
    ()
    """
    text = [token for canary in canaries for token in canary.ids]
    most = min(MAX_PREFIX, len(text))
    if max_model_len:
        most = min(most, max_model_len - OWN_PROMPT - ANSWER - 1)
    wanted = -(-max(length, MIN_PREFIX) // BLOCK) * BLOCK
    cached = min(wanted, most // BLOCK * BLOCK)
    if cached < BLOCK:
        return ()
    chosen = np.linspace(0, len(canaries) - 1, MIN_SEQUENCES).round().astype(int).tolist()
    return tuple(
        Canary(
            canary.kind,
            np.array([*text[:cached], *canary.prompt[-OWN_PROMPT:].tolist()], np.int32),
            canary.answer[:ANSWER],
            cached,
        )
        for canary in (canaries[n] for n in chosen)
    )


def cost(sequences: Sequence[Canary]) -> int:
    """Returns the number of tokens of one replay, with those that are generated: the prefix is computed once.

    >>> short = Canary("chat", np.arange(130, dtype=np.int32), np.arange(10, dtype=np.int32), 128)
    >>> short.tokens, cost([short, short])
    (13, 155)
    """
    return sequences[0].cached + 1 + sum(canary.tokens for canary in sequences)
