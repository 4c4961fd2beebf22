"""Fake engines whose plugins report to a registry and send it taps."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence

from tests.support.engines import FakeEngine
from tests.support.relay import Request

from hemostat.engines.messages import RankReport, TapMessage, TapRun
from hemostat.engines.reports import PluginReports

ANSWER = b'HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: 15\r\n\r\n{"choices": []}'
UNAUTHORIZED = b"HTTP/1.1 401 Unauthorized\r\nContent-Length: 0\r\n\r\n"


class PluginEngine(FakeEngine):
    """boots: of the engines behind this address, which answer in turn; "" for one without the plugin."""

    def __init__(self, registry: PluginReports, *boots: str) -> None:
        super().__init__(self._tapped)
        self.registry = registry
        self.boots = list(boots)
        self.versions: dict[str, Sequence[str]] = {}
        """That each holds."""
        self.wants_key = False

    def report(self, now: float | None = None) -> None:
        """As the plugins do about every second."""
        for boot in filter(None, self.boots):
            held = list(self.versions.get(boot, ()))
            report = RankReport(boot, 0, 1, held, 100, {}, "v1", "0.32.0")
            self.registry.update(report, time.monotonic() if now is None else now)

    def _tapped(self, request: Request) -> bytes:
        if self.wants_key:
            return UNAUTHORIZED
        nonce = json.loads(request.body).get("vllm_xargs", {}).get("hemostat_tap")
        boot = self.boots[len(self.asked) % len(self.boots)]
        if nonce and boot:
            run = TapRun(nonce, 0, 1, {}, None)
            self.registry.taps.update(TapMessage(boot, [run]), time.monotonic())
        return ANSWER
