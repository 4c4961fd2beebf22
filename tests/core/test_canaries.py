"""The test of canaries: who is called changed, who never is, and which sets are refused."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

import numpy as np
import pytest

from hemostat_calibration.arrays import Floats
from hemostat_calibration.canaries import (
    ALPHA_PER_YEAR,
    REPLAYS_PER_YEAR,
    Canary,
    CanarySet,
    Origin,
    shortest,
    votes_needed,
)
from hemostat_calibration.errors import InvalidArgumentError

LENGTHS = [20, 30, 45, 300] * 10
NOISE = 0.02


def canaries(lengths: list[int] = LENGTHS) -> tuple[Canary, ...]:
    return tuple(Canary("chat", np.arange(n - 8, dtype=np.int32), np.arange(8, dtype=np.int32)) for n in lengths)


class World:
    """An engine whose replays differ by noise with heavy tails."""

    def __init__(self, seed: int = 0, noise: float = NOISE) -> None:
        self.rng = np.random.default_rng(seed)
        self.noise = noise
        self.true = -self.rng.exponential(2.0, sum(canary.scored for canary in canaries()))
        self.taken = CanarySet(canaries(), np.stack([self.replay() for _ in range(4)]), Origin("m"))

    def replay(self, shift: float | Floats = 0.0, noise: float | None = None) -> Floats:
        size = len(self.true)
        jitter = self.rng.standard_t(3, size) * (self.noise if noise is None else noise)
        return self.true + jitter + shift * self.rng.choice([-1.0, 1.0], size)


def test_an_unchanged_engine_has_few_votes_and_no_year_of_it_reaches_the_threshold() -> None:
    votes = []
    for seed in range(40):
        world = World(seed)
        votes += [world.taken.compare(world.replay(), 0.0).votes for _ in range(10)]
    # Each sequence votes with a probability of 1 / 5.
    assert 0.15 < np.mean(votes) / len(LENGTHS) < 0.25
    assert max(votes) < votes_needed(len(LENGTHS), 4)


def same_token_sets(count: int, draw: Callable[[tuple[int, int]], Floats]) -> Iterator[tuple[Floats, CanarySet]]:
    """Sets of sequences of one scored token, whose noise nothing averages, and six replays of each; of four of them
    the set is made."""
    sequences = tuple(Canary("", np.zeros(1, np.int32), np.zeros(1, np.int32)) for _ in range(100))
    for _ in range(count):
        replays = draw((6, len(sequences)))
        yield replays, CanarySet(sequences, replays[:4], Origin("m"))


def test_a_sequence_of_an_unchanged_engine_votes_in_at_most_a_fifth_of_replays_whatever_the_noise() -> None:
    rng = np.random.default_rng(0)
    for draw in (rng.standard_normal, rng.standard_cauchy):
        votes = [taken.compare(replays[4], 0.0).votes for replays, taken in same_token_sets(400, draw)]
        assert 0.05 < np.mean(votes) / 100 < 0.2 + 0.01  # 5 standard errors


def test_two_equal_engines_differ_in_at_most_a_third_of_sequences_and_the_votes_needed_are_for_that() -> None:
    rng = np.random.default_rng(0)
    shares = []
    for replays, taken in same_token_sets(400, lambda shape: np.exp(3.0 * rng.standard_normal(shape))):
        comparison = taken.compare_engines({"a": replays[4], "b": replays[5]}, 0.0)["a"]
        assert comparison.needed > votes_needed(100, 2) > taken.needed
        shares.append(comparison.votes / 100)
    assert 0.28 < np.mean(shares) < 1 / 3 + 0.01


NOISES: dict[str, Callable[[np.random.Generator, tuple[int, int]], Floats]] = {
    "normal": lambda rng, shape: rng.standard_normal(shape),
    "heavy tails": lambda rng, shape: rng.standard_cauchy(shape),
    "one side, each far beyond the next": lambda rng, shape: np.exp(9.0 * rng.standard_normal(shape)),
    "two modes, as of two kernels": lambda rng, shape: (rng.random(shape) < 0.2) + 1e-3 * rng.standard_normal(shape),
    "three modes": lambda rng, shape: rng.integers(0, 3, shape) + 1e-3 * rng.standard_normal(shape),
}


@pytest.mark.parametrize("noise", NOISES)
@pytest.mark.parametrize("engines", [2, 3, 4, 8, 12])
def test_engines_that_are_equal_vote_against_each_other_in_at_most_a_third_of_sequences(
    noise: str, engines: int
) -> None:
    """Proven for two and three engines."""
    rng = np.random.default_rng(0)
    sequences = tuple(Canary("", np.zeros(1, np.int32), np.zeros(1, np.int32)) for _ in range(100))
    votes = compared = 0
    for _ in range(100):
        replays = NOISES[noise](rng, (4 + engines, len(sequences)))
        taken = CanarySet(sequences, replays[:4], Origin("m"))
        found = taken.compare_engines({str(n): replay for n, replay in enumerate(replays[4:])}, 0.0)
        votes += sum(comparison.votes for comparison in found.values())
        compared += len(found) * len(sequences)
    # The engines of a sequence share its baseline, so that the sequences are what is independent.
    assert votes / compared < 1.0 / 3.0 + 5.0 * math.sqrt(2.0 / 9.0 / (100 * len(sequences)))


@pytest.mark.parametrize("sequences", [16, 20, 50, 100])
@pytest.mark.parametrize("engines", [2, 8, 64])
def test_all_comparisons_of_an_engine_in_a_year_err_with_one_percent_in_all(sequences: int, engines: int) -> None:
    """The engines are compared again after the replay of each."""
    replays = np.random.default_rng(0).standard_normal((4 + engines, sequences))
    short = tuple(Canary("", np.zeros(1, np.int32), np.zeros(1, np.int32)) for _ in range(sequences))
    taken = CanarySet(short, replays[:4], Origin("m"))
    compared = taken.compare_engines({str(n): replay for n, replay in enumerate(replays[4:])})
    for needed, chance, times in (
        (taken.needed, 1 / 5, 1),
        (compared["0"].needed, 1 / 3, engines),
    ):
        tail = sum(
            math.comb(sequences, k) * chance**k * (1 - chance) ** (sequences - k) for k in range(needed, sequences + 1)
        )
        assert tail * REPLAYS_PER_YEAR * times <= ALPHA_PER_YEAR
    too_few = (1 / 3) ** sequences * REPLAYS_PER_YEAR * engines > ALPHA_PER_YEAR
    assert (compared["0"].needed > sequences) == too_few


def test_the_threshold_is_the_smallest_that_keeps_a_year_of_replays_within_one_percent() -> None:
    def tail(count: int) -> float:
        return sum(math.comb(50, k) * 0.2**k * 0.8 ** (50 - k) for k in range(count, 51))

    needed = votes_needed(50, 4)
    assert tail(needed) * REPLAYS_PER_YEAR <= ALPHA_PER_YEAR < tail(needed - 1) * REPLAYS_PER_YEAR


@pytest.mark.parametrize("shift", [2.5 * NOISE, 0.3])
def test_a_shift_above_the_noise_is_found_at_the_first_replay(shift: float) -> None:
    for seed in range(10):
        world = World(seed)
        assert world.taken.compare(world.replay(shift), 0.0).changed


def test_a_few_sequences_that_are_far_away_are_no_change() -> None:
    world = World()
    shift = np.zeros(len(world.true))
    shift[:200] = 5.0
    comparison = world.taken.compare(world.replay(shift), 0.0)
    assert 3 <= comparison.votes < comparison.needed
    assert comparison.nats < 2 * NOISE


def test_differences_within_the_tolerance_are_none() -> None:
    world = World(noise=0.0)  # an engine that computes the same to the last bit
    now = world.replay(0.008)
    assert world.taken.compare(now, 0.0).votes == len(LENGTHS)
    assert world.taken.compare(now, 0.01).votes == 0


@pytest.mark.parametrize("engines", [3, 4, 5])
def test_the_engine_that_differs_from_the_others_is_named_whatever_all_were_before(engines: int) -> None:
    world = World()
    moved = world.true + 0.5 * world.rng.choice([-1.0, 1.0], len(world.true))  # all run another version than then
    replays = {f"engine {n}": moved + world.rng.standard_t(3, len(moved)) * NOISE for n in range(engines)}
    replays["engine 2"] = replays["engine 2"] + world.rng.choice([-0.08, 0.08], len(moved))
    comparisons = world.taken.compare_engines(replays)
    assert [name for name, comparison in comparisons.items() if comparison.changed] == ["engine 2"]


def test_of_two_engines_that_differ_both_are_named_and_one_alone_is_not_compared() -> None:
    world = World()
    comparisons = world.taken.compare_engines({"a": world.replay(), "b": world.replay(0.2)})
    assert [comparison.changed for comparison in comparisons.values()] == [True, True]
    assert world.taken.compare_engines({"a": world.replay(0.2)}) == {}
    alike = world.taken.compare_engines({"a": world.replay(), "b": world.replay()})
    assert not any(comparison.changed for comparison in alike.values())


def test_the_distance_from_the_reference_is_that_of_then_and_of_now() -> None:
    world = World(noise=0.0)
    taken = CanarySet(world.taken.canaries, world.taken.baseline, Origin("m"), world.true - 0.25)
    assert world.taken.from_reference(world.true) is None
    assert taken.from_reference(world.true + 0.5) == pytest.approx((0.25, 0.75))


def test_an_adapter_gets_the_shortest_sequences() -> None:
    chosen = shortest(canaries())
    assert len(chosen) == 20
    assert max(canary.tokens for canary in chosen) <= 31


def test_a_set_is_read_as_it_was_written() -> None:
    world = World()
    read = CanarySet.from_bytes(world.taken.to_bytes())
    assert read.origin == world.taken.origin
    assert [canary.ids for canary in read.canaries] == [canary.ids for canary in world.taken.canaries]
    assert np.array_equal(read.baseline, world.taken.baseline)


def test_a_set_that_an_earlier_version_stored_is_read() -> None:
    data = World().taken.to_bytes().replace(b'"schema":7', b'"schema":3')
    data = data.replace(b',"decoded":false', b"").replace(b',"texts":null', b"").replace(b',"cached":0', b"")
    assert not CanarySet.from_bytes(data).decoded
    data = data.replace(b'"schema":3', b'"schema":2').replace(b',"conditions":[]', b"")
    assert CanarySet.from_bytes(data).conditions == ()


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (lambda data: data[:-200], "not a stored CanarySet"),
        (lambda data: b"", "not a stored CanarySet"),
        (lambda data: data.replace(b'"schema":7', b'"schema":9'), "has schema 9"),
        (lambda data: data.replace(b'"model"', b'"modul"'), "CanarySet.origin.model is missing"),
    ],
)
def test_a_damaged_set_is_one_line(change: object, text: str) -> None:
    with pytest.raises(InvalidArgumentError, match=text) as caught:
        CanarySet.from_bytes(change(World().taken.to_bytes()))  # type: ignore[operator]
    assert "\n" not in str(caught.value)


def test_sets_that_can_say_nothing_are_refused() -> None:
    few, long = canaries([30] * 15), canaries([300] * 17)
    for sequences, text in ((few, "15 canaries"), (long, "5117 tokens")):
        with pytest.raises(InvalidArgumentError, match=text):
            CanarySet(sequences, np.zeros((4, sum(canary.scored for canary in sequences))), Origin("m"))
    good = canaries([30] * 16)
    for baseline in (np.zeros((4, 7)), np.full((4, 464), np.nan), np.zeros((1, 464))):
        with pytest.raises(InvalidArgumentError, match="baseline is no table of 464"):
            CanarySet(good, baseline, Origin("m"))
    with pytest.raises(InvalidArgumentError, match="too few for a statement"):
        votes_needed(16, 1)
