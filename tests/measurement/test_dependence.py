"""Figures of requests that depend on each other: v̂, effective requests, and intervals that pay for them."""

from __future__ import annotations

import math

import numpy as np
import pytest
from tests.support.records import make_record
from tests.support.samples import values
from tests.support.world import World

from hemostat.measurement.dependence import Cycle, Dependence, told
from hemostat.measurement.measurements import Measurements
from hemostat.metrics import names

RECORDS = [make_record(World(noise=noise).truth(seed), 8) for seed, noise in enumerate((0.1, 0.3, 0.5, 0.7) * 3)]


def fed(x: np.ndarray, clients: list[bytes]) -> Dependence:
    dependence = Dependence()
    for value, client in zip(x, clients, strict=True):
        dependence.add(np.array([value]), np.ones(1), client)
    return dependence


def test_runs_of_alike_requests_count_less_than_different_ones() -> None:
    alike, different = Measurements(), Measurements()
    rng = np.random.default_rng(0)
    order = np.repeat(rng.integers(12, size=36), 3)
    for index, other in zip(order, rng.permutation(order), strict=True):
        alike.observe(RECORDS[index], None, None)
        different.observe(RECORDS[other], None, None)
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
    measured.observe(RECORDS[0], None, None)
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
        measured.observe(RECORDS[at], None, None)
    early = measured.summary(None)["kl_nats"]
    assert early["ci95"] == [None, None]
    assert early["effective_requests"] is None
    low, high = early["ci95_seen"]
    assert low < early["estimate"] < high
    now = 3600.0
    measured.observe(RECORDS[0], None, None)
    later = measured.summary(None)["kl_nats"]
    assert later["ci95"] == later["ci95_seen"]
    assert later["effective_requests"] > 20.0
