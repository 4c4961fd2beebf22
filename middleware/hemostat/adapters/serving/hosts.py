"""`AdapterHosts`: adapters at every engine, one `AdapterHost` as a part of each engine that requests are sent to.

A version that an engine refuses, or whose probe fails there, is not used at that engine; the others go on serving it.
It is given up where no engine applies it.
"""

from __future__ import annotations

import asyncio
import logging
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from hemostat.adapters.serving.host import AdapterHost, AdapterProfiles, HostState
from hemostat.adapters.serving.loading import SharedFolder
from hemostat.adapters.serving.probing import ModelCopy
from hemostat.config.schema import Settings
from hemostat.engines.engine import Engine
from hemostat.engines.registry import ONLY, EngineRegistry
from hemostat.metrics import names
from hemostat.metrics.samples import Sample
from hemostat_calibration.profiles.profile import CalibrationProfile

log = logging.getLogger("hemostat.adapters")

TICK_SECONDS = 0.5


class _ProfilesAt:
    """Implements `host.AdapterProfiles` for one address of several: what is rejected there stays in use elsewhere."""

    def __init__(self, profiles: AdapterProfiles, reject: Callable[[str, str], None]) -> None:
        self.wanted = profiles.wanted
        self.get: Callable[[str], CalibrationProfile | None] = profiles.get
        self.reject = reject


class AdapterHosts:
    """Begins and ends the hosts, and says what they say together. Other arguments as of `AdapterHost`."""

    def __init__(
        self,
        settings: Settings,
        engines: EngineRegistry,
        profiles: AdapterProfiles,
        *,
        copy: ModelCopy | None,
        base: Callable[[], str],
        clock: Callable[[], float],
        on_change: Callable[[], None],
    ) -> None:
        self._engines = engines
        path = settings.adapter.folder
        self._folder = None if path is None else SharedFolder(path)
        self._profiles = profiles
        self._copy = copy
        self._base = base
        self._clock = clock
        self._on_change = on_change
        if len(settings.upstream.addresses) == 1:
            self._begin(engines.only)

    # --- what others read ------------------------------------------------------------------------------------------

    @property
    def hosts(self) -> dict[str, AdapterHost]:
        """The host of each engine's adapters, by the engine's name."""
        return self._engines.parts(AdapterHost)

    @property
    def ready(self) -> frozenset[str]:
        """The versions that requests may ask for at some engine."""
        return frozenset[str]().union(*(host.ready for host in self.hosts.values()))

    def ready_at(self, name: str) -> frozenset[str]:
        """The same at one address, or at the only one."""
        host = self.hosts.get(name)
        return frozenset() if host is None else host.ready

    @property
    def unusable(self) -> str | None:
        """The reason for which no request can use an adapter, though some serve or are tested. It is None if a request
        can, or if no adapter serves or is tested."""
        if not self.hosts or not self._profiles.wanted() or self.ready:
            return None
        return str(self.status()["detail"]) or "none is loaded yet"

    @property
    def hold(self) -> list[str]:
        """Versions that engines should keep loaded."""
        return list(dict.fromkeys(version for host in self.hosts.values() for version in host.hold))

    @property
    def capacity(self) -> int | None:
        """Adapters that may serve at a time, at the engine with the most room; None while that is not known."""
        known = [host.capacity for host in self.hosts.values() if host.capacity is not None]
        return max(known, default=None)

    @property
    def limit(self) -> int | None:
        """The same while clients load none: it changes when an engine is restarted; None while any's is not known."""
        limits = [host.limit for host in self.hosts.values()]
        known = [limit for limit in limits if limit is not None]
        return max(known) if known and len(known) == len(limits) else None

    def status(self) -> dict[str, Any]:
        """JSON-ready. Of several engines: of all together, and `by_engine`."""
        if ONLY in self.hosts:
            return self.hosts[ONLY].status()
        result = {name: host.status() for name, host in self.hosts.items()}
        order = (HostState.READY, HostState.PROBING, HostState.LOADING, HostState.WAITING, HostState.UNUSABLE)
        state = next(
            (candidate.value for candidate in order if any(row["state"] == candidate for row in result.values())),
            "idle",
        )
        rows = list(result.values())
        return {
            "state": state,
            "detail": "; ".join(f"{name}: {row['detail']}" for name, row in result.items() if row["detail"]),
            "way": next((row["way"] for row in rows if row["way"]), None),
            "capacity": self.capacity,
            "wanted": list(self._profiles.wanted()),
            "loaded": sorted({version for row in rows for version in row["loaded"]}),
            "ready": sorted(self.ready),
            "failures": {f"{v} at {name}": why for name, row in result.items() for v, why in row["failures"].items()},
            "probes": _summed([row["probes"] for row in rows]),
            "probe_tokens": sum(row["probe_tokens"] for row in rows),
            "by_engine": {
                name: {key: row[key] for key in ("state", "detail", "loaded", "ready")} for name, row in result.items()
            },
        }

    def samples(self) -> Iterator[Sample]:
        """Adapters in a state: of the engine that has most of them in it. Loads and probes: of all engines together."""
        totals: Counter[tuple[str, tuple[str, ...]]] = Counter()
        for host in self.hosts.values():
            for sample in host.samples():
                key = (sample.name, sample.labels)
                combine = max if sample.name == names.ADAPTERS else int.__add__
                totals[key] = combine(totals[key], int(sample.value))
        for (name, labels), value in totals.items():
            yield Sample(name, labels, value)

    # --- the hosts -------------------------------------------------------------------------------------------------

    async def run(self) -> None:
        """Runs the steps until it is cancelled."""
        try:
            while True:
                await self.step()
                await asyncio.sleep(TICK_SECONDS)
        finally:
            await self._engines.end_parts(AdapterHost)

    async def step(self) -> None:
        """Begins and ends hosts, so that each engine at which adapters are loaded has one."""
        serving = self._engines.serving()
        await self._engines.end_parts(AdapterHost, keep=serving)
        for engine in serving:
            (engine.part(AdapterHost) or self._begin(engine)).keep_running()
        for version in self._profiles.wanted():
            # The last engine that applied it may have left.
            self._given_up(version)

    def _begin(self, engine: Engine) -> AdapterHost:
        name, profiles = engine.name, self._profiles
        host = AdapterHost(
            engine,
            profiles if name == ONLY else _ProfilesAt(profiles, lambda v, why: self._reject(name, v, why)),
            self._folder,
            copy=self._copy,
            base=self._base,
            clock=self._clock,
            on_change=self._on_change,
        )
        engine.add(host)
        return host

    def _reject(self, name: str, version: str, why: str) -> None:
        if not self._given_up(version):
            log.error("adapter %s is not used at %s, but at other engines: %s", version, name, why)

    def _given_up(self, version: str) -> bool:
        """Reject the version, if it is not used at any address."""
        reasons = [host.rejected[version] for host in self.hosts.values() if version in host.rejected]
        if not reasons or len(reasons) < len(self.hosts):
            return False
        self._profiles.reject(version, reasons[0])
        return True


def _summed(probes: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Returns the sums over all engines: the number of results of each kind for each probe, and the last detail that
    there is."""
    result: dict[str, Any] = {}
    for report in probes:
        for probe, results in report.items():
            row = result.setdefault(probe, {"detail": ""})
            for key, value in results.items():
                row[key] = (value or row[key]) if key == "detail" else row.get(key, 0) + value
    return result
