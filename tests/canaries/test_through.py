"""`hemostat canaries replay --through`: routers choose the engine of each request."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path

import pytest
from tests.support.engine_registry import engine_registry
from tests.support.fake_vllm import FakeVllm, serving
from tests.support.routers import Router, TracedVllm, by_prompt, by_session, round_robin

from hemostat.canaries import client, texts, through
from hemostat.canaries.client import CanaryClient
from hemostat.canaries.prompts import load
from hemostat.canaries.through import RouteFindings, RouteReplay
from hemostat.cli import main
from hemostat.commands.canaries import CHANGED, EQUAL
from hemostat.config.schema import Settings
from hemostat.engines.messages import Trace
from hemostat.engines.reports import PluginReports
from hemostat.reference.server import VllmServer
from hemostat.relay.relay import Relay
from hemostat.relay.upstreams.settings import UpstreamSettings
from hemostat_calibration.canaries import CanarySet

PROMPTS = "".join(f"prompt {n}\n" for n in range(48))
"""The prompts are so many that each of two engines gets enough of them: nine votes are a change, and a relay sends a
prompt to either with even odds. One engine gets fewer than nine of 24 in 8 % of the runs, of 48 in one of 600,000."""


@pytest.fixture(scope="module")
def taken(tmp_path_factory: pytest.TempPathFactory) -> CanarySet:
    path = tmp_path_factory.mktemp("canaries") / "prompts.txt"
    path.write_text(PROMPTS)

    async def take() -> CanarySet:
        with serving(FakeVllm()) as url:
            vllm = VllmServer(url)
            made = await CanaryClient(vllm, "fake").take(load(path))
            await vllm.close()
            return made

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(client, "ANSWER_TOKENS", 2)
        patch.setattr(texts, "FREE_TEXTS", 0)
        return asyncio.run(take())


def engines(*noise: float) -> list[TracedVllm]:
    reports = PluginReports()
    made = [TracedVllm(boot=f"boot{n}", reports=reports, noise=each) for n, each in enumerate(noise)]
    for engine in made:
        engine.report()
    return made


async def replayed(taken: CanarySet, url: str, fakes: Sequence[TracedVllm], *, traced: bool = True) -> RouteFindings:
    upstream = Settings.model_validate({"upstream": {"urls": ["http://127.0.0.1:1", "http://127.0.0.1:2"]}}).upstream
    registry = engine_registry(upstream, list, fakes[0].reports)

    async def ask(nonces: Sequence[str], new: int) -> Trace:
        return registry.trace(nonces, new)

    def connect(fields: Mapping[str, str]) -> VllmServer:
        return VllmServer(url, fields=fields)

    public = VllmServer(url)
    try:
        of_route = CanaryClient(public, "fake")
        replay = RouteReplay(taken, of_route, connect, 0.01, ask if traced else None, lambda *_: None)
        return await replay.run()
    finally:
        await public.close()


@asynccontextmanager
async def relayed(fakes: Sequence[FakeVllm]) -> AsyncIterator[str]:
    """The address of the real relay in front of them, which sends each conversation to one of them."""
    async with AsyncExitStack() as stack:
        urls = [stack.enter_context(serving(fake)) for fake in fakes]
        relay = Relay(UpstreamSettings(tuple(urls), health_seconds=0.0))
        listener = socket.socket()
        listener.bind(("127.0.0.1", 0))
        await relay.serve(listener)
        stack.push_async_callback(relay.close)
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"


def said(found: RouteFindings) -> dict[str, bool]:
    return {boot: comparison.changed for boot, comparison in found.comparisons.items()}


async def test_the_one_engine_with_other_weights_is_named_behind_a_round_robin(taken: CanarySet) -> None:
    fakes = engines(0.0, 0.05)
    with serving(Router(fakes, round_robin)) as url:
        found = await replayed(taken, url, fakes)
    assert said(found) == {"boot0": False, "boot1": True}
    assert found.unreached == []


@pytest.mark.parametrize("router", ["prompt", "relay"])
async def test_it_is_named_behind_a_router_that_sends_a_prompt_to_one_engine(taken: CanarySet, router: str) -> None:
    fakes = engines(0.0, 0.05)
    if router == "relay":
        async with relayed(fakes) as url:
            found = await replayed(taken, url, fakes)
    else:
        with serving(Router(fakes, by_prompt)) as url:
            found = await replayed(taken, url, fakes)
    assert said(found) == {"boot0": False, "boot1": True}


async def test_an_engine_that_only_sessions_reach_is_asked_and_one_that_nothing_reaches_is_named(
    taken: CanarySet,
) -> None:
    fakes = engines(0.0, 0.3, 0.0)
    with serving(Router(fakes[:2], by_session)) as url:
        found = await replayed(taken, url, fakes)
    assert said(found) == {"boot0": False, "boot1": True}
    assert found.unreached == ["the engine with boot id boot2"]


async def test_engines_that_have_not_changed_are_equal_with_the_plugin_and_without(
    taken: CanarySet, monkeypatch: pytest.MonkeyPatch
) -> None:
    fakes = engines(0.0, 0.0)
    with serving(Router(fakes, round_robin)) as url:
        found = await replayed(taken, url, fakes)
        assert (said(found), found.unknown) == ({"boot0": False, "boot1": False}, False)
        # An engine without the plugin answers, too.
        fakes[1].boot = ""
        monkeypatch.setattr(through, "TAP_SECONDS", 0.5)
        found = await replayed(taken, url, fakes)
        assert said(found) == {"boot0": False, "": False}


@pytest.mark.parametrize(("noise", "code", "verdict"), [(0.0, EQUAL, "equal"), (0.5, CHANGED, "changed")])
def test_without_a_control_process_the_chance_of_having_missed_an_engine_is_stated(
    taken: CanarySet,
    noise: float,
    code: int,
    verdict: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delenv("HEMOSTAT_ADMIN__TOKEN", raising=False)
    path = tmp_path / "set.json"
    path.write_bytes(taken.to_bytes())
    with serving(Router(engines(0.0, noise), round_robin)) as url:
        assert main(["canaries", "replay", "--through", url, str(path)]) == code
    first, *rest = capsys.readouterr().out.splitlines()
    assert "0.7% among 48 requests without a session and 0.7% among 48 sessions" in first
    assert first.startswith(verdict)
    assert rest[0].startswith(f"  all engines together: {verdict}: ")
