"""What a hook can change in a request and its response, and what happens when it fails."""

from __future__ import annotations

import asyncio
from random import Random

import h11
import pytest
from tests.support.hooks import HookSequence, SpyHook
from tests.support.relay import GET, OK, Request, UpstreamConnection, answering, post, relaying
from tests.support.waiting import HANG_SECONDS, until

from hemostat.hooks import Refusal, Rewrite
from hemostat.relay.exchange import Exchange
from hemostat.relay.fail_open import FailOpenHook
from hemostat.relay.http.response import ResponseHead
from hemostat.relay.limits import Limits

JSON = b'HTTP/1.1 200 OK\r\nA: 1\r\ncontent-length: 11\r\nB: 2\r\n\r\n{"a": "bc"}'
CHUNKED = b"HTTP/1.1 200 OK\r\nA: 1\r\nTransfer-Encoding: chunked\r\nB: 2\r\n\r\n"


async def test_hook_gets_the_head_and_returning_none_changes_nothing() -> None:
    seen: list[Request] = []
    hook = HookSequence([None])
    async with relaying(answering(seen), hook=hook) as (_, _, connect):
        client = await connect()
        await client.send(post(b"hi", b"X-Hemostat-Label:  a ", b"X-Request-Id: r"))
        assert (await client.response("POST")).body == b"ok"
    headers = [(b"Host", b"a"), (b"Content-Length", b"2"), (b"X-Hemostat-Label", b"a"), (b"X-Request-Id", b"r")]
    assert hook.begun == [("POST", b"/v1/completions", headers, "r")]
    assert seen[0].get(b"x-hemostat-label") == []


async def test_hook_and_upstream_get_the_same_generated_request_id() -> None:
    seen: list[Request] = []
    hook = HookSequence([None])
    async with relaying(answering(seen), hook=hook) as (_, _, connect):
        client = await connect()
        await client.send(GET)
        await client.response()
    assert seen[0].get(b"x-request-id") == [hook.begun[0][3].encode()]


@pytest.mark.parametrize("chunked", [True, False])
@pytest.mark.parametrize("in_pieces", [True, False])
async def test_rewrite(chunked: bool, in_pieces: bool) -> None:
    seen: list[Request] = []
    exchange = SpyHook(lambda body: Rewrite(b"<" + (body or b"") + b">", frozenset({b"accept-encoding"})))
    async with relaying(answering(seen), hook=HookSequence([exchange])) as (_, _, connect):
        client = await connect()
        framing = b"Transfer-Encoding: chunked" if chunked else b"CONTENT-Length: 5"
        body = b"2\r\nhe\r\n3\r\nllo\r\n0\r\n\r\n" if chunked else b"hello"
        sent = b"POST / HTTP/1.1\r\nHost: a\r\nAccept-Encoding: gzip\r\n" + framing + b"\r\nX: y\r\n\r\n" + body
        for piece in [sent[i : i + 1] for i in range(len(sent))] if in_pieces else [sent]:
            await client.send(piece)
        assert (await client.response("POST")).body == b"ok"
    assert seen[0].body == b"<hello>"
    name = b"Content-Length" if chunked else b"CONTENT-Length"
    assert seen[0].headers[:3] == [(b"Host", b"a"), (name, b"7"), (b"X", b"y")]
    assert exchange.calls == [("request", b"hello"), ("response_head", 200), ("closed", True)]


@pytest.mark.parametrize("chunked", [True, False])
async def test_body_beyond_the_hooks_limit_is_forwarded_unchanged(chunked: bool) -> None:
    seen: list[Request] = []
    exchange = SpyHook(lambda body: None if body is None else Rewrite(b"wrong"))
    body = bytes(range(256)) * 400
    async with relaying(answering(seen), hook=HookSequence([exchange])) as (_, _, connect):
        client = await connect()
        if chunked:
            head = b"POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n"
            pieces = [b"%x\r\n%b\r\n" % (512, body[i : i + 512]) for i in range(0, len(body), 512)]
            await client.send(head + b"".join(pieces) + b"0\r\n\r\n")
        else:
            await client.send(post(body))
        assert (await client.response("POST")).body == b"ok"
    assert seen[0].body == body
    assert exchange.calls[0] == ("request", None)
    assert exchange.calls[-1] == ("closed", True)


async def test_refusals_keep_the_connection_where_the_request_is_whole() -> None:
    seen: list[Request] = []
    late = SpyHook(lambda _: Refusal(400, b'{"error":2}'))
    hook = HookSequence([Refusal(400, b'{"error":1}'), late, None])
    async with relaying(answering(seen), hook=hook) as (relay, _, connect):
        client = await connect()
        await client.send(post(b"x") * 3)
        for status, body in ((400, b'{"error":1}'), (400, b'{"error":2}'), (200, b"ok")):
            response = await client.response("POST")
            assert (response.status, response.body) == (status, body)
        assert relay.counters.requests == {("/v1/completions", "refused"): 2, ("/v1/completions", "ok"): 1}
    assert len(seen) == 1
    assert late.calls == [("request", b"x"), ("closed", False)]


async def test_refusal_before_the_body_closes() -> None:
    async with relaying(answering([]), hook=HookSequence([Refusal(400, b"{}")])) as (_, _, connect):
        client = await connect()
        await client.send(b"POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 5\r\n\r\n")
        assert (await client.response("POST")).get(b"connection") == [b"close"]
        assert await client.rest() == b""


async def test_expect_100_continue_is_answered_where_the_body_is_needed_first() -> None:
    seen: list[Request] = []
    exchange = SpyHook(lambda body: Rewrite((body or b"") * 2))
    async with relaying(answering(seen), hook=HookSequence([exchange])) as (_, _, connect):
        client = await connect()
        await client.send(b"POST / HTTP/1.1\r\nHost: a\r\nExpect: 100-continue\r\nContent-Length: 2\r\n\r\n")
        assert await client.reader.readuntil(b"\r\n\r\n") == b"HTTP/1.1 100 Continue\r\n\r\n"
        await client.send(b"hi")
        assert (await client.response("POST")).status == 200
    assert seen[0].body == b"hihi"
    assert seen[0].get(b"expect") == []


async def test_response_with_a_content_length_keeps_the_field_at_its_place() -> None:
    exchange = SpyHook(wanted=True, tail=b"!!")
    async with relaying(answering([], JSON), hook=HookSequence([exchange])) as (_, _, connect):
        client = await connect()
        await client.send(GET)
        expected = b'HTTP/1.1 200 OK\r\nA: 1\r\ncontent-length: 13\r\nB: 2\r\n\r\n{"A": "BC"}!!'
        assert await client.reader.readexactly(len(expected)) == expected
    assert exchange.seen == b'{"a": "bc"}'
    assert exchange.names == ["request", "response_head", "response_data", "response_end", "closed"]


@pytest.mark.parametrize("version", [b"1.1", b"1.0"])
@pytest.mark.parametrize("chunked", [True, False])
async def test_streamed_response_is_transformed_as_it_arrives(version: bytes, chunked: bool) -> None:
    async def script(connection: UpstreamConnection) -> None:
        await connection.request()
        await connection.send(CHUNKED if chunked else b"HTTP/1.1 200 OK\r\nA: 1\r\nConnection: close\r\nB: 2\r\n\r\n")
        for word in (b"one", b"DROP", b"two"):
            await connection.send(b"%x\r\n%b\r\n" % (len(word), word) if chunked else word)
            await until(lambda word=word: word in exchange.seen)  # type: ignore[misc]
        if chunked:
            await connection.send(b"0\r\n\r\n")

    exchange = SpyHook(wanted=True, tail=b"end", transform=lambda data: b"" if data == b"DROP" else data.upper())
    async with relaying(script, hook=HookSequence([exchange])) as (_, _, connect):
        client = await connect()
        await client.send(b"GET / HTTP/" + version + b"\r\nHost: a\r\n\r\n")
        response = await client.response()
        assert response.body == b"ONETWOend"
        names = [name for name, _ in response.headers]
        coded = [b"Transfer-Encoding"] if version == b"1.1" else []
        ending = [] if version == b"1.1" else [b"Connection"]
        assert names == ([b"A", *coded, b"B", *ending] if chunked else [b"A", b"B", *coded, *ending])
    assert exchange.calls[-1] == ("closed", True)


async def test_head_204_and_304_have_nothing_to_transform() -> None:
    exchanges = [SpyHook(wanted=True, tail=b"wrong") for _ in range(2)]
    answers = iter([b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\n", b"HTTP/1.1 204 No Content\r\n\r\n"])
    async with relaying(answering([], lambda _: next(answers)), hook=HookSequence([*exchanges])) as (_, _, connect):
        client = await connect()
        for method in ("HEAD", "GET"):
            await client.send(f"{method} / HTTP/1.1\r\nHost: a\r\n\r\n".encode())
            assert (await client.response(method)).body == b""
    assert all(exchange.names == ["request", "response_head", "closed"] for exchange in exchanges)


@pytest.mark.parametrize("fails", ["request", "response_head", "response_data", "response_end", "closed"])
@pytest.mark.parametrize("answer", [JSON, CHUNKED + b'b\r\n{"a": "bc"}\r\n0\r\n\r\n'])
async def test_a_hook_that_raises_changes_nothing_for_the_client(fails: str, answer: bytes) -> None:
    seen: list[Request] = []
    exchange = SpyHook(wanted=True, fails=fails, transform=lambda data: data)
    async with relaying(answering(seen, answer), hook=HookSequence([exchange, None])) as (relay, _, connect):
        client = await connect()
        for _ in range(2):
            await client.send(post(b"hello"))
            response = await client.response("POST")
            assert (response.status, response.body) == (200, b'{"a": "bc"}')
        assert relay.counters.other == {"hemostat_shadow_requests_total": {("dropped", "hook_error"): 1.0}}
    assert seen[0].body == b"hello"
    assert exchange.names[-1] == "closed"
    assert exchange.names.count("closed") == 1


@pytest.mark.parametrize(("fails", "arm"), [("request", "none"), ("response_head", "treated"), ("", "treated")])
def test_a_request_that_the_hook_could_not_change_is_in_no_arm(fails: str, arm: str) -> None:
    hook = FailOpenHook(SpyHook(arm="treated", fails=fails), lambda: None)
    hook.request(b"{}")
    hook.response_head(ResponseHead(b"HTTP/1.1 200 OK", 200, 1))
    assert hook.arm == arm


async def test_a_hook_that_raises_in_begin_changes_nothing() -> None:
    async with relaying(answering([]), hook=HookSequence([])) as (relay, _, connect):
        client = await connect()
        await client.send(GET)
        assert (await client.response()).body == b"ok"
        assert relay.counters.other["hemostat_shadow_requests_total"] == {("dropped", "hook_error"): 1.0}


@pytest.mark.parametrize("start", [b"", CHUNKED, JSON[:-3]])
@pytest.mark.parametrize("who", ["client", "upstream"])
async def test_closed_is_called_once_when_client_or_upstream_disconnects(start: bytes, who: str) -> None:
    async def script(connection: UpstreamConnection) -> None:
        await connection.request()
        await connection.send(start)
        if who == "client":
            await connection.reader.read()

    exchange = SpyHook(wanted=True)
    async with relaying(script, hook=HookSequence([exchange])) as (_, upstream, connect):
        client = await connect()
        await client.send(GET)
        await until(lambda: upstream.connections == 1)
        if who == "client":
            await client.close()
        await until(lambda: "closed" in exchange.names)
    assert exchange.calls[-1] == ("closed", False)
    assert exchange.names.count("closed") == 1


async def test_upstream_failing_while_its_response_is_collected_is_a_502() -> None:
    async def script(connection: UpstreamConnection) -> None:
        await connection.request()
        await connection.send(JSON[:-3])

    async with relaying(script, hook=HookSequence([SpyHook(wanted=True)])) as (_, _, connect):
        client = await connect()
        await client.send(GET)
        assert (await client.response()).status == 502


async def test_body_limit_of_the_relay_applies_while_the_body_is_collected() -> None:
    exchange = SpyHook(body_limit=10_000)
    limits = Limits(body_bytes=100)
    async with relaying(answering([], OK), hook=HookSequence([exchange]), limits=limits) as (_, _, connect):
        client = await connect()
        await client.send(
            b"POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n" + b"40\r\n" + b"x" * 64 + b"\r\n"
            b"40\r\n" + b"x" * 64 + b"\r\n"
        )
        assert (await client.response("POST")).status == 413
    assert exchange.calls == [("closed", False)]


BAD = b"HTTP/1.1 400 Bad Request\r\nContent-Length: 2\r\n\r\nno"
BAD_CHUNKED = b"HTTP/1.1 400 Bad Request\r\nTransfer-Encoding: chunked\r\n\r\n2\r\nno\r\n0\r\n\r\n"
BAD_CLOSING = b"HTTP/1.1 400 Bad Request\r\n\r\nno"


@pytest.mark.parametrize("bad", [BAD, BAD_CHUNKED, BAD_CLOSING])
@pytest.mark.parametrize("chunked", [False, True])
@pytest.mark.parametrize("version", [b"1.1", b"1.0"])
async def test_a_replay_sends_what_the_client_sent(version: bytes, chunked: bool, bad: bytes) -> None:
    seen: list[Request] = []

    async def script(connection: UpstreamConnection) -> None:
        while (request := await connection.request()) is not None:
            seen.append(request)
            await connection.send(bad if request.body == b"rewritten" else JSON)
            if bad is BAD_CLOSING and request.body == b"rewritten":
                return

    def exchange() -> SpyHook:
        rewrite = Rewrite(b"rewritten", frozenset({b"accept-encoding"}))
        return SpyHook(lambda _: rewrite, wanted=True, replays=True, transform=lambda d: b"" if d == b"no" else d)

    exchanges = [exchange(), exchange()]
    framing = b"Transfer-Encoding: chunked" if chunked else b"content-LENGTH: 5"
    body = b"2\r\nhe\r\n3\r\nllo\r\n0\r\n\r\n" if chunked else b"hello"
    if chunked and version == b"1.0":
        pytest.skip("HTTP/1.0 has no chunks")
    keep = b"Connection: keep-alive\r\n" if version == b"1.0" else b""
    head = b"POST / HTTP/" + version + b"\r\nHost: a\r\n" + keep + b"Accept-Encoding: gzip\r\nX: y\r\n"
    async with relaying(script, hook=HookSequence([*exchanges])) as (relay, upstream, connect):
        client = await connect()
        for _ in exchanges:  # the client's connection lives on
            await client.send(head + framing + b"\r\n\r\n" + body)
            response = await client.response("POST")
            assert (response.status, response.body) == (200, b'{"a": "bc"}')
            assert response.get(b"connection") == ([b"keep-alive"] if version == b"1.0" else [])
        assert relay.counters.requests == {("other", "ok"): 2}
        assert sum(relay.counters.overhead) == 2
        assert upstream.connections == (3 if bad is BAD_CLOSING else 1)
    assert [request.body for request in seen] == [b"rewritten", b"hello"] * 2
    assert seen[0].get(b"accept-encoding") == []
    own = [(name, value) for name, value in seen[1].headers if name in (b"Accept-Encoding", b"X")]
    assert own == [(b"Accept-Encoding", b"gzip"), (b"X", b"y")]
    framed = (b"Transfer-Encoding", b"chunked") if chunked else (b"content-LENGTH", b"5")
    assert framed in seen[1].headers
    for done in exchanges:
        heads = [call for call in done.calls if isinstance(call, tuple) and call[0] == "response_head"]
        assert heads == [("response_head", 400), ("response_head", 200)]
        assert done.names.count("replay") == 1
        assert done.calls[-1] == ("closed", True)


async def test_the_client_gets_the_response_to_the_replay_even_if_it_is_an_error() -> None:
    seen: list[Request] = []
    exchange = SpyHook(lambda _: Rewrite(b"rewritten"), wanted=True, replays=True, transform=lambda d: d)
    async with relaying(answering(seen, BAD), hook=HookSequence([exchange])) as (_, _, connect):
        client = await connect()
        await client.send(post(b"hello"))
        assert await client.reader.readexactly(len(BAD)) == BAD
    assert [request.body for request in seen] == [b"rewritten", b"hello"]


@pytest.mark.parametrize("verdict", [None, Rewrite(b"rewritten")])
async def test_no_replay_after_the_client_got_a_byte_or_without_a_rewrite(
    verdict: Rewrite | None,
) -> None:
    seen: list[Request] = []
    exchange = SpyHook(lambda _: verdict, wanted=True, replays=True, transform=lambda d: d if verdict else b"")
    async with relaying(answering(seen, BAD_CHUNKED), hook=HookSequence([exchange])) as (_, _, connect):
        client = await connect()
        await client.send(post(b"hello"))
        assert (await client.response("POST")).status == 400
    assert len(seen) == 1
    assert "replay" not in exchange.names


@pytest.mark.parametrize("answer", [BAD, BAD_CHUNKED])
async def test_a_hook_that_raises_in_replay_changes_nothing(answer: bytes) -> None:
    exchange = SpyHook(lambda _: Rewrite(b"x"), wanted=True, fails="replay", transform=lambda _: b"")
    async with relaying(answering([], answer), hook=HookSequence([exchange])) as (relay, _, connect):
        client = await connect()
        await client.send(post(b"hello"))
        assert (await client.response("POST")).status == 400
        assert relay.counters.other == {"hemostat_shadow_requests_total": {("dropped", "hook_error"): 1.0}}
    assert exchange.calls[-1] == ("closed", True)


@pytest.mark.parametrize("withholds", [False, True])
async def test_the_response_head_of_a_rewritten_request_is_held_back_for_a_limited_time(
    monkeypatch: pytest.MonkeyPatch, withholds: bool
) -> None:
    """Until the hook releases some of the body, or wants to replace the response, whatever comes first."""
    released = asyncio.Event()
    release = Exchange._release_held_head

    def seen(self: Exchange) -> None:
        release(self)
        released.set()

    monkeypatch.setattr(Exchange, "_release_held_head", seen)
    go = asyncio.Event()

    async def script(connection: UpstreamConnection) -> None:
        await connection.request()
        await connection.send(CHUNKED)
        await go.wait()
        await connection.send(b"3\r\nend\r\n0\r\n\r\n")
        if withholds:
            await connection.request()
            await connection.send(CHUNKED + b"3\r\nown\r\n0\r\n\r\n")
        await connection.reader.read()

    exchange = SpyHook(
        lambda _: Rewrite(b"x"), wanted=True, replays=True, withholds=withholds, transform=lambda _: b"", tail=b"tail"
    )
    async with relaying(script, hook=HookSequence([exchange])) as (_, _, connect):
        client = await connect()
        await client.send(post(b"hello"))
        reading = asyncio.create_task(client.reader.readuntil(b"\r\n\r\n"))
        await asyncio.wait_for(released.wait(), HANG_SECONDS)
        if withholds:
            assert not reading.done()
            exchange.withholds = exchange.wanted = False
        else:
            assert await asyncio.wait_for(reading, HANG_SECONDS) == CHUNKED
        go.set()
        if withholds:
            assert await asyncio.wait_for(reading, HANG_SECONDS) == CHUNKED
        rest = await asyncio.wait_for(client.reader.readuntil(b"0\r\n\r\n"), HANG_SECONDS)
        assert rest == (b"3\r\nown\r\n0\r\n\r\n" if withholds else b"4\r\ntail\r\n0\r\n\r\n")
    assert ("replay" in exchange.names) == withholds


async def test_client_disconnect_during_a_replay_closes_the_upstream_connection() -> None:
    async def script(connection: UpstreamConnection) -> None:
        await connection.request()
        await connection.send(BAD)
        await connection.request()
        await connection.reader.read()

    exchange = SpyHook(lambda _: Rewrite(b"x"), wanted=True, replays=True)
    async with relaying(script, hook=HookSequence([exchange])) as (_, upstream, connect):
        client = await connect()
        await client.send(post(b"hello"))
        await until(lambda: "replay" in exchange.names)
        await client.close()
        await until(lambda: upstream.closed == 1)
    assert exchange.calls[-1] == ("closed", False)


class HoldingHook(SpyHook):
    """Gives back as much as `sizes` says of what it holds, and raises in its call number `raises`."""

    def __init__(self, random: Random, *, rewrites: bool, alters: bool) -> None:
        super().__init__((lambda _: Rewrite(b"rewritten")) if rewrites else (lambda _: None), wanted=True)
        self.raises = random.randrange(9)
        self.in_withholds = random.random() < 0.1
        self.held = b""
        self._random = random
        self._alters = alters

    def _called(self, name: str, value: object) -> None:
        super()._called(name, value)
        if name not in {"request", "closed"} and len(self.calls) > self.raises:
            raise RuntimeError(name)

    @property
    def withholds(self) -> bool:
        if self.in_withholds:
            raise RuntimeError("withholds")
        return False

    @withholds.setter
    def withholds(self, value: bool) -> None:
        pass

    def response_data(self, data: bytes) -> bytes:
        self._called("response_data", data)
        self.held += data
        return self._give(self._random.choice((0, 0, 1, len(self.held) // 2, len(self.held))))

    def response_end(self) -> bytes:
        self._called("response_end", None)
        return self._give(len(self.held))

    def _give(self, size: int) -> bytes:
        given, self.held = self.held[:size], self.held[size:]
        return given.upper() if self._alters else given


@pytest.mark.parametrize("alters", [False, True])
@pytest.mark.parametrize("rewrites", [False, True])
@pytest.mark.parametrize("framing", ["length", "chunked", "close"])
async def test_a_hook_that_raises_anywhere_never_shortens_a_response_silently(
    framing: str, rewrites: bool, alters: bool
) -> None:
    """The client gets all bytes of the upstream in order, the hook's own ones, or a connection that visibly breaks."""
    outcomes = set()
    for seed in range(30):
        random = Random(seed)
        hook = HoldingHook(random, rewrites=rewrites, alters=alters)
        body = b"".join(b"data: %d\n\n" % number for number in range(random.randrange(1, 20)))
        cuts = sorted(random.sample(range(len(body)), min(len(body), random.randrange(6))))
        parts = list(zip([0, *cuts], [*cuts, len(body)], strict=True))

        async def script(
            connection: UpstreamConnection, body: bytes = body, parts: list[tuple[int, int]] = parts
        ) -> None:
            while (request := await connection.request()) is not None:
                sent = body if request.body == b"hello" else body.replace(b"data", b"also")
                field = {"length": b"Content-Length: %d\r\n" % len(body), "chunked": b"Transfer-Encoding: chunked\r\n"}
                await connection.send(b"HTTP/1.1 200 OK\r\n%b\r\n" % field.get(framing, b""))
                for piece in (sent[i:j] for i, j in parts if i < j):
                    await connection.send(b"%x\r\n%b\r\n" % (len(piece), piece) if framing == "chunked" else piece)
                    await asyncio.sleep(0)
                if framing == "close":
                    return
                await connection.send(b"0\r\n\r\n" if framing == "chunked" else b"")

        async with relaying(script, hook=HookSequence([hook])) as (relay, _, connect):
            client = await connect()
            await client.send(post(b"hello"))
            try:
                response = await client.response("POST")
            except (h11.RemoteProtocolError, ConnectionError):
                outcomes.add("broken")
                assert relay.counters.requests == {("/v1/completions", "upstream_failed"): 1}
            else:
                seen = body.replace(b"data", b"also") if rewrites else body
                assert response.status == 200
                if response.body == body:
                    outcomes.add("own")
                else:
                    assert response.body == (seen.upper() if alters else seen)
                    outcomes.add("whole")
            errors = relay.counters.other.get("hemostat_shadow_requests_total", {})
            assert errors.get(("dropped", "hook_error"), 0.0) <= 2.0
        assert hook.names.count("closed") == 1
    assert "own" in outcomes
    assert ("broken" in outcomes) == (framing != "length" and (rewrites or alters))


@pytest.mark.parametrize("fails", ["response_head", "response_data", "response_end", "replay"])
@pytest.mark.parametrize("path", [b"/v1/completions", b"/v1/responses"])
async def test_what_was_injected_does_not_pass_after_the_hook_has_failed(fails: str, path: bytes) -> None:
    """The client's own request is sent, unless the engine may keep something of it."""
    seen: list[Request] = []

    def respond(request: Request) -> bytes:
        return JSON.replace(b'"bc"', b"1234") if request.body == b"rewritten" else JSON

    hook = SpyHook(lambda _: Rewrite(b"rewritten"), wanted=True, fails=fails)
    async with relaying(answering(seen, respond), hook=HookSequence([hook])) as (_, _, connect):
        client = await connect()
        await client.send(post(b"hello", path=path))
        response = await client.response("POST")
        if path == b"/v1/responses":
            assert response.status == 502
        else:
            assert (response.status, response.body) == (200, b'{"a": "bc"}')
    assert [request.body for request in seen] == [b"rewritten", b"hello"][: 1 + (path == b"/v1/completions")]
