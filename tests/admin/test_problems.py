"""The state of the deployment: what is wrong, worst first, since when. In front of a real `Control`."""

from __future__ import annotations

import asyncio
import inspect
import logging
import re
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from importlib import resources
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import msgspec
import pytest
from tests.support.admin_server import everything
from tests.support.captures import V
from tests.support.control import connect_relay, control, lose, relay_stats, scored, set_gate, settings, status_json
from tests.support.prometheus import rules
from tests.support.waiting import until

from hemostat import __version__
from hemostat.admin import problem_sources
from hemostat.admin.alerts import ALERTS
from hemostat.admin.recent import LONG_SECONDS, LOST_SECONDS, MINUTE_SECONDS
from hemostat.control.composition import Control
from hemostat.engines.messages import RankReport
from hemostat.engines.reports import SILENCE_SECONDS
from hemostat.ipc.messages import OVERHEAD_BUCKETS, EngineHealth, Stats, encode
from hemostat.metrics.reasons import Unscored
from hemostat.reference.pair import ReferenceState
from hemostat.store.protocol import StoreFailure

REQUESTS, SHADOW = "hemostat_requests_total", "hemostat_shadow_requests_total"
REPEATED = "hemostat_repeated_requests_total"
AREAS = re.findall(
    r"^  (\w+): \(", resources.files("hemostat.admin.console").joinpath("overview.js").read_text(), re.MULTILINE
)
"""The parts of the console's status line."""
A, B, C = "10.0.0.1:8000", "10.0.0.2:8000", "10.0.0.3:8000"


def engine(name: str, state: str = "up") -> EngineHealth:
    return EngineHealth(name, state, drained=False, outstanding=0, requests=0, resent=0, ejections=0)


def stats(
    *engines: EngineHealth,
    ok: float = 0.0,
    failed: float = 0.0,
    captured: float = 0.0,
    lost: float = 0.0,
    repeated: float = 0.0,
    slow: int = 0,
) -> Stats:
    """slow: of the requests, those to which the relay added 20 ms."""
    route = "/v1/completions"
    counters = {
        REQUESTS: {(route, "ok"): ok, (route, "upstream_failed"): failed},
        SHADOW: {("shadowed", ""): captured, ("dropped", "link_full"): lost},
        REPEATED: {("refused",): repeated},
    }
    buckets = [0] * (len(OVERHEAD_BUCKETS) + 1)
    buckets[0], buckets[OVERHEAD_BUCKETS.index(0.025)] = int(ok) - slow, slow
    return msgspec.structs.replace(
        relay_stats(), counters=counters, overhead_buckets=buckets, engines=list(engines or [engine(A)])
    )


class Now:
    """All clocks of the control process."""

    value = 1000.0

    def __call__(self) -> float:
        return self.value


class Bench:
    """A control process whose reference is ready, with a relay."""

    def __init__(self, plane: Control, folder: Path, clock: Now) -> None:
        self.clock = clock
        self.one, self.folder = plane, folder
        self.reports = 0
        self.relays: list[asyncio.StreamWriter] = []
        self.taken: dict[int, float] = {}
        """The sum of the overheads that each relay has reported last."""

    @property
    def now(self) -> float:
        return self.clock.value

    @now.setter
    def now(self, value: float) -> None:
        self.clock.value = value

    async def connect(self, figures: Stats | None = None) -> None:
        figures = figures or stats()
        self.taken[len(self.relays)] = figures.overhead_sum
        self.relays.append(await connect_relay(self.one, self.folder, len(self.relays) + 1, figures))

    async def report(self, figures: Stats, relay: int = 0) -> None:
        self.reports += 1
        taken = {**self.taken, relay: float(2**self.reports)}  # no other figures have the same sum
        self.relays[relay].write(encode(msgspec.structs.replace(figures, overhead_sum=taken[relay])))
        await until(lambda: self.one.link.total().overhead_sum == sum(taken.values()))
        self.taken = taken

    def found(self) -> list[tuple[str, str]]:
        """Alerts and texts; and what must hold of every state."""
        state = status_json(self.one)["state"]
        problems = state["problems"]
        assert state["level"] == (problems[0]["severity"] if problems else "ok")
        assert [problem["alert"] for problem in problems] == [
            alert for alert in ALERTS if alert in {problem["alert"] for problem in problems}
        ]
        assert all(problem["runbook"] == f"runbook#{problem['alert'].lower()}" for problem in problems)
        return [(problem["alert"], problem["text"]) for problem in problems]

    def recent(self) -> tuple[int, int]:
        """Requests of the last minute, and how many of them failed."""
        recent = status_json(self.one)["proxy"]["recent"]
        return recent["requests"], recent["failed"]

    def since(self) -> dict[str, float]:
        return {problem["alert"]: problem["since"] for problem in status_json(self.one)["state"]["problems"]}


@asynccontextmanager
async def bench(folder: Path, **more: Any) -> AsyncIterator[Bench]:
    upstream = {"urls": [f"http://{name}" for name in (A, B, C)]}
    now = Now()
    clocks = {"clock": now, "wall": now, "steady": now}
    async with control(folder, settings(**{"upstream": upstream} | more), **clocks) as plane:
        made = Bench(plane, folder, now)
        plane.monitor.state = ReferenceState.READY
        await made.connect()
        made.found()  # as once a second
        try:
            yield made
        finally:
            for relay in made.relays:
                relay.close()


def seconds(duration: str) -> float:
    """A duration of Prometheus, such as 15m."""
    return float(duration[:-1]) * {"s": 1, "m": 60, "h": 3600}[duration[-1]]


def test_the_alerts_of_the_rules_are_those_of_the_table_with_their_severities() -> None:
    alerts = {rule["alert"]: rule for rule in rules() if "alert" in rule}
    assert {name: rule["labels"]["severity"] for name, rule in alerts.items()} == {
        name: alert.severity for name, alert in ALERTS.items()
    }
    order = [alert.severity for alert in ALERTS.values()]
    assert order == sorted(order), "critical before warning"
    for name, alert in ALERTS.items():
        assert alert.lasting <= seconds(alerts[name].get("for", "0s")), f"{name}: shown no later than the alert fires"
        assert alert.area in AREAS, f"{name}: the console's status line has a part for it"


def test_every_alert_is_looked_for() -> None:
    """The code that looks has each name; the other tests of this file show that each is found."""
    source = inspect.getsource(problem_sources)
    assert set(re.findall(r'"(Hemostat[A-Z]\w+)"', source)) == ALERTS.keys()
    cases = Path(__file__).read_text()
    assert [name for name in ALERTS if name not in cases] == []


async def test_a_dead_engine_is_the_state_with_the_share_of_failures_until_it_answers_again(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "hemostat.control")
    async with bench(tmp_path) as plane:
        await plane.report(stats(ok=10))
        assert plane.found() == []
        plane.now += 5
        await plane.report(stats(engine(A, "ejected"), ok=10, failed=0))
        assert plane.found() == [("HemostatUpstreamDown", "vLLM does not answer")]
        plane.now += 5
        await plane.report(stats(engine(A, "ejected"), ok=10, failed=30))
        share = "vLLM does not answer: 75 % of the requests of the last minute failed"
        assert plane.found() == [("HemostatUpstreamDown", share)]
        assert plane.since() == {"HemostatUpstreamDown": 1005.0}
        assert plane.recent() == (40, 30)
        await plane.report(stats(engine(A), ok=20, failed=30))
        assert plane.found() == [], "what failed before was the outage, which is over"
        assert plane.recent() == (0, 0)
        await plane.report(stats(engine(A), ok=30, failed=45))
        assert plane.found() == [
            ("HemostatProxyErrors", "60 % of the requests of the last minute failed, in vLLM or on the way to it")
        ], "what fails now counts"
        plane.now += MINUTE_SECONDS
        await plane.report(stats(engine(A), ok=40, failed=45))
        assert plane.found() == []
        said = [record.getMessage() for record in caplog.records if "vLLM" in record.getMessage()]
        assert said == ["vLLM does not answer", "vLLM answers again"]


async def test_an_outage_is_over_when_every_relay_reaches_an_engine_again(tmp_path: Path) -> None:
    async with bench(tmp_path) as plane:
        await plane.connect(stats())
        await plane.report(stats(engine(A, "ejected"), ok=10), 0)
        await plane.report(stats(engine(A, "ejected"), ok=10), 1)
        assert [alert for alert, _ in plane.found()] == ["HemostatUpstreamDown"]
        await plane.report(stats(engine(A), ok=10), 0)
        await plane.report(stats(engine(A, "ejected"), ok=10, failed=20), 1)
        assert [alert for alert, _ in plane.found()] == ["HemostatProxyErrors", "HemostatEngineEjected"]
        await plane.report(stats(engine(A), ok=10, failed=20), 1)
        assert plane.found() == []


async def test_of_several_engines_one_is_no_outage_and_all_are(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "hemostat.control")
    async with bench(tmp_path) as plane:
        await plane.connect(stats(engine(A), engine(B), engine(C)))
        await plane.report(stats(engine(A), engine(B, "ejected"), engine(C, "returning")))
        assert plane.found() == [
            (
                "HemostatEngineEjected",
                f"2 of 3 engines get no requests: {B} (for 1 of 2 relays), {C} (for 1 of 2 relays)",
            )
        ]
        await plane.report(stats(engine(A), engine(B, "ejected"), engine(C)), 0)
        await plane.report(stats(engine(A), engine(B, "ejected"), engine(C)), 1)
        assert plane.found() == [("HemostatEngineEjected", f"1 of 3 engines gets no requests: {B}")]
        plane.one.engines.drained = frozenset([B])
        assert plane.found() == []
        for relay in range(2):
            await plane.report(stats(engine(A, "ejected"), engine(B), engine(C, "ejected")), relay)
        assert plane.found() == [("HemostatUpstreamDown", "None of the 2 engines answers")], (
            "one that is drained is no help"
        )
        assert [record.getMessage() for record in caplog.records if "engine" in record.getMessage()] == [
            f"2 of 3 engines get no requests: {B} (for 1 of 2 relays), {C} (for 1 of 2 relays)",
            "all engines that are not drained get requests again",
            "None of the 2 engines answers",
        ]


async def test_what_a_relay_counted_before_it_connected_is_not_of_the_last_minute(tmp_path: Path) -> None:
    async with bench(tmp_path) as plane:
        await plane.connect(stats(ok=10, failed=90, captured=10, lost=90))
        assert plane.found() == []
        await plane.report(stats(ok=105, failed=95, captured=10, lost=90), 1)
        assert plane.found() == [], "5 % is within the limit"
        await plane.report(stats(ok=105, failed=105, captured=10, lost=90), 1)
        assert [text.partition(" of ")[0] for _, text in plane.found()] == ["14 %"]


async def test_a_few_failures_are_no_problem_of_the_deployment(tmp_path: Path) -> None:
    async with bench(tmp_path) as plane:
        await plane.report(stats(failed=4))
        assert plane.found() == []
        await plane.report(stats(failed=5))
        assert [alert for alert, _ in plane.found()] == ["HemostatProxyErrors"]


async def test_without_a_relay_it_is_not_known_what_is_served(tmp_path: Path) -> None:
    async with bench(tmp_path) as plane:
        plane.relays[0].close()
        await until(lambda: plane.one.link.relays == 0)
        assert [alert for alert, _ in plane.found()] == ["HemostatNoRelays"]
        await plane.connect()
        assert plane.found() == []


@pytest.mark.parametrize(
    ("state", "text"),
    [
        (ReferenceState.STARTING, "The reference is not ready yet: nothing is measured (why)"),
        (ReferenceState.DOWN, "The reference does not answer: nothing is measured (why)"),
        (
            ReferenceState.MISMATCH,
            "The reference and the compressed model cannot be compared: nothing is measured (why)",
        ),
    ],
)
async def test_a_reference_that_is_not_ready_is_a_problem_and_none_at_all_is_not(
    state: ReferenceState, text: str, tmp_path: Path
) -> None:
    async with bench(tmp_path) as plane:
        plane.one.monitor.state, plane.one.monitor.detail = state, "why"
        assert plane.found() == [("HemostatReferenceDown", text)]
        plane.one.monitor.state = ReferenceState.NONE
        assert plane.found() == []


async def test_the_worst_is_first_and_each_has_its_own_since(tmp_path: Path) -> None:
    async with bench(tmp_path) as plane:
        configuration = plane.one.configuration
        configuration.report = msgspec.structs.replace(configuration.report, error="shadow.rate: not a number")
        assert plane.found()[0][1].endswith("the former one serves: shadow.rate: not a number")
        plane.now += 7
        await plane.report(stats(engine(A, "ejected")))
        assert [alert for alert, _ in plane.found()] == ["HemostatUpstreamDown", "HemostatReloadFailed"]
        assert plane.since() == {"HemostatUpstreamDown": 1007.0, "HemostatReloadFailed": 1000.0}


async def test_a_store_that_refuses_is_a_problem_for_a_quarter_of_an_hour(tmp_path: Path) -> None:
    async with bench(tmp_path) as plane:
        plane.one.store_errors.record(StoreFailure("disk full"))
        assert plane.found() == [
            (
                "HemostatStoreErrors",
                "Reads and writes that the store refused in the last 15 minutes: 1; "
                "a restart may lose something (disk full)",
            )
        ]
        plane.now += LOST_SECONDS - 1
        assert plane.found() != []
        plane.now += 2
        assert plane.found() == []


async def test_a_store_that_is_not_known_is_a_problem_for_as_long_as_it_is(tmp_path: Path) -> None:
    async with bench(tmp_path) as plane:
        await lose(plane.one, "the session has ended")
        assert plane.found() == [("HemostatStoreErrors", "Nothing is decided or stored: the session has ended")]
        plane.now += 2 * LOST_SECONDS
        assert [alert for alert, _ in plane.found()] == ["HemostatStoreErrors"]


def fail_floor(plane: Control) -> None:
    meter = plane.noise_floor
    assert meter is not None
    meter.failing["reference"] = "no cache"


def fail_adapters(plane: Control) -> None:
    plane.adapters.learner.stop("compressed-tensors is missing", unavailable=True)


@pytest.mark.parametrize(
    ("harm", "alert", "said"),
    [
        (fail_floor, "HemostatNoiseFloorUnknown", "reference model: no cache"),
        (fail_adapters, "HemostatAdapterBuildsFail", "compressed-tensors is missing"),
    ],
)
async def test_what_measuring_and_learning_cannot_do(
    harm: Callable[[Control], None], alert: str, said: str, tmp_path: Path
) -> None:
    async with bench(tmp_path, reference={"backend": "vllm", "url": "http://127.0.0.1:1"}) as plane:
        harm(plane.one)
        [(raised, text)] = plane.found()
        assert raised == alert
        assert said in text


async def test_a_profile_that_failed_is_a_problem_until_its_engine_is_started_again(tmp_path: Path) -> None:
    async with bench(tmp_path) as plane:

        def found() -> list[tuple[str, str]]:
            return [(problem.alert, problem.text) for problem in plane.one.problems.look().problems]

        def report(boot: str, **counters: int) -> None:
            last = RankReport(boot, 0, 1, [], 30, counters, "v1", "0", plugin=__version__)
            plane.one.engines.reports.update(last, plane.now)

        report("a", profiles_failed=0, profiles_refused=2)
        report("b")
        assert found() == []
        report("a", profiles_failed=1)
        text = "A profile failed in 1 of 2 engines, and is off there until vLLM restarts: see vLLM's log"
        assert found() == [("HemostatProfileFailed", text)]
        plane.now += SILENCE_SECONDS + 1
        report("anew", profiles_failed=0)
        assert found() == []


async def test_a_plugin_whose_version_does_not_fit_is_a_problem_until_its_engine_has_another(tmp_path: Path) -> None:
    async with bench(tmp_path) as plane:

        def report(boot: str, version: str) -> None:
            last = RankReport(boot, 0, 1, [], 30, {}, "v1", "0", plugin=version)
            plane.one.engines.reports.update(last, plane.now)

        def found() -> list[str]:
            problems = plane.one.problems.look().problems
            assert {problem.alert for problem in problems} <= {"HemostatPluginMisfit"}
            return [problem.text for problem in problems]

        patch = f"{__version__.rpartition('.')[0]}.999"
        report("a", __version__)
        report("b", patch)
        assert found() == []
        report("c", "0.1.0")
        said = f"The plugin does not fit Hemostat {__version__} in"
        assert found() == [f"{said} 1 of 3 engines: its version there is 0.1.0"]
        report("d", "")
        assert found() == [f"{said} 2 of 4 engines: its version there is unknown (older than 0.3), 0.1.0"]
        plane.now += SILENCE_SECONDS + 1
        report("anew", __version__)
        assert found() == []


async def test_captures_and_records_that_are_lost(tmp_path: Path) -> None:
    async with bench(tmp_path, records={"path": str(tmp_path / "records.jsonl")}) as plane:
        await plane.report(stats(captured=990, lost=10))
        assert plane.found() == [], "a restart of the control process loses a few"
        await plane.report(stats(captured=980, lost=20))
        assert [alert for alert, _ in plane.found()] == ["HemostatCapturesLost"]
        assert plane.found()[0][1].startswith("20 of 1000 captures of the last 15 minutes were lost")
        records = plane.one.records
        assert records is not None
        records.lost += 3
        assert plane.found()[1] == (
            "HemostatRecordsLost",
            "Records that could not be written to records.path in the last 15 minutes: 3",
        )
        plane.now += LOST_SECONDS
        assert plane.found() == []


async def test_an_engine_that_computes_something_else_is_a_problem_with_its_figures(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with bench(tmp_path) as plane:
        stated = [(f"Canaries: {A} (m) has changed", 900.0), (f"Canaries: {B} (m) has changed", 800.0)]
        monkeypatch.setattr(plane.one.canaries, "statements", lambda: iter(stated))
        assert plane.found() == [("HemostatCanaryChanged", f"Canaries: {A} (m) has changed (and 1 more)")]
        assert plane.since() == {"HemostatCanaryChanged": 800.0}
        monkeypatch.setattr(plane.one.canaries, "statements", lambda: iter(()))
        assert plane.found() == []


async def test_a_gate_that_fails_or_cannot_decide_is_a_problem(tmp_path: Path) -> None:
    async with bench(tmp_path, reference={"backend": "vllm", "url": "http://127.0.0.1:1"}) as plane:
        gate = plane.one.gate
        gate.begin("http://127.0.0.1:1", "other", None, None, waive_cycles=False)
        assert "HemostatGateUndecided" not in [alert for alert, _ in plane.found()]
        gate.forget("the stored evidence is about other models")
        await plane.one.writer.write()
        text = "undecided: the stored evidence is about other models: the candidate was compared with others"
        assert ("HemostatGateUndecided", f"The live gate: {text}") in plane.found()
        set_gate(plane.one, "fail")
        assert "HemostatGateFailed" in [alert for alert, _ in plane.found()]


# --- what measuring and calibrating does not do -----------------------------------------------------------------------


async def test_captures_that_are_dropped_while_the_reference_is_ready(tmp_path: Path) -> None:
    async with bench(tmp_path, reference={"backend": "vllm", "url": "http://127.0.0.1:1"}) as plane:
        endings, [_, capture] = plane.one.pipeline.endings, scored()

        def end(dropped: int, scores: int) -> None:
            for _ in range(dropped):
                endings.unscored(Unscored.QUEUE_FULL, capture)
            for _ in range(scores):
                endings.scored(capture)

        end(dropped=20, scores=80)
        assert plane.found() == []
        plane.now += 300
        assert plane.found() == [], "a fifth is within the limit"
        end(dropped=1, scores=0)
        assert plane.found() == [], "a burst is no problem"
        plane.now += 300
        text = "21 of 101 captures of the last 15 minutes were dropped (since the start most often for queue_full)"
        assert plane.found() == [("HemostatShadowDrops", text)]
        assert plane.since() == {"HemostatShadowDrops": 1300.0}
        plane.one.monitor.state = ReferenceState.DOWN
        end(dropped=50, scores=0)
        assert [alert for alert, _ in plane.found()] == ["HemostatReferenceDown"]
        plane.one.monitor.state = ReferenceState.READY
        plane.found()
        plane.now += 301
        assert plane.found() == [], "what was dropped while the reference was down is a part of that"


async def test_requests_of_which_none_is_scored(tmp_path: Path) -> None:
    async with bench(tmp_path, reference={"backend": "vllm", "url": "http://127.0.0.1:1"}) as plane:
        await plane.report(stats(ok=11))
        assert plane.found() == [], "scoring takes a while"
        plane.now += 300
        text = "11 requests were answered in the last 30 minutes, and none was scored"
        assert plane.found() == [("HemostatShadowStarving", text)]
        plane.one.pipeline.endings.scored(scored()[1])
        assert plane.found() == []
        plane.now += LONG_SECONDS
        await plane.report(stats(ok=21))
        assert plane.found() == []
        plane.now += 301
        assert plane.found() == [], "too few requests to expect a score"


async def test_requests_that_are_sent_twice(tmp_path: Path) -> None:
    async with bench(tmp_path) as plane:
        await plane.report(stats(ok=100, repeated=20))
        assert plane.found() == []
        await plane.report(stats(ok=4300, repeated=21))
        assert plane.found() == [], "fewer than one in 200"
        await plane.report(stats(ok=4300, repeated=22))
        [(alert, text)] = plane.found()
        assert alert == "HemostatRequestsRepeated"
        assert text.startswith("22 of 4300 requests of the last 30 minutes were sent to the engine twice")
        plane.now += LONG_SECONDS
        assert plane.found() == []


async def test_a_relay_that_is_slow(tmp_path: Path) -> None:
    async with bench(tmp_path) as plane:
        await plane.report(stats(ok=100, slow=50))
        plane.found()
        plane.now += 200
        assert plane.found() == [], "fewer than 101 requests say nothing of the 99 % quantile"
        await plane.report(stats(ok=1000, slow=60))
        assert plane.found() == []
        plane.now += 299
        await plane.report(stats(ok=2000, slow=100))
        assert plane.found() == []
        plane.now += 1
        text = "Hemostat adds 10 ms or more to one request in a hundred, of those of the last 5 minutes"
        assert plane.found() == [("HemostatOverhead", text)]
        plane.now += 300
        assert plane.found() == []


async def test_adapters_of_which_no_request_can_use_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async with bench(tmp_path) as plane:
        monkeypatch.setattr(plane.one.profile_manager.lifecycle, "adapter_versions", lambda: ["ab" * 16])
        hosts = plane.one.adapters.hosts
        running = asyncio.create_task(hosts.run())
        try:
            await until(lambda: hosts.hosts)
            assert plane.found() == [], "in mode observe none is asked for"
            plane.one.profile_manager.operator.set_mode("auto")
            plane.one.profile_manager.set_model_pair("m", V)
            assert plane.found() == [], "to load one takes a while"
            plane.now += 600
            [(alert, text)] = plane.found()
            assert alert == "HemostatAdaptersUnusable"
            assert text.startswith("Adapters serve or are tested, but no request can use one: ")
        finally:
            running.cancel()
            await asyncio.gather(running, return_exceptions=True)


@pytest.mark.parametrize(("test", "alert"), [("budget", "HemostatHemorrhage"), ("change", "HemostatModelChanged")])
async def test_an_alarm_that_is_raised(test: str, alert: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async with bench(tmp_path) as plane:
        readings = [
            SimpleNamespace(test=test, kind=kind, raised=SimpleNamespace(since=since))
            for kind, since in (("chat", 900.0), ("text", 800.0))
        ]
        monkeypatch.setattr(plane.one.measured.alarms, "raised", lambda: readings)
        [(found, text)] = plane.found()
        assert found == alert
        assert text.endswith(" in chat, text")
        assert plane.since() == {alert: 800.0}


async def test_an_engine_that_is_an_outlier(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async with bench(tmp_path) as plane:
        row = {"engine": B, "outlier": True, "farther": True, "since": 700.0}
        by_engine = plane.one.measured.by_engine
        monkeypatch.setattr(type(by_engine), "outliers", frozenset([B]))
        monkeypatch.setattr(by_engine, "report", lambda: [{"engine": A, "outlier": False}, row])
        text = f"Engines differ on the same kinds of traffic: {B} is further from the reference than the others"
        assert plane.found() == [("HemostatEngineOutlier", text)]
        assert plane.since() == {"HemostatEngineOutlier": 700.0}
        assert status_json(plane.one)["state"]["problems"][0]["page"] == ["engines", B]


async def test_a_profile_that_harmed_is_a_problem_until_its_kind_is_released_and_its_rollback_for_half_an_hour(
    tmp_path: Path,
) -> None:
    async with bench(tmp_path) as plane:
        plane.relays.append(await everything(plane.one, tmp_path))
        [released] = plane.one.measured.outcomes.harmed()
        found = dict(plane.found())
        assert found["HemostatOutcomeHarm"] == (
            f"A profile made answers in {released} worse (cut 1 with it, 0 without), and was taken from this kind"
        )
        assert found["HemostatCalibrationRolledBack"].startswith(f"A profile was rolled back in {released}: cut is bad")
        plane.one.profile_manager.operator.release(released)
        assert "HemostatOutcomeHarm" not in dict(plane.found())
        plane.now += LONG_SECONDS + 60.0
        assert "HemostatCalibrationRolledBack" not in dict(plane.found())
