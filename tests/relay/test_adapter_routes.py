"""Clients cannot load or unload adapters, and do not see Hemostat's own in the list of models."""

from __future__ import annotations

import gzip
import json
from urllib.parse import unquote

import httptools
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from starlette.routing import Match, Route
from tests.support.relay import Request, UpstreamConnection, answering, post, relaying
from tests.support.wire import VERSION, policy

from hemostat.interception.interceptor import Interceptor
from hemostat.openai.routes import loads_adapters
from hemostat.relay.limits import Limits

REFUSED = (
    b"/v1/load_lora_adapter",
    b"/v1/unload_lora_adapter",
    b"/v1/load_lora_adapter/",
    b"/v1/load_lora_adapter?x=/v1/models",
    b"/v1/load_lora_adapter#x",
    b"/v1//load_lora_adapter",
    b"//v1/load_lora_adapter",
    b"/v1/models/../load_lora_adapter",
    b"/v1/load%5flora_adapter",
    b"/v1/load%5Flora_adapter",
    b"/v1%2Fload_lora_adapter",
    b"/v1/load%255flora_adapter",
    b"/V1/Load_LoRA_Adapter",
    b"/prefix/v1/load_lora_adapter",
    b"http://other/v1/load_lora_adapter",
    b"/v1/x%3f/../unload_lora_adapter",
    b"/v1/load_lora_adapter%3Fx",
    b"/adapters",
    b"/adapters/" + VERSION.encode(),
    b"/adapters/a%20b?x",
    b"/%61dapters",
)
RELAYED = (
    b"/v1/models",
    b"/v1/models?load_lora_adapter",
    b"/v1/models#/v1/load_lora_adapter",
    b"/v1/load_lora_adapters",
    b"/v1/adapters_of",
    b"/",
    b"/v1/files/%zz",
    b"/caf%C3%A9/%ff",
)


@pytest.mark.parametrize("target", REFUSED)
async def test_routes_that_load_adapters_are_refused(target: bytes) -> None:
    seen: list[Request] = []
    async with relaying(answering(seen)) as (relay, _, connect):
        client = await connect()
        for method in (b"POST", b"DELETE", b"GET", b"PUT"):
            await client.send(method + post(b'{"lora_name": "a"}', path=target).removeprefix(b"POST"))
            answer = await client.response(method.decode())
            assert answer.status == 403
            error = json.loads(answer.body)["error"]
            assert "upstream.allow_adapter_routes" in error["message"]
            assert error["code"] == "adapter_routes"
        assert relay.counters.requests[("other", "refused")] == 4
        await client.send(post(b"{}"))
        assert (await client.response()).status == 200
    assert [request.target for request in seen] == [b"/v1/completions"]


@pytest.mark.parametrize("target", RELAYED)
async def test_other_routes_are_relayed(target: bytes) -> None:
    assert not loads_adapters(target)
    seen: list[Request] = []
    async with relaying(answering(seen)) as (_, _, connect):
        client = await connect()
        await client.send(post(b"{}", path=target))
        assert (await client.response()).status == 200
    assert seen[0].target == target


async def test_the_setting_allows_them() -> None:
    seen: list[Request] = []
    async with relaying(answering(seen), limits=Limits(adapter_routes=True)) as (_, _, connect):
        client = await connect()
        await client.send(post(b"{}", path=b"/v1/load_lora_adapter"))
        assert (await client.response()).status == 200
    assert seen[0].target == b"/v1/load_lora_adapter"


async def test_a_refused_request_whose_body_is_not_complete_ends_the_connection() -> None:
    async with relaying(answering([])) as (_, _, connect):
        client = await connect()
        await client.send(b"POST /adapters HTTP/1.1\r\nHost: a\r\nContent-Length: 100\r\n\r\nx")
        answer = await client.response()
        assert answer.status == 403
        assert answer.get(b"connection") == [b"close"]


ROUTES = (
    Route("/v1/load_lora_adapter", lambda _: None, methods=["POST"]),
    Route("/v1/unload_lora_adapter", lambda _: None, methods=["POST"]),
    Route("/adapters", lambda _: None, methods=["POST"]),
    Route("/adapters/{adapter_name}", lambda _: None, methods=["DELETE"]),
)


def reaches(target: bytes, root: str) -> bool:
    """Whether uvicorn and Starlette give it to one of vLLM's routes, under any method."""
    try:
        path = httptools.parse_url(target).path
        scope = {"type": "http", "path": unquote((path or b"").decode("ascii")), "root_path": root, "headers": []}
    except (httptools.HttpParserInvalidURLError, UnicodeError):
        return False
    return any(route.matches(scope | {"method": m})[0] is Match.FULL for route in ROUTES for m in ("POST", "DELETE"))


def test_the_routes_of_vllm_are_reached_as_expected() -> None:
    assert [reaches(target, "") for target in REFUSED[:3]] == [True, True, False]
    assert reaches(b"/prefix/v1/load%5flora_adapter", "/prefix")


@given(
    route=st.sampled_from(
        ["/v1/load_lora_adapter", "/v1/unload_lora_adapter", "/adapters", "/adapters/x", "/v1/models"]
    ),
    encoded=st.sets(st.integers(0, 25)),
    root=st.sampled_from(["", "/a", "/a/b"]),
    inserted=st.lists(st.tuples(st.integers(0, 30), st.sampled_from(["/", "%2f", "?", "#", "%3F", "%23", ";", "."]))),
)
@example(route="/v1/load_lora_adapter", encoded={4}, root="/a", inserted=[(24, "?")])
@example(route="/adapters/x", encoded=set(), root="", inserted=[(10, "%23"), (13, "%3F")])
def test_nothing_that_reaches_vllm_s_routes_is_relayed(
    route: str, encoded: set[int], root: str, inserted: list[tuple[int, str]]
) -> None:
    parts = [f"%{ord(c):02x}" if i in encoded and i else c for i, c in enumerate(route)]
    for place, text in inserted:
        parts.insert(min(place, len(parts)), text)
    target = (root + "".join(parts)).encode()
    if reaches(target, root):
        assert loads_adapters(target)


def models(*names: str) -> bytes:
    cards = [{"id": name, "object": "model", "parent": None if name == "base" else "base"} for name in names]
    return json.dumps({"object": "list", "data": cards}, separators=(",", ":")).encode()


def answer(body: bytes, *fields: bytes, chunked: bool = False) -> bytes:
    if chunked:
        pieces = b"".join(b"%x\r\n%b\r\n" % (len(body[i : i + 9]), body[i : i + 9]) for i in range(0, len(body), 9))
        return b"\r\n".join((b"HTTP/1.1 200 OK", b"Transfer-Encoding: chunked", *fields, b"", pieces + b"0\r\n\r\n"))
    return b"\r\n".join((b"HTTP/1.1 200 OK", b"Content-Length: %d" % len(body), *fields, b"", body))


@pytest.mark.parametrize("chunked", [False, True])
async def test_the_list_of_models_is_framed_anew(chunked: bool) -> None:
    seen: list[Request] = []
    full, visible = models("base", VERSION, "sql"), models("base", "sql")
    async with relaying(answering(seen, answer(full, chunked=chunked))) as (relay, _, connect):
        relay.hook = Interceptor(policy(adapter_names=True), lambda _: True, lambda *_: None)
        client = await connect()
        for _ in range(2):
            await client.send(b"GET /v1/models HTTP/1.1\r\nHost: a\r\nAccept-Encoding: gzip\r\n\r\n")
            got = await client.response()
            assert (got.status, got.body) == (200, visible)
            assert got.get(b"content-length") == ([] if chunked else [str(len(visible)).encode()])
        assert seen[0].get(b"accept-encoding") == seen[0].get(b"content-length") == []
        assert seen[0].body == b""


@pytest.mark.parametrize(
    "sent",
    [
        answer(models("base", "sql")),
        answer(gzip.compress(models("base", VERSION)), b"Content-Encoding: gzip"),
        answer(models("base", VERSION)[:-3]),
        answer(models("base", VERSION)).replace(b"200 OK", b"500 X"),
        b"HTTP/1.1 304 Not Modified\r\n\r\n",
        b"HTTP/1.1 204 No Content\r\n\r\n",
    ],
)
async def test_other_answers_to_the_list_of_models_are_unchanged(sent: bytes) -> None:
    async with relaying(answering([], sent)) as (relay, _, connect):
        relay.hook = Interceptor(policy(adapter_names=True), lambda _: True, lambda *_: None)
        client = await connect()
        await client.send(b"GET /v1/models HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n")
        assert (await client.rest()).replace(b"Connection: close\r\n", b"") == sent


async def test_a_head_request_of_the_list_of_models_is_relayed() -> None:
    sent = b"HTTP/1.1 200 OK\r\nContent-Length: 500\r\n\r\n"
    async with relaying(answering([], sent)) as (relay, _, connect):
        relay.hook = Interceptor(policy(adapter_names=True), lambda _: True, lambda *_: None)
        client = await connect()
        await client.send(b"HEAD /v1/models HTTP/1.1\r\nHost: a\r\n\r\n")
        assert (await client.response("HEAD")).get(b"content-length") == [b"500"]


async def test_an_upstream_that_fails_within_the_list_of_models() -> None:
    broken = answer(models("base", VERSION)).replace(b"Content-Length: ", b"Content-Length: 9")

    async def script(connection: UpstreamConnection) -> None:
        await connection.request()
        await connection.send(broken)

    async with relaying(script) as (relay, _, connect):
        relay.hook = Interceptor(policy(adapter_names=True), lambda _: True, lambda *_: None)
        client = await connect()
        await client.send(b"GET /v1/models HTTP/1.1\r\nHost: a\r\n\r\n")
        assert (await client.response()).status == 502
