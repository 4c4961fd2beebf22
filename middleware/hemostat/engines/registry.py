"""The engines of the upstream: one registry, which owns which there are, from when each appears until it leaves.

An engine appears when a relay reports it and the control process's own configuration has its address
(`ConfiguredEngines`). It leaves when no connected relay reports it any more; then its parts end. One that returns is
new here: what outlasts it, such as its drain or what its canaries have spent, is stored by whoever owns that.

If the upstream has one address, one more engine stands for whatever answers there, also while no relay is connected
(`only`). Adapters are loaded at it. With several addresses, they are loaded at each engine by itself (`serving`).

Where more engines report that were found nowhere than addresses are left for them (several behind one address, as with
data parallelism), each of these engines may be behind any address, and an address holds a version only if these engines
hold it, too.
"""

from __future__ import annotations

import asyncio
import functools
import logging
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from hemostat.config.models import Upstream
from hemostat.engines.configured import ConfiguredEngines
from hemostat.engines.engine import Engine, EnginePart, Health, P
from hemostat.engines.identification import Identification, new_nonce
from hemostat.engines.messages import Trace
from hemostat.engines.reports import PluginReports
from hemostat.ipc.messages import EngineHealth
from hemostat.metrics import names
from hemostat.metrics.samples import Sample
from hemostat.reference.protocol import FailureReason, ReferenceFailure
from hemostat.reference.server import VllmServer
from hemostat.store.protocol import StateKey, StoreWrites
from hemostat.store.states import read_state, write_state
from hemostat_calibration.engine_keys import TAP_KEY
from hemostat_calibration.errors import HemostatError
from hemostat_calibration.messages import shown_address

log = logging.getLogger("hemostat.engines")

STATE_KEY = StateKey("drained_engines")
"""The key of the drained engines in the store's state."""
SCHEMA = 1
ONLY = ""
"""The name of the engine that stands for whatever answers at the only address."""
TICK_SECONDS = 0.25


@dataclass(frozen=True, slots=True)
class _Drained:
    """The drained engines as they are stored: their names."""

    engines: list[str]


class EngineRegistry:
    """Owns the engines, and which of them are drained. Lives in the control process's event loop.

    reports: what plugins report. relayed: what each connected relay has last reported of the engines. clock: monotonic
    seconds. on_change: called when it was found out which engine is at an address.
    """

    def __init__(
        self,
        upstream: Upstream,
        reports: PluginReports,
        relayed: Callable[[], Iterable[list[EngineHealth]]],
        writes: StoreWrites,
        clock: Callable[[], float],
        on_change: Callable[[], None],
    ) -> None:
        self.reports = reports
        self.configured = ConfiguredEngines(upstream, clock)
        """The addresses that relays are believed to send requests to, and that may be contacted."""
        self.drained: frozenset[str] = frozenset()
        """The names of the engines that get no new requests."""
        self.outliers: frozenset[str] = frozenset()
        """The names of the engines that canaries state to be outliers."""
        self.only = Engine(ONLY, reports, functools.partial(self.connect, ONLY))
        self._upstream = upstream
        self.health_sources = [relayed]
        """The functions that return the engines as relays report them. `Health` adds their figures."""
        self._writes = writes
        self._clock = clock
        self._on_change = on_change
        self._engines: dict[str, Engine] = {}
        """The engines by name, also those that have left and whose parts have not ended yet."""

    # --- which engines there are -----------------------------------------------------------------------------------

    def current(self) -> dict[str, Engine]:
        """Returns the engines that relays report now, by name, in the order in which they are configured."""
        health: dict[str, Health] = {}
        for source in self.health_sources:
            for report in source():
                for entry in self.configured.known(report):
                    health.setdefault(entry.engine, Health()).update(entry)
        return {name: self._engine(name, its) for name, its in health.items()}

    def _engine(self, name: str, health: Health) -> Engine:
        if (engine := self._engines.get(name)) is None:
            identification = Identification(name, self.reports, self._alone, self._clock, self._on_change)
            engine = self._engines[name] = Engine(name, identification, functools.partial(self.connect, name))
            engine.add(identification)
        engine.health = health
        return engine

    def _alone(self) -> bool:
        return len(self._upstream.addresses) == 1 and len(self._engines) == 1

    @property
    def several(self) -> bool:
        """It is True if there may be more than one engine, so that it matters which engine reports."""
        return len(self._upstream.addresses) > 1 or len(self.current()) > 1

    def serving(self) -> list[Engine]:
        """Returns the engines at which adapters are loaded, each by itself."""
        return list(self.current().values()) if self.several else [self.only]

    def parts(self, kind: type[P]) -> dict[str, P]:
        """Returns the parts of this class, by the name of their engine, until they have ended."""
        found = ((engine.name, engine.part(kind)) for engine in (self.only, *self._engines.values()))
        return {name: part for name, part in found if part is not None}

    # --- what they hold --------------------------------------------------------------------------------------------

    def held(self, now: float) -> dict[str, frozenset[str]]:
        """Returns by address the versions that a request there may ask for."""
        engines = self.current()
        found = {name: boot for name, engine in engines.items() if (boot := self._boot(engine, now)) is not None}
        unplaced = self.reports.boots(now) - set(found.values())
        if len(unplaced) <= len(engines) - len(found):
            unplaced = frozenset()
        return {name: self.reports.held_by_all({boot} | unplaced, now) for name, boot in found.items()}

    def _boot(self, engine: Engine, now: float) -> str | None:
        identification = engine.part(Identification)
        return None if identification is None else identification.boot(now)

    def shown(self, now: float) -> dict[str, frozenset[str]]:
        """Returns what each address holds, for operators: without an address while it is not known which engine is
        there. Where there is one address, what all engines hold."""
        return self.held(now) if self.several else dict.fromkeys(self.current(), self.reports.acknowledged(now))

    # --- requests of the control process's own ---------------------------------------------------------------------

    def connect(self, name: str, timeout: float) -> VllmServer:
        """Returns a client of the engine at this address; ONLY: of the only address in the settings.

        Its requests carry the upstream's API key. So every contact with an address that a relay has named begins here,
        and ReferenceFailure is raised where the address is not one of the configured upstream.
        """
        upstream = self._upstream
        if name and not self.configured.knows(name):
            raise ReferenceFailure(FailureReason.DOWN, f"{shown_address(name)} is not an engine of the upstream")
        scheme, _, host = upstream.servers[0].partition("://")
        return VllmServer(
            f"{scheme}://{name or host}",
            upstream.api_key,
            timeout=timeout,
            ca=upstream.ca,
            host=host if name and upstream.resolves else None,
        )

    def signed(self, xargs: dict[str, Any]) -> dict[str, Any]:
        """Returns the `vllm_xargs` of a request of the control process's own."""
        return self.reports.secrets.signed(xargs, self._clock())

    def trace(self, nonces: Sequence[str], new: int) -> Trace:
        """Returns which engines have answered the requests with these nonces, and `vllm_xargs` for further ones."""
        now = self._clock()
        answered = {nonce: tap.boot_id for nonce in nonces if (tap := self.reports.taps.take(nonce, 1)) is not None}
        boots = {self._boot(engine, now): name for name, engine in self.current().items()}
        engines = {boot: boots.get(boot, "") for boot in sorted(self.reports.boots(now))}
        requests = {nonce: self.signed({TAP_KEY: nonce}) for nonce in (new_nonce(self.reports) for _ in range(new))}
        return Trace(engines, answered, requests)

    # --- drains ----------------------------------------------------------------------------------------------------

    def drain(self, engine: str, *, ends: bool = False) -> None:
        """Lets the engine get no new requests from now on (or again some, with `ends`). Raises HemostatError for an
        unknown one.

        One that is drained may be gone meanwhile, so that its drain can be ended whatever relays report.
        """
        known = self.current().keys() | self.drained
        if engine not in known:
            raise HemostatError(
                f"engine {engine[:100]!r} is not known; the engines are {', '.join(sorted(known)) or 'not known yet'}"
            )
        self.drained = self.drained - {engine} if ends else self.drained | {engine}
        log.warning("engine %s is %s", engine, "not drained any more" if ends else "drained")
        self.save()

    @property
    def excluded(self) -> frozenset[str]:
        """The outliers that get no new requests, as `upstream.outlier` says: at most half of the engines that would get
        some, so that it is never the last one, and never both of two."""
        if self._upstream.outlier != "exclude" or not self.outliers:
            return frozenset()
        serving = {name for name, engine in self.current().items() if engine.health.up} - self.drained
        found = self.outliers & serving
        return found if 2 * len(found) <= len(serving) else frozenset()

    def save(self) -> None:
        """Queues a write of which engines are drained."""
        write_state(self._writes, STATE_KEY, _Drained(sorted(self.drained)), SCHEMA)

    def restore(self, states: Mapping[StateKey, str], report: Callable[[str], None]) -> None:
        """Takes what an earlier run stored; if it cannot be read, none is drained. report: see `read_state`."""
        stored = read_state(states, STATE_KEY, _Drained, SCHEMA, report)
        self.drained = frozenset() if stored is None else frozenset(stored.engines)

    def samples(self) -> Iterator[Sample]:
        closed = self.drained | self.excluded
        for name, engine in self.current().items():
            labels, health = (name,), engine.health
            yield Sample(names.UPSTREAM_UP_RATIO, labels, health.up / health.relays)
            yield Sample(names.UPSTREAM_DRAINED, labels, name in closed)
            yield Sample(names.UPSTREAM_OUTSTANDING, labels, health.outstanding)

    # --- their lifetime --------------------------------------------------------------------------------------------

    async def run(self) -> None:
        """Ends the engines that leave, and finds out which engine is at which address, until it is cancelled."""
        try:
            while True:
                await self.step()
                await asyncio.sleep(TICK_SECONDS)
        finally:
            await self.end_parts(Identification)

    async def step(self) -> None:
        """Ends the engines that have left, and begins the probes that are due."""
        await self.end_left()
        now = self._clock()
        if not self.several or not self.reports.boots(now):
            return
        for engine in self.current().values():
            if (identification := engine.part(Identification)) is not None:
                identification.begin_probe(engine.connect, now)

    async def end_left(self) -> None:
        """Ends the engines that no relay reports any more."""
        for name in self._engines.keys() - self.current().keys():
            await self._engines.pop(name).close()

    async def end_parts(self, kind: type[EnginePart], keep: Collection[Engine] = ()) -> None:
        """Ends the parts of this class of all engines, without the engines of `keep`."""
        for engine in [self.only, *self._engines.values()]:
            if engine not in keep:
                await engine.end(kind)
