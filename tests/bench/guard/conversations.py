"""Turns of one conversation are alike: it is one observation, and it is either learned from or judged by."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import numpy as np
from tests.bench.guard import Row, count_row
from tests.bench.guard.traffic import WIDTH, Floats, Unit, draw_clients, promotions

from hemostat_calibration.guard.guard import Guard
from hemostat_calibration.statistics.confidence import MeanSequence
from hemostat_calibration.statistics.running_mean import RunningMean
from hemostat_calibration.statistics.split import held_out

NAME = "conversations"
TAKES = "1.5 minutes on one core"

TEST = "candidate"
HELD_OUT = 0.3
LEARNED_GAIN, NEW_GAIN = 0.054, -0.038


def rows(lives: int, seed: int) -> Iterator[Row]:
    yield from peculiar(lives, np.random.default_rng([seed, 31]))
    for rate in (0.05, 0.25, 1.0):
        yield from alike(rate, lives, np.random.default_rng([seed, 32, round(100 * rate)]))


def turns(
    rng: np.random.Generator, effects: Floats, per_conversation: int, noise: float, rate: float
) -> Iterator[tuple[int, Unit]]:
    """Sampled turns with the number of their conversation; conversations run beside each other, 20 at a time.

    effects: [C], mean of each conversation's gains.
    """
    clients = draw_clients(rng, len(effects))
    for start in range(0, len(effects), 20):
        group = np.repeat(np.arange(start, min(start + 20, len(effects))), per_conversation)
        rng.shuffle(group)
        group = group[rng.random(len(group)) < rate]
        gains = np.clip(effects[group] + rng.normal(0.0, noise, len(group)), -WIDTH, WIDTH).tolist()
        for conversation, gain in zip(group.tolist(), gains, strict=True):
            yield conversation, Unit("A", conversation.to_bytes(8, "big"), clients[conversation], gain)


def peculiar(lives: int, rng: np.random.Generator) -> Iterator[Row]:
    """60 conversations of 24 turns each, again and again. A profile has learned what is peculiar to those that it has
    seen: it gains 0.054 there, and loses 0.038 on all others. By turn, as it once was, a conversation is on both
        sides."""
    promoted, by_turn = 0, 0
    for _ in range(lives):
        salt = rng.bytes(8)
        keys = [salt + n.to_bytes(4, "big") for n in range(60)]
        judged = np.array([held_out(key, HELD_OUT) for key in keys])
        effects = np.where(judged, NEW_GAIN, LEARNED_GAIN) + rng.normal(0.0, 0.05, 60)
        # As it once was: something of every conversation was learned.
        leaked = np.full(60, LEARNED_GAIN) + rng.normal(0.0, 0.05, 60)
        guard, old = Guard(), Guard()
        for each in (guard, old):
            each.begin_candidate(TEST, {"A": (WIDTH, 1.0)})
        stream = [unit for c, unit in turns(rng, effects, 24, 0.05, 1.0) if judged[c]]
        promoted += bool(promotions(guard, TEST, stream))
        as_turns = [
            replace(unit, key=b"%d" % at) for at, (_, unit) in enumerate(turns(rng, leaked, 24, 0.05, HELD_OUT))
        ]
        by_turn += bool(promotions(old, TEST, as_turns))
    yield count_row("24 turns, +0.054 where learned, -0.038 elsewhere: promoted", promoted, lives, 0.05)
    yield Row(
        "the same, split and counted by turn: promoted",
        f"{by_turn} of {lives}",
        "for comparison: the rule before",
        True,
    )


def alike(rate: float, lives: int, rng: np.random.Generator) -> Iterator[Row]:
    """Ten turns that differ little within a conversation; conversations have a mean of 0 and a spread of 0.2."""
    conversations = 250
    promoted, by_turn, covered, wide = 0, 0, 0, 0
    for _ in range(lives):
        effects = rng.normal(0.0, 0.2, conversations)
        guard, old = Guard(), Guard()
        for each in (guard, old):
            each.begin_candidate(TEST, {"A": (WIDTH, 1.0)})
        stream = [unit for _, unit in turns(rng, effects, 10, 0.02, rate)]
        promoted += bool(promotions(guard, TEST, stream))
        by_turn += bool(promotions(old, TEST, [replace(unit, key=b"%d" % at) for at, unit in enumerate(stream)]))
        inside, finite = coverage(stream)
        covered += inside
        wide += finite
    words = f"ten alike turns at rate {rate}"
    yield count_row(f"{words}: null promoted", promoted, lives, 0.05)
    yield Row(
        f"{words}, counted by turn: null promoted", f"{by_turn} of {lives}", "for comparison: the rule before", True
    )
    for name, count in (("asymptotic", covered), ("finite-sample", wide)):
        yield Row(
            f"{words}: {name} interval holds at every look", f"{count} of {lives}", ">= 94 %", count >= 0.94 * lives
        )


def coverage(stream: list[Unit]) -> tuple[bool, bool]:
    """Whether the two intervals of the mean contain 0 at every look, each conversation counted once."""
    sequence, running, seen = MeanSequence(), RunningMean(-WIDTH, WIDTH), set()
    both = [True, True]
    for unit in stream:
        if unit.key in seen:
            continue
        seen.add(unit.key)
        sequence, running = sequence.update(unit.gain, 1.0), running.update(unit.gain)
        if len(seen) % 10 == 0:
            for at, interval in enumerate((sequence.get(), running.get())):
                both[at] &= interval.low <= 0.0 <= interval.high
    return both[0], both[1]
