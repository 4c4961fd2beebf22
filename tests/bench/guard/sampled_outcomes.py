"""Whether the comparison of outcomes keeps its level where the part of the conversations that is reported changes.

Each life is eight hours of one kind of traffic, half of it treated by a harmless profile: at every turn, answers are
as often bad in both arms. But treated conversations are longer, and later answers are worse, so that whoever counts
conversations from the middle of them finds harm that is none. The whole deployment's requests per second, from which
the reported part follows, change with the day, in bursts, or fall, and the kind's own traffic with them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
from tests.bench.guard import Row, count_row, median

from hemostat.config.schema import Evidence
from hemostat.ipc.messages import OutcomeReport
from hemostat.measurement.outcome_sampling import MAX_REPORTS_PER_SECOND, OutcomeSampling
from hemostat.measurement.outcomes import Outcomes

NAME = "sampled_outcomes"
TAKES = "7 minutes on one core (a fifth of the lives)"

KIND, VERSION = "chat json greedy", "v"
HOURS = 8
STEP = 60.0
"""Seconds between two looks."""
STEPS = int(HOURS * 3600 / STEP)
CONVERSATIONS = 40_000
GAP = 60.0
"""Mean seconds between two answers of a conversation."""
TURNS = {False: 2.0, True: 20.0}
"""Mean answers of a conversation, by arm."""
FIRST, LATER = 0.1, 0.8
"""Rates of bad first and later answers."""

Curve = npt.NDArray[np.float64]
_AT = np.arange(STEPS) / STEPS


@dataclass(frozen=True)
class World:
    """requests: per second of the deployment, at each look. drift: added to all rates, by look. harm: added to the
    treated arm's."""

    requests: Callable[[np.random.Generator], Curve]
    drift: Curve = field(default_factory=lambda: np.zeros(STEPS))
    harm: float = 0.0


def day_and_night(rng: np.random.Generator) -> Curve:
    return 10.0 ** (2.5 + 1.0 * np.sin(2.0 * np.pi * (2.0 * _AT + rng.random())))


def bursts(rng: np.random.Generator) -> Curve:
    """Of five minutes, to fifty times as much."""
    started = rng.random(STEPS) < 0.01
    going_on = np.convolve(started, np.ones(5))[:STEPS] > 0
    return np.where(going_on, 10_000.0, 200.0)


def falling(rng: np.random.Generator) -> Curve:
    """Steeply, again and again: the part that is reported then rises in steps."""
    return 10.0 ** (3.5 - 2.0 * ((3.0 * _AT + rng.random()) % 1.0))


class EarlyCounting(OutcomeSampling):
    """Counts what is reported at once: the wrong rule that the worlds have to break."""

    def update(self, requests_per_second: float, now: float) -> bool:
        changed = super().update(requests_per_second, now)
        self.counted = self.reported
        return changed


class Served:
    """The profile serves until it is taken back."""

    def __init__(self) -> None:
        self.harmed = False

    def kinds(self) -> frozenset[str]:
        return frozenset({KIND})

    def version(self, kind: str) -> str | None:
        return None if self.harmed else VERSION

    def is_operators(self, kind: str) -> bool:
        return self.harmed

    def leave(self, kind: str, why: str, evidence: dict[str, Any]) -> None:
        self.harmed = True


class NoWrites:
    def set_state(self, key: str, value: str | None) -> None:
        pass

    def queued(self) -> int:
        return 0

    def has_written(self, write: int) -> bool:
        return True


@dataclass(frozen=True)
class Life:
    """units: conversations that counted until harm was proven, or until the end. most: reports in the look with most
    of them, per second, if the kind were all of the traffic."""

    harmed: bool
    units: int
    most: float


def live(world: World, rng: np.random.Generator, sampling: OutcomeSampling) -> Life:
    served, now = Served(), 0.0
    outcomes = Outcomes(Evidence.client_share, 0.5, served, NoWrites(), lambda: now, sampling)  # type: ignore[arg-type]
    requests = world.requests(rng)
    started = (rng.choice(STEPS, CONVERSATIONS, p=requests / requests.sum()) + rng.random(CONVERSATIONS)) * STEP
    treated, drawn = rng.random(CONVERSATIONS) < 0.5, rng.random(CONVERSATIONS)
    turns = rng.geometric(1.0 / np.where(treated, TURNS[True], TURNS[False]))
    of = np.repeat(np.arange(CONVERSATIONS), turns)
    first = np.concatenate([[0], np.cumsum(turns)[:-1]])
    waited = np.cumsum(rng.exponential(GAP, len(of)))
    at = started[of] + waited - waited[first][of]
    look = np.minimum(at / STEP, STEPS - 1).astype(int)
    later = np.arange(len(of)) > first[of]
    rate = np.where(later, LATER, FIRST) + world.drift[look] + world.harm * treated[of]
    bad = rng.random(len(of)) < rate
    order = np.argsort(at)
    ends = np.searchsorted(at[order], STEP * np.arange(1, STEPS + 1))
    begin, most = 0, 0.0
    for step in range(STEPS):
        now = STEP * step
        outcomes.sample(float(requests[step]), now)
        most = max(most, float(requests[step]) * sampling.reported)
        answers = order[begin : ends[step]]
        begin = int(ends[step])
        for answer in answers[drawn[of[answers]] < sampling.reported]:
            number = int(of[answer])
            name = number.to_bytes(4, "little")
            report = OutcomeReport(
                KIND, VERSION, bool(treated[number]), name, name[:1], {"json": bool(bad[answer])}, 9, drawn[number]
            )
            outcomes.update(report)
        units = sum(kind["units"] for kind in outcomes.report()["kinds"]) if step == STEPS - 1 else 0
        outcomes.check()
        if served.harmed:
            (kind,) = outcomes.report()["kinds"]
            units = kind["harmed"]["control"]["units"] + kind["harmed"]["treated"]["units"]
            break
    return Life(served.harmed, units, most)


def rows(lives: int, seed: int) -> Iterator[Row]:
    lives = max(lives // 5, 4)
    drift = 0.2 * np.sin(2.0 * np.pi * 3.0 * _AT) ** 2
    worlds = {
        "day and night": World(day_and_night),
        "day and night, rates of both arms change, too": World(day_and_night, drift),
        "bursts": World(bursts),
        "traffic that falls": World(falling),
    }
    most = 0.0
    for number, (case, world) in enumerate(worlds.items()):
        result = [live(world, np.random.default_rng([seed, number, n]), OutcomeSampling()) for n in range(lives)]
        yield count_row(f"harmless, {case}: taken back", sum(life.harmed for life in result), lives, 0.05)
        units = median([float(life.units) for life in result])
        yield Row("the same: median units", units, ">= 300", units >= 300)
        most = max(most, *(life.most for life in result))
    limit = MAX_REPORTS_PER_SECOND
    yield Row("most reports per second at any look", most, f"<= {limit:.0f}", most <= limit)
    wrong = [live(World(falling), np.random.default_rng([seed, 3, n]), EarlyCounting()) for n in range(lives)]
    broken = sum(life.harmed for life in wrong)
    case = "counted as soon as reported (wrong), traffic that falls: taken back"
    yield Row(case, f"{broken} of {lives}", f">= {lives // 2} of {lives}", broken >= lives // 2)
    harm = [
        live(World(day_and_night, harm=0.3), np.random.default_rng([seed, 9, n]), OutcomeSampling())
        for n in range(lives)
    ]
    needed = median([float(life.units) if life.harmed else math.inf for life in harm])
    case = "bad answers 10 % -> 40 %, day and night: median units until it is found"
    yield Row(case, needed, "<= 600", needed <= 600)
