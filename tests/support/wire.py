"""Acts as the relay: sends one request through an interceptor, with httpx, and splits the response anywhere."""

from __future__ import annotations

import itertools
import random
import re
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import httpx
import httpx2
import msgspec
import numpy as np

from hemostat.hooks import Headers, Refusal
from hemostat.interception.interceptor import Interceptor
from hemostat.ipc.messages import REST_KIND, Capture, Policy, encode
from hemostat.ipc.sampled import SampledTally
from hemostat.metrics.names import CALIBRATION_REQUESTS, REPEATED_REQUESTS, SHADOW_REQUESTS
from hemostat.openai.routes import CHAT
from hemostat.scoring.capture_arrays import candidates, decode_capture, emitted_logprobs, output_ids, prompt_ids

VERSION = "0123456789abcdef" * 2
OTHER_VERSION = "fedcba9876543210" * 2

TOOL_CALL = '<tool_call>\n{"name": "get_weather", "arguments": {"city": "Paris"}}\n</tool_call>'
PARAMETERS = {"type": "object", "properties": {"city": {"type": "string"}}}
TOOLS = [{"type": "function", "function": {"name": "get_weather", "parameters": PARAMETERS}}]

POLICY = Policy(
    generation=1,
    mode="observe",
    shadow_rate=1.0,
    shadow_allow_on=True,
    shadow_top_k=8,
    shadow_max_tokens=1024,
    scoring=True,
    tap=False,
    control_fraction=0.5,
    acknowledged=frozenset({VERSION}),
    labels=frozenset(),
)


def policy(*, served: str | None = None, **changes: Any) -> Policy:
    """served: the version that serves every kind."""
    if served is not None:
        changes = {"mode": "auto", "serving_by_kind": {REST_KIND: served}} | changes
    return msgspec.structs.replace(POLICY, **changes)


@dataclass
class Answer:
    status: int
    body: bytes
    sent: bytes = b""
    """What went upstream."""
    complete: bool = True
    replayed: bool = False


@dataclass
class Wire:
    """An interceptor, and its captures and counts."""

    client: httpx.Client
    interceptor: Interceptor = field(init=False)
    captures: list[Capture] = field(default_factory=list)
    engine: str = ""
    """That requests go to."""
    counts: Counter[tuple[str, ...]] = field(default_factory=Counter)
    tally: SampledTally = field(default_factory=SampledTally)
    """Sampled requests that never became a capture."""
    room: bool = True
    replays: bool = True
    """False: as when the relay cannot, the head being out."""
    arms: list[str] = field(default_factory=list)
    """Of the intercepted requests, as their outcomes are counted."""
    draw: Callable[[], float] = lambda: 0.5
    now: float = 1.5
    nonce: Callable[[], str] = lambda: "nonce"

    def __post_init__(self) -> None:
        self.interceptor = Interceptor(
            POLICY,
            self._emit,
            self._count,
            sampled=self.tally.update,
            draw=self.draw,
            clock=lambda: self.now,
            nonce=self.nonce,
        )

    def _emit(self, capture: Capture) -> bool:
        if self.room:
            self.captures.append(capture)
        return self.room

    def _count(self, metric: str, labels: tuple[str, ...]) -> None:
        self.counts[(metric, *labels)] += 1

    def shadow(self, outcome: str, reason: str = "") -> int:
        return self.counts[(SHADOW_REQUESTS, outcome, reason)]

    def repeated(self, reason: str) -> int:
        return self.counts[(REPEATED_REQUESTS, reason)]

    def calibration(self, arm: str, reason: str) -> int:
        return self.counts[(CALIBRATION_REQUESTS, arm, reason)]

    def send(
        self,
        path: str,
        body: bytes | dict[str, Any],
        *,
        headers: dict[str, str] | None = None,
        request_id: str = "r1",
        method: str = "POST",
        splits: random.Random | None = None,
        give_up_after: int | None = None,
    ) -> Answer:
        data = msgspec.json.encode(body) if isinstance(body, dict) else body
        fields = {"content-type": "application/json", "accept-encoding": "gzip"} | (headers or {})
        head = [(name.encode(), value.encode()) for name, value in fields.items()]
        exchange = self.interceptor.begin(method, path.encode(), head, request_id)
        if isinstance(exchange, Refusal):
            return Answer(exchange.status, exchange.body)
        dropped: frozenset[bytes] = frozenset()
        own, rewritten = data, False
        if exchange is not None:
            exchange.sent_to(self.engine, drawn=exchange.draws_engine)
            rewrite = exchange.request(data if len(data) <= exchange.body_limit else None)
            if isinstance(rewrite, Refusal):
                return Answer(rewrite.status, rewrite.body)
            if rewrite is not None:
                data, dropped, rewritten = rewrite.body, rewrite.drop_headers, True
        fields["x-request-id"] = request_id
        answer = Answer(0, b"", data)
        parts: list[bytes] = []
        while True:
            upstream = {
                name: value
                for name, value in fields.items()
                if name.lower().encode() not in dropped and not name.lower().startswith("x-hemostat-")
            }
            try:
                with self.client.stream(method, path, content=data, headers=upstream) as response:
                    answer.status = response.status_code
                    looks = exchange is not None and exchange.response_head(
                        response.status_code, *content_fields(response.headers.raw)
                    )
                    for chunk in response.iter_raw():
                        if not looks or exchange is None:
                            parts.append(chunk)
                            continue
                        parts += [exchange.response_data(piece) for piece in cut(chunk, splits)]
                        if give_up_after is not None and len(parts) >= give_up_after:
                            raise httpx.ReadError("the client is gone")
                    if looks and exchange is not None:
                        if rewritten and self.replays and not any(parts) and exchange.replay():
                            data, dropped, rewritten = own, frozenset(), False
                            answer.replayed = True
                            continue
                        parts.append(exchange.response_end())
            except httpx.TransportError:
                answer.complete = False
            break
        answer.body = b"".join(parts)
        if exchange is not None:
            self.arms.append(exchange.arm)
            exchange.closed(complete=answer.complete, engine=self.engine)
        return answer


def content_fields(fields: Headers) -> tuple[bytes, bytes]:
    """What the relay tells the hook of a response's fields: Content-Type and Content-Encoding."""
    result = {name.lower(): value for name, value in fields}
    return result.get(b"content-type", b""), result.get(b"content-encoding", b"identity")


class ThroughWire(httpx.BaseTransport):
    """An httpx transport whose every request goes through the interceptor."""

    def __init__(self, wire: Wire) -> None:
        self._wire = wire
        self._ids = itertools.count()

    def handle_request(self, request: httpx.Request) -> httpx.Response:
        answer = self._wire.send(request.url.path, request.read(), request_id=f"sdk-{next(self._ids)}")
        kind = "text/event-stream" if answer.body.startswith((b"data:", b"event:")) else "application/json"
        return httpx.Response(answer.status, headers={"content-type": kind}, content=answer.body)


def httpx2_transport(wire: Wire) -> httpx2.BaseTransport:
    """The same for clients that have httpx's classes in a package of their own, and refuse httpx's."""
    through = ThroughWire(wire)

    def handle(request: httpx2.Request) -> httpx2.Response:
        answer = through.handle_request(httpx.Request(request.method, str(request.url), content=request.read()))
        return httpx2.Response(answer.status_code, headers=dict(answer.headers), content=answer.content)

    return httpx2.MockTransport(handle)


def cut(data: bytes, splits: random.Random | None) -> list[bytes]:
    if splits is None or len(data) < 2:
        return [data]
    places = sorted({0, len(data), *(splits.randrange(len(data)) for _ in range(splits.randrange(8)))})
    return [data[a:b] for a, b in itertools.pairwise(places)]


def rows(capture: Capture) -> tuple[list[int], list[int], np.ndarray, np.ndarray, np.ndarray]:
    """Prompt ids, output ids, candidate ids and log-probabilities [T, K + 1], emitted log-probabilities [T]."""
    capture = decode_capture(capture)
    given = candidates(capture)
    return (
        prompt_ids(capture).tolist(),
        output_ids(capture).tolist(),
        given.ids,
        given.logprobs.astype(np.float32),
        emitted_logprobs(capture).astype(np.float32),
    )


def assert_same_tokens(in_response: Capture, by_plugin: Capture) -> None:
    """Both are captures of one answer: from logprobs in the response, and from what the engine's plugin handed out.

    A chat's response leaves out the last of the most likely ids where the emitted one is not among them.
    """
    given, reported = decode_capture(in_response), decode_capture(by_plugin)
    for read in (prompt_ids, output_ids, emitted_logprobs):
        np.testing.assert_array_equal(read(given), read(reported), err_msg=read.__name__)
    top_k = in_response.top_k
    assert by_plugin.top_k == top_k
    for position, emitted in enumerate(output_ids(given).tolist()):
        rows = []
        for listed in (candidates(given), candidates(reported)):
            ids, logprobs = listed.ids[position].tolist(), listed.logprobs[position].tolist()
            rows.append({i: value for i, value in zip(ids, logprobs, strict=True) if i >= 0})
        if in_response.route == CHAT and emitted not in list(rows[1])[:top_k]:
            del rows[1][list(rows[1])[top_k - 1]]
        assert list(rows[0].items()) == list(rows[1].items()), position
    finish = in_response.finish_reason.replace("tool_calls", "stop")  # what the engine says of a tool's call
    changes = {"finish_reason": finish, "also_in_response": True, "logprobs": [], "generated": by_plugin.generated}
    arrays = {name: getattr(by_plugin, name) for name in ("candidate_ids", "candidate_logprobs", "emitted_logprobs")}
    expected = msgspec.structs.replace(in_response, **changes, **arrays)
    assert encode(expected) == encode(by_plugin), "as bytes, since NaN is not equal to itself"


def normal(body: bytes) -> bytes:
    """A real server's body without the time and the random ids."""
    body = re.sub(rb'"created":\d+', b'"created":0', body)
    return re.sub(rb"chatcmpl-tool-[0-9a-f]+", b"chatcmpl-tool-0", body)


def user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


def chat(text: str = "Hello", **more: Any) -> dict[str, Any]:
    return {"model": "fake", "messages": [{"role": "user", "content": text}], "max_tokens": 12, "temperature": 0} | more


def completion(prompt: Any = "Hello", **more: Any) -> dict[str, Any]:
    return {"model": "fake", "prompt": prompt, "max_tokens": 12, "temperature": 0} | more
