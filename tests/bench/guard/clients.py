"""What one client can do that sends 5 % of the requests.

The others send conversations of 24 turns, of which the first counts in the kind that is judged; the attacker sends
conversations of one turn, so that it has 56 % of the units. Whether a request is sampled, and on which side of the
split
it is, is drawn with a secret: ids that a client chooses play no part, and all units here are held-out ones. Its
prompts are crafted so that its gains are as large as a profile allows (0.95 of a range of 1), of either sign, on
answers of 5 or of 2,000 tokens; or it repeats five such prompts. It knows all decisions, and begins before the others
are met.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import numpy as np
from tests.bench.guard import Row, count_row, median
from tests.bench.guard.traffic import SHARES, WIDTH, Unit, decided, normal, promotions, show, units

from hemostat_calibration.guard.decisions import Action, Admission
from hemostat_calibration.guard.guard import Guard, window_after_promotion

NAME = "clients"
TAKES = "1.5 minutes on one core"

TEST, WATCH = "candidate", "serving"
ATTACKER = b"attacker"
PART = 0.05 / (0.05 + 0.95 / 24)
CAP = 0.25
CRAFTED = 0.95


def rows(lives: int, seed: int) -> Iterator[Row]:
    yield from candidate(lives, np.random.default_rng([seed, 11]))
    yield from serving(lives, np.random.default_rng([seed, 12]))
    yield blocked(lives, np.random.default_rng([seed, 13]))
    yield lost_by_one(lives, np.random.default_rng([seed, 14]))
    yield lost_by_most(lives, np.random.default_rng([seed, 15]))


def attacked(rng: np.random.Generator, mean: float, sign: float, n: int, way: int) -> list[Unit]:
    """Units of which the others' have this mean, and the attacker's the largest gain of this sign.

    way: 0 short answers, 1 long ones, 2 five repeated prompts.
    """
    stream = units(rng, ["A"] * n, normal(rng, mean, n))
    is_attack = rng.random(n) < PART
    tokens = (5, 2000, 2000)[way]
    return [
        replace(
            unit,
            client=ATTACKER,
            gain=sign * CRAFTED,
            tokens=tokens,
            key=b"prompt %d" % (at % 5) if way == 2 else unit.key,
        )
        if attack
        else unit
        for at, (unit, attack) in enumerate(zip(stream, is_attack, strict=True))
    ]


def harmful_promoted(lives: int, rng: np.random.Generator) -> tuple[int, int, tuple[int, int]]:
    """Lives in which a profile is promoted that loses 0.03 for all others; in how many lives the attacker had more than
    its share of the units, rounded up; and the largest number that it had, with all units."""
    promoted, above, largest = 0, 0, (0, 1)
    for life in range(lives):
        guard = Guard(client_share=CAP)
        guard.begin_candidate(TEST, {"A": (WIDTH, 1.0)})
        counted = 0
        for unit in attacked(rng, -0.03, 1.0, 500, life % 3):
            admission, decision = show(guard, TEST, unit)
            counted += unit.client == ATTACKER and admission is Admission.ADMITTED
            if decision is not None and decision.action is Action.PROMOTE:
                promoted += 1
                break
        result = guard.evidence(TEST, "A")
        above += counted > np.ceil(CAP * result.units)
        largest = max(largest, (counted, result.units), key=lambda pair: pair[0] / pair[1])
    return promoted, above, largest


def candidate(lives: int, rng: np.random.Generator) -> Iterator[Row]:
    promoted, above, (most_units, of) = harmful_promoted(lives, rng)
    yield count_row(
        "5 % of the requests, crafted: a profile promoted that loses 0.03 for others", promoted, lives, 0.05
    )
    yield Row("the same: its largest part of the units", f"{most_units} of {of}", "<= 25 %, rounded up", above == 0)


def serving(lives: int, rng: np.random.Generator) -> Iterator[Row]:
    """A good profile that it wants taken back, a useless one that it wants kept, a harmful one that it wants kept."""
    taken_back, kept, needed = 0, 0, []
    for life in range(lives):
        guard = Guard(client_share=CAP)
        guard.begin_candidate(TEST, {"A": (WIDTH, 1.0)})
        promotions(guard, TEST, units(rng, ["A"] * 600, normal(rng, 0.08, 600)))
        window = window_after_promotion(guard.evidence(TEST, "A"))
        guard.begin_watch(WATCH, "A", WIDTH, window, like=TEST)
        stream = attacked(rng, 0.08, -1.0, 3 * window, life % 3)
        taken_back += any(decided(guard, WATCH, unit) is not None for unit in stream)

        guard = Guard(client_share=CAP)
        guard.begin_watch(WATCH, "A", WIDTH, window=300)
        for unit in attacked(rng, 0.0, 1.0, 1500, life % 3):
            # Kept where a second window begins.
            if decided(guard, WATCH, unit) is not None or guard.windows["A"] > 1:
                break
        kept += guard.windows["A"] > 1

        guard = Guard(client_share=CAP)
        guard.begin_watch(WATCH, "A", WIDTH, window=300)
        for unit in attacked(rng, -0.18, 1.0, 900, life % 3):
            if decided(guard, WATCH, unit) is not None:
                break
        needed.append(float(guard.evidence(WATCH, "A").units))
    yield count_row("the same: a profile that gains 0.08, promoted before, taken back", taken_back, lives, 0.05)
    yield count_row("the same: a profile that gains 0 outlasts its window", kept, lives, 0.05)
    yield Row(
        "the same: one that loses 0.18 for others, median units until it is taken back",
        median(needed),
        "<= 120",
        median(needed) <= 120,
    )


def lost_by_one(lives: int, rng: np.random.Generator) -> Row:
    """The busiest client, with 12 % of the traffic, loses so much that the mean over all is just below 0, while all
    others gain."""
    loss = (0.08 * (1.0 - SHARES[0]) + 0.005) / SHARES[0]
    promoted = 0
    for _ in range(lives):
        guard = Guard(client_share=CAP)
        guard.begin_candidate(TEST, {"A": (WIDTH, 1.0)})
        stream = [
            replace(unit, gain=max(unit.gain - 0.08 - loss, -WIDTH)) if unit.client == b"client 0" else unit
            for unit in units(rng, ["A"] * 500, normal(rng, 0.08, 500))
        ]
        promoted += bool(promotions(guard, TEST, stream))
    return count_row("one client of 12 % loses more than all others gain: promoted", promoted, lives, 0.05)


def lost_by_most(lives: int, rng: np.random.Generator) -> Row:
    """One client with 60 % of the traffic loses 0.1, all others gain 0.08: the mean over all is -0.028, and over what
    counts, where its share is limited, above 0."""
    promoted = 0
    for _ in range(lives):
        guard = Guard(client_share=CAP)
        guard.begin_candidate(TEST, {"A": (WIDTH, 1.0)})
        stream = [
            replace(unit, client=b"most", gain=max(unit.gain - 0.18, -WIDTH)) if most else unit
            for unit, most in zip(units(rng, ["A"] * 600, normal(rng, 0.08, 600)), rng.random(600) < 0.6, strict=True)
        ]
        promoted += bool(promotions(guard, TEST, stream))
    return count_row("one client of 60 % loses 0.1, all others gain 0.08: promoted", promoted, lives, 0.05)


def blocked(lives: int, rng: np.random.Generator) -> Row:
    """It wants that a good profile is not promoted. It can: its losses are losses of a part of the traffic."""
    promoted = 0
    for _ in range(lives):
        guard = Guard(client_share=CAP)
        guard.begin_candidate(TEST, {"A": (WIDTH, 1.0)})
        promoted += bool(promotions(guard, TEST, attacked(rng, 0.08, -1.0, 800, 0)))
    return Row(
        "the same: a profile that gains 0.08 for others, promoted against its losses",
        f"{promoted} of {lives}",
        "not promised: one client can prevent it",
        True,
    )
