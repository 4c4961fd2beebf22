"""Records of an adapter are of another model: no figure of the compressed model may contain them.

In this world the compressed model's KL is about six times the adapted model's, and nine of ten requests are treated.
"""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from tests.support.adapters import adapted, adapted_record, adapter, distances_of
from tests.support.profile_bench import contextual
from tests.support.records import Truth, make_record
from tests.support.samples import histograms, values
from tests.support.stores import DirectWrites
from tests.support.world import World

from hemostat.config import schema as config
from hemostat.measurement.alarms import Alarms
from hemostat.measurement.figures import MODELS
from hemostat.measurement.measurements import Measurements
from hemostat.metrics import names
from hemostat_calibration.divergence.per_token import divergence
from hemostat_calibration.profiles.profile import IDENTITY
from hemostat_calibration.records import Arm, ExactDistances, Sampling, TokenRecord

WORLD = World(bias=1.5)
KIND = "chat text sampled"
ADAPTER = adapter()
REQUESTS = 60


def truth(seed: int) -> Truth:
    whole = WORLD.truth(seed)
    cut = 5 + seed % 30
    return Truth(whole.reference[:cut], whole.compressed[:cut], whole.emitted[:cut])


def place(seed: int) -> dict[str, Any]:
    return {"kind": KIND, "route": "/v1/completions", "label": "gold", "sampling": Sampling(float(seed % 2))}


def control(seed: int) -> TokenRecord:
    return replace(make_record(truth(seed), 20), arm=Arm.CONTROL, **place(seed))


def treated(seed: int, **more: Any) -> TokenRecord:
    return adapted_record(truth(seed), ADAPTER.version, **(place(seed) | more))


def mean_kl(make: Any) -> float:
    """Over the whole vocabulary, of all requests."""
    result = [
        (np.exp(t.reference) * (t.reference - t.compressed)).sum(-1) for t in (make(truth(n)) for n in range(REQUESTS))
    ]
    return float(np.concatenate(result).mean())


@pytest.fixture(scope="module")
def both() -> tuple[Measurements, Measurements]:
    """Control requests alone, and the same beside nine times as many that an adapter answered."""
    alone, mixed = Measurements(), Measurements()
    for seed in range(REQUESTS):
        for measured in (alone, mixed):
            measured.update(control(seed), ADAPTER, None)
            for model in MODELS:
                measured.update_noise_floor(
                    model, make_record(Truth(*[truth(seed).reference] * 2, truth(seed).emitted), 20)
                )
        for n in range(9):
            record = treated(seed) if n % 3 else replace(treated(seed), applied=None, arm=Arm.NONE)
            mixed.update(record, ADAPTER, ADAPTER if record.applied else None)
    return alone, mixed


def test_the_world_would_show_it() -> None:
    assert mean_kl(lambda t: t) > 0.55
    assert 0.05 < mean_kl(adapted) < 0.12


@pytest.mark.parametrize(
    "figure",
    [
        lambda m: m.summary(None),
        lambda m: m.excess(),
        lambda m: m.where(),
        lambda m: m.by_decoding.report(),
        lambda m: m.survival.report(),
        lambda m: [kind["raw"] for kind in m.by_kind.report()],
        lambda m: m.arms()["control"],
        lambda m: [sample for sample in m.samples() if sample.name in (names.KL_NATS, names.KL_TOKENS)],
        lambda m: [sample for sample in m.samples() if sample.name == names.DIVERGENCE],
        lambda m: {series: histogram for series, histogram in histograms(m.samples()).items() if "raw" in series},
        lambda m: {series: value for series, value in values(m.samples()).items() if "raw" in series},
    ],
    ids=["raw", "excess", "where", "decoding", "survival", "kinds", "control", "places", "metric", "kl", "top1"],
)
def test_figures_of_the_compressed_model_are_of_its_own_records(
    both: tuple[Measurements, Measurements], figure: Any
) -> None:
    alone, mixed = both
    assert figure(mixed) == figure(alone)
    assert figure(alone), "something was measured"


def test_raw_is_what_it_was(both: tuple[Measurements, Measurements]) -> None:
    raw = both[1].summary(None)
    assert raw["requests"] == REQUESTS
    # The whole vocabulary is known to the reference, the 20 likeliest ids of 60 to the record.
    assert raw["kl_nats"]["estimate"] == pytest.approx(mean_kl(lambda t: t), rel=0.1)


def test_clients_of_the_treated_arm_got_the_adapted_model(both: tuple[Measurements, Measurements]) -> None:
    arms = both[1].arms()
    assert arms["treated"]["requests"] == 6 * REQUESTS
    assert arms["treated"]["kl_nats"]["estimate"] == pytest.approx(mean_kl(adapted), rel=0.1)
    less = arms["treated_minus_control"]["total_variation"]
    assert less["ci95"][1] < 0.0
    (kind,) = both[1].by_kind.report()
    assert kind["arms"]["treated"]["kl_nats"]["estimate"] == arms["treated"]["kl_nats"]["estimate"]
    assert kind["requests"] == REQUESTS
    result = histograms(both[1].samples())
    staged = {series[2:]: sum(cell.counts) for series, cell in result.items() if "reference_compressed" in series}
    assert staged["calibrated", "treated"] > 0
    assert staged["raw", "treated"] == 0
    # What a control request would have been with the adapter does not follow from its record.
    assert staged["calibrated", "control"] == 0


def observe(measured: Measurements, seed: int, distances: dict[str, ExactDistances], **more: Any) -> None:
    record = replace(control(seed), distances=distances)
    measured.update(record, ADAPTER, None)
    measured.update_distances(record, ADAPTER, **({"fresh": True} | more))


def test_an_adapters_gain_is_exact_and_of_held_out_records() -> None:
    measured = Measurements()
    assert measured.recovered(ADAPTER.version) is None
    assert measured.gained(ADAPTER.version) is None
    for seed in range(REQUESTS):
        observe(measured, seed, distances_of(truth(seed), {ADAPTER.version: 0.6}))
        observe(measured, seed, distances_of(truth(seed), {ADAPTER.version: -1.0}), fresh=False)
        observe(measured, seed, {}), "computed by nobody"
    before, after = mean_kl(lambda t: t), mean_kl(adapted)
    recovered, gained = measured.recovered(ADAPTER.version), measured.gained(ADAPTER.version)
    assert recovered is not None
    assert gained is not None
    assert recovered["estimate"] == pytest.approx(1.0 - after / before)
    assert gained["estimate"] == pytest.approx(before - after)
    assert gained["ci95"][0] < before - after < gained["ci95"][1]
    assert gained["by_request"]["ci95_finite"] is None, "nothing bounds it"
    assert gained["requests"] == REQUESTS
    assert 0.0 < gained["total_variation"]["ci95"][0] < gained["total_variation"]["by_request"]["estimate"] < 1.0
    shown = measured.summary(ADAPTER.version)
    assert shown["kl_nats"]["estimate"] == pytest.approx(after)
    assert shown["raw_same_requests"]["kl_nats"]["estimate"] == pytest.approx(before)
    assert shown["kl_nats"]["bound"] == "exact"
    top1 = shown["top1_by_decoding"]["sampled"]
    assert top1["before"]["estimate"] < top1["after"]["estimate"]
    (kind,) = measured.by_kind.report()
    assert (kind["profile"], kind["gain_nats"], kind["recovered"]) == (ADAPTER.version, gained, recovered)
    json.dumps([shown, kind], allow_nan=False)
    assert values(measured.samples())[names.RECOVERED_DIVERGENCE_RATIO, KIND] == recovered["estimate"]


def test_infinite_divergences_are_counted_and_in_no_mean_of_the_kl() -> None:
    measured = Measurements()
    for seed in range(5):
        result = distances_of(truth(seed), {ADAPTER.version: 0.6})
        broken = result[ADAPTER.version]
        kl, tv = broken.kl.copy(), broken.tv.copy()
        kl[0], tv[0] = np.inf, 1.0
        result[ADAPTER.version] = ExactDistances(kl, tv, broken.top1)
        observe(measured, seed, result)
    gained = measured.gained(ADAPTER.version)
    assert gained is not None
    assert gained["infinite_tokens"] == 5
    assert gained["estimate"] > 0.0
    json.dumps(measured.summary(ADAPTER.version), allow_nan=False)


def test_other_families_are_measured_as_before_where_there_are_distances() -> None:
    """A candidate's test may have asked for them while another profile serves."""
    measured, profile = Measurements(), contextual()
    result = distances_of(truth(0), {profile.version: 0.5})
    measured.update_distances(replace(control(0), distances=result), profile, fresh=True)
    measured.update_distances(replace(control(0), distances=result), None, fresh=True)
    measured.update_distances(replace(control(0), distances={IDENTITY: result[IDENTITY]}), ADAPTER, fresh=True)
    assert measured.recovered(profile.version) is None
    assert measured.recovered(ADAPTER.version) is None


def test_no_alarm_is_raised_by_an_adapter_and_none_is_missed_because_of_it() -> None:
    """From the 60th request on an adapter answers nine of ten."""
    store = DirectWrites()
    alarms = Alarms(config.Alarm(baseline_requests=40, budget_nats=1.5), (), store, lambda: 0.0)
    alone = Alarms(config.Alarm(baseline_requests=40, budget_nats=1.5), (), store, lambda: 0.0)
    for seed in range(200):
        if seed < 60 or seed % 10 == 0:
            for each in (alarms, alone):
                each.update(control(seed), divergence(control(seed)))
        else:
            alarms.update(treated(seed), divergence(treated(seed)))
    report, without = alarms.report(), alone.report()
    assert not report["raised"]
    assert report["tests"] == without["tests"]
    assert report["kinds"] == without["kinds"]
    counted = report["workload"]["baseline_requests"]
    assert counted == report["workload"]["baseline_needed"], "in the mix of kinds they count"
