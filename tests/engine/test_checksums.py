"""Checksums of an engine's weights: who may ask for them, when they are computed, and how they reach the admin port."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace
from typing import Any

import pytest
from tests.support.engine_admin import TOKEN, EngineAdmin

pytest.importorskip("vllm")
from tests.support.async_llm import PROMPT, Engine, params

from hemostat_calibration.canary_weights import BUSY
from hemostat_calibration.engine_keys import CHECKSUMS_KEY
from hemostat_engine import checksums
from hemostat_engine.answer_sender import AnswerQueue, AnswerSender
from hemostat_engine.answer_tap import AnswerTap, wrapped
from hemostat_engine.peers import Peers
from hemostat_engine.secrets import Secrets
from hemostat_engine.settings import Settings

DIGESTS = [{"dp0:pp0:pcp0:tp0:a": "a" * 64, "dp0:pp0:pcp0:tp0:b": "b" * 64}, {"dp0:pp0:pcp0:tp1:a": "c" * 64}]


class WithChecksums(Engine):
    def __init__(self, others: int = 0, fails: bool = False) -> None:
        super().__init__([[[3]]])
        self.others, self.fails, self.asked = others, fails, 0
        self.vllm_config = SimpleNamespace(
            cache_config=SimpleNamespace(cache_dtype="fp8"), parallel_config=SimpleNamespace(tensor_parallel_size=2)
        )

    def get_num_unfinished_requests(self) -> int:
        return self.others

    async def compute_weight_checksums(self) -> list[dict[str, str]]:
        self.asked += 1
        if self.fails:
            raise RuntimeError("out of memory")
        return DIGESTS


def served(engine: Engine, xargs: dict[str, Any], secrets: Secrets, requests: int = 1) -> AnswerQueue:
    """Serves requests with these xargs, and what they begin. Returns the queue of the sender."""
    queue = AnswerQueue()
    generate = wrapped(Engine.generate, AnswerTap(queue, lambda: None, secrets))

    async def run() -> None:
        for _ in range(requests):
            outputs = [output async for output in generate(engine, PROMPT, params(xargs), "id")]
            assert outputs[-1].finished
        while len(asyncio.all_tasks()) > 1:
            await asyncio.sleep(0)

    asyncio.run(run())
    return queue


@pytest.fixture
def admin() -> Any:
    admin = EngineAdmin()
    yield admin
    admin.close()


def believing(admin: EngineAdmin) -> Secrets:
    secrets = Secrets()
    secrets.update(admin.own_requests()["secrets"])
    return secrets


def test_checksums_of_all_ranks_reach_the_admin_port_that_has_asked(admin: EngineAdmin) -> None:
    engine, secrets = WithChecksums(), believing(admin)
    queue = served(engine, admin.signed({CHECKSUMS_KEY: "nonce"}), secrets)
    sender = AnswerSender(queue, Peers(Settings(admin_url=admin.url, engine_token=TOKEN)), "boot", secrets)
    sender.send()
    message = admin.registry.checksums["nonce"]
    assert list(message.digests.items()) == [(name, each[:32]) for rank in DIGESTS for name, each in rank.items()]
    assert (message.detail, message.facts["KV cache dtype"], message.facts["tensor parallel size"]) == ("", "fp8", "2")
    assert {"vLLM", "device"} <= message.facts.keys()
    sender.send()
    assert admin.seen.count("/api/v1/engine/answers") == 1, "they are sent once"


def test_nobody_else_can_ask_for_them(admin: EngineAdmin) -> None:
    engine = WithChecksums()
    for xargs in (
        {CHECKSUMS_KEY: "nonce"},
        admin.signed({CHECKSUMS_KEY: "no nonce"}),
        admin.signed({CHECKSUMS_KEY: 7}),
    ):
        assert served(engine, xargs, believing(admin)).take_checksums() is None
    assert engine.asked == 0


@pytest.mark.parametrize(
    ("engine", "detail"),
    [
        (WithChecksums(others=1), BUSY),
        (WithChecksums(fails=True), "RuntimeError: out of memory"),
    ],
)
def test_why_there_are_none_is_said_and_the_request_is_served(
    engine: WithChecksums, detail: str, admin: EngineAdmin
) -> None:
    message = served(engine, admin.signed({CHECKSUMS_KEY: "nonce"}), believing(admin)).take_checksums()
    assert message is not None
    assert (message["nonce"], message["digests"], message["detail"]) == ("nonce", {}, detail)
    assert engine.asked == (not engine.others)


def test_an_older_vllm_has_none() -> None:
    message = asyncio.run(checksums.measure(SimpleNamespace(), "nonce", 0))
    assert message["detail"] == "this vLLM computes no checksums"
