"""The gateways of docs/gateways.md, with the page's own examples: in front of a relay, and behind one."""

from __future__ import annotations

import asyncio
import os
import re
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
from tests.support.fake_vllm import FakeVllm, serving
from tests.support.paths import ROOT
from tests.support.served import Served, hemostat
from tests.support.waiting import HANG_SECONDS

from hemostat_lab.demo.vllm_server import free_port

TRACE = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
HEADERS = {"traceparent": TRACE, "x-request-id": "one", "x-forwarded-for": "203.0.113.9"}
CHAT = {"model": "fake", "messages": [{"role": "user", "content": "hello"}], "max_tokens": 12, "temperature": 0.0}
PLAIN = {"model": "fake", "prompt": "hello", "max_tokens": 12, "temperature": 0.0}
REQUESTS = [
    ("/v1/chat/completions", CHAT),
    ("/v1/chat/completions", CHAT | {"stream": True}),
    ("/v1/chat/completions", CHAT | {"logprobs": True, "top_logprobs": 2}),
    ("/v1/completions", PLAIN),
    ("/v1/completions", PLAIN | {"stream": True}),
    ("/v1/completions", PLAIN | {"n": 2}),
]
SCORED = 5
"""All but the last, which the engine refuses: it is greedy."""
ARGUMENTS = {
    "nginx": lambda config: ["-e", "stderr", "-p", str(config.parent), "-c", str(config)],
    "HAProxy": lambda config: ["-db", "-f", str(config)],
    "Envoy": lambda config: ["--disable-hot-restart", "-l", "warning", "-c", str(config)],
}
"""The arguments of each program that is run in both places, by its section of the page."""
CLIENT = "127.0.0.2"
"""The address of the client; the gateway and the relay have 127.0.0.1."""
ADD_THEIR_CALLER = ("HAProxy", "Envoy")
"""The gateways that add the address that they were called from to `X-Forwarded-For`."""
LITELLM_KEY = "sk-0123456789abcdef0123456789abcdef"


PAGE = (ROOT / "docs" / "gateways.md").read_text()


def example(section: str) -> str:
    (text,) = re.findall(r"```\w+\n(.*?)```", PAGE.partition(f"\n## {section}\n")[2].partition("\n## ")[0], re.DOTALL)
    return str(text)


def program(name: str) -> str:
    """Returns the path of a program, also of one that a package has brought into the tests' environment."""
    path = os.pathsep.join((os.environ.get("PATH", os.defpath), str(Path(sys.executable).parent)))
    found = shutil.which(name, path=path)
    if found is None:
        pytest.skip(f"{name} is not installed")
    return found


@contextmanager
def gateway(name: str, to: str, folder: Path, trusted: str = "10.0.0.0/8") -> Iterator[str]:
    """The page's example, with these addresses. Returns its own."""
    command = program(name.lower())
    port = free_port()
    text = example(name).replace("127.0.0.1:8080", to.removeprefix("http://"))
    text = text.replace("10.0.0.0/8", trusted)
    text = text.replace("127.0.0.1:8090", f"127.0.0.1:{port}")
    # Envoy's addresses and ports are two members.
    text = text.replace("port_value: 8090", f"port_value: {port}")
    text = text.replace("port_value: 8080", f"port_value: {to.rpartition(':')[2]}")
    if name == "nginx":
        paths = " ".join(f"{kind}_temp_path {folder}/{kind};" for kind in NGINX_FOLDERS)
        text = f"daemon off; pid {folder}/pid; events {{}} http {{ access_log off; {paths}\n{text}}}"
    config = folder / f"{name}.yaml"  # Envoy reads the format from the name
    config.write_text(text)
    with (folder / f"{name}.log").open("wb") as log:
        process = subprocess.Popen([command, *ARGUMENTS[name](config)], stdout=log, stderr=log)
    try:
        ends = time.monotonic() + HANG_SECONDS
        while True:
            assert process.poll() is None, (folder / f"{name}.log").read_text()
            try:
                socket.create_connection(("127.0.0.1", port), 1.0).close()
                break
            except OSError:
                assert time.monotonic() < ends
                time.sleep(0.05)
        yield f"http://127.0.0.1:{port}"
    finally:
        process.terminate()
        process.wait(HANG_SECONDS)


NGINX_FOLDERS = ("client_body", "proxy", "fastcgi", "uwsgi", "scgi")


@contextmanager
def chain(name: str, place: str, engine: FakeVllm, url: str, folder: Path) -> Iterator[tuple[str, Served]]:
    """Returns the address for clients, and Hemostat, which samples every request."""
    with serving(FakeVllm(seed=5, noise=0.1)) as reference:
        settings: dict[str, Any] = {"reference": {"backend": "vllm", "url": reference}}
        if place == "in front of the relay":
            settings["client_limits"] = {"trusted_proxies": ["127.0.0.1"]}
            with hemostat(folder, engine, url, **settings) as served, gateway(name, served.data, folder) as address:
                yield address, served
        else:
            settings["client_limits"] = {"trusted_proxies": []}
            with (
                gateway(name, url, folder, trusted="127.0.0.1") as address,
                hemostat(folder, engine, address, **settings) as served,
            ):
                yield served.data, served


def read(address: str) -> list[tuple[int, str, bytes]]:
    found = []
    with httpx.Client(transport=httpx.HTTPTransport(local_address=CLIENT), headers=HEADERS, timeout=60) as client:
        for route, body in REQUESTS:
            answer = client.post(address + route, json=body)
            found.append((answer.status_code, answer.headers["content-type"], answer.content))
    return found


@pytest.mark.parametrize("place", ["in front of the relay", "behind the relay"])
@pytest.mark.parametrize("name", ARGUMENTS)
async def test_answers_are_the_engines_own_streams_flow_and_headers_arrive(
    name: str, place: str, tmp_path: Path
) -> None:
    engine = FakeVllm(seed=5)
    with serving(engine) as url:
        own = await asyncio.to_thread(read, url)
        with chain(name, place, engine, url, tmp_path) as (address, served):
            await served.until(lambda status: status["reference"]["state"] == "ready" and status["relays"] > 0)
            engine.headers.clear()
            assert await asyncio.to_thread(read, address) == own
            await served.until(lambda status: status["requests"]["scored"] >= SCORED)
            arrived = [headers for headers in engine.headers if headers.get(b"x-request-id") == b"one"]
            assert {headers[b"traceparent"].split(b"-")[1] for headers in arrived} == {TRACE.split("-")[1].encode()}
            # The client's own claim is gone, as its hop is not trusted. Envoy adds another address for 127.0.0.1.
            hops = [headers[b"x-forwarded-for"].decode().split(",") for headers in arrived]
            added = place == "behind the relay" and name in ADD_THEIR_CALLER
            assert {(entries[0], len(entries)) for entries in hops} == {(CLIENT, 2 if added else 1)}
            engine.hold_after = 4
            await asyncio.to_thread(read_held, address, engine)


def read_held(address: str, engine: FakeVllm) -> None:
    """Reads a stream whose end the engine holds back until its beginning has arrived."""
    route, body = REQUESTS[1]
    with httpx.stream("POST", address + route, json=body, headers=HEADERS, timeout=60) as answer:
        events = answer.iter_lines()
        seen = [line for line in (next(events) for _ in range(4)) if line]
        assert seen
        assert "data: [DONE]" not in seen
        engine.hold_after = None
        assert [line for line in events if line][-1] == "data: [DONE]"


@contextmanager
def litellm(to: str, folder: Path) -> Iterator[str]:
    """The page's example of LiteLLM's proxy. Returns its address."""
    command = program("litellm")
    port = free_port()
    config = folder / f"litellm-{port}.yaml"
    config.write_text(example("LiteLLM's proxy").replace("http://127.0.0.1:8080", to))
    own = {"PATH": f"{Path(command).parent}:/usr/bin:/bin", "HOME": str(folder), "LITELLM_MASTER_KEY": LITELLM_KEY}
    own["PYTHONHASHSEED"] = "0"  # LiteLLM writes some members in the order of a set
    log = folder / f"litellm-{port}.log"
    whole = [command, "--config", str(config), "--host", "127.0.0.1", "--port", str(port)]
    with log.open("wb") as file:
        process = subprocess.Popen(whole, stdout=file, stderr=file, env=own)
    address = f"http://127.0.0.1:{port}"
    try:
        ends = time.monotonic() + HANG_SECONDS
        while True:
            assert process.poll() is None, log.read_text()[-2000:]
            try:
                httpx.get(f"{address}/health/liveliness", timeout=5).raise_for_status()
                break
            except httpx.HTTPError:
                assert time.monotonic() < ends
                time.sleep(0.5)
        yield address
    finally:
        process.terminate()
        process.wait(HANG_SECONDS)


def chats(address: str) -> list[bytes]:
    """The answers of LiteLLM's proxy without what it makes anew for each."""
    found = []
    for more in ({}, {"stream": True}):
        answer = httpx.post(
            f"{address}/v1/chat/completions",
            json=CHAT | more,
            headers={"authorization": f"Bearer {LITELLM_KEY}"},
            timeout=60,
        )
        assert answer.status_code == 200, answer.text
        found.append(re.sub(rb'"id":"[^"]*"|"created":\d+', b"", answer.content))
    return found


@pytest.mark.slow
async def test_litellm_gives_the_same_answers_with_hemostat_behind_it(tmp_path: Path) -> None:
    engine = FakeVllm(seed=5)
    with serving(engine) as url, serving(FakeVllm(seed=5, noise=0.1)) as reference:
        with litellm(url, tmp_path) as address:
            own = await asyncio.to_thread(chats, address)
        settings = {"reference": {"backend": "vllm", "url": reference}}
        with hemostat(tmp_path, engine, url, **settings) as served, litellm(served.data, tmp_path) as address:
            await served.until(lambda status: status["reference"]["state"] == "ready" and status["relays"] > 0)
            assert await asyncio.to_thread(chats, address) == own
            await served.until(lambda status: status["requests"]["scored"] >= len(own))


def test_every_example_of_the_page_is_run() -> None:
    with_example = [section.partition("\n")[0] for section in PAGE.split("\n## ")[1:] if "```" in section]
    assert with_example == [*ARGUMENTS, "LiteLLM's proxy"]
