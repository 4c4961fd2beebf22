"""One request on its way upstream: which engine it goes to, what has been read of it and not been sent, what is kept.

A request is sent again, to another engine, where an engine cannot be reached (nothing has been sent yet, so that this
is safe for every request), and where one answers 500, 502 or 503 and a second time has no other effect than a second
computation (`repeatable`), as far as the budget for retries goes; at most MAX_RESENDS times, after a 500 once, and
never after a byte of a response has gone to the client.
"""

from __future__ import annotations

import random
from time import perf_counter
from typing import Final

from hemostat.hooks import Rewrite
from hemostat.ipc.origin import Origin
from hemostat.openai import routes
from hemostat.openai.conversation_key import conversation_key
from hemostat.relay.client_identity import client_key
from hemostat.relay.client_side import ClientSide
from hemostat.relay.context import RelayContext
from hemostat.relay.fail_open import FailOpenHook
from hemostat.relay.forwarding import redirected, upstream_head
from hemostat.relay.http.framing import CHUNKED, LAST_CHUNK, chunk, set_length
from hemostat.relay.http.request import SAFE_METHODS, RequestHead
from hemostat.relay.shares import Holding
from hemostat.relay.upstreams.group import Engine

MAX_RESENDS: Final = 3
FAILED_STATUSES: Final = frozenset({500, 502, 503, 504})
RESENT_STATUSES: Final = frozenset({500, 502, 503})
"""The statuses after which a request is sent to another engine. 504 is not among them: the request has been computed
for long, and would be again.
"""

_random: Final = random.Random()  # noqa: S311  not a secret


class OutgoingRequest:
    """Owns the bytes of one request: those that wait to be sent, and those that are kept to send it once more.

    All of them count in the relay's budget until `forget`, and so does the head while the request waits.
    """

    __slots__ = (
        "_budget",
        "_client",
        "_context",
        "_copied",
        "_engine",
        "_failed",
        "_held",
        "_original",
        "_resends",
        "_started",
        "_tried",
        "_unsent",
        "_upload",
        "_whole",
        "_written_for",
        "head",
        "hook",
    )

    def __init__(self, context: RelayContext, head: RequestHead, client: ClientSide, started: float) -> None:
        """started: when the head had been received (perf_counter)."""
        self.head = head
        self._client = client
        self._started = started
        self._engine: Engine | None = None
        self.hook: FailOpenHook | None = None
        """The hook, which is called with the engine that the request goes to."""
        self._context = context
        self._tried: tuple[Engine, ...] = ()
        """The engines that failed to answer it."""
        self._failed: tuple[tuple[Engine, int], ...] = ()
        """The failed engines that could be reached, each with its status; 0: none."""
        self._resends = 0
        self._written_for: Origin | None = None
        """The engine whose name is in the encoded head."""
        self._budget = context.budget
        self._held = 0
        """The number of bytes in the budget that wait to be sent: the head, and `_unsent`."""
        self._copied = 0
        """The number of bytes of `_whole` and `_original` that are counted in the budget."""
        self._upload: Holding | None = None
        """It was begun upstream before it was complete, and still is not."""
        self._unsent: bytes | bytearray = b""
        """The bytes that are not sent yet: the body's beginning while the body is collected, and what is sent first
        while the exchange waits for a connection.
        """
        self._whole: bytes | None = None
        """The request as it went upstream, if it was whole and is kept."""
        self._original: tuple[list[bytes], int, bytes] | None = None
        """The header lines, framing index and body as the client sent them, if a hook has rewritten the request."""

    @property
    def unsent_bytes(self) -> int:
        return len(self._unsent)

    @property
    def max_collected_bytes(self) -> int:
        """The number of bytes of a body that are collected at most before any is sent upstream."""
        limit = self._context.limits.buffered_body_bytes
        return limit if self.hook is None else max(limit, self.hook.body_limit)

    def hold(self, data: bytes, *, complete: bool = False) -> None:
        """Keeps bytes that cannot be sent yet. complete: the whole request is here."""
        holding = self._client.holding
        size = len(data)
        if not self._held:
            size += sum(map(len, self.head.lines))
            if not holding.size:
                holding.waiting = complete
        if not self._unsent:
            self._unsent = data
        else:
            # One buffer, not a list: a client can send each byte in a packet of its own.
            if isinstance(self._unsent, bytes):
                self._unsent = bytearray(self._unsent)
            self._unsent += data
        self._held += size
        self._budget.hold(holding, size)

    def take(self) -> bytes:
        """Returns the bytes that were held, which are no longer kept."""
        data = bytes(self._unsent)
        self._release()
        return self._addressed(data)

    def encode(self, body: bytes, *, complete: bool) -> bytes:
        """Returns the head and the body's beginning as they go upstream. complete: it is the whole body."""
        if self.head.length == CHUNKED:
            body = chunk(body) + (LAST_CHUNK if complete else b"")
        return self._encoded_head() + body

    def encode_more(self, pieces: list[bytes], *, complete: bool) -> bytes:
        """Returns more of a body whose beginning was encoded, as it goes upstream. complete: its end is among it."""
        if self.head.length == CHUNKED:
            pieces = [chunk(piece) for piece in pieces]
            if complete:
                pieces.append(LAST_CHUNK)
        return b"".join(pieces)

    def rewrite(self, body: bytes, verdict: Rewrite) -> bytes:
        """Returns the request as the hook wants it to go upstream. body: the client's own, whole."""
        head = self.head
        self._original = (list(head.lines), head.framing, body)
        self._copy(len(body))
        if verdict.drop_headers:
            head.drop(verdict.drop_headers)
        if verdict.body or head.framing >= 0:
            head.framing = set_length(head.lines, head.framing, len(verdict.body))
        return self._encoded_head() + verdict.body

    def restore(self) -> bytes:
        """Returns the client's own request, of one that was rewritten."""
        assert self._original is not None
        self.head.lines, self.head.framing, body = self._original
        self.forget()
        return self.encode(body, complete=True)

    @property
    def rewritten(self) -> bool:
        """It is True if the request was rewritten, and what the client sent can still be sent in its place."""
        return self._original is not None

    def sent(self, payload: bytes) -> None:
        """Notes that the whole request goes upstream at once: it is kept if memory is to spare."""
        size = len(payload)
        if self._budget.spares(size):
            self._whole = payload
            self._copy(size)

    def repeatable(self, route: str) -> bool:
        """Returns True if the request may be sent a second time: the method is safe, or the route keeps nothing, and
        all of it is here."""
        stateless = self.head.method in SAFE_METHODS or route in routes.REPEATABLE
        return stateless and self._whole is not None and self._resends < MAX_RESENDS

    def repeat(self) -> None:
        """Holds the whole request once more, to be sent to `engine`."""
        payload, self._whole = self._whole, None
        assert payload is not None
        self._copy(-len(payload))
        self._resends += 1
        self.hold(payload, complete=True)

    def forget(self) -> None:
        """Forgets the request: nothing of it is needed any more."""
        self._original = None
        if self._copied:
            self._whole = None
            self._copy(-self._copied)
        if self._held:
            self._release()

    def begin_upload(self) -> bool:
        """Begins the request upstream before it is complete. Returns False if too many are begun so."""
        holding = self._client.holding
        upload = Holding(holding.owner, holding.network)
        if not self._budget.begin_upload(upload, self._context.loop.time()):
            return False
        self._upload = upload
        return True

    def end_upload(self) -> None:
        """Ends the upload, which is complete or given up."""
        upload, self._upload = self._upload, None
        if upload is not None:
            self._budget.end_upload(upload)

    def end(self) -> None:
        """Ends the request: neither the request nor its engine is needed any more."""
        if self._copied or self._held or self._original is not None:
            self.forget()
        if self._engine is not None:
            self.engine.outstanding -= 1
        if self._upload is not None:
            self.end_upload()

    def _copy(self, size: int) -> None:
        self._copied += size
        self._budget.copy(size)

    def _release(self) -> None:
        """Releases what was counted of it: nothing of it waits to be sent any more."""
        self._unsent = b""
        self._budget.hold(self._client.holding, -self._held)
        self._held = 0

    # The engine.

    def choose_engine(self, body: bytes, route: str, *, draw: bool) -> bool:
        """Chooses the engine by what has been read of the body; returns False if there is none. draw: choose at random
        if requests need not go to a certain engine.
        """
        upstreams = self._context.upstreams
        engine = upstreams.only
        drawn = draw and engine is None and not upstreams.affinity
        if drawn:
            engine = upstreams.draw(_random.random())
            drawn = engine is not None
        if engine is None:
            key: int | None = None
            if upstreams.comparison.spreading and upstreams.comparison.spreads(self._client_key, perf_counter()):
                key = _random.getrandbits(32)
            elif upstreams.affinity and route in routes.SCORED:
                key = conversation_key(body)
            engine = upstreams.choose(key)
            if engine is None:
                return False
        self._enter_engine(engine, drawn=drawn)
        return True

    @property
    def engine(self) -> Engine:
        """The engine that the request goes to; it is chosen before anything is encoded."""
        assert self._engine is not None
        return self._engine

    @property
    def engine_name(self) -> str:
        """ "" if none was chosen."""
        return self.engine.name if self._engine is not None else ""

    def connection_failed(self) -> bool:
        """Notes that the engine could not be reached. Returns True if another one is chosen; nothing has been sent, so
        that the budget for retries does not matter."""
        engine = self.engine
        if engine not in self._tried:
            self._tried += (engine,)
            engine.health.connection_failed(self._context.loop.time())
        return self._redirect(free=True)

    def answered_with_error(self, status: int, route: str) -> bool:
        """Notes that the engine has answered with an error. It returns True if another engine is chosen, and the
        request is to be repeated there. status: 500 or above.
        """
        if status not in FAILED_STATUSES:
            return False
        self._engine_failed(status)
        once_more = status in RESENT_STATUSES and not (status == 500 and len(self._failed) > 1)
        if once_more and self.repeatable(route) and self._may_retry() and self._redirect(free=False):
            return True
        self.settle(answered=False)
        return False

    def broke_off(self) -> None:
        """Notes that there is no complete and valid response."""
        self._engine_failed(0)
        self.settle(answered=False)

    @property
    def failed(self) -> bool:
        """It is True if an engine has failed the request, and it is not settled whose fault that is."""
        return bool(self._failed)

    def settle(self, *, answered: bool) -> None:
        """Settles which engines have failed the request: no further engine is asked. answered: the last engine
        answered."""
        failed, self._failed = self._failed, ()
        if failed:
            self._context.upstreams.request_failed(
                self._client_key,
                self._client.holding.network,
                failed,
                self._started,
                perf_counter(),
                answered=answered,
            )

    def _engine_failed(self, status: int) -> None:
        engine = self._engine
        if engine is not None and engine not in self._tried:
            self._tried += (engine,)
            self._failed += ((engine, status),)

    def _may_retry(self) -> bool:
        return self._context.upstreams.comparison.may_retry(self._client_key, perf_counter())

    @property
    def _client_key(self) -> bytes:
        return client_key(self.head, self._client.holding.network)

    def _redirect(self, *, free: bool) -> bool:
        """Chooses an engine that has not failed to answer it; returns False if there is none, or the budget for retries
        is used up. free: it does not count. Otherwise an engine has answered, if with an error: that is better than
        what an engine out of reach has, or one that is to get no requests."""
        upstreams = self._context.upstreams
        if upstreams.only is not None or len(self._tried) > MAX_RESENDS:
            return False
        engine = upstreams.choose(None, self._tried)
        if engine is None:
            return False
        if not free and (engine.drained or not engine.health.reachable or not upstreams.take_retry()):
            return False
        self.engine.resent += 1
        self.engine.outstanding -= 1
        self._enter_engine(engine, drawn=False)
        return True

    def _enter_engine(self, engine: Engine, *, drawn: bool) -> None:
        self._engine = engine
        engine.requests += 1
        engine.outstanding += 1
        if self.hook is not None:
            self.hook.sent_to(engine.name, drawn=drawn)

    def _encoded_head(self) -> bytes:
        self._written_for = origin = self.engine.origin
        return upstream_head(self.head, origin, self._context.authorization)

    def _addressed(self, payload: bytes) -> bytes:
        """Returns the payload, which may have been encoded for another engine, as it goes to `engine`."""
        old, new = self._written_for, self.engine.origin if self._engine is not None else None
        if old is None or new is None or old is new:
            return payload
        self._written_for = new
        return redirected(payload, old, new)
