"""Finds out which of the engines that report answers at which address.

Relays know engines by their addresses, plugins report under a boot id. Which belongs to which is asked: every address
gets a request of one token with a tap, whose nonce its plugin sends back under its boot id. Invariants:

- An address is identified by a probe that was answered by an engine that still reports, and that began after the last
  new engine had reported. A plugin reports while its model is loaded, before its server takes requests: an engine that
  was restarted is never taken for the one before it.
- An address without an answer is not identified, and holds no version: its engine has no plugin, or cannot be reached.
- Where more engines report that were found nowhere than addresses are left for them (several behind one address, as
  with data parallelism), each of these engines may be behind any address, and an address holds a version only if these
  engines hold it, too.
"""

from __future__ import annotations

import asyncio
import logging
import random
import secrets
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from hemostat.config.schema import Upstream
from hemostat.engines.configured import ConfiguredEngines
from hemostat.engines.messages import EngineReport
from hemostat.engines.registry import EngineRegistry
from hemostat.reference.protocol import FailureReason, ReferenceFailure
from hemostat.reference.server import VllmServer
from hemostat_calibration.backoff import Backoff
from hemostat_calibration.engine_keys import TAP_KEY
from hemostat_calibration.messages import shown_address

log = logging.getLogger("hemostat.engines")

TICK_SECONDS = 0.25
TAP_SECONDS = 3.0
"""A tap that has not come so long after the answer is not waited for: plugins send them four times a second."""
REQUEST_SECONDS = 10.0
BACKOFF = (1.0, 2.0, 5.0, 15.0)
"""The seconds between two probes of an address that is not identified."""


@dataclass(slots=True)
class _Address:
    server: VllmServer
    boot: str = ""
    """The engine that answered a probe; "" before the first."""
    asked_at: float = -1.0
    """The time when that probe began; monotonic seconds."""
    backoff: Backoff = field(default_factory=lambda: Backoff(BACKOFF, random.random))
    probe: asyncio.Task[None] | None = None
    refused: bool = False
    """It is True if the last probe was answered with 401 or 403."""


class EngineAt:
    """Implements `adapters.serving.host.LiveReports` for the engine at one address."""

    def __init__(self, addresses: EngineAddresses, registry: EngineRegistry, name: str) -> None:
        self._addresses = addresses
        self._registry = registry
        self._name = name

    def known(self, now: float) -> bool:
        """Returns True if it is known which engine that is, or no engine reports."""
        return self._addresses.boot_at(self._name, now) is not None or not self._registry.boots(now)

    def live(self, now: float) -> list[EngineReport]:
        """Returns the last report of each of its ranks."""
        boot = self._addresses.boot_at(self._name, now)
        return [report for report in self._registry.live(now) if report.boot_id == boot]


class EngineAddresses:
    """Lives in the control process's event loop.

    configured: the addresses that may be contacted. names: host:port of the engines that relays send requests to, at
    present. clock: monotonic seconds. on_change: called when an address was identified.
    """

    def __init__(
        self,
        upstream: Upstream,
        configured: ConfiguredEngines,
        registry: EngineRegistry,
        names: Callable[[], Sequence[str]],
        clock: Callable[[], float],
        on_change: Callable[[], None],
    ) -> None:
        self._upstream = upstream
        self._configured = configured
        self._registry = registry
        self._names = names
        self._clock = clock
        self._on_change = on_change
        self._addresses: dict[str, _Address] = {}

    @property
    def several(self) -> bool:
        """It is True if there may be more than one engine, so that it matters which engine reports."""
        return len(self._upstream.addresses) > 1 or len(self._names()) > 1

    def current(self) -> Sequence[str]:
        """Returns the addresses, at present."""
        return self._names()

    def boot_at(self, name: str, now: float) -> str | None:
        """Returns the boot id of the engine at this address; None if that is not known now."""
        address = self._addresses.get(name)
        if address is None or address.asked_at < self._registry.newest:
            return None
        return address.boot if address.boot in self._registry.boots(now) else None

    def held(self, now: float) -> dict[str, frozenset[str]]:
        """Returns by address the versions that a request there may ask for."""
        names = self._names()
        result = {name: boot for name in names if (boot := self.boot_at(name, now)) is not None}
        unplaced = self._registry.boots(now) - set(result.values())
        if len(unplaced) <= len(names) - len(result):
            unplaced = frozenset()
        return {name: self._registry.held_by_all({boot} | unplaced, now) for name, boot in result.items()}

    def shown(self, now: float) -> dict[str, frozenset[str]]:
        """Returns what each address holds, for operators: without an address while it is not known which engine is
        there. Where there is one address, what all engines hold."""
        return self.held(now) if self.several else dict.fromkeys(self._names(), self._registry.acknowledged(now))

    def at(self, name: str) -> EngineAt:
        return EngineAt(self, self._registry, name)

    def server(self, name: str, timeout: float) -> VllmServer:
        """Returns a client of the engine at this address; "": of the only address in the settings.

        Its requests carry the upstream's API key. So every contact with an address that a relay has named begins here,
        and ReferenceFailure is raised where the address is not one of the configured upstream.
        """
        upstream = self._upstream
        if name and not self._configured.knows(name):
            raise ReferenceFailure(FailureReason.DOWN, f"{shown_address(name)} is not an engine of the upstream")
        scheme, _, host = upstream.servers[0].partition("://")
        return VllmServer(
            f"{scheme}://{name or host}",
            upstream.api_key,
            timeout=timeout,
            ca=upstream.ca,
            host=host if name and upstream.resolves else None,
        )

    async def run(self) -> None:
        """Identifies the addresses until it is cancelled."""
        try:
            while True:
                await self.step()
                await asyncio.sleep(TICK_SECONDS)
        finally:
            for name in list(self._addresses):
                await self._forget(name)

    async def step(self) -> None:
        """Begins the probes that are due."""
        now, names = self._clock(), self._names() if self.several else ()
        for gone in self._addresses.keys() - set(names):
            await self._forget(gone)
        if not self._registry.boots(now):
            return
        for name in names:
            address = self._addresses.get(name)
            if address is None:
                address = self._addresses[name] = _Address(self.server(name, REQUEST_SECONDS))
            idle = address.probe is None or address.probe.done()
            if idle and address.backoff.may_try(now) and self.boot_at(name, now) is None:
                address.probe = asyncio.create_task(self._identify(name, address))

    async def _identify(self, name: str, address: _Address) -> None:
        asked_at = self._clock()
        address.backoff.failed(asked_at)
        nonce = f"{self._registry.nonce_prefix}-{secrets.token_hex(8)}"
        xargs = self._registry.secrets.signed({TAP_KEY: nonce}, asked_at)
        body = {"prompt": "x", "max_tokens": 1, "vllm_xargs": xargs}
        try:
            await address.server.post("/v1/completions", body, dict[str, Any])
        except ReferenceFailure as failure:
            refused = failure.reason is FailureReason.UNAUTHORIZED
            log.log(
                logging.WARNING if refused and not address.refused else logging.DEBUG,
                "which engine is at %s is not known, and it gets no profile: %s%s",
                name,
                failure,
                "; set upstream.api_key" if refused else "",
            )
            address.refused = refused
            return
        address.refused = False
        waited_until = self._clock() + TAP_SECONDS
        while (tap := self._registry.taps.take(nonce, 1)) is None:
            if self._clock() >= waited_until:
                return
            await asyncio.sleep(TICK_SECONDS / 5)
        if tap.boot_id != address.boot:
            log.info("the engine at %s reports as %s", name, tap.boot_id)
        address.boot, address.asked_at = tap.boot_id, asked_at
        address.backoff.reset()
        self._on_change()

    async def _forget(self, name: str) -> None:
        address = self._addresses.pop(name)
        if address.probe is not None:
            address.probe.cancel()
            await asyncio.gather(address.probe, return_exceptions=True)
        await address.server.close()
