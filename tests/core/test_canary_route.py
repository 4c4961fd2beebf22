"""Canaries through a route: which engine is called changed, and that none is that has not."""

from __future__ import annotations

import numpy as np

from hemostat_calibration.arrays import Floats
from hemostat_calibration.canaries import Canary, CanarySet, Origin, votes_needed
from hemostat_calibration.canary_route import Routed, compare_routed, far_parts

TOKENS = 40
SEQUENCES = 48
NOISE = 0.02


class World:
    """Engines that serve the same, whose kernels switch between two modes, with noise with heavy tails."""

    def __init__(self, seed: int) -> None:
        self.rng = np.random.default_rng(seed)
        sequences = tuple(Canary("", np.zeros(TOKENS - 8, np.int32), np.zeros(9, np.int32)) for _ in range(SEQUENCES))
        self.modes = self.rng.normal(0.0, 0.02, (2, SEQUENCES, TOKENS))
        # Each baseline replay is in one of the modes as a whole.
        self.taken = CanarySet(sequences, np.stack([self.replay(n % 2).ravel() for n in range(4)]), Origin("m"))

    def replay(self, mode: int) -> Floats:
        noise: Floats = self.rng.standard_t(3, (SEQUENCES, TOKENS)) * NOISE
        return self.modes[mode] + noise

    def routed(self, engines: int, shift: float = 0.0) -> list[Routed]:
        """Answers by engines in turn, each request in a mode of its own; the first engine's tokens are shifted."""
        signs = self.rng.choice([-1.0, 1.0], (SEQUENCES, TOKENS))
        answers = []
        for n in self.rng.permutation(SEQUENCES).tolist():
            engine = len(answers) % engines
            values = self.replay(int(self.rng.integers(2)))[n] + (shift * signs[n] if not engine else 0.0)
            answers.append(Routed(n, str(engine), values))
        return answers


def test_a_request_of_an_unchanged_engine_votes_in_at_most_a_fifth_whichever_engine_and_mode_it_meets() -> None:
    votes, changed, far = 0, 0, 0
    for seed in range(24):
        world = World(seed)
        answers = world.routed(3)
        found = compare_routed(world.taken, answers, 0.0)
        votes += sum(comparison.votes for comparison in found.values())
        changed += sum(comparison.changed for comparison in compare_routed(world.taken, answers).values())
        far += sum(far_parts(world.taken, answer) for answer in answers)
    assert 0.1 < votes / (24 * SEQUENCES) < 0.2 + 0.036  # 3 standard errors
    assert (changed, far) == (0, 0)


def test_the_engine_that_differs_is_found_by_its_own_requests_and_the_others_are_not() -> None:
    found = [compare_routed(world.taken, world.routed(3, 0.2)) for world in map(World, range(20))]
    assert sum(each["0"].changed for each in found) == 20
    assert not any(each[name].changed for each in found for name in "12")


def test_where_engines_are_not_told_apart_a_small_change_of_one_of_three_is_lost_and_a_large_one_is_not() -> None:
    def together(shift: float) -> int:
        worlds = map(World, range(20))
        answers = [[Routed(a.sequence, "", a.values) for a in w.routed(3, shift)] for w in worlds]
        worlds = map(World, range(20))
        return sum(compare_routed(w.taken, each)[""].changed for w, each in zip(worlds, answers, strict=True))

    assert (together(0.1), together(0.4)) == (0, 20)


def test_an_engine_with_too_few_sequences_for_votes_is_judged_by_parts_that_are_far_away() -> None:
    world = World(0)
    answers = [answer for answer in world.routed(8, 1.0) if answer.engine == "0"]
    few = compare_routed(world.taken, answers[:4])["0"]
    assert few.needed == 5
    assert few.changed
    assert not compare_routed(world.taken, answers[:1])["0"].changed
    assert votes_needed(9, 4) == 9
