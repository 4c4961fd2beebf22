"""Finds out which of the engines that report answers at an address.

Relays know engines by their addresses, plugins report under a boot id. Which belongs to which is asked: every address
gets a request of one token with a tap, whose nonce its plugin sends back under its boot id. Invariants:

- An address is identified by a probe that was answered by an engine that still reports, and that began after the last
  new engine had reported. A plugin reports while its model is loaded, before its server takes requests: an engine that
  was restarted is never taken for the one before it.
- An address without an answer is not identified, and holds no version: its engine has no plugin, or cannot be reached.
"""

from __future__ import annotations

import asyncio
import logging
import random
import secrets
from collections.abc import Callable
from typing import Any

from hemostat.engines.messages import RankReport
from hemostat.engines.reports import PluginReports
from hemostat.reference.protocol import FailureReason, ReferenceFailure
from hemostat.reference.server import VllmServer
from hemostat_calibration.backoff import Backoff
from hemostat_calibration.engine_keys import TAP_KEY

log = logging.getLogger("hemostat.engines")

TAP_SECONDS = 3.0
"""A tap that has not come so long after the answer is not waited for: plugins send them four times a second."""
TAP_TICK_SECONDS = 0.05
"""The time between two looks for the tap."""
REQUEST_SECONDS = 10.0
BACKOFF = (1.0, 2.0, 5.0, 15.0)
"""The seconds between two probes of an address that is not identified."""


def new_nonce(reports: PluginReports) -> str:
    """Returns a nonce for a request of the control process's own, whose tap comes back to this one."""
    return f"{reports.nonce_prefix}-{secrets.token_hex(8)}"


class Identification:
    """Owns which engine answers at one address. Implements `engine.LiveReports` and `engine.EnginePart`.

    reports: of all engines. alone: returns True if there is no other address, so that all reports are meant. clock:
    monotonic seconds. on_change: called when the address was identified.
    """

    def __init__(
        self,
        name: str,
        reports: PluginReports,
        alone: Callable[[], bool],
        clock: Callable[[], float],
        on_change: Callable[[], None],
    ) -> None:
        self._name = name
        self._reports = reports
        self._alone = alone
        self._clock = clock
        self._on_change = on_change
        self._boot = ""
        """The engine that answered a probe; "" before the first."""
        self._asked_at = -1.0
        """The time when that probe began; monotonic seconds."""
        self._backoff = Backoff(BACKOFF, random.random)
        self._probe: asyncio.Task[None] | None = None
        self._server: VllmServer | None = None
        self._refused = False
        """It is True if the last probe was answered with 401 or 403."""

    def boot(self, now: float) -> str | None:
        """Returns the boot id of the engine at this address; None if that is not known now."""
        if self._asked_at < self._reports.newest:
            return None
        return self._boot if self._boot in self._reports.boots(now) else None

    def known(self, now: float) -> bool:
        """Returns True if it is known which engine that is, or no engine reports."""
        return self._alone() or self.boot(now) is not None or not self._reports.boots(now)

    def live(self, now: float) -> list[RankReport]:
        """Returns the last report of each of its ranks."""
        if self._alone():
            return self._reports.live(now)
        boot = self.boot(now)
        return [report for report in self._reports.live(now) if report.boot_id == boot]

    def begin_probe(self, connect: Callable[[float], VllmServer], now: float) -> None:
        """Begins a probe, if one is due. connect: see `engine.Engine`."""
        idle = self._probe is None or self._probe.done()
        if idle and self._backoff.may_try(now) and self.boot(now) is None:
            if self._server is None:
                self._server = connect(REQUEST_SECONDS)
            self._probe = asyncio.create_task(self._identify(self._server))

    async def _identify(self, server: VllmServer) -> None:
        asked_at = self._clock()
        self._backoff.failed(asked_at)
        nonce = new_nonce(self._reports)
        xargs = self._reports.secrets.signed({TAP_KEY: nonce}, asked_at)
        body = {"prompt": "x", "max_tokens": 1, "vllm_xargs": xargs}
        try:
            await server.post("/v1/completions", body, dict[str, Any])
        except ReferenceFailure as failure:
            refused = failure.reason is FailureReason.UNAUTHORIZED
            log.log(
                logging.WARNING if refused and not self._refused else logging.DEBUG,
                "which engine is at %s is not known, and it gets no profile: %s%s",
                self._name,
                failure,
                "; set upstream.api_key" if refused else "",
            )
            self._refused = refused
            return
        self._refused = False
        waited_until = self._clock() + TAP_SECONDS
        while (tap := self._reports.taps.take(nonce, 1)) is None:
            if self._clock() >= waited_until:
                return
            await asyncio.sleep(TAP_TICK_SECONDS)
        if tap.boot_id != self._boot:
            log.info("the engine at %s reports as %s", self._name, tap.boot_id)
        self._boot, self._asked_at = tap.boot_id, asked_at
        self._backoff.reset()
        self._on_change()

    async def close(self) -> None:
        """Ends a probe that is under way."""
        if self._probe is not None:
            self._probe.cancel()
            await asyncio.gather(self._probe, return_exceptions=True)
        if self._server is not None:
            await self._server.close()
