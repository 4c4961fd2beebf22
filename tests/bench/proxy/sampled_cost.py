"""What one sampled answer costs, in CPU time of the threads that do the work: 49 tokens with 20 alternatives each.

Without an event loop, so that only the work for sampling is in it: the relay's hook from the request's head to the
capture, the bytes on the Unix socket, and the control process from these bytes to the queue and to the arrays that the
reference is asked with. What the same request costs the hook when it is not sampled is subtracted.

In the same rounds: the unavoidable parts of this cost (`Floor`), by the fastest means that Python has.
"""

from __future__ import annotations

import json
import re
import socket
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import msgspec
from tests.support.captures import candidates_of

from hemostat.interception.interceptor import Interceptor
from hemostat.ipc.messages import Capture, MessageReader, encode
from hemostat.openai.logprobs.rows import ChatLogprobs
from hemostat.openai.routes import CHAT
from hemostat.scoring.limits import ShadowQueue

from .load import TOP_K, Answers, request_body
from .proxies import observing

TOKENS = 49
LIMIT_MS = 0.27
ROUNDS = 300
_HEAD = [
    (b"Host", b"127.0.0.1:8000"),
    (b"Content-Type", b"application/json"),
    (b"Authorization", b"Bearer sk-none"),
    (b"User-Agent", b"bench"),
    (b"Content-Length", b"300"),
]
_SOCKET_BYTES = 1 << 20


class _Choice(msgspec.Struct, gc=False):
    logprobs: ChatLogprobs | None = None


class _Response(msgspec.Struct, gc=False):
    choices: list[_Choice]


class _Nothing(msgspec.Struct, gc=False):
    pass


_reads_all = msgspec.json.Decoder(_Response)
_reads_nothing = msgspec.json.Decoder(_Nothing)


@dataclass
class Floor:
    """Milliseconds of CPU time for the bytes of one answer, medians over ROUNDS."""

    copied: float
    """Searched once for a character that is not there, and copied once."""
    sent: float
    """To another process through a Unix socket, as they are."""
    skipped: float
    """By the JSON decoder msgspec, which checks them and keeps nothing of them."""
    decoded: float
    """By msgspec, to objects with each token's name and log-probability. Arrays are yet to be made of these."""


@dataclass
class Cost:
    """Milliseconds of CPU time of one sampled answer, medians over ROUNDS."""

    relay: float
    queued: float
    """In the control process, until it waits to be scored."""
    parsed: float
    """There, of an answer that is scored: from the queue to arrays."""
    floor: Floor

    @property
    def until_queued(self) -> float:
        return self.relay + self.queued

    @property
    def total(self) -> float:
        return self.relay + self.queued + self.parsed


@dataclass
class Stopwatch:
    laps: dict[str, list[float]] = field(default_factory=dict)

    def time(self, name: str, work: Callable[[], None]) -> None:
        started = time.thread_time()
        work()
        self.laps.setdefault(name, []).append((time.thread_time() - started) * 1e3)

    def median(self, name: str) -> float:
        return statistics.median(self.laps[name])


class Answer:
    """One request with its answer, as the hook gets them."""

    def __init__(self, answers: Answers, *, stream: bool) -> None:
        self.body = json.dumps(request_body(stream=stream)).encode()
        self.content_type = b"text/event-stream; charset=utf-8" if stream else b"application/json"
        self.pieces = [answers.json_asked]
        if stream:
            role, *events = answers.stream_asked
            usage = re.sub(rb'"completion_tokens":\d+', b'"completion_tokens":%d' % TOKENS, events[-2])
            self.pieces = [role, *events[: TOKENS - 1], events[-3], usage, events[-1]]

    def documents(self) -> list[bytes]:
        """The JSON in it."""
        return [event for piece in self.pieces if (event := piece.removeprefix(b"data: ").strip()) != b"[DONE]"]

    def through(self, hook: Interceptor) -> None:
        exchange = hook.begin("POST", CHAT.encode(), _HEAD, "r")
        if exchange is None:
            return
        assert hasattr(exchange, "request")
        exchange.request(self.body)
        exchange.response_head(200, self.content_type, b"identity")
        for piece in self.pieces:
            exchange.response_data(piece)
        exchange.response_end()
        exchange.closed(complete=True)


def measure(answers: Answers, *, stream: bool, rounds: int = ROUNDS) -> Cost:
    """One answer, over and over."""
    answer = Answer(answers, stream=stream)
    sending, receiving = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
    with sending, receiving:
        sending.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _SOCKET_BYTES)
        sent = 0

        def emit(capture: Capture) -> bool:
            nonlocal sent
            frame = encode(capture)
            sent += len(frame)
            sending.sendall(frame)
            return True

        sampled = Interceptor(observing(1.0), emit, lambda name, labels: None)
        plain = Interceptor(observing(0.0), emit, lambda name, labels: None)
        reader, queue, watch = MessageReader(), ShadowQueue(10), Stopwatch()

        def receive() -> None:
            nonlocal sent
            while sent:
                data = receiving.recv(_SOCKET_BYTES)
                sent -= len(data)
                for message in reader.feed(data):
                    assert isinstance(message, Capture)
                    assert queue.offer(message)

        def parse() -> None:
            capture = queue.take()
            assert capture is not None
            assert candidates_of(capture).ids.shape == (TOKENS, TOP_K + 1)

        documents = answer.documents()
        size = sum(map(len, documents))

        def copy() -> None:
            for document in documents:
                document.find(b"\0")
                bytearray(document)

        def send() -> None:
            sending.sendall(whole)
            left = size
            while left:
                left -= receiving.recv_into(buffer)

        def decode(decoder: msgspec.json.Decoder[Any]) -> None:
            for document in documents:
                decoder.decode(document)

        whole, buffer = b"".join(documents), bytearray(_SOCKET_BYTES)
        for _ in range(rounds):
            watch.time("plain", lambda: answer.through(plain))
            watch.time("relay", lambda: answer.through(sampled))
            watch.time("queued", receive)
            watch.time("parsed", parse)
            watch.time("copied", copy)
            watch.time("sent", send)
            watch.time("skipped", lambda: decode(_reads_nothing))
            watch.time("decoded", lambda: decode(_reads_all))
    floor = Floor(*(watch.median(name) for name in ("copied", "sent", "skipped", "decoded")))
    return Cost(watch.median("relay") - watch.median("plain"), watch.median("queued"), watch.median("parsed"), floor)


def lines(costs: dict[str, Cost]) -> list[str]:
    """Of a table. costs: by the kind of answer."""
    result = []
    for name, cost in costs.items():
        floor = cost.floor
        result += [
            f"CPU of one sampled answer, {name}, {TOKENS} tokens × {TOP_K} logprobs: relay {cost.relay:.3f} ms, "
            f"control {cost.queued:.3f} ms until queued (together {cost.until_queued:.3f}) and {cost.parsed:.3f} ms if "
            f"scored: {cost.total:.3f} ms in all (aim: {LIMIT_MS})",
            f"the least for its bytes, {name}: {floor.copied:.3f} ms to search and copy them once, {floor.sent:.3f} ms "
            f"to another process, {floor.skipped:.3f} ms for msgspec to check them, {floor.decoded:.3f} ms to decode",
        ]
    return result


async def measure_both(rounds: int = ROUNDS) -> dict[str, Cost]:
    answers = await Answers.make()
    return {name: measure(answers, stream=name == "stream", rounds=rounds) for name in ("JSON", "stream")}
