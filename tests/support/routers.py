"""Routers in front of fake engines, and fake engines whose plugin tells which of them has answered."""

from __future__ import annotations

import json
import time
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from tests.support.fake_vllm import FakeVllm
from tests.support.fake_vllm.answers import Receive, Scope, Send

from hemostat.engines.messages import RankReport, TapMessage, TapRun
from hemostat.engines.reports import PluginReports

Choice = Callable[[dict[bytes, bytes], bytes, int], int]
"""Returns the number of the engine from a request's header fields, its body, and how many came before."""


@dataclass
class TracedVllm(FakeVllm):
    """A fake engine whose plugin, if it has a boot id, reports, and sends taps."""

    boot: str = ""
    reports: PluginReports = field(default_factory=PluginReports)

    def report(self) -> None:
        self.reports.update(RankReport(self.boot, 0, 1, [], 100, {}, "v1", "0.32.0"), time.monotonic())

    async def generate(self, path: str, headers: dict[bytes, bytes], data: bytes, receive: Receive, send: Send) -> None:
        await super().generate(path, headers, data, receive, send)
        nonce = (json.loads(data).get("vllm_xargs") or {}).get("hemostat_tap")
        if nonce and self.boot:
            self.report()
            self.reports.taps.update(TapMessage(self.boot, [TapRun(nonce, 0, 1, {}, None)]), time.monotonic())


class Router:
    """An ASGI application that hands each generation to one of the engines, and the rest to the first one."""

    def __init__(self, engines: Sequence[FakeVllm], choose: Choice) -> None:
        self._engines = engines
        self._choose = choose
        self._count = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        body, more = b"", scope["type"] == "http"
        while more:
            message = await receive()
            body += message.get("body", b"")
            more = bool(message.get("more_body"))
        engine = self._engines[0]
        if scope.get("method") == "POST" and scope["path"] == "/v1/completions":
            engine = self._engines[self._choose(dict(scope["headers"]), body, self._count) % len(self._engines)]
            self._count += 1

        given = iter([{"type": "http.request", "body": body}])

        async def again() -> dict[str, Any]:
            first = next(given, None)
            return first if first is not None else await receive()

        await engine(scope, again, send)


def round_robin(_: dict[bytes, bytes], __: bytes, count: int) -> int:
    return count


def by_prompt(_: dict[bytes, bytes], body: bytes, __: int) -> int:
    return zlib.crc32(str(json.loads(body)["prompt"]).encode())


def by_session(fields: dict[bytes, bytes], _: bytes, __: int) -> int:
    """Requests without a session go to the first engine."""
    return zlib.crc32(fields.get(b"x-session-id", b""))
