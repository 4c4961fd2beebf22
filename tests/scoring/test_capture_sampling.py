"""What relays sample, as the traffic and the reference's speed change: a simulated queue and its workers."""

from __future__ import annotations

from dataclasses import dataclass, field

import pytest

from hemostat.scoring.limits import FILL_SECONDS, MIN_CAPTURES_PER_SECOND, CaptureSampling

LIMIT = 256
LOOK = 0.5
"""Seconds between two looks."""


@dataclass
class World:
    """would_come: captures per second with the fraction 1. capacity: what the reference scores in a second. scorable:
    part of the requests that can become captures at all."""

    would_come: float
    capacity: float
    scorable: float = 1.0
    workers: int = 2
    now: float = 0.0
    queued: float = 0.0
    sampling: CaptureSampling = field(init=False)
    sent: float = 0.0
    scored: float = 0.0
    dropped: float = 0.0

    def __post_init__(self) -> None:
        self.sampling = CaptureSampling(self.workers, LIMIT)
        self._due = 0.0

    def run(self, seconds: float, *, scoring: bool = True) -> World:
        """Counts of these seconds alone."""
        self.sent = self.scored = self.dropped = 0.0
        for _ in range(round(seconds / LOOK)):
            self.now += LOOK
            expected = self.would_come / self.scorable
            self.sampling.update(expected, self.queued / LIMIT, self.now, scoring=scoring)
            if not scoring:
                continue
            self._due += self.would_come * self.sampling.fraction * LOOK
            came, self._due = int(self._due), self._due % 1.0
            for _ in range(min(came, 10_000)):
                self.sampling.received()
            self.sent += came
            self.queued += came
            self.dropped += max(0.0, self.queued - LIMIT)
            self.queued = min(self.queued, LIMIT)
            done = min(self.queued, self.capacity * LOOK)
            self.queued -= done
            self.scored += done
            for _ in range(min(round(done), 100)):
                self.sampling.taken(self.workers / self.capacity)
        return self


def test_what_can_be_scored_is_sampled_wholly() -> None:
    world = World(would_come=8.0, capacity=10.0).run(600)
    assert world.sampling.fraction == 1.0
    assert world.dropped == 0.0


def test_a_burst_that_the_queue_holds_is_sampled_wholly() -> None:
    """However slow the reference is."""
    world = World(would_come=0.0, capacity=0.5).run(60)
    world.would_come = 20.0
    world.run(7)
    assert world.sampling.fraction == 1.0
    assert world.dropped == 0.0


@pytest.mark.parametrize("scorable", [1.0, 0.01])
@pytest.mark.parametrize("times", [2, 100, 10_000])
def test_what_is_sent_is_what_can_be_scored_and_the_reference_does_not_wait(times: int, scorable: float) -> None:
    world = World(would_come=5.0 * times, capacity=5.0, scorable=scorable)
    world.run(10, scoring=False)
    world.run(300)
    world.run(600)
    assert world.sent <= 1.1 * world.scored
    assert world.scored >= 0.9 * 600 * world.capacity
    assert world.dropped <= 0.02 * world.sent


def test_a_surge_sends_little_more_than_the_queue_holds() -> None:
    world = World(would_come=2.0, capacity=5.0).run(300)
    world.would_come = 20_000.0
    world.run(5)
    assert world.sent <= 20_000.0 * LOOK + 3 * LIMIT, "what comes before the next look, and little more"
    world.run(120)
    assert world.run(300).dropped <= 0.02 * world.sent


def test_a_faster_reference_gets_more_and_a_slower_one_less() -> None:
    world = World(would_come=1000.0, capacity=5.0).run(300)
    world.capacity = 20.0
    world.run(200)
    assert world.run(300).scored >= 0.9 * 300 * 20.0
    world.capacity = 2.0
    world.run(300)
    assert world.run(300).sent <= 1.1 * 300 * 2.0


def test_a_reference_that_never_answers_is_still_tried() -> None:
    world = World(would_come=1000.0, capacity=1e-9).run(600)
    world.run(600)
    assert world.sent <= 600 * 2 * MIN_CAPTURES_PER_SECOND + LIMIT
    assert world.sampling.fraction > 0.0


def test_while_nothing_is_scored_the_part_is_ready_for_when_it_will_be() -> None:
    world = World(would_come=10_000.0, capacity=5.0).run(60, scoring=False)
    assert world.sampling.fraction * 10_000.0 <= LIMIT / FILL_SECONDS
