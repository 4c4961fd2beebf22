"""Engines that relays report, and the canaries that the control process keeps of them."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import Any

from tests.support.control import settings
from tests.support.fake_vllm import FakeVllm, running
from tests.support.stores import DirectWrites
from tests.support.waiting import until

from hemostat.canaries.engine import STATES_KEY, EngineCanaries
from hemostat.canaries.keeper import Canaries
from hemostat.canaries.short import ShortCanaries
from hemostat.canaries.states import BLOB_KEY
from hemostat.canaries.weights import BLOB_KEY as WEIGHTS_KEY
from hemostat.engines.registry import EngineRegistry
from hemostat.engines.reports import PluginReports
from hemostat.ipc.messages import EngineHealth
from hemostat.reference.monitor import ReferenceMonitor
from hemostat_calibration.canaries import MIN_SEQUENCES

SEQUENCES = MIN_SEQUENCES


class World:
    """Engines that relays report, and the canaries that are kept of them."""

    def __init__(
        self, fakes: Sequence[FakeVllm], folder: Path, more: dict[str, Any], stored: DirectWrites | None
    ) -> None:
        self.fakes, self._folder, self._more = fakes, folder, more
        self.now = 1000.0
        self.names = [fake.url.removeprefix("http://") for fake in fakes]
        self.up = dict.fromkeys(self.names, True)
        self.outstanding = dict.fromkeys(self.names, 0)
        self.written = stored or DirectWrites()
        canaries = {name: value for name, value in more.items() if name != "upstream"}
        made = settings(
            canaries={"file": folder / "prompts.txt"} | canaries,
            upstream={"urls": [fake.url for fake in fakes]} | more.get("upstream", {}),
        )
        self.registry = PluginReports()
        self.engines = EngineRegistry(
            made.upstream, self.registry, lambda: [self._health()], self.written, self.clock, lambda: None
        )
        self.canaries = Canaries(
            made,
            self.engines,
            ReferenceMonitor(
                None,
                made,
                compressed_scorer=None,
                scores_fail=lambda _: False,
                refused=lambda: 0.0,
            ),
            self.written,
            active=lambda: True,
            clock=self.clock,
            wall=self.clock,
        )
        blobs = {
            key: data for key in (BLOB_KEY, STATES_KEY, WEIGHTS_KEY) if (data := self.written.get_blob(key)) is not None
        }
        self.canaries.restore(blobs)

    def again(self) -> World:
        """The control process after a restart."""
        return World(self.fakes, self._folder, self._more, self.written)

    def clock(self) -> float:
        return self.now

    def _health(self) -> list[EngineHealth]:
        return [
            EngineHealth(name, "up" if self.up[name] else "ejected", False, self.outstanding[name], 0, 0, 0)
            for name in self.names
        ]

    async def settle(self, seconds: float = 0.0) -> None:
        """Time passes, and all that is due then is done."""
        self.now += seconds
        for _ in range(4):  # what is due, what follows at once, and twice more
            await self.engines.end_left()
            self.canaries.step()
            await until(self._idle)

    def _idle(self) -> bool:
        parts = (self.engines.parts(EngineCanaries), self.engines.parts(ShortCanaries))
        return all(part.idle for each in parts for part in each.values())

    def asked(self) -> list[int]:
        """Replayed sequences by engine, since the last time."""
        counts = [sum("prompt_logprobs" in body for body in fake.requests) for fake in self.fakes]
        for fake in self.fakes:
            fake.requests.clear()
        return counts

    def statements(self) -> list[str]:
        return [text for text, _ in self.canaries.statements()]

    def sample(self, name: str) -> dict[tuple[str, ...], float]:
        return {tuple(exported.labels): exported.value for exported in self.canaries.samples() if exported.name == name}


@asynccontextmanager
async def world(
    folder: Path, *fakes: FakeVllm, stored: DirectWrites | None = None, prompts: str = "", **more: Any
) -> AsyncIterator[World]:
    (folder / "prompts.txt").write_text(prompts or "".join(f"p{n}\n" for n in range(SEQUENCES)))
    async with AsyncExitStack() as stack:
        for fake in fakes:
            await stack.enter_async_context(running(fake))
        async with control_process(World(fakes, folder, more, stored)) as bench:
            yield bench


@asynccontextmanager
async def control_process(bench: World, now: float = 1000.0) -> AsyncIterator[World]:
    bench.now = now
    task = asyncio.create_task(bench.canaries.run())  # reads the prompts; looks at the engines once
    await until(lambda: bench.canaries.replays.prompts is not None or task.done())
    try:
        yield bench
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
