"""Are the weights behind a served name still the same? Fixed texts are scored, and compared with what they gave before.

A generating server says nothing of its weights but a name and a path, and both stay when another checkpoint is loaded.
"""

from __future__ import annotations

from collections.abc import Sequence

from hemostat.reference.hidden.probe import TEXT
from hemostat.reference.match import MAX_SAME_NATS, PROBE_TEXT
from hemostat.reference.server import ModelCard, VllmServer

PROBE_SECONDS = 300.0
"""The time between two probes, while requests are scored."""
MAX_PROBE_TOKENS = 64
"""The largest number of tokens of each text that are scored."""


async def probed_scores(server: VllmServer, card: ModelCard) -> tuple[float, ...]:
    """Returns the log-probabilities of the tokens of both texts, nats. Raises ReferenceFailure."""
    limit = min(MAX_PROBE_TOKENS, (card.max_model_len or MAX_PROBE_TOKENS) - 1)
    scores: list[float] = []
    for text in (TEXT, PROBE_TEXT):
        ids = await server.tokenize(card.id, text)
        scores += await server.prompt_logprobs(card.id, ids[:limit])
    return tuple(scores)


def mean_difference(before: Sequence[float], now: Sequence[float]) -> float:
    """Returns the mean absolute difference of two probes, nats; infinite if they are of different numbers of tokens."""
    if len(before) != len(now) or not before:
        return float("inf")
    return sum(abs(a - b) for a, b in zip(before, now, strict=True)) / len(before)


def same_weights(before: Sequence[float], now: Sequence[float]) -> bool:
    """Returns True if two probes are of the same weights. They are as noisy as a server: the same tokens in batches of
    other shapes differ by about 0.01 nats in bfloat16, and other weights by more than MAX_SAME_NATS. A change of the
    weights that moves the log-probabilities by less is not seen.

    >>> same_weights([-1.0, -2.0], [-1.02, -1.99]), same_weights([-1.0, -2.0], [-1.4, -2.0])
    (True, False)
    """
    return mean_difference(before, now) <= MAX_SAME_NATS
