"""`AdapterHost` beside a real vLLM server, and adapters for it."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from typing import Any

from tests.support.lora_world import unusable_reason
from tests.support.running_vllm import RunningVllm
from tests.support.waiting import until

from hemostat.adapters.serving.host import AdapterHost, HostState
from hemostat.adapters.serving.loading import SharedFolder
from hemostat.config.schema import Settings
from hemostat.engines.engine import Engine
from hemostat.engines.messages import RankReport
from hemostat.reference.server import VllmServer
from hemostat_calibration.adapters.correction import low_rank
from hemostat_calibration.adapters.factors import LowRank
from hemostat_calibration.arrays import Ids, Singles
from hemostat_calibration.profiles.adapter import adapter_profile
from hemostat_calibration.profiles.profile import CalibrationProfile
from hemostat_lab.demo.checkpoints import Checkpoints
from hemostat_lab.models.checkpoint import Checkpoint
from hemostat_lab.models.copies import Copy

RANK, LAYERS = 16, 6
MODULES = ("self_attn.q_proj", "self_attn.v_proj", "self_attn.o_proj", "mlp.up_proj", "mlp.down_proj")
SECONDS = 900.0
"""That only a hang takes, also on a machine in use."""


class Engines:
    """The registry of the server's admin port, which another thread writes to."""

    def __init__(self, server: RunningVllm) -> None:
        self._admin = server.admin

    def known(self, _now: float) -> bool:
        return True

    def live(self, _now: float) -> list[RankReport]:
        with self._admin.lock:
            return self._admin.registry.live(self._admin.now)

    def set_wanted(self, versions: Sequence[str]) -> None:
        with self._admin.lock:
            self._admin.registry.set_wanted(versions)


class Profiles:
    def __init__(self, profiles: Sequence[CalibrationProfile]) -> None:
        self.known = {profile.version: profile for profile in profiles}
        self.versions: list[str] = []
        self.rejected: dict[str, str] = {}

    def wanted(self) -> Sequence[str]:
        return [version for version in self.versions if version not in self.rejected]

    def get(self, version: str) -> CalibrationProfile | None:
        return self.known.get(version)

    def reject(self, version: str, why: str) -> None:
        self.rejected[version] = why


class CopyInProcess:
    """layers: by version, what the copy has; another than the engine's, where a test says so."""

    def __init__(self, copy: Copy, layers: dict[str, dict[str, LowRank]]) -> None:
        self._copy = copy
        self.layers = layers

    async def logprobs(self, ids: Ids, version: str | None) -> Singles:
        adapter = None if version is None else self.layers[version]
        return (await asyncio.to_thread(self._copy.logprobs, ids, adapter)).astype("float32")


def corrections_of(checkpoints: Checkpoints) -> list[CalibrationProfile]:
    """Two adapters: a part of what the weights lost, and half of it."""
    reference, compressed = (
        Checkpoint(checkpoints.reference, "REFERENCE"),
        Checkpoint(checkpoints.compressed, "COMPRESSED"),
    )
    layers = {}
    for name in (f"model.layers.{n}.{module}" for n in range(LAYERS) for module in MODULES):
        delta = (reference.weight(name) - compressed.weight(name)).numpy()
        layers[name] = low_rank(delta, RANK, None, None)[0]
    half = {name: LowRank(factors.a, 0.5 * factors.b) for name, factors in layers.items()}
    return [
        adapter_profile(model="smollm2", vocab_size=compressed.config.vocab_size, layers=factors)
        for factors in (layers, half)
    ]


@asynccontextmanager
async def hosting(
    server: RunningVllm, profiles: Profiles, copy: CopyInProcess, **adapter: Any
) -> AsyncIterator[AdapterHost]:
    """adapter: settings."""
    engines = Engines(server)
    for version, profile in profiles.known.items():
        server.admin.files[version] = profile.to_bytes()
    folder = Settings.model_validate({"upstream": {"url": server.url}, "adapter": adapter}).adapter.folder
    host = AdapterHost(
        Engine("", engines, lambda timeout: VllmServer(server.url, timeout=timeout)),
        profiles,
        None if folder is None else SharedFolder(folder),
        copy=copy,
        base=lambda: server.model,
        clock=time.monotonic,
        on_change=lambda: engines.set_wanted(host.hold),
    )
    task = asyncio.create_task(host.run())
    try:
        yield host
        profiles.versions = []
        await until(lambda: host.state is HostState.IDLE, SECONDS)
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        engines.set_wanted([])
        for version in profiles.known:
            server.admin.files.pop(version)


async def settled(host: AdapterHost, profiles: Profiles) -> None:
    """Returns once an adapter may be asked for, or it is known why none may; else an error with the host's status."""
    try:
        await until(lambda: bool(host.ready) or bool(unusable_reason(host)) or bool(profiles.rejected), SECONDS)
    except TimeoutError:
        raise AssertionError(host.status()) from None
