"""Finds out if the output head belongs to the server's model, and if the model is still the same one. It does no IO.

A pooling server gives no log-probabilities to compare with. But a language model predicts plain text well, and its
mean entropy is near its mean negative log-likelihood: the derivative of the latter by a factor of the logits, at 1, is
their difference. Another head, a forgotten scale or another normalization breaks the one or the other.
"""

from __future__ import annotations

import numpy as np

from hemostat.checkpoints.output_embedding import floats
from hemostat.reference.hidden.pooling import States
from hemostat_calibration.arrays import Floats

TEXT = (
    "The house stood at the end of a narrow road, a few miles from the sea. In the winter the wind came in from the "
    "west and it was often cold, but in the summer the windows were open all day and the children played in the garden "
    "until it was dark. My father worked in the town and came home on the train every evening at six o'clock."
)
"""A plain text that no model is likely to know by heart."""
MAX_SHARE_OF_UNIFORM = 0.6
"""The largest mean negative log-likelihood of the text, as a part of log V, which is its value without any
knowledge.
"""
MAX_MISCALIBRATION_NATS = 1.5
"""The largest difference of mean entropy and mean negative log-likelihood."""
MAX_SAME_DISTANCE = 0.1
"""The mean distance of two answers for the text, relative to their length, up to which they are of one model."""


def fit_of_head(emitted: Floats, entropy: Floats, vocab_size: int) -> str:
    """Returns why the head does not belong to the model; "" if it fits.

    emitted, entropy: float64 [T], nats, of the text's tokens under the head.

    >>> fit_of_head(np.full(4, -3.0), np.full(4, 2.7), 50_000)
    ''
    >>> fit_of_head(np.full(4, -3.0), np.full(4, 0.2), 50_000)
    'a plain text costs 3.00 nats per token at an entropy of 0.20: the logits have another scale'
    """
    cost, spread = -float(emitted.mean()), float(entropy.mean())
    uniform = float(np.log(vocab_size))
    if not cost <= MAX_SHARE_OF_UNIFORM * uniform:
        return f"a plain text costs {cost:.2f} nats per token, a uniform guess {uniform:.2f}: it is of another model"
    if not abs(cost - spread) <= MAX_MISCALIBRATION_NATS:
        return (
            f"a plain text costs {cost:.2f} nats per token at an entropy of {spread:.2f}: the logits have another scale"
        )
    return ""


def distance(first: States, other: States) -> float:
    """Returns the mean over positions of the Euclidean distance, relative to the length of `other`; infinite for other
    shapes.

    >>> distance(np.array([[0x3F80, 0]], np.uint16), np.array([[0x3F80, 0x3F80]], np.uint16)).__round__(3)
    0.707
    """
    if first.shape != other.shape:
        return float("inf")
    a, b = (floats(states).astype(np.float64) for states in (first, other))
    lengths = np.maximum(np.linalg.norm(b, axis=1), np.finfo(np.float64).tiny)
    return float((np.linalg.norm(a - b, axis=1) / lengths).mean())
