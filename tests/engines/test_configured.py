"""The control process believes and contacts few addresses of engines: its own upstream's, whatever relays report."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import msgspec
import pytest
from tests.support.captures import capture
from tests.support.control import connect_relay, control, relay_stats, settings, status_json
from tests.support.engines import FakeEngine
from tests.support.waiting import until

from hemostat.config.schema import Settings
from hemostat.control.composition import Control
from hemostat.engines import configured as module
from hemostat.engines.configured import KEEP_SECONDS, ConfiguredEngines
from hemostat.engines.messages import RankReport
from hemostat.ipc.messages import EngineHealth, Stats
from hemostat.reference.protocol import ReferenceFailure
from hemostat.scoring.engine_scores import EngineScorer

A, B, C = "10.0.0.1:8000", "10.0.0.2:8000", "10.0.0.3:8000"


def health(name: str) -> EngineHealth:
    return EngineHealth(name, "up", drained=False, outstanding=0, requests=0, resent=0, ejections=0)


def reporting(*names: str) -> Stats:
    return msgspec.structs.replace(relay_stats(), engines=[health(name) for name in names])


@asynccontextmanager
async def contacted(configured: list[FakeEngine], evil: FakeEngine, folder: Path) -> AsyncIterator[Control]:
    """A control process with these engines in its configuration. Its relay reports another server, too."""
    for engine in (*configured, evil):
        await engine.start()
    made = settings(upstream={"urls": [f"http://{engine.name}" for engine in configured], "api_key": "the-key"})
    async with control(folder, made) as plane:
        relay = await connect_relay(plane, folder, 1, reporting(evil.name, *[engine.name for engine in configured]))
        try:
            yield plane
        finally:
            relay.close()
    for engine in (*configured, evil):
        await engine.stop()


@pytest.mark.parametrize("count", [1, 2])
async def test_an_address_that_only_a_relay_names_is_never_contacted(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, count: int
) -> None:
    configured, evil = [FakeEngine() for _ in range(count)], FakeEngine()
    async with contacted(configured, evil, tmp_path) as plane:
        plane.engines.reports.update(RankReport("one", 0, 1, [], 100, {}, "v1", "0.32.0"), time.monotonic())
        loops = [asyncio.create_task(loop) for loop in (plane.engines.run(), plane.canaries.run())]
        try:
            await until(lambda: evil.asked or all(engine.asked for engine in configured))
        finally:
            for loop in loops:
                loop.cancel()
            await asyncio.gather(*loops, return_exceptions=True)
        assert [request.get(b"authorization") for request in evil.asked] == []
        assert configured[0].asked[0].get(b"authorization") == [b"Bearer the-key"], "what another server would get"
        names = [engine.name for engine in configured]
        assert list(plane.engines.current()) == names
        assert [row["engine"] for row in status_json(plane)["upstream"]] == names
        assert status_json(plane)["engines"]["ignored_addresses"] == 1
        lines = [record.getMessage() for record in caplog.records if evil.name in record.getMessage()]
        assert len(lines) == 1, "once, however often it is reported"
        assert "is not contacted" in lines[0]


async def test_a_capture_that_names_another_engine_is_scored_nowhere(tmp_path: Path) -> None:
    evil = FakeEngine()
    async with contacted([FakeEngine()], evil, tmp_path) as plane:
        scorer = EngineScorer(plane.engines, 4)
        with pytest.raises(ReferenceFailure, match=f"{evil.name} is not an engine of the upstream"):
            await scorer.with_candidates(capture(engine=evil.name))
        await scorer.close()
        assert evil.asked == []


class Names:
    """A name server. addresses: of the only name; None where it does not answer."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.addresses: list[str] | None = []
        self.asked = 0
        monkeypatch.setattr(asyncio.get_running_loop(), "getaddrinfo", self._look_up, raising=False)

    async def _look_up(self, host: str, port: int, **_: Any) -> list[Any]:
        assert (host, port) == ("vllm.models.svc", 8000)
        self.asked += 1
        if self.addresses is None:
            raise OSError("no answer")
        return [(None, None, None, "", (address, port)) for address in self.addresses]


class Bench:
    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 0.0
        self.names = Names(monkeypatch)
        upstream = Settings.model_validate({"upstream": {"url": "dns+http://vllm.models.svc:8000"}}).upstream
        self.engines = ConfiguredEngines(upstream, lambda: self.now)

    def known(self, *reported: str) -> list[str]:
        return [entry.engine for entry in self.engines.known(map(health, reported))]


async def test_engines_behind_a_name_are_what_this_process_resolves(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    bench = Bench(monkeypatch)
    assert bench.known(A, "evil:80") == [], "nothing is known before the first look-up"
    bench.names.addresses = ["10.0.0.1", "10.0.0.2"]
    await bench.engines.resolve()
    assert bench.known(A, B, "evil:80") == [A, B]
    assert list(bench.engines.ignored) == ["evil:80"]
    assert "vllm.models.svc" in caplog.text
    assert caplog.text.count("evil:80") == 1

    bench.names.addresses = None
    bench.now += 10 * KEEP_SECONDS
    await bench.engines.resolve()
    assert bench.known(A, B) == [A, B], "a look-up that fails removes no engine"

    bench.names.addresses = ["10.0.0.2", "10.0.0.3"]
    await bench.engines.resolve()
    assert bench.known(A, B, C) == [B, C], "what left long ago is not believed any more"


async def test_an_engine_that_a_relay_resolves_first_is_looked_up_before_it_is_ignored(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(module, "SOON_SECONDS", 0.0)
    monkeypatch.setattr(module, "RESOLVE_SECONDS", 3600.0)
    bench = Bench(monkeypatch)
    bench.names.addresses = ["10.0.0.1"]
    task = asyncio.create_task(bench.engines.run())
    try:
        await until(lambda: bench.known(A) == [A])
        bench.names.addresses = ["10.0.0.1", "10.0.0.2"]
        await until(lambda: bench.known(A, B) == [A, B])
        assert not bench.engines.ignored
        assert not [record for record in caplog.records if record.levelno >= logging.WARNING]
        asked = bench.names.asked
        await until(lambda: bench.known("evil:80") == [] and "evil:80" in bench.engines.ignored)
        for _ in range(5):
            bench.known("evil:80")
            await asyncio.sleep(0)
        assert bench.names.asked <= asked + 1, "an ignored address causes no further look-up"
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


async def test_what_relays_make_up_takes_bounded_memory_and_few_lines(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    upstream = Settings.model_validate({"upstream": {"url": "http://vllm:8000"}}).upstream
    engines = ConfiguredEngines(upstream, lambda: 0.0)
    for n in range(1000):
        assert not list(engines.known([health(f"{n}-{'x' * 10_000}\n:80")]))
    assert len(engines.ignored) == module.MAX_IGNORED
    assert len(caplog.records) == module.MAX_IGNORED
    assert all("\n" not in record.getMessage() and len(record.getMessage()) < 300 for record in caplog.records)
    assert [entry.engine for entry in engines.known([health("vllm:8000")])] == ["vllm:8000"]
