"""When lost answers make relays ask for logprobs in the response, and when the plugin is asked again."""

from __future__ import annotations

import random
from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.support.memory import kept_bytes

from hemostat.scoring.answer_losses import (
    MAX_ENGINES,
    MAX_LOST,
    PAUSE_SECONDS,
    RECENT_ANSWERS,
    AnswerLosses,
)

DAY = 86_400.0


class World:
    """Answers of sampled requests, one every `seconds`, of `engines` in turn."""

    def __init__(self, seconds: float, engines: int = 1, seed: int = 0) -> None:
        self.losses = AnswerLosses()
        self.seconds, self.engines = seconds, engines
        self.draw = random.Random(seed)
        self.now = 0.0
        self.pauses: list[float] = []
        """When each began."""
        self.lost = self.asked = self.requests = 0

    def run(self, until: float, share: Callable[[int], float]) -> None:
        """share: of an engine's answers that are lost."""
        while self.now < until:
            self.now += self.seconds
            self.requests += 1
            if self.losses.paused(self.now):
                continue
            engine = self.requests % self.engines
            lost = self.draw.random() < share(engine)
            self.asked += 1
            self.lost += lost
            if self.losses.update(str(engine), self.now, lost=lost):
                self.pauses.append(self.now)


def test_where_nothing_comes_ten_requests_are_lost_before_the_response_is_asked() -> None:
    world = World(seconds=1.0)
    world.run(PAUSE_SECONDS[0], lambda _: 1.0)
    assert (world.lost, world.asked, world.pauses) == (MAX_LOST, MAX_LOST, [float(MAX_LOST)])
    # Each further pause is twice as long.
    world.run(DAY, lambda _: 1.0)
    lengths = [b - a for a, b in zip(world.pauses, world.pauses[1:], strict=False)]
    assert lengths[:3] == pytest.approx(PAUSE_SECONDS[:3], abs=2 * MAX_LOST)
    assert max(lengths) == pytest.approx(PAUSE_SECONDS[-1], abs=2 * MAX_LOST)
    assert world.lost / world.requests < 0.002


def test_little_traffic_loses_few_of_its_requests() -> None:
    world = World(seconds=60.0)
    world.run(30 * DAY, lambda _: 1.0)
    assert world.lost / world.requests < 0.06


def test_a_loss_of_one_in_twenty_hardly_ever_ends_it() -> None:
    """100 worlds of 1,000 answers: at most 3 of them pause."""
    worlds = [World(seconds=1.0, seed=seed) for seed in range(100)]
    for world in worlds:
        world.run(1000.0, lambda _: 0.05)
    assert sum(bool(world.pauses) for world in worlds) <= 3


def test_a_loss_of_a_third_ends_it_within_a_hundred_answers() -> None:
    for seed in range(100):
        world = World(seconds=1.0, seed=seed)
        world.run(100.0, lambda _: 1 / 3)
        assert world.pauses, seed


def test_one_engine_of_ten_that_hands_out_nothing_is_noticed() -> None:
    world = World(seconds=1.0, engines=10)
    world.run(200.0, lambda engine: float(engine == 3))
    assert (world.lost, len(world.pauses)) == (MAX_LOST, 1)


def test_once_answers_come_again_the_next_pause_is_a_short_one() -> None:
    world = World(seconds=1.0)
    world.run(4 * PAUSE_SECONDS[0], lambda _: 1.0)
    assert len(world.pauses) > 1
    repaired = world.now + 8 * PAUSE_SECONDS[0]
    world.run(repaired, lambda _: 0.0)
    assert not world.losses.paused(world.now)
    before = len(world.pauses)
    world.run(repaired + 2 * MAX_LOST, lambda _: 1.0)
    assert len(world.pauses) == before + 1
    assert not world.losses.paused(world.pauses[-1] + PAUSE_SECONDS[0])


def test_engines_are_bounded() -> None:
    losses, kept = AnswerLosses(), []
    for n in range(3 * MAX_ENGINES):
        losses.update(str(n), 0.0, lost=True)
        kept.append(kept_bytes(losses))
    assert kept[-1] < 1.1 * kept[MAX_ENGINES]


@given(st.lists(st.tuples(st.sampled_from("ab"), st.booleans(), st.floats(0.0, 900.0)), max_size=200))
def test_it_pauses_exactly_where_ten_of_an_engines_last_fifty_were_lost(
    events: list[tuple[str, bool, float]],
) -> None:
    losses, now, begun = AnswerLosses(), 0.0, 0.0
    recent: dict[str, list[bool]] = {"a": [], "b": []}
    for engine, lost, seconds in events:
        now += seconds
        if losses.paused(now):
            assert now - begun < PAUSE_SECONDS[-1]
            assert not losses.update(engine, now, lost=lost)
            continue
        recent[engine].append(lost)
        expected = sum(recent[engine][-RECENT_ANSWERS:]) >= MAX_LOST
        assert losses.update(engine, now, lost=lost) == losses.paused(now) == expected
        if expected:
            recent, begun = {"a": [], "b": []}, now
