"""Relays that are replaced: all new ones first, then the former drain; stopped ones, and failures."""

from __future__ import annotations

import asyncio
import signal
from collections.abc import Sequence
from typing import ClassVar

import pytest

from hemostat.config.schema import Settings
from hemostat.ipc.supervised import KILL_AFTER_SECONDS
from hemostat.supervisor import relays as module
from hemostat.supervisor.child import Launch, StartFailure
from hemostat.supervisor.relays import DRAIN, MAX_REPLACED, Relays

SETTINGS = Settings.model_validate({"upstream": {"url": "http://a"}, "shutdown_seconds": 3.0})


class FakeChild:
    """Ends by SIGTERM and SIGKILL; by DRAIN when `drained` is set."""

    made: ClassVar[list[FakeChild]] = []
    failing: ClassVar[set[str]] = set()
    """Values of `settings` whose start fails."""

    def __init__(self, name: str, module: str, launch: Launch, take_spare: object, silent_seconds: float) -> None:
        self.name = name
        self.launch = launch
        self.version = str(launch.settings["version"])
        self.signals: list[tuple[signal.Signals, float]] = []
        self.kept = False
        self.drained = asyncio.Event()
        self.ended = False
        self.made.append(self)

    async def start(self) -> None:
        if self.version in self.failing:
            raise StartFailure(self.name, 1)

    def keep(self) -> None:
        self.kept = True

    async def stop(self, sig: signal.Signals, within: float) -> None:
        self.kept = False
        self.signals.append((sig, within))
        if sig is DRAIN:
            await self.drained.wait()
        self.ended = True


class FakeSpare:
    def __init__(self, module: str) -> None:
        self.take = None

    async def provide(self, fds: Sequence[int]) -> None:
        pass

    async def stop(self) -> None:
        pass


@pytest.fixture(autouse=True)
def children(monkeypatch: pytest.MonkeyPatch) -> list[FakeChild]:
    monkeypatch.setattr(module, "Child", FakeChild)
    monkeypatch.setattr(module, "SpareRelay", FakeSpare)
    monkeypatch.setattr(FakeChild, "made", [])
    monkeypatch.setattr(FakeChild, "failing", {"bad"})
    return FakeChild.made


def launches(version: str, number: int = 2) -> Sequence[Launch]:
    return [Launch({"version": version})] * number


async def started() -> Relays:
    relays = Relays()
    await relays.start(launches("first"))
    await relays.keep()
    return relays


async def settle() -> None:
    for _ in range(10):
        await asyncio.sleep(0)


async def test_former_relays_drain_once_all_new_ones_serve(children: list[FakeChild]) -> None:
    relays = await started()
    await relays.replace(launches("second", 3), SETTINGS)
    await settle()
    former, new = children[:2], children[2:]
    assert [child.signals for child in former] == [[(DRAIN, SETTINGS.drain_seconds + KILL_AFTER_SECONDS)]] * 2
    assert [child.kept for child in new] == [True] * 3
    assert not any(child.ended for child in children)


async def test_a_new_relay_that_fails_changes_nothing(children: list[FakeChild]) -> None:
    relays = await started()
    with pytest.raises(StartFailure):
        await relays.replace([*launches("second", 1), *launches("bad", 1)], SETTINGS)
    assert [child.kept for child in children[:2]] == [True, True]
    assert all(child.signals[0][0] is signal.SIGKILL for child in children[2:]), "none of the new ones is left"


async def test_stop_ends_those_that_drain_too(children: list[FakeChild]) -> None:
    relays = await started()
    await relays.replace(launches("second"), SETTINGS)
    await relays.stop(3.0)
    assert all(child.ended and child.signals[-1] == (signal.SIGTERM, 3.0 + KILL_AFTER_SECONDS) for child in children)


async def test_no_more_than_a_few_sets_drain_at_a_time(children: list[FakeChild]) -> None:
    relays = await started()
    for n in range(MAX_REPLACED + 2):
        await relays.replace(launches(f"version {n}"), SETTINGS)
    await settle()
    assert sum(not child.ended for child in children) == 2 * (MAX_REPLACED + 1)
    assert children[0].signals[-1] == (signal.SIGTERM, 3.0 + KILL_AFTER_SECONDS), "the oldest"
    for child in children:
        child.drained.set()
    await relays.drain(1.0)
    assert all(child.ended for child in children)
