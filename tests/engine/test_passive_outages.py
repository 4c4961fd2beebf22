"""Outages of the control process while the plugin measures alone: no answer changes or waits, losses are counted."""

from __future__ import annotations

import gc
import threading
import tracemalloc
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest

pytest.importorskip("vllm")
from tests.support.async_llm import params
from tests.support.engine_admin import TOKEN, EngineAdmin
from tests.support.passive_server import POLICY, TOKENS, Server, run
from tests.support.waiting import HANG_SECONDS

from hemostat_engine.answer_sender import AnswerQueue, AnswerSender
from hemostat_engine.passive import Lost, PassiveSampler
from hemostat_engine.peers import Peers
from hemostat_engine.settings import Settings
from hemostat_lab.demo.vllm_server import free_port

REQUESTS = 4000
SECONDS = 600.0
"""The simulated time in which the requests come. A policy is in force for 30 s of it after the last message."""
QUEUE_BYTES = 20_000
GROWTH_BYTES = 1 << 18
"""The largest growth of the process's memory over most of the requests; an answer that is kept has some 2 kB."""


@contextmanager
def sending(server: Server, url: str, token: str, fails: Callable[[], None]) -> Iterator[None]:
    """Sends what is queued, and asks for the policy, on a thread of its own as in a process of vLLM. The control
    process fails after it was asked once, and before it is asked again."""
    peers = Peers(Settings(admin_url=url, engine_token=token))
    sender = AnswerSender(server.queue, peers, "boot", server.secrets, server.sampler, pause=lambda _: None)
    sender.look()
    fails()
    ended = threading.Event()

    def work() -> None:
        while not ended.is_set():
            sender.look()
            if server.queue.filled.wait(0.01):
                sender.send()
        while server.queue.filled.is_set():
            sender.send()

    thread = threading.Thread(target=work)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join(HANG_SECONDS)
        assert not thread.is_alive()


def kept_bytes() -> int:
    """Returns what is in use without what waits for the garbage collector: an HTTP error refers to the frame that
    refers to it and to the message, which is larger than all that may be kept, and when it is collected depends on
    what else the process makes."""
    gc.collect()
    return tracemalloc.get_traced_memory()[0]


@pytest.mark.parametrize("seconds", [SECONDS, SECONDS / 30], ids=["ten minutes", "twenty seconds"])
@pytest.mark.parametrize("fault", ["killed", "slow", "wrong token", "broken", "absent"])
def test_no_answer_waits_or_differs_memory_is_flat_and_each_loss_is_counted(fault: str, seconds: float) -> None:
    admin = EngineAdmin()
    admin.registry.passive.enabled, admin.registry.passive.policy = True, POLICY
    server = Server(None)
    server.queue = AnswerQueue(QUEUE_BYTES)
    server.sampler = PassiveSampler(server.secrets, server.queue.has_room, lambda: 0.5, lambda: server.now)
    server.start_tap()
    plain, waits = run(server.engine.generate(TOKENS, params(), "cmpl-1-0"))
    url = f"http://127.0.0.1:{free_port()}" if fault == "absent" else admin.url
    tracemalloc.start()
    try:
        with sending(server, url, TOKEN, lambda: admin.fail(fault)):
            at_first = largest = 0
            for n in range(REQUESTS):
                server.now += seconds / REQUESTS
                seen, waited = run(server.generate(server.engine, TOKENS, params(), f"cmpl-{n}-0"))
                assert waited == waits
                assert [output.outputs for output in seen] == [output.outputs for output in plain]
                server.engine.given.clear()
                largest = max(largest, server.queue.bytes)
                if n == REQUESTS // 4:
                    at_first = kept_bytes()
            assert kept_bytes() - at_first < GROWTH_BYTES
            if fault == "slow":
                assert server.queue.bytes > 0, "one message waits all the time"
                admin.close()
        assert largest <= QUEUE_BYTES
    finally:
        tracemalloc.stop()
        if fault not in ("killed", "slow"):
            admin.close()
    counts = server.sampler.counts()
    assert server.queue.bytes == server.tap.room.bytes == 0
    assert sum(counts.requests.values()) == counts.sampled + sum(counts.unscored.values())
    assert counts.unscored.keys() <= {Lost.LINK_FULL, Lost.PLUGIN_BUSY}
    assert server.queue.dropped == counts.unscored.get(Lost.LINK_FULL, 0)
    drawn = sum(counts.requests.values())
    assert drawn == (0 if fault == "absent" else 200 if seconds == SECONDS else REQUESTS)
