"""Figures of requests that depend on each other: v̂, effective requests, and intervals that pay for them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from tests.support.records import make_record
from tests.support.samples import values
from tests.support.world import World

from hemostat.measurement.alarms import FloorLimit
from hemostat.measurement.by_decoding import ByDecoding
from hemostat.measurement.dependence import CARRIED_BY_FEW, NO_CYCLE, Cycle, Dependence, told
from hemostat.measurement.figures import StageFigures
from hemostat.measurement.gains import GainFigures, difference
from hemostat.measurement.measurements import Measurements
from hemostat.metrics import names
from hemostat_calibration.divergence import together
from hemostat_calibration.divergence.bounds import Interval
from hemostat_calibration.divergence.decoding import DecodedDivergence
from hemostat_calibration.divergence.gain import Gain
from hemostat_calibration.divergence.per_token import TokenDivergence, divergence

RECORDS = [make_record(World(noise=noise).truth(seed), 8) for seed, noise in enumerate((0.1, 0.3, 0.5, 0.7) * 3)]


Answers = Sequence[tuple[float, int]]
"""The divergence at each token, and the number of tokens."""


def answers(requests: int, seed: int = 0) -> list[tuple[float, int]]:
    """Independent ordinary ones: log-normal lengths and divergences."""
    rng = np.random.default_rng(seed)
    lengths = np.ceil(80.0 * np.exp(0.6 * rng.standard_normal(requests))).astype(int)
    return list(zip(rng.gamma(10.0, 0.01, requests).tolist(), lengths.tolist(), strict=True))


ORDINARY = answers(300)
CARRIED = [*ORDINARY, (0.4, 4000), (0.1, 4000)]
"""Two answers have about a quarter of the tokens."""


def figures_of(value: float, tokens: int) -> TokenDivergence:
    some = divergence(RECORDS[0])
    rows: Any = np.arange(tokens) % len(some.kl_rc)
    return replace(together._rows(some, rows), kl_rc=np.full(tokens, value), estimate_rc=np.full(tokens, value))


def stage(given: Answers) -> StageFigures:
    result = StageFigures(["kl_nats"])
    for value, tokens in given:
        result.update(figures_of(value, tokens))
    return result


def by_token(given: Answers) -> dict[str, Any]:
    return stage(given).figure("kl_nats")


def gained(given: Answers) -> dict[str, Any]:
    figures = GainFigures(2.0)
    for value, tokens in given:
        won = np.full(tokens, value)
        figures.update(Gain(won, won, np.ones(tokens, np.bool_)), figures_of(0.2, tokens))
    return figures.gained()


def recovered(given: Answers) -> dict[str, Any]:
    figures = GainFigures(2.0)
    for value, tokens in given:
        won = np.full(tokens, value)
        figures.update(Gain(won, won, np.ones(tokens, np.bool_)), figures_of(0.2, tokens))
    return figures.recovered() or {}


def drawn(given: Answers) -> dict[str, Any]:
    groups = ByDecoding()
    for value, tokens in given:
        ends = Interval(np.full(tokens, value), np.full(tokens, 1.1 * value))
        groups.update("greedy", figures_of(value, tokens), DecodedDivergence(ends, ends, ends.lower > 0.0))
    (row,) = groups.report()
    result: dict[str, Any] = row["drawn_from"]["total_variation"]
    return result


def treated_minus_control(given: Answers) -> dict[str, Any]:
    return difference(stage(given), stage(answers(300, seed=1)), "kl_nats")


def fed(x: np.ndarray, clients: list[bytes]) -> Dependence:
    dependence = Dependence()
    for value, client in zip(x, clients, strict=True):
        dependence.update(np.array([value]), np.ones(1), client)
    return dependence


@pytest.mark.parametrize("figure", [by_token, gained, recovered, drawn, treated_minus_control])
def test_where_a_few_answers_carry_the_sum_there_is_no_interval(figure: Any) -> None:
    ordinary, carried = figure(ORDINARY), figure(CARRIED)
    assert None not in ordinary["ci95"]
    assert ordinary["no_interval"] is None
    assert carried["ci95"] == [None, None]
    assert carried["effective_requests"] > 20.0
    assert carried["no_interval"] == CARRIED_BY_FEW


def test_before_a_whole_cycle_too() -> None:
    for given, known in ((ORDINARY, True), (CARRIED, False)):
        figures = StageFigures(["kl_nats"], Cycle(3600.0, lambda: 0.0))
        for value, tokens in given:
            figures.update(figures_of(value, tokens))
        figure = figures.figure("kl_nats")
        assert figure["ci95"] == [None, None]
        assert (None not in figure["ci95_seen"]) == known == (figure["no_interval"] is None)


def test_ordinary_answers_have_an_interval_after_64_requests() -> None:
    given = [by_token(answers(64, seed)) for seed in range(20)]
    assert sum(None not in figure["ci95"] for figure in given) >= 10


def test_more_long_answers_share_the_sum() -> None:
    many = [*ORDINARY, *((value, 4000) for value, _ in answers(40, seed=2))]
    order = np.random.default_rng(0).permutation(len(many))
    assert None not in by_token([many[at] for at in order])["ci95"]


def test_a_noise_floor_that_a_few_answers_carry_has_no_limit() -> None:
    limits = []
    for given in (ORDINARY, CARRIED):
        floor = FloorLimit(20.0, NO_CYCLE)
        for value, tokens in given:
            floor.update(np.full(tokens, value), b"")
        limits.append(floor.limit(0.05))
    assert limits[0] < 0.2
    assert math.isinf(limits[1])


def test_runs_of_alike_requests_count_less_than_different_ones() -> None:
    alike, different = Measurements(), Measurements()
    rng = np.random.default_rng(0)
    order = np.repeat(rng.integers(12, size=36), 3)
    for index, other in zip(order, rng.permutation(order), strict=True):
        alike.update(RECORDS[index], None, None)
        different.update(RECORDS[other], None, None)
    few, many = (measured.summary(None)["kl_nats"] for measured in (alike, different))
    assert few["estimate"] == pytest.approx(many["estimate"])
    assert few["inflation"] > 1.3 * many["inflation"]
    assert few["effective_requests"] == pytest.approx(108 / few["inflation"])
    assert few["ci95"][1] - few["ci95"][0] > 1.1 * (many["ci95"][1] - many["ci95"][0])
    gauges = values(alike.samples())
    assert gauges[names.EFFECTIVE_REQUESTS, "all", "kl_nats"] == few["effective_requests"]
    assert gauges[names.VARIANCE_INFLATION_RATIO, "all", "kl_nats"] == few["inflation"]


def test_before_v_is_known_there_are_no_effective_requests() -> None:
    measured = Measurements()
    measured.update(RECORDS[0], None, None)
    gauges = values(measured.samples())
    assert gauges[names.EFFECTIVE_REQUESTS, "all", "kl_nats"] == 0.0
    assert (names.VARIANCE_INFLATION_RATIO, "all", "kl_nats") not in gauges
    assert told(1, math.inf) == {"inflation": None, "effective_requests": None}


def test_runs_of_each_client_between_those_of_others_are_seen_by_client() -> None:
    rng = np.random.default_rng(0)
    clients = [b"client %d" % (at % 20) for at in range(960)]
    x = rng.normal(size=(20, 6))[[at % 20 for at in range(960)], [at // 160 for at in range(960)]]
    assert fed(x, clients).inflation() > 1.5 * fed(x, [b""] * 960).inflation()


def test_before_a_whole_cycle_an_interval_is_of_the_hours_seen() -> None:
    now = 0.0
    measured = Measurements(cycle=Cycle(3600.0, lambda: now))
    rng = np.random.default_rng(0)
    for at in rng.integers(12, size=150):
        measured.update(RECORDS[at], None, None)
    early = measured.summary(None)["kl_nats"]
    assert early["ci95"] == [None, None]
    assert early["effective_requests"] is None
    low, high = early["ci95_seen"]
    assert low < early["estimate"] < high
    now = 3600.0
    measured.update(RECORDS[0], None, None)
    later = measured.summary(None)["kl_nats"]
    assert later["ci95"] == later["ci95_seen"]
    assert later["effective_requests"] > 20.0
