"""Responses that named ids only: the engine that answered computes the log-probabilities of their tokens again."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from tests.support.captures import capture
from tests.support.fake_lora import FakeLora
from tests.support.fake_vllm import FakeVllm, serving
from tests.support.scorer_bench import Bench
from tests.support.served import hemostat
from tests.support.wire import VERSION, rows, user

from hemostat.ipc.messages import Capture
from hemostat.reference.probes import keeps_responses
from hemostat.reference.protocol import ReferenceFailure
from hemostat.reference.server import VllmServer
from hemostat.scoring.engine_scores import EngineScorer

TOP = 6
PROMPT, OUTPUT = [72, 101, 108], [108, 111, 33]


class Engines:
    """Implements `engine_scores.Engines`."""

    def __init__(self, urls: dict[str, str]) -> None:
        self.urls = urls
        self.made: list[str] = []

    def current(self) -> Sequence[str]:
        return list(self.urls)

    def connect(self, name: str, timeout: float) -> VllmServer:
        self.made.append(name)
        return VllmServer(self.urls[name], timeout=timeout)


@asynccontextmanager
async def scorer(engines: Engines) -> AsyncIterator[EngineScorer]:
    made = EngineScorer(engines, TOP)
    try:
        yield made
    finally:
        await made.close()


def of_ids(**more: Any) -> Capture:
    given = {
        "prompt_token_ids": np.array(PROMPT, "<i4").tobytes(),
        "output_token_ids": np.array(OUTPUT, "<i4").tobytes(),
        **{"ids_only": True, "top_k": 0, "model": "fake", "engine": "one"},
        **dict.fromkeys(("candidate_ids", "candidate_logprobs", "emitted_logprobs"), b""),
    }
    return capture(**given | more)


@pytest.fixture
def fakes() -> Iterator[tuple[FakeVllm, FakeVllm, Engines]]:
    one, two = FakeVllm(seed=3), FakeVllm(seed=4)
    with serving(one) as first, serving(two) as second:
        yield one, two, Engines({"one": first, "two": second})


async def test_the_candidates_are_those_of_the_engine_that_answered(fakes: tuple[FakeVllm, FakeVllm, Engines]) -> None:
    *models, engines = fakes
    async with scorer(engines) as made:
        for name, fake in (("one", models[0]), ("two", models[1]), ("one", models[0])):
            completed = await made.with_candidates(of_ids(engine=name))
            prompt, output, ids, logprobs, emitted = rows(completed)
            assert (prompt, output, completed.top_k) == (PROMPT, OUTPUT, TOP)
            for position, token in enumerate(OUTPUT):
                truth = fake.logprobs(PROMPT + OUTPUT[:position]).astype(np.float32)
                most_likely = np.argsort(-truth, kind="stable")[:TOP].tolist()
                assert ids[position].tolist() == [*most_likely, -1 if token in most_likely else token]
                np.testing.assert_array_equal(logprobs[position][:TOP], truth[most_likely])
                assert emitted[position] == truth[token]
        assert engines.made == ["one", "two"], "one connection to each"
        del engines.urls["one"]
        await made.with_candidates(of_ids(engine="two"))
        with pytest.raises(KeyError):
            await made.with_candidates(of_ids(engine="one"))


async def test_an_adapter_that_answered_is_asked(fakes: tuple[FakeVllm, FakeVllm, Engines]) -> None:
    fake, _, engines = fakes
    fake.lora = FakeLora(resolves={VERSION: 16})
    async with scorer(engines) as made:
        await made.with_candidates(of_ids(adapter=VERSION))
        assert fake.requests[-1]["model"] == VERSION
        fake.status = 503
        with pytest.raises(ReferenceFailure, match="503"):
            await made.with_candidates(of_ids())


@pytest.mark.parametrize("keeps", [False, True])
async def test_whether_vllm_keeps_responses(keeps: bool) -> None:
    fake = FakeVllm(keeps_responses=keeps)
    with serving(fake) as url:
        server = VllmServer(url)
        assert await keeps_responses(server, "fake") is keeps
        assert not fake.requests, "nothing was generated"
        fake.status = 500
        assert await keeps_responses(server, "fake"), "it is not known"
        await server.close()


async def test_a_capture_that_no_engine_can_score_is_counted(bench: Bench) -> None:
    assert await bench.ends(of_ids(model="m")) == {("skipped", "no_logprobs"): 1}


async def test_own_logprobs_and_responses_are_scored_without_a_plugin(tmp_path: Path) -> None:
    fake = FakeVllm(seed=3)
    bodies: dict[str, dict[str, Any]] = {
        "/v1/chat/completions": {"messages": [user("Hello")], "max_tokens": 4, "logprobs": True, "top_logprobs": 3},
        "/v1/completions": {"prompt": "Hello", "max_tokens": 4, "logprobs": 3},
        "/v1/responses": {"input": "Hello", "max_output_tokens": 4},
    }
    with (
        serving(fake) as url,
        serving(FakeVllm(seed=3, noise=0.1)) as reference,
        hemostat(tmp_path, fake, url, reference={"backend": "vllm", "url": reference}) as served,
    ):
        await served.until(lambda status: status["reference"]["state"] == "ready" and status["relays"] > 0)
        async with httpx.AsyncClient(base_url=served.data, timeout=20) as client:
            for path, body in bodies.items():
                for stream in (False, True):
                    (await client.post(path, json={"model": "fake", "stream": stream} | body)).raise_for_status()
            status = await served.until(lambda status: status["requests"]["scored"] == 6)
            assert status["requests"]["skipped"] == {}
            assert {row["route"] for row in status["where"]} == set(bodies)
            fake.max_logprobs = 4  # of `shadow.top_k` 8
            (await client.post("/v1/responses", json={"model": "fake"} | bodies["/v1/responses"])).raise_for_status()
            await served.until(lambda status: status["requests"]["dropped"] == {"engine_refused": 1})
