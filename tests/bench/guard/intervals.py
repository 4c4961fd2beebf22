"""Coverage of the intervals over all looks at once, finite-sample and asymptotic, and of conversations as units.

The streams are in `tests/support/interval_worlds.py`: 1,000 requests of a figure between 0 and 20 nats, with up to
4,096 tokens. What has to be covered is the running conditional mean: by token Σ E[x]/Σ E[n], by request the mean of
E[x/n]. A life is one stream; it is covered where the interval contains that value at every look: after each of the
first 30 requests, then at 70 more. The finite-sample interval is of the mean by request, the asymptotic one by token.

The conversations: ten turns each, of one kind and alike (each has its effect, log-normal with a deviation of 0.5), each
turn scored with the sampling rate. What counts goes through `SeenUnits` into the sequence of the status. What has to be
covered is the mean per token over conversations, at a nominal 95 %.
"""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
from tests.bench.guard import Row, most
from tests.support.interval_worlds import RANGE, WORLDS, World, running, truth

from hemostat.scoring.record_reader import SeenUnits
from hemostat_calibration.records import TokenRecord
from hemostat_calibration.statistics import confidence
from hemostat_calibration.statistics.confidence import MeanSequence
from hemostat_calibration.statistics.running_mean import RunningMean

NAME = "intervals"
TAKES = "3 minutes on one core"
REQUESTS = 1000
LOOKS = np.unique(np.concatenate([np.arange(1, 31), np.geomspace(31, REQUESTS, 70).astype(int)]))
CHUNK = 25
"""Streams at a time: the intervals of all their looks take 200 MB."""
CONVERSATIONS, TURNS = 300, 10
RATES = (0.05, 0.25, 1.0)
NO_PROMPT = np.zeros(0, np.int32)
"""Conversations are known by their names here."""


def rows(lives: int, seed: int) -> Iterator[Row]:
    for name, world in WORLDS.items():
        yield from _coverage(name, world, lives, seed)
    for rate in RATES:
        yield _conversations(rate, lives, seed)


def least_covered(lives: int, share: float) -> int:
    """Covered lives that are compatible with a probability of 95 %: `share` of 1,000 and more."""
    return int(np.ceil(share * lives)) if lives >= 1000 else lives - most(lives, 0.05)


def _coverage(name: str, world: World, lives: int, seed: int) -> Iterator[Row]:
    result: dict[str, list[Any]] = {"mean": [], "asymptotic": []}
    covered = dict.fromkeys(result, 0)
    rng = np.random.default_rng([seed, *name.encode()])
    for first in range(0, lives, CHUNK):
        x, n, mean_x, mean_n, mean = world(rng, min(CHUNK, lives - first), REQUESTS)
        true = truth(mean_x, mean_n)[:, LOOKS - 1]
        below, above = confidence.reach(*running(x, n, LOOKS), 0.05)
        ratio = x.cumsum(-1)[:, LOOKS - 1] / n.cumsum(-1)[:, LOOKS - 1]
        low, high = np.maximum(ratio - below, 0.0), np.minimum(ratio + above, RANGE)
        covered["asymptotic"] += int(((low <= true) & (true <= high)).all(-1).sum())
        result["asymptotic"].extend(high[:, -1] - low[:, -1])
        wanted = mean.cumsum(-1) / np.arange(1, REQUESTS + 1)
        for values, line in zip(x / n, wanted, strict=True):
            hit, width = _covers(values, line)
            covered["mean"] += hit
            result["mean"].append(width)
    least = least_covered(lives, 0.937)
    yield Row(
        f"{name}, by request",
        f"{covered['mean']} of {lives}, width {np.median(result['mean']):.2f} nats; asymptotic, by token "
        f"{covered['asymptotic']}, width {np.median(result['asymptotic']):.2f}",
        f">= {least} of {lives}",
        covered["mean"] >= least,
    )


def _covers(values: Any, line: Any) -> tuple[bool, float]:
    sequence, good, at = RunningMean(0.0, RANGE), True, set(LOOKS[::2].tolist()) | {REQUESTS}
    for t, (value, true) in enumerate(zip(values.tolist(), line.tolist(), strict=True), 1):
        sequence = sequence.update(value)
        if t in at:
            result = sequence.get()
            good = good and result.low <= true <= result.high
    return good, result.high - result.low


def _conversations(rate: float, lives: int, seed: int) -> Row:
    rng = np.random.default_rng([seed, round(100 * rate)])
    true, spread = 0.1 * np.exp(0.5 * 0.5**2), 0.5
    covered = {"fresh": 0, "all": 0}
    for _ in range(lives):
        effect = 0.1 * np.exp(spread * rng.standard_normal((CONVERSATIONS, 1)))
        n = rng.integers(40, 201, (CONVERSATIONS, TURNS))
        x = effect * rng.gamma(20.0, 1 / 20.0, (CONVERSATIONS, TURNS)) * n
        scored = rng.random((CONVERSATIONS, TURNS)) < rate
        good = dict.fromkeys(covered, True)
        seen, sequences = SeenUnits(), {"fresh": MeanSequence(), "all": MeanSequence()}
        for conversation in range(CONVERSATIONS):
            record = SimpleNamespace(
                conversation=conversation.to_bytes(8, "big"),
                kind="chat text sampled reply",
                output_ids=NO_PROMPT,
                partial=False,
            )
            for turn in np.flatnonzero(scored[conversation]):
                sums = float(x[conversation, turn]), float(n[conversation, turn])
                sequences["all"] = sequences["all"].update(*sums)
                if seen.update(cast(TokenRecord, record), NO_PROMPT):
                    sequences["fresh"] = sequences["fresh"].update(*sums)
            if conversation % 10 == 9:
                for name, sequence in sequences.items():
                    result = sequence.get(0.0, RANGE)
                    good[name] = good[name] and result.low <= true <= result.high
        for name, hit in good.items():
            covered[name] += hit
    least = least_covered(lives, 0.94)
    return Row(
        f"ten alike turns, rate {rate}: asymptotic interval, conversations as units",
        f"{covered['fresh']} of {lives}; were every turn a unit {covered['all']}",
        f">= {least} of {lives}",
        covered["fresh"] >= least,
    )
