"""Rows of what serves, where units depend on each other: how often a profile that does no harm is taken back.

The worlds are the ones of `dependence`, with `cycle_hours: 0`: `FEW` units are known before the test begins, `PROOF`
gains were the proof, and then `UNITS` units of gain 0, or a little above 0, are watched. All pass `Guard`, which
decides at every `EVERY`-th of them. Only lives that are taken back with units taken for independent are simulated so:
the evidence with a larger v̂ is never above that evidence where the latter is above 1.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np
from tests.bench.guard import Row, count_row
from tests.bench.guard.dependence import (
    FEW,
    GAINS_ALONE,
    LATE_TEMPLATES,
    NEEDED,
    NULLS,
    SHORT,
    UNTUNED,
    Stream,
    World,
    late_worlds,
)
from tests.bench.guard.traffic import WIDTH

from hemostat_calibration.guard.decisions import Reason
from hemostat_calibration.guard.guard import Guard
from hemostat_calibration.guard.harm import HarmSum

NAME = "serving"
TAKES = "20 minutes on one core (a tenth of the lives)"

UNITS = 1000
PROOF = 42
"""The gains of the proof: about the median of a gain of 0.15."""
PROVEN_GAIN = 0.25
EVERY = 5
TOKENS = 512
"""The tokens of a unit: so many that the harm by token is the harm by unit."""
GAINS = (0.0, 0.02)
WORLDS: dict[str, World] = {
    **{
        name: NULLS[name][0] for name in ("independent", "runs of 3 by one client", "runs of 20", "day and night ± 0.1")
    },
    **SHORT,
    "one of 20 units loses 0.95": UNTUNED["one of 20 units loses 0.95"],
    **late_worlds(FEW),
    "runs of 30 of the gains alone": GAINS_ALONE["runs of 30 of the gains alone"][0],
}
NOT_COVERED = ("runs of 30 of the gains alone", LATE_TEMPLATES)
"""Worlds in which neither what is noted nor a proof of `PROOF` gains tells how much gains depend on each other."""


def taken_for_independent(gains: np.ndarray, clients: np.ndarray) -> int | None:
    """Returns the number of units after which the evidence of harm, with v̂ = 1, would take a profile back; None if it
    never does."""
    harm = HarmSum(1)
    for at, (gain, client) in enumerate(zip(gains.tolist(), clients.tolist(), strict=True), start=1):
        harm.update(b"client %d" % client, -gain, -gain)
        if harm.reaches(NEEDED, 1.0):
            return at
    return None


def taken_back(gains: np.ndarray, figure: np.ndarray, clients: np.ndarray, mean: float) -> tuple[bool, bool]:
    """Returns if one life is taken back for harm with v̂ = 1, and if the guard takes it back."""
    begins = FEW + PROOF
    served = np.clip(gains + mean, -WIDTH, WIDTH)
    suspect = taken_for_independent(served[begins:], clients[begins:])
    if suspect is None:
        return False, False
    guard = Guard(client_share=1.0)
    guard.begin_candidate("test", {"kind": (WIDTH, 1.0)})
    for at in range(len(gains)):
        client = b"client %d" % clients[at]
        guard.update_dependence("kind", client, float(figure[at]))
        if FEW <= at < begins:
            gain = float(np.clip(gains[at] + PROVEN_GAIN, -WIDTH, WIDTH))
            guard.update("test", "kind", b"", client, gain, gain, TOKENS)
        elif at >= begins:
            if at == begins:
                guard.begin_watch("serving", "kind", WIDTH, 2 * UNITS, like="test")
            guard.update("serving", "kind", b"", client, float(served[at]), float(served[at]), TOKENS)
            units = at - begins + 1
            if units >= suspect and units % EVERY == 0 and guard.decide("serving", "kind").reason is Reason.HARM:
                return True, True
    return True, False


def lives_of(world: World, lives: int, rng: np.random.Generator, mean: float) -> tuple[int, int]:
    """Returns the lives that are taken back for harm: with v̂ = 1, and by the guard."""
    stream: Stream = world(rng, FEW + PROOF + UNITS, lives)
    each = [
        taken_back(stream.gains[:, life], stream.figure[:, life], stream.clients[:, life], mean)
        for life in range(lives)
    ]
    return sum(independent for independent, _ in each), sum(back for _, back in each)


def rows(lives: int, seed: int) -> Iterator[Row]:
    lives = math.ceil(lives / 10)
    for number, (name, world) in enumerate(WORLDS.items()):
        for mean in GAINS:
            independent, back = lives_of(world, lives, np.random.default_rng([seed, 85, number]), mean)
            case = f"a profile of gain {mean} serves, {name}: taken back for harm"
            if name in NOT_COVERED:
                limit = f"for comparison: the gains alone depend; with v taken for 1 {independent}"
                yield Row(case, f"{back} of {lives}", limit, True)
            else:
                yield count_row(case, back, lives, 0.05)
