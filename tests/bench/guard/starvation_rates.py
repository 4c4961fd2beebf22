"""Lives with builds of an adapter at any rate, in traffic of any rate: is a good one starved?

Of each life are drawn the tokens of a request, the kinds of traffic, the requests a second and the time between two
builds. Each life is simulated twice with the same requests: with these builds, and with the first one alone. Nothing is
asked of the learner, which makes no build while one is tested: builds are proposed whenever their time has come.

Each life is written to a file as soon as it is over, so that an interrupted run goes on from there. The lives of other
code are left out.
"""

from __future__ import annotations

import json
import math
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from tests.bench.guard import Row, digest, median
from tests.bench.guard.builds import STARVED, Traffic

KINDS = (1, 4, 12)
TOKENS = (40.0, 3_000.0)
EVERY_SECONDS = (300.0, 86_400.0)
PER_SECOND = (1.0 / 3600.0, 50.0)
MAX_PER_SECOND_IN_CYCLES = 1.0 / 20.0
"""The largest number of scored requests a second of lives whose traffic has a cycle: two days have 8,640 of them."""
IN_CYCLES_EVERY = 4
"""One of so many lives has a cycle of a day, as by default. Nothing is promoted in the first two of them."""
MAX_REQUESTS = 6_000
"""The number of requests after which a life ends; the requests of two cycles are added to it."""


@dataclass(frozen=True, slots=True)
class Life:
    """One life. alone, replaced: the requests from the first build until the first promotion, without further builds
    and with them; None if there was no promotion."""

    number: int
    tokens: int
    kinds: int
    per_second: float
    every_seconds: float
    cycle_hours: float
    alone: int | None
    replaced: int | None
    builds: int

    @property
    def cell(self) -> tuple[int, float, int]:
        """The lives that are compared with each other: of as many kinds, and, since a cycle is a time, of a rate of the
        same power of ten."""
        return self.kinds, self.cycle_hours, math.floor(math.log10(self.per_second)) if self.cycle_hours else 0


class TimedBuilds(Traffic):
    """Traffic in which a build is proposed after each `every_seconds`; inf: the first one only."""

    def __init__(
        self,
        rng: np.random.Generator,
        tokens: int,
        kinds: int,
        *,
        per_second: float,
        every_seconds: float,
        cycle_hours: float = 0.0,
    ) -> None:
        super().__init__(rng, tokens, kinds, cycle_hours=cycle_hours, seconds=1.0 / per_second)
        self._every_seconds, self._due = every_seconds, 0.0
        self.first_build: int | None = None
        """The number of requests before the first build."""

    def _build(self) -> None:
        if self._known < self._next or self.bench.time < self._due:
            return
        if self.first_build is None:
            self.first_build = self.requests
        # Builds that came between two requests are one: only the newest waits.
        self._due = self.bench.time + self._every_seconds
        self._propose()

    @property
    def took(self) -> int | None:
        """The requests from the first build until the first promotion."""
        if self.first_build is None or not self.promoted:
            return None
        return min(self.promoted.values()) - self.first_build


def between(rng: np.random.Generator, ends: tuple[float, float]) -> float:
    """Draws a number between both ends, of uniform logarithm."""
    return float(np.exp(rng.uniform(*np.log(ends))))


def live(seed: int, number: int) -> Life:
    rng = np.random.default_rng([seed, 11, number])
    in_cycles = number % IN_CYCLES_EVERY == IN_CYCLES_EVERY - 1
    cycle_hours = 24.0 if in_cycles else 0.0
    rates = (PER_SECOND[0], MAX_PER_SECOND_IN_CYCLES) if in_cycles else PER_SECOND
    tokens, kinds = round(between(rng, TOKENS)), KINDS[number // IN_CYCLES_EVERY % len(KINDS)]
    per_second, every = between(rng, rates), between(rng, EVERY_SECONDS)
    requests = MAX_REQUESTS + round(2.0 * 3600.0 * cycle_hours * per_second)
    result = []
    for seconds in (math.inf, every):
        traffic = TimedBuilds(
            np.random.default_rng([seed, 12, number]),
            tokens,
            kinds,
            per_second=per_second,
            every_seconds=seconds,
            cycle_hours=cycle_hours,
        )
        traffic.run(requests)
        result.append(traffic)
    alone, replaced = result
    return Life(number, tokens, kinds, per_second, every, cycle_hours, alone.took, replaced.took, replaced.builds)


def lives_of(lives: int, seed: int, path: Path | None = None) -> list[Life]:
    """Returns so many lives. path: the file of the lives that are over; None keeps none."""
    made = {"code": digest(), "seed": seed}
    known = {life.number: life for life in _read(path, made)} if path is not None else {}
    result = []
    for number in range(lives):
        life = known.get(number)
        if life is None:
            life = live(seed, number)
            if path is not None:
                path.parent.mkdir(parents=True, exist_ok=True)
                with path.open("a") as file:
                    file.write("\n" + json.dumps(made | asdict(life)) + "\n")  # behind a line that was cut off
        result.append(life)
    return result


def _read(path: Path, made: dict[str, object]) -> Iterator[Life]:
    for line in path.read_text().splitlines() if path.exists() else ():
        try:
            row = json.loads(line)
        except ValueError:
            continue  # the run was interrupted while it was written
        if row.items() >= made.items():
            yield Life(**{name: value for name, value in row.items() if name not in made})


def starved(lives: Sequence[Life]) -> tuple[list[Life], list[Life]]:
    """Returns the lives that were not promoted within `STARVED` times the median of those that were never replaced: of
    those with builds, and of those without."""
    cells = defaultdict(list)
    for life in lives:
        cells[life.cell].append(_number(life.alone))
    limits = {cell: STARVED * median(values) for cell, values in cells.items()}
    late = [life for life in lives if _number(life.replaced) > limits[life.cell]]
    return late, [life for life in lives if _number(life.alone) > limits[life.cell]]


def _number(requests: int | None) -> float:
    return math.inf if requests is None else float(requests)


def rate_rows(lives: int, seed: int, path: Path | None) -> Iterator[Row]:
    result = lives_of(lives, seed, path)
    for name, cycle in (
        ("traffic without a cycle, 1 request an hour to 50 a second", 0.0),
        ("cycles of a day, 1 scored request an hour to 3 a minute", 24.0),
    ):
        own = [life for life in result if life.cycle_hours == cycle]
        late, alone = starved(own)
        by_builds = [life for life in late if life not in alone]
        builds = median([float(life.builds) for life in own])
        yield Row(
            f"{name}; requests of 40 to 3,000 tokens, 1, 4 and 12 kinds, a build every 5 minutes to every day: not "
            f"promoted within {STARVED:.0f} times the median of lives without further builds",
            f"{len(late)} of {len(own)} lives, {len(alone)} without further builds, {len(by_builds)} with them only; "
            f"{builds:.0f} builds in the median, {max(life.builds for life in own)} at most",
            "0 with further builds only",
            not by_builds,
        )
