"""Hooks for tests of the relay: they record their calls, and raise where a test wants it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from hemostat.hooks import Comparison, Headers, Refusal, Rewrite


def upper(data: bytes) -> bytes:
    return data.upper()


@dataclass
class SpyHook:
    """An `ExchangeHook` that records its calls and raises in the method that `fails` names."""

    verdict: Callable[[bytes | None], Rewrite | Refusal | None] = lambda _: None
    wanted: bool = False
    transform: Callable[[bytes], bytes] = upper
    tail: bytes = b""
    replays: bool = False
    withholds: bool = False
    fails: str = ""
    body_limit: int = 1000
    arm: str = "none"
    comparison: Comparison | None = None
    calls: list[object] = field(default_factory=list)
    seen: bytes = b""
    engines: list[str] = field(default_factory=list)
    draws_engine: bool = False
    drawn: list[bool] = field(default_factory=list)

    def _called(self, name: str, value: object) -> None:
        self.calls.append((name, value))
        if self.fails == name:
            raise RuntimeError(name)

    def sent_to(self, engine: str, *, drawn: bool) -> None:
        self.engines.append(engine)
        self.drawn.append(drawn)
        if self.fails == "sent_to":
            raise RuntimeError("sent_to")

    def request(self, body: bytes | None) -> Rewrite | Refusal | None:
        self._called("request", body)
        return self.verdict(body)

    def response_head(self, status: int, content_type: bytes, content_coding: bytes) -> bool:
        self._called("response_head", status)
        return self.wanted

    def response_data(self, data: bytes) -> bytes:
        self.seen += data
        self._called("response_data", len(data))
        return self.transform(data)

    def replay(self) -> bool:
        self._called("replay", None)
        return self.replays

    def response_end(self) -> bytes:
        self._called("response_end", None)
        return self.tail

    def closed(
        self, *, complete: bool, output_tokens: int | None = None, engine: str = "", own_status: int = 0
    ) -> None:
        self._called("closed", complete)

    @property
    def names(self) -> list[object]:
        return [call[0] for call in self.calls if isinstance(call, tuple)]


@dataclass
class HookSequence:
    """A hook that returns one of `answers` for each request, in order."""

    answers: list[SpyHook | Refusal | None]
    begun: list[tuple[str, bytes, list[tuple[bytes, bytes]], str]] = field(default_factory=list)

    def begin(
        self, method: str, target: bytes, headers: Headers, request_id: str, *, marked: bool = True
    ) -> SpyHook | Refusal | None:
        self.begun.append((method, target, list(headers), request_id))
        return self.answers.pop(0)
