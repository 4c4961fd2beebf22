"""Clients and an upstream on both sides of a relay, and the findings: what must not have happened."""

from __future__ import annotations

import asyncio
import json
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import pairwise
from random import Random
from typing import cast

from tests.bench.faults.fuzzing.messages import TOKEN, Answer, Conversation, Request, answer, conversation
from tests.bench.faults.fuzzing.reading import LATIN, Malformed, Message, h11_requests, llhttp_agrees, read

from hemostat.openai.routes import REPEATABLE
from hemostat.relay.http.request import SAFE_METHODS

HANG_SECONDS = 60.0
MAX_SHOWN = 20
KEPT = 20_000
"""Conversations whose tokens are still known when they are over: something may arrive late."""


@dataclass(slots=True)
class Findings:
    """Owns what was counted and what was found."""

    counts: Counter[str] = field(default_factory=Counter)
    found: Counter[str] = field(default_factory=Counter)
    shown: list[str] = field(default_factory=list)

    def add(self, kind: str, what: object) -> None:
        self.found[kind] += 1
        if len(self.shown) < MAX_SHOWN:
            self.shown.append(f"{kind}: {what!r:.20000}")


class World:
    """Owns which conversation each token belongs to. stray: the upstream also sends bytes behind its responses, after
    which a relay uses each of its connections once. version: what the relay may ask for, as a profile or an adapter."""

    def __init__(self, findings: Findings, seed: int, *, stray: bool, version: str = "") -> None:
        self.version = version
        self.findings = findings
        self.random = Random(seed)
        self.seed = seed
        self.stray = stray
        self.tokens: dict[bytes, Conversation] = {}
        self._answers: dict[bytes, Answer] = {}
        self.open: set[asyncio.Transport] = set()
        """Of both ends' connections."""

    def conversation(self) -> Conversation:
        made = conversation(self.random)
        while len(self.tokens) > 6 * KEPT:
            oldest = next(iter(self.tokens))
            del self.tokens[oldest]
            self._answers.pop(oldest, None)
        self.tokens.update((each.token, made) for each in made.requests)
        return made

    def answer(self, token: bytes, method: bytes) -> Answer:
        """The same for the same request, also if it comes once more."""
        result = self._answers.get(token)
        if result is None:
            result = answer(Random(self.seed ^ int(token[1:] or b"0", 16)), token, method)
            if not self.stray:
                result.data = result.data[: result.end]
            self._answers[token] = result
        return result


class Upstream(asyncio.Protocol):
    """The engine's end of one connection."""

    def __init__(self, world: World) -> None:
        self._world = world
        self._buffer = b""
        self._left: list[bytes] = []
        self._busy = False
        self._transport: asyncio.Transport

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast("asyncio.Transport", transport)
        self._world.open.add(self._transport)

    def connection_lost(self, exc: Exception | None) -> None:
        self._world.open.discard(self._transport)

    def data_received(self, data: bytes) -> None:
        self._buffer += data
        findings = self._world.findings
        try:
            message = read(self._buffer, response=False)
        except Malformed as error:
            findings.add("a malformed request reached the upstream", (str(error), self._buffer))
            self._transport.abort()
            return
        if message is None:
            return
        self._buffer = self._buffer[len(message.raw) :]
        if self._buffer or self._busy:
            findings.add("bytes behind a request reached the upstream", (message.raw, self._buffer))
        if not llhttp_agrees(message, response=False):
            findings.add("llhttp reads another request at the upstream", message.raw)
        token = self._check(message)
        findings.counts["requests that reached the upstream"] += 1
        if self._world.version:
            findings.counts["requests that were treated"] += self._world.version.encode() in message.body
        result = self._world.answer(token, message.start[0])
        self._busy = True
        cuts = [0, *(cut for cut in result.cuts if cut < len(result.data)), len(result.data)]
        self._left = [result.data[a:b] for a, b in pairwise(cuts)]
        findings.counts["responses"] += 1
        findings.counts["responses that were changed"] += result.changed
        self._send(closes=result.closes)

    def _send(self, *, closes: bool) -> None:
        if self._transport.is_closing():
            return
        if self._left:
            self._transport.write(self._left.pop(0))
        if self._left:
            asyncio.get_running_loop().call_later(0.0005, lambda: self._send(closes=closes))
            return
        self._busy = False
        if closes:
            self._transport.close()

    def _check(self, message: Message) -> bytes:
        """Whom the request is from; its token."""
        world = self._world
        named = [*TOKEN.findall(message.start[1]), *TOKEN.findall(message.get(b"x-token"))]
        token = next((candidate for candidate in named if candidate in world.tokens), b"")
        if not token:
            world.findings.counts["requests whose token was changed"] += 1
            return b"t"
        conversation = world.tokens[token]
        for other in TOKEN.findall(message.raw):
            if world.tokens.get(other, conversation) is not conversation:
                world.findings.add("a request has bytes of another client's", message.raw)
        conversation.forwarded.append((message.start[0], message.start[1], message.body))
        return token


class Client(asyncio.Protocol):
    """One client's connection. `done` is set when it is over."""

    def __init__(self, world: World) -> None:
        self._world = world
        self._conversation = world.conversation()
        self._requests = self._conversation.requests
        self._changed = self._conversation.changed_from < len(self._requests)
        data, cuts = self._conversation.data, [0, *self._conversation.cuts, len(self._conversation.data)]
        self._left = [data[a:b] for a, b in pairwise(cuts)]
        self._buffer = b""
        self._responses: list[Message] = []
        self._transport: asyncio.Transport
        self.done = asyncio.get_running_loop().create_future()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast("asyncio.Transport", transport)
        self._world.open.add(self._transport)
        counts = self._world.findings.counts
        counts["requests"] += len(self._requests)
        counts["requests that were changed"] += self._changed
        self._send()

    def _send(self) -> None:
        if self._transport.is_closing():
            return
        self._transport.write(self._left.pop(0))
        if self._left:
            asyncio.get_running_loop().call_later(0.0005, self._send)
        elif self._conversation.resets:
            self._transport.abort()
        elif self._changed:
            self._transport.write_eof()

    def data_received(self, data: bytes) -> None:
        self._buffer += data
        self._read(ended=False)
        if not self._changed and len(self._responses) == len(self._requests):
            self._transport.close()

    def connection_lost(self, exc: Exception | None) -> None:
        self._world.open.discard(self._transport)
        self._read(ended=exc is None)
        if not self.done.done():
            self.done.set_result(None)
        if not self._conversation.resets:
            self._check()

    def give_up(self) -> None:
        self._world.findings.add("a client waits in vain", self._conversation.data)
        self._transport.abort()

    def _read(self, *, ended: bool) -> None:
        findings = self._world.findings
        while self._buffer:
            try:
                message = read(self._buffer, response=True, bodyless=self._to_head, ended=ended)
            except Malformed as error:
                findings.add(
                    "a malformed response reached a client", (str(error), self._buffer, self._conversation.data)
                )
                self._buffer = b""
                return
            if message is None:
                return
            framed = message.get(b"content-length") or message.get(b"transfer-encoding")
            has_body = framed and not self._to_head(message) and message.status not in {204, 304}
            if has_body and not llhttp_agrees(message, response=True):
                findings.add("llhttp reads another response at the client", message.raw)
            self._buffer = self._buffer[len(message.raw) :]
            if message.status >= 200:
                self._responses.append(message)

    def _to_head(self, _: Message) -> bool:
        """Whether the next response is to a HEAD request: there is none in a conversation that was changed."""
        number = len(self._responses)
        return number < len(self._requests) and self._requests[number].method == b"HEAD"

    # What must hold, once the connection is over.

    def _check(self) -> None:
        findings, conversation = self._world.findings, self._conversation
        if self._changed:
            findings.counts["refused by the relay"] += any(
                response.get(b"x-token") == b"" for response in self._responses
            )
        own = [request.token for request in self._requests]
        at = -1
        for response in self._responses:
            for token in TOKEN.findall(response.raw):
                if self._world.tokens.get(token, conversation) is not conversation:
                    findings.add("a client got bytes of another's response", (response.raw, conversation.data))
            token = response.get(b"x-token")
            if token in own:
                # What was the body of a request that was changed may be requests with its token.
                if own.index(token) < at + (not self._changed):
                    findings.add("a response came twice, or not in order", (response.raw, conversation.data))
                at = own.index(token)
        self._check_requests()
        self._check_responses()

    def _check_requests(self) -> None:
        """What the upstream got is what the client has sent: by h11 where that was changed."""
        findings, conversation = self._world.findings, self._conversation
        got = [
            request
            for n, request in enumerate(conversation.forwarded)
            if n == 0 or request != conversation.forwarded[n - 1]
        ]
        sent = [(request.method, request.target, request.body) for request in self._requests]
        if self._changed:
            got = [(method, target.translate(LATIN), body.translate(LATIN)) for method, target, body in got]
            sent = h11_requests(conversation.data)
        if not all(any(same(request, other, self._world.version) for other in sent) for request in got):
            findings.add("the upstream got another request than h11 finds", (conversation.data, got, sent))

    def _check_responses(self) -> None:
        findings, conversation = self._world.findings, self._conversation
        cut = False
        for number, asked in enumerate(self._requests[: conversation.changed_from]):
            planned = self._world.answer(asked.token, asked.method)
            if number >= len(self._responses):
                if not (cut or planned.changed):
                    findings.add("a request was not answered", (number, conversation.data, self._responses))
                return
            response = self._responses[number]
            shown = response.status, response.body
            cut = response.get(b"connection") == b"close"
            if shown == planned.shown or (planned.changed and response.status == 502):
                continue
            if b"closed the connection before" in response.body and not repeatable(asked):
                findings.counts["502, since the upstream had closed its connection"] += 1
            else:
                findings.add("another response than the upstream's", (shown, planned, asked.raw))


def repeatable(request: Request) -> bool:
    """Whether a relay may send it again, when a connection that it reuses has been closed."""
    return request.method in SAFE_METHODS or request.target.partition(b"?")[0].decode() in REPEATABLE


def same(got: tuple[bytes, bytes, bytes], sent: tuple[bytes, bytes, bytes], version: str = "") -> bool:
    """Whether a request at the upstream is the one that was sent; Hemostat may have added members to its body, and have
    put an adapter in the place of its model."""
    if got == sent:
        return True
    if got[:2] != sent[:2]:
        return False
    try:
        added, own = json.loads(got[2]), json.loads(sent[2])
    except ValueError:
        return False
    if not isinstance(own, dict) or not isinstance(added, dict):
        return False
    if version and added.get("model") == version and "model" in own:
        added["model"] = own["model"]
    return all(name in added and added[name] == value for name, value in own.items())


async def run(port: int, world: World, *, clients: int, enough: Callable[[], bool]) -> None:
    """Conversations, `clients` at a time, until there are enough."""
    loop = asyncio.get_running_loop()

    async def talk() -> None:
        while not enough():
            try:
                _, client = await loop.create_connection(lambda: Client(world), "127.0.0.1", port)
            except OSError as error:
                world.findings.add("no connection", str(error))
                await asyncio.sleep(0.5)
                continue
            try:
                async with asyncio.timeout(HANG_SECONDS):
                    await client.done
            except TimeoutError:
                client.give_up()

    async with asyncio.TaskGroup() as tasks:
        for _ in range(clients):
            tasks.create_task(talk())
    for transport in tuple(world.open):
        transport.abort()
    while world.open:
        await asyncio.sleep(0.01)
