"""A reload that fails half-way leaves the former processes, settings and sockets; see test_restarts for real ones."""

from __future__ import annotations

import asyncio
import errno
import os
import subprocess
from collections.abc import AsyncIterator, Sequence
from typing import Any, cast

import pytest
from tests.support.waiting import HANG_SECONDS

from hemostat.config.schema import Settings
from hemostat.supervisor.child import Launch, StartFailure
from hemostat.supervisor.commands import Commands
from hemostat.supervisor.role import Role
from hemostat.supervisor.run_folder import RunFolder
from hemostat.supervisor.serve import Supervisor
from hemostat.supervisor.sockets import Sockets, addresses, open_sockets


def settings(url: str, workers: int = 1) -> Settings:
    sections = {"listen": {"host": "127.0.0.1", "port": 0}, "admin": {"port": 0}, "workers": workers}
    return Settings.model_validate({"upstream": {"url": url}, **sections})


class FakeProcesses:
    """Stands for both `Relays` and `ControlProcess`; remembers what they were replaced with, in order."""

    def __init__(self) -> None:
        self.replaced: list[tuple[str, str]] = []
        """Which, and the upstream's address."""
        self.failing = ""
        self.reports: list[dict[str, Any]] = []

    async def start(self, which: str, upstream: str) -> None:
        self.replaced.append((which, upstream))
        if which == self.failing and upstream == "http://new":
            raise StartFailure(which, 1)

    def send(self, message: dict[str, Any]) -> None:
        if "configuration" in message:
            self.reports.append(message["configuration"])


class FakeControl(FakeProcesses):
    async def replace(self, launch: Launch) -> None:
        self.reports.append(launch.settings["configuration"])
        await self.start("control", launch.settings["settings"]["upstream"]["url"])


class FakeRelays:
    def __init__(self, processes: FakeProcesses) -> None:
        self._processes = processes

    async def replace(self, launches: Sequence[Launch], _: Settings) -> None:
        await self._processes.start("relays", launches[0].settings["upstream"]["urls"][0])


@pytest.fixture
async def sockets() -> AsyncIterator[Sockets]:
    former = settings("http://former")
    opened = open_sockets(addresses(former, Role.SERVE), {}, by_service=False)
    yield opened
    opened.close()


@pytest.fixture
async def supervisor(sockets: Sockets) -> AsyncIterator[Supervisor]:
    commands, folder = Commands(), RunFolder.make(None)
    yield Supervisor(settings("http://former"), lambda: settings("http://new", 3), print, commands, sockets, folder)
    commands.close()
    folder.remove()


async def reload(supervisor: Supervisor, failing: str) -> FakeControl:
    control = FakeControl()
    control.failing = failing
    supervisor._control, supervisor._relays = cast("Any", control), cast("Any", FakeRelays(control))
    await asyncio.wait_for(supervisor._reload(), HANG_SECONDS)
    return control


async def test_no_relay_is_replaced_where_the_control_process_does_not_start(supervisor: Supervisor) -> None:
    control = await reload(supervisor, "control")
    assert control.replaced == [("control", "http://new")]
    assert control.reports[-1]["error"] == "control did not start"


async def test_relays_that_do_not_start_leave_neither_a_new_control_process_nor_sockets(
    supervisor: Supervisor, sockets: Sockets
) -> None:
    control = await reload(supervisor, "relays")
    assert control.replaced == [("control", "http://new"), ("relays", "http://new"), ("control", "http://former")]
    assert control.reports[-1]["error"] == "relays did not start"
    assert len(sockets.data) == 1, "on others no relay accepts"


async def test_what_starts_is_replaced_once(supervisor: Supervisor, sockets: Sockets) -> None:
    control = await reload(supervisor, "")
    assert control.replaced == [("control", "http://new"), ("relays", "http://new")]
    former, present = control.reports
    assert former["loaded_at"] < present["loaded_at"], "it is not in force before the relays serve"
    assert present["error"] == ""
    assert len(sockets.data) == 3


async def test_a_successor_that_the_system_does_not_allow_changes_nothing(
    supervisor: Supervisor, monkeypatch: pytest.MonkeyPatch
) -> None:
    def scarce(*_: Any, **options: Any) -> None:
        raise OSError(errno.EAGAIN, os.strerror(errno.EAGAIN))

    monkeypatch.setattr(subprocess, "Popen", scarce)
    assert supervisor._start_successor() is None
