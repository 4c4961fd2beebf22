"""The control process's registry of engines, with relays that report what a test says."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

from tests.support.stores import DirectWrites

from hemostat.config.models import Upstream
from hemostat.engines.engine import Engine, Health
from hemostat.engines.registry import EngineRegistry
from hemostat.engines.reports import PluginReports
from hemostat.ipc.messages import EngineHealth
from hemostat.reference.server import VllmServer


def engine_registry(
    upstream: Upstream,
    names: Callable[[], Sequence[str]],
    reports: PluginReports | None = None,
    on_change: Callable[[], None] = lambda: None,
) -> EngineRegistry:
    """Returns a registry of engines that one relay reports as up. names: of these, at present."""

    def relayed() -> list[list[EngineHealth]]:
        return [[EngineHealth(name, "up", False, 0, 0, 0, 0) for name in names()]]

    return EngineRegistry(upstream, reports or PluginReports(), relayed, DirectWrites(), time.monotonic, on_change)


def single_engine(url: str, reports: PluginReports) -> Engine:
    """Returns the engine at the only address."""
    return Engine("", reports, lambda timeout: VllmServer(url, timeout=timeout))


def healthy(name: str, **figures: int) -> Engine:
    """Returns an engine of which relays report these figures."""
    engine = Engine(name, PluginReports(), lambda timeout: VllmServer(f"http://{name}", timeout=timeout))
    engine.health = Health(**figures)
    return engine
