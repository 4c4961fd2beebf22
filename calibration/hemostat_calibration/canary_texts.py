"""Compares what a server makes of texts as clients send them: the token ids of prompts, and how tokens are drawn.

Canaries are token ids, so that another chat template, another tokenizer or another default temperature has no effect on
them. So the same texts are also sent as messages, without a temperature:

- **Prompt ids** are exact: a server that has not changed makes the same ids of the same messages.
- **Free answers** are random. Each token has an *excess*: −log p minus the entropy of p, the model's distribution
  there. If tokens are drawn from p (temperature 1, no top-p), the mean of an excess is zero, whatever the context, but
  for the entropy of tokens that the server does not list. A lower temperature, top-p or top-k make it lower. Other
  defaults have a mean of their own, which the baseline knows.

**The test.** A replay differs if the ids of a text differ, or if the mean excess differs from the baseline's by more
than SIGMAS standard errors and MIN_NATS. Two replays in a row that differ in the same way are a change. That the mean
of so few tokens is normal was not proven, but simulated: of 10,500 unchanged servers no two replays in a row differ
(tests/core/test_canary_texts.py).

>>> rng = np.random.default_rng(0)
>>> p = rng.dirichlet(np.full(8, 0.3), 800)
>>> def answers(temperature, of):
...     powers = of ** (1 / temperature)
...     tokens = [rng.choice(8, p=row / row.sum()) for row in powers]
...     return np.array([excess(np.log(row[token]), np.log(row)) for row, token in zip(of, tokens)])
>>> ids = (np.arange(3, dtype=np.int32),)
>>> baseline = TextBaseline(("hello",), TextReplay(ids, answers(1.0, p)))
>>> baseline.compare(TextReplay(ids, answers(1.0, p[:200]))).changed
False
>>> baseline.compare(TextReplay(ids, answers(0.5, p[:200]))).drawn_otherwise
True
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from hemostat_calibration.arrays import Floats, Ids
from hemostat_calibration.errors import InvalidArgumentError

SIGMAS = 4.0
"""The number of standard errors by which the mean excess of an unchanged server does not differ twice in a row."""
MIN_NATS = 0.1
"""The difference of the mean excess that is never a change."""


def excess(emitted: float, top: Floats) -> float:
    """Returns −log p of a token minus the entropy, for which what is not among the most likely tokens counts as one
    outcome.

    emitted: the token's log-probability, nats. top: float64 [K], the most likely tokens' log-probabilities.

    >>> round(excess(np.log(0.5), np.log([0.5, 0.5])), 9)
    0.0
    >>> round(excess(np.log(0.01), np.log([0.5, 0.25])), 3)
    3.565
    """
    p = np.exp(top)
    rest = 1.0 - float(p.sum())
    entropy = -float((p * top).sum()) - (rest * math.log(rest) if rest > 1e-6 else 0.0)
    return float(-emitted - entropy)


@dataclass(frozen=True, slots=True, eq=False)
class TextReplay:
    """One replay: the results of a server for all texts.

    prompts: int32 [P] each, the token ids of each text as a client's message. excess: float64 [K], of the tokens of
    free answers, nats; empty where the server returns no log-probabilities.
    """

    prompts: tuple[Ids, ...]
    excess: Floats


@dataclass(frozen=True, slots=True)
class TextComparison:
    """The comparison of a replay with the baseline.

    other_ids: the number of texts whose ids differ, of so many `texts`. then, now: mean excess, nats. errors: their
    difference in standard errors; 0 where one of them is not known.
    """

    other_ids: int
    texts: int
    then: float = 0.0
    now: float = 0.0
    errors: float = 0.0

    @property
    def drawn_otherwise(self) -> bool:
        return abs(self.errors) > SIGMAS and abs(self.now - self.then) > MIN_NATS

    @property
    def changed(self) -> bool:
        return bool(self.other_ids) or self.drawn_otherwise

    def confirms(self, first: TextComparison) -> bool:
        """Returns True if both replays show a change in the same way."""
        both_drawn = self.drawn_otherwise and first.drawn_otherwise and (self.errors > 0) == (first.errors > 0)
        return (bool(self.other_ids) and bool(first.other_ids)) or both_drawn

    @property
    def summary(self) -> str:
        """One line, without a verdict."""
        parts = []
        if self.other_ids:
            parts.append(
                f"{self.other_ids} of {self.texts} texts have other token ids: the chat template or the tokenizer has "
                "changed"
            )
        if self.drawn_otherwise:
            parts.append(
                "free answers are drawn in another way: −log p minus the entropy had a mean of "
                f"{self.then:.2f} nats, and has {self.now:.2f} ({self.errors:.1f} standard errors): a default of "
                "temperature, top-p or penalties has changed"
            )
        return "; ".join(parts) or f"{self.texts} texts have the same token ids, and answers are drawn as before"


@dataclass(frozen=True, slots=True, eq=False)
class TextBaseline:
    """The texts, and what the server made of them when the set was taken. Raises InvalidArgumentError if they do not
    fit together."""

    texts: tuple[str, ...]
    taken: TextReplay

    def __post_init__(self) -> None:
        if len(self.texts) != len(self.taken.prompts) or not np.isfinite(self.taken.excess).all():
            raise InvalidArgumentError(f"the canaries' {len(self.texts)} texts have no token ids or excess each")

    def compare(self, now: TextReplay) -> TextComparison:
        """Returns the comparison of a replay of the same texts."""
        pairs = zip(self.taken.prompts, now.prompts, strict=True)
        other = sum(not np.array_equal(then, ids) for then, ids in pairs)
        a, b = self.taken.excess, now.excess
        if len(a) < 2 or len(b) < 2:
            return TextComparison(other, len(self.texts))
        error = math.sqrt(float(a.var(ddof=1)) / len(a) + float(b.var(ddof=1)) / len(b))
        difference = float(b.mean() - a.mean())
        errors = difference / max(error, MIN_NATS / SIGMAS)
        return TextComparison(other, len(self.texts), float(a.mean()), float(b.mean()), errors)
