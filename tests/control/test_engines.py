"""What the control process knows of the engines: their health, their drain, and which one is an outlier."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
from tests.support.admin_server import admin_client
from tests.support.captures import K
from tests.support.control import AUTHORIZED, connect_relay, control, relay_stats, scored, settings, status_json, told
from tests.support.plugin_engines import PluginEngine
from tests.support.waiting import until

from hemostat.config.schema import Settings
from hemostat.control.composition import Control
from hemostat.engines.reports import PluginReports
from hemostat.ipc.messages import EngineHealth, Stats
from hemostat.measurement.by_engine import ACTIVE_SECONDS

A, B, C, D = (f"10.0.0.{n}:8000" for n in range(4))


def of_engines(**more: Any) -> Settings:
    """Settings whose upstream are the engines."""
    return settings(upstream={"urls": [f"http://{name}" for name in (A, B, C, D)]}, **more)


def reporting(*states: str, requests: int = 5) -> Stats:
    """A relay whose engines are in these states."""
    engines = [
        EngineHealth(name, state, drained=False, outstanding=2, requests=requests, resent=1, ejections=0)
        for name, state in zip((A, B, C, D), states, strict=False)
    ]
    return msgspec.structs.replace(relay_stats(), engines=engines)


def value(plane: Control, metric: str, engine: str) -> float | None:
    return plane.registry.get_sample_value(metric, {"engine": engine})


async def test_the_status_sums_what_all_relays_know(tmp_path: Path) -> None:
    async with control(tmp_path, of_engines()) as plane:
        first = await connect_relay(plane, tmp_path, 1, reporting("up", "up"))
        second = await connect_relay(plane, tmp_path, 2, reporting("up", "ejected", requests=7))
        result = {row["engine"]: row for row in status_json(plane)["upstream"]}
        assert {
            name: (row["up"], row["relays"], row["outstanding"], row["requests"]) for name, row in result.items()
        } == {
            A: (2, 2, 4, 12),
            B: (1, 2, 4, 12),
        }
        assert value(plane, "hemostat_upstream_up_ratio", B) == 0.5
        first.close()
        second.close()


async def test_a_drain_reaches_relays_and_survives_a_restart(tmp_path: Path) -> None:
    made = of_engines(store={"url": f"sqlite:///{tmp_path / 'store.db'}"})
    async with control(tmp_path, made) as plane:
        relay = await connect_relay(plane, tmp_path, 1, reporting("up", "up"))
        async with admin_client(plane) as client:
            refused = await client.post("/api/v1/engines/drain", json={"engine": "other:1"}, headers=AUTHORIZED)
            assert refused.status_code == 400
            assert A in refused.json()["detail"], "it names the engines"
            drained = await client.post("/api/v1/engines/drain", json={"engine": B}, headers=AUTHORIZED)
        assert [row["drained"] for row in drained.json()["upstream"]] == [False, True]
        assert policy_drains(plane) == {B}
        relay.close()
    async with control(tmp_path, made) as plane:
        assert policy_drains(plane) == {B}
        async with admin_client(plane) as client:
            ended = await client.post("/api/v1/engines/undrain", json={"engine": B}, headers=AUTHORIZED)
        assert ended.status_code == 200
        assert policy_drains(plane) == set()


def policy_drains(plane: Control) -> frozenset[str]:
    return told(plane).drained


def observe(plane: Control, count: int, outlier: str | None, first: int = 0, *, drawn: bool = True) -> None:
    rng = np.random.default_rng(first)
    for n in range(first, first + count):
        engine = (A, B, C, D)[n % 4]
        top = 0.35 if engine == outlier else 0.75 + 0.1 * rng.random()
        row = np.log([top, (1 - top) / 2, (1 - top) / 4, (1 - top) / 8, 1e-300]).astype("<f4")
        row[K] = -np.inf
        rows = np.tile(row, (3, 1))
        plane.pipeline.update(
            *scored(
                f"r{n}",
                n,
                engine=engine,
                engine_drawn=drawn,
                candidate_logprobs=rows.tobytes(),
                emitted_logprobs=rows[:, 0].tobytes(),
            )
        )


async def test_the_engine_that_differs_is_named_and_that_survives_a_restart(tmp_path: Path) -> None:
    made = settings(store={"url": f"sqlite:///{tmp_path / 'store.db'}"})
    async with control(tmp_path, made) as plane:
        observe(plane, 20, outlier=C)
        await plane.writer.write()  # the numbers of the tests
        observe(plane, 100, outlier=C, first=20)
        assert plane.measured.by_engine.outliers == {C}
        (row,) = [row for row in plane.measured.by_engine.report() if row["outlier"]]
        assert row["farther"] is False
        assert row["on_tokens"] <= 90
        assert value(plane, "hemostat_engine_outlier", C) == 1.0
        assert value(plane, "hemostat_engine_outlier", A) == 0.0
        per_token = {row["engine"]: row["kl_nats"] for row in plane.measured.by_engine.report()}
        assert per_token[C] < min(per_token[A], per_token[B], per_token[D])
        await plane.writer.write()
        assert f"engine {C} is an outlier" in {event["why"] for event in plane.store.read().events}
    async with control(tmp_path, made) as plane:
        assert plane.measured.by_engine.outliers == {C}


async def test_engines_of_one_model_are_not_named(tmp_path: Path) -> None:
    async with control(tmp_path) as plane:
        observe(plane, 100, outlier=None)
        assert not plane.measured.by_engine.outliers


@pytest.mark.parametrize("affinity", [True, False])
async def test_engines_that_were_not_drawn_are_not_compared(tmp_path: Path, affinity: bool) -> None:
    made = settings(upstream={"url": "http://127.0.0.1:1", "affinity": affinity})
    async with control(tmp_path, made) as plane:
        observe(plane, 120, outlier=C, drawn=False)
        assert not plane.measured.by_engine.outliers
        assert not [row for row in plane.measured.by_engine.report() if row["outlier"] or row["requests"]]
        status = plane.status.current().outlier_engine
        assert status["state"] == "off"
        assert ("upstream.affinity: false" if affinity else "a router behind its address") in status["detail"]
        observe(plane, 1, outlier=None, first=120)
        assert plane.status.current().outlier_engine == {"state": "on", "detail": None}


async def test_an_engine_that_was_named_is_not_shown_when_none_was_drawn_for_a_day(tmp_path: Path) -> None:
    now = 1000.0
    async with control(tmp_path, clock=lambda: now, wall=lambda: now, steady=lambda: now) as plane:
        observe(plane, 20, outlier=C)
        await plane.writer.write()  # the numbers of the tests
        observe(plane, 100, outlier=C, first=20)
        assert plane.measured.by_engine.outliers == {C}
        now += ACTIVE_SECONDS
        assert not plane.measured.by_engine.outliers
        assert not [row for row in plane.measured.by_engine.report() if row["outlier"]]


async def test_records_without_an_engine_count_nowhere(tmp_path: Path) -> None:
    async with control(tmp_path) as plane:
        plane.pipeline.update(*scored())
        assert plane.measured.by_engine.report() == []


async def test_each_engine_is_asked_for_the_versions_that_it_holds_itself(tmp_path: Path) -> None:
    registry = PluginReports()
    engines = [PluginEngine(registry, "one"), PluginEngine(registry, "two")]
    for engine in engines:
        await engine.start()
    names = [engine.name for engine in engines]
    made = settings(upstream={"urls": [f"http://{name}" for name in names]})
    async with control(tmp_path, made) as plane:
        for engine in engines:
            engine.registry = plane.engines.reports
        health = [EngineHealth(name, "up", False, 0, 0, 0, 0) for name in names]
        relay = await connect_relay(plane, tmp_path, 1, msgspec.structs.replace(relay_stats(), engines=health))
        engines[0].versions = {"one": ["a" * 32]}
        task = asyncio.create_task(plane.engines.run())

        def held() -> dict[str, frozenset[str]] | None:
            for engine in engines:
                engine.report()
            policy = told(plane)
            assert policy.acknowledged == frozenset()
            return policy.held_by_engine

        assert held() == {}
        await until(lambda: held() == {names[0]: {"a" * 32}})
        assert [row["holds"] for row in status_json(plane)["upstream"]] == [["a" * 32], []]
        engines[1].versions = {"two": ["a" * 32]}
        assert held() == dict.fromkeys(names, frozenset({"a" * 32}))
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        relay.close()
    for engine in engines:
        await engine.stop()
