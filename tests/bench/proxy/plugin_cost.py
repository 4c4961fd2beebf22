"""What one sampled answer costs relay and control process, in CPU time, where the engine's plugin hands out the tokens.

Its 49 tokens with 20 alternatives each are those of `sampled_cost`.

No logprobs are asked for in the response, so the hook only reads how the response ends. The control process decodes the
plugin's message (here of one answer), joins it with the relay's capture, and makes the arrays that the reference is
asked with. What one HTTP request with such a message costs the admin port besides is measured by itself: an API server
sends at most 1 / `COLLECT_SECONDS` of them a second, each with all answers since the last one.
"""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import httpx
import msgspec
import uvicorn
from fastapi import FastAPI
from tests.support.captures import candidates_of
from tests.support.fake_vllm import FakeVllm

from hemostat.admin.hardening import server_settings
from hemostat.engines.api import engine_router
from hemostat.engines.messages import AnswerMessage, TapAnswer, decode_answers
from hemostat.engines.reports import PluginReports
from hemostat.interception.interceptor import Interceptor
from hemostat.ipc.messages import Capture, MessageReader, encode
from hemostat.scoring.intake import AwaitedAnswers, captures_from_tap
from hemostat.scoring.limits import ShadowQueue
from hemostat_engine.admin_client import AdminClient
from hemostat_engine.answer_sender import COLLECT_SECONDS

from .load import PATH, TOP_K, Answers, request_body
from .proxies import observing
from .sampled_cost import LIMIT_MS, ROUNDS, TOKENS, Answer, Stopwatch

NONCE = "nonce"
MESSAGES = 100
"""HTTP requests whose cost is averaged."""


@dataclass
class Cost:
    """Milliseconds of CPU time of one sampled answer, medians over the rounds."""

    relay: float
    queued: float
    """In the control process: the capture and the message are decoded and joined, until it waits to be scored."""
    parsed: float
    """There, of an answer that is scored: from the queue to arrays."""

    @property
    def total(self) -> float:
        return self.relay + self.queued + self.parsed


class PlainAnswer(Answer):
    """To a request that asks for no logprobs."""

    def __init__(self, answers: Answers, *, stream: bool) -> None:
        super().__init__(answers, stream=stream)
        self.pieces = [answers.json_plain]
        if stream:
            role, *events = answers.stream_plain
            self.pieces = [role, *events[: TOKENS - 1], *events[-2:]]


async def handed_out() -> TapAnswer:
    """The answer to the JSON request, by the fake vLLM's plugin."""
    fake = FakeVllm(model="fake", plugin=True)
    asks = {"vllm_xargs": {"hemostat_tap": NONCE, "hemostat_tap_top": str(TOP_K)}}
    async with httpx.AsyncClient(transport=httpx.ASGITransport(fake), base_url="http://fake") as client:
        (await client.post(PATH, json=request_body(stream=False) | asks)).raise_for_status()
    (answer,) = fake.handed_out
    assert (answer.tokens, answer.top_k) == (TOKENS, TOP_K)
    return answer


def measure(answers: Answers, given: TapAnswer, *, stream: bool, rounds: int = ROUNDS) -> Cost:
    """One answer, over and over. given: what the plugin hands out of it."""
    answer, watch = PlainAnswer(answers, stream=stream), Stopwatch()
    body = msgspec.msgpack.encode(AnswerMessage("api-server", [given], 0))
    frames: list[bytes] = []
    sending, receiving = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
    with sending, receiving:

        def emit(capture: Capture) -> bool:
            frames.append(encode(capture))
            sending.sendall(frames[-1])
            return True

        by_plugin = observing(1.0, tap=True, tap_tokens=True, prefer_plugin=True)
        sampled = Interceptor(by_plugin, emit, lambda name, labels: None, nonce=lambda: NONCE)
        plain = Interceptor(observing(0.0), emit, lambda name, labels: None)
        reader, queue, engines = MessageReader(), ShadowQueue(10), PluginReports()
        awaited = AwaitedAnswers(engines.answers, 10, 4.0)

        def receive() -> None:
            engines.update_answers(decode_answers(body), time.monotonic())
            for message in reader.feed(receiving.recv(len(frames.pop()))):
                assert isinstance(message, Capture)
                assert awaited.offer(message)
            for capture, reported in awaited.take(time.monotonic()):
                for choice in captures_from_tap(capture, reported, 8192):
                    assert queue.offer(choice)

        def parse() -> None:
            capture = queue.take()
            assert capture is not None
            assert candidates_of(capture).ids.shape == (TOKENS, TOP_K + 1)

        for _ in range(rounds):
            watch.time("plain", lambda: answer.through(plain))
            watch.time("relay", lambda: answer.through(sampled))
            watch.time("queued", receive)
            watch.time("parsed", parse)
    return Cost(watch.median("relay") - watch.median("plain"), watch.median("queued"), watch.median("parsed"))


@contextmanager
def admin_port() -> Iterator[tuple[str, threading.Thread]]:
    """Its address, and the thread of its server."""
    app = FastAPI()
    app.include_router(engine_router(PluginReports(), lambda _: None, time.monotonic))
    listener = socket.create_server(("127.0.0.1", 0))
    server = uvicorn.Server(uvicorn.Config(app, **server_settings()))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
    thread.start()
    try:
        yield f"http://127.0.0.1:{listener.getsockname()[1]}", thread
    finally:
        server.should_exit = True
        thread.join()
        listener.close()


def message_ms(messages: int = MESSAGES) -> float:
    """Milliseconds of CPU time that an HTTP request with a message of no answers costs the control process."""
    body = {"boot_id": "api-server", "answers": [], "dropped": 0}
    with admin_port() as (url, thread):
        client = AdminClient(url, "token")
        client.send_answers(body)
        assert thread.ident is not None
        clock = time.pthread_getcpuclockid(thread.ident)
        started = time.clock_gettime(clock)
        for _ in range(messages):
            client.send_answers(body)
        return (time.clock_gettime(clock) - started) * 1e3 / messages


async def measure_both(rounds: int = ROUNDS) -> dict[str, Cost]:
    answers, given = await Answers.make(), await handed_out()
    return {name: measure(answers, given, stream=name == "stream", rounds=rounds) for name in ("JSON", "stream")}


def lines(costs: dict[str, Cost], message: float) -> list[str]:
    """costs: by the kind of answer. message: `message_ms`."""
    result = [
        f"CPU of one sampled answer by the plugin, {name}, {TOKENS} tokens × {TOP_K} logprobs: relay {cost.relay:.3f} "
        f"ms, control {cost.queued:.3f} ms until queued and {cost.parsed:.3f} ms if scored: {cost.total:.3f} ms in all "
        f"(aim: {LIMIT_MS})"
        for name, cost in costs.items()
    ]
    a_second = 1 / COLLECT_SECONDS
    result.append(f"a message to the admin port: {message:.3f} ms, at most {a_second:.0f} a second of each API server")
    return result
