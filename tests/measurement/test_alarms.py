"""The alarm while serving: what reaches it, what it tells, what survives a restart."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tests.support.admin_server import admin_client
from tests.support.constants import with_constants
from tests.support.control import AUTHORIZED, control, settings
from tests.support.records import Truth, log_softmax, make_record
from tests.support.samples import values
from tests.support.stores import DirectWrites
from tests.support.waiting import HANG_SECONDS

from hemostat.config import schema as config
from hemostat.measurement.alarms import FLOORS_KEY, SPENT_KEY, STATE_KEY, Alarms
from hemostat.measurement.dependence import Dependence
from hemostat.measurement.figures import MODELS
from hemostat_calibration.alarm.serialization import begun_tests, read
from hemostat_calibration.alarm.state import Alarm
from hemostat_calibration.divergence.per_token import divergence
from hemostat_calibration.errors import HemostatError
from hemostat_calibration.records import TokenRecord
from hemostat_calibration.statistics.confidence import ClippedMean
from hemostat_calibration.statistics.dependence import BatchMeans

KIND = "chat text sampled"
V = 50


def record(seed: int, noise: float) -> TokenRecord:
    """Forty tokens of two models whose logits differ by `noise`."""
    rng = np.random.default_rng(seed)
    reference = log_softmax(rng.normal(size=(40, V)) * 2.0)
    compressed = log_softmax(reference + noise * rng.normal(size=(40, V)))
    emitted = np.array([rng.choice(V, p=np.exp(row)) for row in compressed])
    return replace(make_record(Truth(reference, compressed, emitted), 20), kind=KIND, request_id=str(seed))


class Bench:
    def __init__(self, **given: Any) -> None:
        self.store = DirectWrites()
        self.now = 1000.0
        floors, cycle = given.pop("floors", ()), given.pop("cycle", 0.0)
        alarm = with_constants(config.Alarm, clear_after=given.pop("clear_after", config.Alarm.clear_after))
        self.alarms = Alarms(alarm(**given), floors, self.store, lambda: self.now, cycle)

    def feed(self, seeds: range, noise: float) -> None:
        for seed in seeds:
            self.now += 1.0
            made = record(seed, noise)
            self.alarms.update(made, divergence(made))

    def saved(self) -> Alarm:
        """Returns the state that a restart goes on with."""
        self.alarms.save()
        return read((self.store.get_state(STATE_KEY) or "").encode())

    def raised(self) -> dict[str, bool]:
        return {test["test"]: test["raised"] for test in self.alarms.report()["tests"]}

    def events(self) -> list[dict[str, Any]]:
        return self.store.events(100)[::-1]


def test_a_change_is_seen_told_and_cleared() -> None:
    bench = Bench(baseline_requests=40, clear_after=5)
    bench.feed(range(60), 0.1)
    assert bench.raised() == {"change": False}
    assert bench.alarms.report()["kinds"][0]["watched"]
    bench.feed(range(60, 80), 0.1)
    assert not bench.events()
    began = bench.now
    bench.feed(range(80, 95), 0.6)
    assert bench.raised() == {"change": True}
    (event,) = bench.events()
    assert event["decision"] == "alarm"
    assert began - 5.0 <= event["evidence"]["since"] <= event["evidence"]["at"] <= began + 15.0
    assert event["evidence"]["on_tokens"] > 0
    report = bench.alarms.report()
    assert report["raised"]
    assert json.loads(json.dumps(report, allow_nan=False)) == report
    gauges = values(bench.alarms.samples())
    assert gauges["hemostat_hemorrhage_alarm", "change", "all"] == 1.0
    assert gauges["hemostat_alarm_spread_ratio", KIND] > 2.0
    bench.feed(range(95, 150), 0.1)
    assert bench.raised() == {"change": False}
    assert [event["evidence"]["raised"] for event in bench.events()] == [True, False]


def test_the_budget_is_above_the_floor_and_waits_for_it() -> None:
    bench = Bench(budget_nats=0.05, baseline_requests=None, floors=MODELS)
    bench.feed(range(40), 1.0)
    assert bench.raised() == {}, "no floor, no test"
    assert bench.alarms.report()["floor_upper_nats"] is None
    for seed in range(200):
        for model in MODELS:
            bench.alarms.update_noise_floor(model, divergence(record(seed, 0.02)).kl_rc)
    floor = bench.alarms.report()["floor_upper_nats"]
    assert 0.0 < floor < 0.02
    bench.feed(range(40, 100), 1.0)
    assert bench.raised() == {}, "how much its requests depend on each other is not known"
    bench.feed(range(100, 200), 1.0)
    assert bench.raised() == {"budget": True}


def test_without_a_measured_floor_the_budget_is_on_the_divergence_itself() -> None:
    allowed = Bench(budget_nats=2.0, baseline_requests=None)
    exceeded = Bench(budget_nats=0.05, baseline_requests=None)
    for bench in (allowed, exceeded):
        bench.feed(range(160), 1.0)
    assert allowed.raised() == {"budget": False}
    assert exceeded.raised() == {"budget": True}
    assert exceeded.alarms.report()["floor_upper_nats"] == 0.0


def test_what_takes_a_part_of_alpha_is_stored_at_once() -> None:
    """A process that is killed a moment later does not take the same part again."""
    bench = Bench(baseline_requests=40)
    stored = []
    for seed in range(42):
        bench.feed(range(seed, seed + 1), 0.1)
        stored.append(begun_tests((bench.store.get_state(STATE_KEY) or "").encode()))
        state = bench.saved()
        assert stored[-1] == max(state.baselines, state.change_tests)
    assert stored[-1] == 1


def test_a_restart_goes_on_where_it_was() -> None:
    bench = Bench(baseline_requests=40)
    bench.feed(range(60), 0.1)
    bench.feed(range(60, 80), 0.6)
    bench.alarms.save()
    kept = bench.store.get_state(STATE_KEY)
    again = Bench(baseline_requests=40)
    again.alarms.restore(kept, bench.events())
    assert again.alarms.report()["tests"] == bench.alarms.report()["tests"]
    assert list(again.alarms.events) == list(bench.alarms.events)
    again.feed(range(80, 82), 0.6)
    assert not again.events(), "it was told already"


@pytest.mark.parametrize("kept", ['{"schema": 1, "state": {}}', '{"schema": 99}', "not JSON", None])
def test_spent_alpha_is_recovered_from_every_format(kept: str | None) -> None:
    bench = Bench(baseline_requests=40)
    bench.feed(range(60), 0.1)
    begun = bench.saved().begun
    assert begun > 0
    again = Bench(baseline_requests=40)
    again.alarms.restore(kept, [], bench.store.get_state(SPENT_KEY))
    assert again.saved().begun == begun
    again.feed(range(60), 0.1)
    assert again.saved().change_tests == begun + 1


def test_no_alarm_is_raised_before_the_number_of_its_test_is_stored(monkeypatch: pytest.MonkeyPatch) -> None:
    bench = Bench(baseline_requests=40, clear_after=50)
    with monkeypatch.context() as away:
        away.setattr(DirectWrites, "has_written", lambda *_: False)
        bench.feed(range(60), 0.1)
        bench.feed(range(60, 90), 0.6)
        assert not bench.events()
    bench.feed(range(90, 92), 0.6)
    assert [event["why"] for event in bench.events()] == ["change alarm raised"]


@pytest.mark.parametrize("kept", ["", "{}", '{"is": "Settings", "fields": {}}', "\x00"])
def test_a_state_that_cannot_be_read_is_logged_and_begun_anew(kept: str, caplog: pytest.LogCaptureFixture) -> None:
    bench = Bench(baseline_requests=40)
    bench.alarms.restore(kept, [])
    assert "stored alarm" in caplog.text
    assert ["cannot be continued" in event["why"] for event in bench.events()] == [True]
    bench.feed(range(3), 0.1)
    assert bench.raised() == {"change": False}


def test_rebase_learns_what_is_from_now_on() -> None:
    bench = Bench(baseline_requests=40)
    bench.feed(range(60), 0.1)
    bench.feed(range(60, 80), 0.6)
    assert bench.raised() == {"change": True}
    with pytest.raises(HemostatError, match="'poems' is not watched; watched: chat text sampled"):
        bench.alarms.rebase("poems")
    bench.alarms.rebase(KIND)
    assert bench.raised() == {"change": False}
    bench.feed(range(80, 150), 0.6)
    assert bench.raised() == {"change": False}


async def test_over_the_admin_port(tmp_path: Path) -> None:
    async with control(tmp_path, settings(alarm={"baseline_requests": 30})) as plane, admin_client(plane) as http:
        for seed in range(60):
            given = record(seed, 0.1 if seed < 40 else 0.8)
            assert await plane.writer.wait_until_written(HANG_SECONDS), "the numbers of tests that have begun"
            plane.measured.alarms.update(given, divergence(given))
        status = (await http.get("/api/v1/status")).json()
        assert status["alarm"]["raised"] is True
        metrics = (await http.get("/metrics")).text
        assert 'hemostat_hemorrhage_alarm{kind="all",test="change"} 1.0' in metrics
        assert (await http.post("/api/v1/alarm/rebase", json={"kind": KIND})).status_code == 401
        assert (await http.post("/api/v1/alarm/rebase", json={"knd": KIND}, headers=AUTHORIZED)).status_code == 422
        answer = await http.post("/api/v1/alarm/rebase", json={"kind": KIND}, headers=AUTHORIZED)
        assert answer.json()["raised"] is False


def test_values_that_are_not_numbers_reach_no_test() -> None:
    bench = Bench(baseline_requests=30, budget_nats=0.1)
    made = record(0, 0.1)
    nothing = replace(divergence(made), kl_rc=np.full(made.tokens, math.nan))
    blind = replace(made, reference_at=np.full_like(made.reference_at, math.nan))
    for _ in range(30):
        bench.alarms.update(blind, nothing)
    assert not any(bench.raised().values())
    assert bench.alarms.report()["kinds"][0]["baseline_requests"] == 0


def test_the_report_says_what_the_alarm_waits_for() -> None:
    bench = Bench(budget_nats=0.05, floors=MODELS)
    bench.feed(range(63), 0.1)
    assert bench.alarms.report()["waits_for"] == [
        "baseline of 'chat text sampled': 63 of 150 requests",
        "noise floor, for the budget test",
    ]
    gauges = values(bench.alarms.samples())
    assert gauges["hemostat_alarm_baseline_ratio", KIND] == 63 / 150


def test_rare_kinds_together_are_in_the_mix_and_not_in_the_change_test() -> None:
    bench = Bench(baseline_requests=40)
    for seed in range(80):
        made = replace(record(seed, 0.1), kind="" if seed % 2 else "rest")
        bench.alarms.update(made, divergence(made))
    report = bench.alarms.report()
    assert [(kind["kind"], kind["watched"]) for kind in report["kinds"]] == [("rest", False)]
    assert report["waits_for"] == []
    assert (report["workload"]["distance"], report["workload"]["changed"]) == (0.0, False)


def test_half_of_the_noise_floors_is_what_noise_adds() -> None:
    """Runs of five equal requests: the limit is that of the effective ones, and there is none before v̂ is known."""
    bench, mean, batches = Bench(budget_nats=0.05, floors=MODELS), ClippedMean(0.0, 5.0), BatchMeans.of(1)
    for seed in range(400):
        floor = divergence(record(seed // 5, 0.02)).kl_rc
        for model in MODELS:
            bench.alarms.update_noise_floor(model, floor)
        if seed == 40:
            assert bench.alarms.report()["floor_upper_nats"] is None
        mean, batches = mean.update(floor), batches.update(np.array([floor.sum()]), np.array([float(len(floor))]))
    v = float(batches.inflation()[0])
    assert v > 3.0
    # Both floors are the same, so that half of their sum is one of them.
    assert bench.alarms.report()["floor_upper_nats"] == pytest.approx(mean.get(0.01 / 8, v).high)


def test_a_scored_record_does_not_compute_how_much_requests_of_the_floors_depend_on_each_other(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    bench = Bench(budget_nats=0.05, baseline_requests=None, floors=MODELS)
    for seed in range(60):
        for model in MODELS:
            bench.alarms.update_noise_floor(model, divergence(record(seed, 0.02)).kl_rc)

    def computed(_: Dependence, series: int = 0) -> float:
        raise AssertionError(series)

    monkeypatch.setattr(Dependence, "inflation", computed)
    bench.feed(range(60, 62), 0.1)


def test_an_older_state_is_refused_by_name_and_its_alpha_stays_spent(caplog: pytest.LogCaptureFixture) -> None:
    old = json.dumps({"schema": 1, "state": {"budget_tests": 3}})
    bench = Bench(budget_nats=1.0, baseline_requests=None)
    bench.alarms.restore(old, [])
    assert "schema 1" in caplog.text
    (event,) = bench.events()
    assert "schema 1" in event["why"]
    assert event == bench.alarms.report()["events"][-1]
    bench.feed(range(100), 0.1)
    (test,) = bench.alarms.report()["tests"]
    assert test["alpha"] == pytest.approx(0.01 / 2 / (4 * 5))


def test_other_models_begin_anew_and_their_alpha_too() -> None:
    bench = Bench(budget_nats=1.0, baseline_requests=None)
    bench.feed(range(100), 0.1)
    bench.alarms.forget()
    assert bench.alarms.report()["tests"] == []
    again = Bench(budget_nats=1.0, baseline_requests=None)
    again.alarms.restore(json.dumps({"schema": 1, "state": {"budget_tests": 2, "change_tests": 2, "baselines": 2}}), [])
    for each in (bench, again):
        each.feed(range(100), 0.6)
    alphas = [each.alarms.report()["tests"][0]["alpha"] for each in (bench, again)]
    assert alphas == pytest.approx([0.01 / 2 / 6, 0.01 / 2 / 12])


# --- other settings, and kinds that are gone ------------------------------------------------------------------------


def over_budget(**given: Any) -> Bench:
    """The alarm about a budget of 0.05 nats is raised: the divergence is about 0.5."""
    bench = Bench(budget_nats=0.05, baseline_requests=None, **given)
    bench.feed(range(160), 1.0)
    assert bench.raised() == {"budget": True}
    return bench


def restarted(bench: Bench, **given: Any) -> Bench:
    bench.alarms.save()
    again = Bench(**given)
    again.now = bench.now
    again.alarms.restore(bench.store.get_state(STATE_KEY), bench.events(), floors=bench.store.get_state(FLOORS_KEY))
    return again


def test_an_alarm_about_a_budget_that_is_no_longer_set_ends_with_the_restart() -> None:
    for other in ({"budget_nats": 2.0, "baseline_requests": None}, {"budget_nats": None, "baseline_requests": None}):
        again = restarted(over_budget(), **other)
        assert not again.alarms.report()["raised"]
        assert again.alarms.raised() == []
        assert [event["why"].split(":")[0] for event in again.events()] == [f"budget alarm ended on {KIND}"]
        assert not restarted(again, **other).events(), "it was told already"
        again.feed(range(160, 190), 1.0)
        assert not again.alarms.report()["raised"]
        assert values(again.alarms.samples()).get(("hemostat_hemorrhage_alarm", "budget", KIND), 0.0) == 0.0


def test_a_new_budget_reaches_a_test_that_has_begun_and_spends_no_further_alpha() -> None:
    bench = Bench(budget_nats=2.0, baseline_requests=None)
    bench.feed(range(160), 1.0)
    assert bench.raised() == {"budget": False}
    (before,) = bench.alarms.report()["tests"]
    again = restarted(bench, budget_nats=0.05, baseline_requests=None)
    (begun,) = again.alarms.report()["tests"]
    assert (begun["alpha"], begun["evidence"], begun["requests"]) == (before["alpha"], 0.0, 0)
    again.feed(range(160, 220), 1.0)
    assert again.raised() == {"budget": True}


def test_another_alpha_reaches_the_tests_that_have_begun() -> None:
    bench = Bench(budget_nats=2.0, baseline_requests=40)
    bench.feed(range(160), 1.0)
    before = {test["test"]: test for test in bench.alarms.report()["tests"]}
    again = restarted(bench, budget_nats=2.0, baseline_requests=40, alpha=0.001)
    for test in again.alarms.report()["tests"]:
        assert test["alpha"] == pytest.approx(before[test["test"]]["alpha"] / 10.0, rel=0.01)
        assert test["requests"] == before[test["test"]]["requests"] > 0


def test_a_budget_alarm_whose_kind_is_gone_ends() -> None:
    bench = over_budget()
    for passed in range(3):
        bench.now += 86_400.0
        made = replace(record(passed, 0.1), kind="other")
        bench.alarms.update(made, divergence(made))
        assert bench.alarms.report()["raised"] == (passed < 1), "a kind that comes once a day is not gone"
    (ended,) = (event["why"] for event in bench.events() if "ended" in event["why"])
    assert KIND in ended
    bench.feed(range(160, 220), 1.0)
    assert bench.raised() == {"budget": True}, "its test begins anew"


def test_a_budget_alarm_ends_with_the_place_of_its_kind(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hemostat_calibration.alarm.alarm.MAX_KINDS", 2)
    bench = over_budget()
    for kind in ("a", "b", "c"):
        bench.now += 1.0
        made = replace(record(1, 0.1), kind=kind)
        bench.alarms.update(made, divergence(made))
    assert not bench.alarms.report()["raised"]
    assert "budget alarm ended" in bench.events()[-1]["why"]


def test_an_operator_ends_a_budget_alarm() -> None:
    bench = over_budget()
    bench.alarms.rebase(KIND)
    assert not bench.alarms.report()["raised"]
    bench.feed(range(160, 260), 1.0)
    assert bench.raised() == {"budget": True}, "the budget is still exceeded"


def test_alarms_end_with_the_models_that_they_are_about() -> None:
    bench = over_budget()
    bench.alarms.forget()
    assert not bench.alarms.report()["raised"]
    assert "budget alarm ended" in bench.events()[-1]["why"]


def measure_floors(bench: Bench, requests: int) -> None:
    for seed in range(requests):
        bench.now += 600.0
        for model in MODELS:
            bench.alarms.update_noise_floor(model, divergence(record(seed, 0.02)).kl_rc, b"client %d" % (seed % 7))


def test_the_noise_floor_goes_on_over_restarts() -> None:
    """With a restart every ten hours a cycle of a day is seen, as without one."""
    given: dict[str, Any] = {"budget_nats": 0.05, "floors": MODELS, "cycle": 86_400.0}
    bench = Bench(**given)
    for _ in range(3):
        assert bench.alarms.report()["floor_upper_nats"] is None
        measure_floors(bench, 60)
        bench = restarted(bench, **given)
    limit = bench.alarms.report()["floor_upper_nats"]
    assert 0.0 < limit < 0.02
    uninterrupted = Bench(**given)
    for _ in range(3):
        measure_floors(uninterrupted, 60)
    assert limit == uninterrupted.alarms.report()["floor_upper_nats"]
    bench.alarms.forget()
    assert bench.alarms.report()["floor_upper_nats"] is None, "other models have another noise floor"
    assert restarted(bench, **given).alarms.report()["floor_upper_nats"] is None


@pytest.mark.parametrize("damaged", ["", "{}", '{"schema": 1, "state": {"floors": {"compressed": {}}}}', "reshaped"])
def test_a_damaged_noise_floor_is_measured_anew(damaged: str, caplog: pytest.LogCaptureFixture) -> None:
    given: dict[str, Any] = {"budget_nats": 0.05, "floors": MODELS}
    bench = Bench(**given)
    measure_floors(bench, 60)
    bench.alarms.save()
    stored = json.loads(bench.store.get_state(FLOORS_KEY) or "")
    for floor in stored["state"]["floors"].values():
        floor["dependence"]["mean"]["open"][1].append(1)
    again = Bench(**given)
    again.alarms.restore(None, [], floors=json.dumps(stored) if damaged == "reshaped" else damaged)
    assert "noise floors cannot be continued" in caplog.text
    assert again.alarms.report()["floor_upper_nats"] is None
    measure_floors(again, 60)
    assert again.alarms.report()["floor_upper_nats"] is not None
