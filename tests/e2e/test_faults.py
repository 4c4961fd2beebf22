"""What breaks in the middle of streams: the reference, the store, vLLM, the client. Every request is sampled."""

from __future__ import annotations

import json
import os
import shutil
import sqlite3
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import httpx
import openai
import pytest
from prometheus_client.parser import text_string_to_metric_families
from tests.support.slow import slow_unless
from tests.support.stack import (
    ADMIN_TOKEN,
    FakeEngine,
    Stack,
    events,
    fake_engine,
    hemostat,
    kill,
    sampling_settings,
    wait_for,
)

pytestmark = pytest.mark.timeout(300)

CHAT = "/v1/chat/completions"


class Engine(Protocol):
    url: str
    model: str


def asks(text: str, max_tokens: int, **more: Any) -> dict[str, Any]:
    messages = [{"role": "user", "content": text}]
    return {"messages": messages, "max_tokens": max_tokens, "temperature": 0, "ignore_eos": True} | more


def text_of(stream: Iterator[dict[str, Any]]) -> str:
    return "".join(choice["delta"].get("content") or "" for event in stream for choice in event["choices"])


def ended(requests: dict[str, Any]) -> int:
    """Captures that came to an end behind the relay."""
    return int(requests["scored"]) + sum(requests["dropped"].values())


# --- with the real engine ---------------------------------------------------------------------------------------------


@pytest.mark.vllm
@pytest.mark.slow
def test_the_reference_killed_in_the_middle_of_a_stream(sampled: Stack, vllm_server: Engine) -> None:
    long = asks("Tell a long story about the sea.", 120, stream=True)
    short = asks("Hi", 4)
    direct = httpx.post(vllm_server.url + CHAT, json=long, timeout=120)
    expected = text_of(events(iter(direct.text.splitlines())))
    before = sampled.wait_settled()
    worker = sampled.process("hemostat.reference.worker")

    with httpx.stream("POST", sampled.url + CHAT, json=long, timeout=120) as response:
        stream = events(response.iter_lines())
        begun = [next(stream) for _ in range(20)]
        kill(worker)
        whole = [*begun, *stream]
    assert text_of(iter(whole)) == expected
    assert whole[-1]["choices"][0]["finish_reason"] == "length"
    for _ in range(2):
        answer = httpx.post(sampled.url + CHAT, json=short, timeout=120)
        assert answer.json()["usage"]["completion_tokens"] == 4

    after = sampled.wait_settled(before["shadowed"] + 3)
    # How many of the three were lost depends on how quickly torch was loaded again; each has its ending.
    assert ended(after) - ended(before) == 3
    assert after["skipped"] == before["skipped"]
    assert set(after["dropped"]) - set(before["dropped"]) <= {"reference_down"}
    sampled.wait_scoring()
    assert sampled.process("hemostat.reference.worker") != worker
    assert sampled.status()["reference"]["state"] == "ready"


@pytest.mark.vllm
@pytest.mark.slow
def test_what_the_reference_was_scoring_when_it_was_killed_is_dropped_by_reason(sampled: Stack) -> None:
    before = sampled.wait_settled()
    worker = sampled.process("hemostat.reference.worker")
    with ThreadPoolExecutor(3) as clients:
        answers = clients.map(lambda n: httpx.post(sampled.url + CHAT, json=asks(f"Say {n}", 4), timeout=120), range(3))
        kill(worker)
        assert [answer.status_code for answer in answers] == [200, 200, 200]
    after = sampled.wait_settled(before["shadowed"] + 3)
    assert ended(after) - ended(before) == 3
    lost = after["dropped"]["reference_down"] - before["dropped"].get("reference_down", 0)
    assert lost >= 1
    assert sampled.metric("hemostat_shadow_requests_total", outcome="dropped", reason="reference_down") >= lost
    sampled.wait_scoring()


LEAVES = ("in the stream", "before the first token", "before the whole answer")


@pytest.mark.vllm
@pytest.mark.parametrize(
    ("leaves", "shadow"),
    slow_unless(
        {(leaves, "sampled") for leaves in LEAVES} | {("in the stream", "not sampled")},
        [(leaves, shadow) for leaves in LEAVES for shadow in ("sampled", "not sampled")],
    ),
)
def test_a_client_that_leaves_ends_its_request_in_vllm(
    sampled: Stack, vllm_server: Engine, shadow: str, leaves: str
) -> None:
    headers = {} if shadow == "sampled" else {"X-Hemostat-Shadow": "off"}
    if leaves == "before the first token":
        body = asks("word " * 400, 1000, stream=True)
        read_timeout = 0.05
    else:
        body = asks("Tell a long story.", 1000, stream=leaves == "in the stream")
        read_timeout = 2.0
    wait_for("vLLM to be idle", lambda: at_work(vllm_server) == 0)
    written = tokens_written(vllm_server)
    with httpx.Client(base_url=sampled.url, timeout=120) as client:
        if leaves == "in the stream":
            with client.stream("POST", CHAT, json=body, headers=headers) as response:
                stream = events(response.iter_lines())
                for _ in range(5):
                    next(stream)
                assert at_work(vllm_server) == 1
        else:
            with pytest.raises(httpx.ReadTimeout):
                client.post(CHAT, json=body, headers=headers, timeout=httpx.Timeout(60, read=read_timeout))
    wait_for("vLLM to be idle", lambda: at_work(vllm_server) == 0, every=0.05)
    time.sleep(0.5)
    assert at_work(vllm_server) == 0, "it did not begin late"
    assert tokens_written(vllm_server) - written < body["max_tokens"] / 4


def vllm_metric(server: Engine, name: str) -> float:
    text = httpx.get(f"{server.url}/metrics", timeout=10).text
    return sum(s.value for family in text_string_to_metric_families(text) for s in family.samples if s.name == name)


def at_work(server: Engine) -> float:
    """Requests that vLLM has not ended with."""
    return vllm_metric(server, "vllm:num_requests_running") + vllm_metric(server, "vllm:num_requests_waiting")


def tokens_written(server: Engine) -> float:
    return vllm_metric(server, "vllm:generation_tokens_total")


# --- with the fake one, in a process of its own -----------------------------------------------------------------------


@dataclass(frozen=True)
class Faked:
    engine: FakeEngine
    stack: Stack
    store: Path
    """The file; the folder is its own."""


@pytest.fixture(scope="module")
def faked(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Faked]:
    """Shared: each test leaves it working."""
    folder = tmp_path_factory.mktemp("faked")
    store = folder / "store" / "hemostat.db"
    store.parent.mkdir()
    with fake_engine("--token-delay", "0.02") as engine, fake_engine("--noise", "0.5") as other:
        reference = {"backend": "vllm", "url": other.url}
        settings = sampling_settings(engine.url, reference, store={"url": f"sqlite:///{store}"})
        with hemostat(settings, folder) as stack:
            stack.wait_scoring()
            yield Faked(engine, stack, store)


def test_vllm_killed_in_the_middle_of_a_stream(faked: Faked) -> None:
    engine, stack = faked.engine, faked.stack
    long, short = asks("Hi", 200, stream=True), asks("Hi", 4)
    before = stack.wait_settled()
    with httpx.stream("POST", stack.url + CHAT, json=long, timeout=20) as response:
        stream = events(response.iter_lines())
        for _ in range(10):
            next(stream)
        engine.kill()
        # Not an end that looks like one: the client can tell.
        with pytest.raises(httpx.RemoteProtocolError, match="incomplete chunked read"):
            list(stream)

    refused = httpx.post(stack.url + CHAT, json=short, timeout=20)
    assert refused.status_code == 502
    assert set(refused.json()["error"]) == {"message", "type", "param", "code"}
    with (
        openai.OpenAI(base_url=f"{stack.url}/v1", api_key="none", max_retries=0) as client,
        pytest.raises(openai.InternalServerError) as error,
    ):
        client.chat.completions.create(model="fake", messages=[{"role": "user", "content": "Hi"}])
    assert error.value.status_code == 502

    engine.start()
    for _ in range(3):
        assert httpx.post(stack.url + CHAT, json=short, timeout=20).json()["usage"]["completion_tokens"] == 4
    after = stack.wait_settled(before["shadowed"] + 3)
    assert after["scored"] - before["scored"] == 3
    # The stream that broke off, and the two that the relay answered with 502 itself.
    assert Counter(after["skipped"]) - Counter(before["skipped"]) == {"incomplete": 1, "upstream_error": 2}
    assert after["dropped"] == before["dropped"]


@contextmanager
def removed(store: Path) -> Iterator[None]:
    shutil.rmtree(store.parent)
    try:
        yield
    finally:
        store.parent.mkdir()


@contextmanager
def a_folder(store: Path) -> Iterator[None]:
    store.unlink()
    store.mkdir()
    try:
        yield
    finally:
        store.rmdir()


@contextmanager
def locked(store: Path) -> Iterator[None]:
    """By another process, for longer than Hemostat waits."""
    with closing(sqlite3.connect(store)) as connection:
        connection.execute("BEGIN EXCLUSIVE")
        yield


@contextmanager
def read_only(store: Path) -> Iterator[None]:
    store.chmod(0o400)
    store.parent.chmod(0o500)
    try:
        if os.access(store, os.W_OK):
            pytest.skip("root may write anywhere")
        yield
    finally:
        store.parent.chmod(0o700)
        store.chmod(0o600)


@pytest.mark.parametrize("harm", slow_unless([removed, read_only], [removed, a_folder, locked, read_only]))
def test_a_store_that_breaks_affects_no_client(
    faked: Faked, harm: Callable[[Path], AbstractContextManager[None]]
) -> None:
    stack, store = faked.stack, faked.store
    set_mode(stack, "observe")
    wait_for("a whole store", lambda: stored_mode(store) == "observe")
    before, errors = stack.wait_settled(), stack.metric("hemostat_store_errors_total")
    with httpx.stream("POST", stack.url + CHAT, json=asks("Hi", 50, stream=True), timeout=20) as response:
        stream = events(response.iter_lines())
        begun = [next(stream) for _ in range(5)]
        with harm(store):
            assert set_mode(stack, "off") == 507, "it applies, but is not kept"
            whole = [*begun, *stream]
            wait_for("the failure's count", lambda: stack.metric("hemostat_store_errors_total") > errors)
            assert "HemostatStoreErrors" in {problem["alert"] for problem in stack.status()["state"]["problems"]}
            assert httpx.post(stack.url + CHAT, json=asks("Hi", 4), timeout=20).status_code == 200
    assert whole[-1]["choices"][0]["finish_reason"] == "length"
    if store.exists():
        assert stack.status()["profile"]["mode"] == "off", "what the operator switched holds all the same"
        after = stack.wait_settled(before["shadowed"] + 2)
        assert after["scored"] - before["scored"] == 2
    else:
        wait_for("a process that begins anew", lambda: store.is_file() and scores(stack))
    # Whole again, it is used again.
    set_mode(stack, "observe")
    wait_for("a whole store", lambda: stored_mode(store) == "observe")


def scores(stack: Stack) -> bool:
    """The control process owns its store, and its reference is ready."""
    try:
        status = stack.status()
    except httpx.HTTPError:  # it ends just now
        return False
    return bool(status["control"]["state"] == "active" and status["reference"]["state"] == "ready" and status["relays"])


def set_mode(stack: Stack, mode: str) -> int:
    """The status: 200, or 507 where the mode applies, but could not be written yet."""
    headers = {"Authorization": f"Bearer {ADMIN_TOKEN}"}
    answer = stack.admin.post("/api/v1/calibration", json={"mode": mode}, headers=headers)
    assert answer.status_code in (200, 507), answer.text
    return answer.status_code


def stored_mode(store: Path) -> str | None:
    """The operator's choice, as the file itself says it."""
    if not store.is_file():
        return None
    with closing(sqlite3.connect(store)) as connection:
        try:
            result = connection.execute("SELECT value FROM state WHERE key = 'mode'").fetchone()
        except sqlite3.OperationalError:
            return None  # not written yet
    return str(json.loads(result[0])["state"]["mode"]) if result else None
