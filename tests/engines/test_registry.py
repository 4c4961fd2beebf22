"""The registry knows which engines there are, which answers at which address, and what requests to it may ask for."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress

import pytest
from tests.support.engine_registry import engine_registry
from tests.support.plugin_engines import PluginEngine
from tests.support.waiting import HANG_SECONDS

from hemostat.config.schema import Settings
from hemostat.engines import identification
from hemostat.engines.messages import TapMessage, TapRun
from hemostat.engines.reports import SILENCE_SECONDS, PluginReports
from hemostat.ipc.origin import Lookup, Origin, parse_origin

V, W = "a" * 32, "b" * 32


@pytest.fixture(autouse=True)
def soon(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(identification, "BACKOFF", (0.02,))
    monkeypatch.setattr(identification, "TAP_TICK_SECONDS", 0.004)
    monkeypatch.setattr(identification, "TAP_SECONDS", 0.1)


class World:
    """Addresses of engines that are up."""

    def __init__(self, engines: list[PluginEngine], registry: PluginReports) -> None:
        self.engines = engines
        self.registry = registry
        self.changes = 0
        upstream = Settings.model_validate(
            {"upstream": {"urls": [f"http://{engine.name}" for engine in engines]}}
        ).upstream
        self.names = [engine.name for engine in engines]
        self.addresses = engine_registry(upstream, lambda: self.names, registry, self._changed)

    def _changed(self) -> None:
        self.changes += 1

    def held(self) -> list[set[str]]:
        """Returns the versions that are held at each address."""
        for engine in self.engines:
            engine.report()
        result = self.addresses.held(time.monotonic())
        return [set(result.get(engine.name, ())) for engine in self.engines]

    async def becomes(self, *expected: set[str]) -> None:
        """Steps until this is held."""
        async with asyncio.timeout(HANG_SECONDS):
            while self.held() != list(expected):
                await self.addresses.step()
                await asyncio.sleep(0.01)


@asynccontextmanager
async def world(*boots: tuple[str, ...]) -> AsyncIterator[World]:
    """An address for each; boots: of the engines behind it."""
    registry = PluginReports()
    engines = [PluginEngine(registry, *boot) for boot in boots]
    for engine in engines:
        await engine.start()
        engine.versions = {boot: [V] for boot in engine.boots}
    made = World(engines, registry)
    try:
        yield made
    finally:
        made.names = []
        await made.addresses.step()
        for engine in engines:
            with suppress(OSError):
                await engine.stop()


async def test_each_address_holds_what_its_own_engine_reports() -> None:
    async with world(("one",), ("two",), ("",)) as w:
        w.engines[1].versions = {"two": [V, W]}
        assert w.held() == [set(), set(), set()], "nothing is known before an address was asked"
        await w.becomes({V}, {V, W}, set())
        assert w.changes == 2
        assert [len(engine.asked) for engine in w.engines[:2]] == [1, 1]
        w.engines[0].versions = {"one": []}
        assert w.held() == [set(), {V, W}, set()]
        await w.addresses.step()
        assert [len(engine.asked) for engine in w.engines[:2]] == [1, 1], "who is known is not asked again"


async def test_a_tap_that_a_client_sends_does_not_say_which_engine_is_at_an_address() -> None:
    async with world(("one",), ("two",)) as w:
        w.engines[1].versions = {"two": [V, W]}
        w.held()  # both report
        guesses = [TapRun(f"-address-{number}", 0, 1, {}, None) for number in range(9)]
        w.registry.taps.update(TapMessage("two", guesses), time.monotonic())
        await w.becomes({V}, {V, W})


async def test_an_engine_that_restarts_is_never_taken_for_the_one_before_it() -> None:
    async with world(("one",), ("two",)) as w:
        await w.becomes({V}, {V})
        # The new engine's plugin reports while its model is loaded; its old report has not expired.
        w.engines[0].boots = ["again"]
        w.engines[0].versions = {"again": []}
        assert w.held() == [set(), set()], "at once, without a probe"
        await w.becomes(set(), {V})
        w.engines[0].versions = {"again": [V]}
        assert w.held() == [{V}, {V}]


async def test_a_new_engine_that_answers_nothing_yet_takes_the_version_from_itself_alone() -> None:
    async with world(("one",), ("two",), ("three",)) as w:
        await w.becomes({V}, {V}, {V})
        await w.engines[2].stop()
        w.engines[2].boots, w.engines[2].versions = ["again"], {"again": []}
        w.registry._engines.pop("three")
        assert w.held() == [set(), set(), set()]
        await w.becomes({V}, {V}, set())


async def test_an_engine_that_is_silent_holds_nothing() -> None:
    async with world(("one",), ("two",)) as w:
        await w.becomes({V}, {V})
        later = time.monotonic() + SILENCE_SECONDS + 1.0
        w.engines[1].report(later)
        result = w.addresses.held(later)
        assert w.engines[0].name not in result


async def test_of_several_engines_behind_an_address_all_have_to_hold_a_version() -> None:
    """A probe finds one of them, as with data parallelism."""
    async with world(("one", "one's second"), ("two",)) as w:
        w.engines[0].versions = {"one": [V, W], "one's second": [V]}
        w.engines[1].versions = {"two": [V, W]}
        await w.becomes({V}, {V, W})
        w.engines[0].versions["one"] = []
        assert w.held() == [set(), set()], "the one that no probe has found may be behind any address"


async def test_an_address_that_is_gone_is_forgotten_and_one_that_comes_is_asked() -> None:
    async with world(("one",), ("two",), ("three",)) as w:
        every = list(w.names)
        w.names = every[:2]
        w.engines[2].boots = [""]
        await w.becomes({V}, {V}, set())
        w.names, w.engines[2].boots = every[1:], ["three"]
        w.engines[0].boots = [""]
        await w.becomes(set(), {V}, {V})


async def test_one_address_is_not_asked() -> None:
    registry = PluginReports()
    engine = PluginEngine(registry, "one")
    await engine.start()
    upstream = Settings.model_validate({"upstream": {"url": f"http://{engine.name}"}}).upstream
    addresses = engine_registry(upstream, lambda: [engine.name], registry)
    engine.report()
    await addresses.step()
    assert (addresses.several, engine.asked) == (False, [])
    await engine.stop()


async def test_that_an_engine_wants_a_key_is_said_once(caplog: pytest.LogCaptureFixture) -> None:
    async with world(("one",), ("two",)) as w:
        w.engines[0].wants_key = True
        await w.becomes(set(), {V})
        async with asyncio.timeout(HANG_SECONDS):
            while len(w.engines[0].asked) < 3:
                await w.addresses.step()
                await asyncio.sleep(0.01)
        (line,) = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
        assert w.names[0] in line
        assert line.endswith("; set upstream.api_key")


class Part:
    """A part of an engine that counts how often it was ended."""

    def __init__(self) -> None:
        self.ended = 0

    async def close(self) -> None:
        self.ended += 1


async def test_an_engine_s_parts_end_when_it_leaves_and_one_that_returns_has_none() -> None:
    upstream = Settings.model_validate({"upstream": {"urls": ["http://a:1", "http://b:1"]}}).upstream
    names = ["a:1", "b:1"]
    engines = engine_registry(upstream, lambda: names)
    parts = [Part(), Part()]
    for engine, part in zip(engines.current().values(), parts, strict=True):
        engine.add(part)
    assert engines.parts(Part) == {"a:1": parts[0], "b:1": parts[1]}
    names.remove("a:1")
    assert list(engines.current()) == ["b:1"]
    assert engines.parts(Part) == {"a:1": parts[0], "b:1": parts[1]}, "what it does ends first"
    await engines.step()
    assert (engines.parts(Part), parts[0].ended) == ({"b:1": parts[1]}, 1)
    names.append("a:1")
    assert list(engines.current()) == ["b:1", "a:1"]
    assert engines.parts(Part) == {"b:1": parts[1]}
    await engines.end_parts(Part)
    await engines.end_parts(Part)
    assert (engines.parts(Part), parts[1].ended) == ({}, 1)


async def test_the_only_address_has_an_engine_before_any_relay_and_adapters_are_loaded_at_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    upstream = Settings.model_validate({"upstream": {"url": "dns+http://vllm:8000"}}).upstream
    names: list[str] = []
    engines = engine_registry(upstream, lambda: names)

    async def addresses(_: Lookup) -> list[Origin]:
        return [parse_origin(f"http://10.0.0.{number}:8000") for number in (1, 2)]

    monkeypatch.setattr(Lookup, "addresses", addresses)
    await engines.configured.resolve()
    assert engines.serving() == [engines.only]
    names.append("10.0.0.1:8000")
    assert engines.serving() == [engines.only]
    names.append("10.0.0.2:8000")
    assert [engine.name for engine in engines.serving()] == names
