"""One request and its response, between a client's connection and an upstream's; see `exchange_state` for its states.

The client's connection calls `start`, `request_data`, `fail_request` and `client_lost`; the pool and the upstream's
connection call the methods of `upstream.Receiver`. What the exchange needs of the client's connection is `ClientSide`.
"""

from __future__ import annotations

from time import perf_counter
from typing import Final

from hemostat.hooks import Refusal, Rewrite
from hemostat.ipc import ends
from hemostat.openai import routes
from hemostat.openai.routes import ADAPTER_ROUTE_REFUSED, loads_adapters
from hemostat.relay.client_response import BodyMode, ClientResponse
from hemostat.relay.client_side import ClientSide
from hemostat.relay.context import RelayContext
from hemostat.relay.exchange_state import (
    COLLECTING,
    DONE,
    FORWARDED,
    HEAD_HELD,
    QUEUED,
    STARTING,
    STREAMING,
    TRANSITIONS,
    TUNNEL,
    ExchangeState,
)
from hemostat.relay.fail_open import FailOpenHook, ask_hook
from hemostat.relay.generation import GenerationReport
from hemostat.relay.http.errors import BadRequest, error_body, error_response
from hemostat.relay.http.framing import LAST_CHUNK, chunk
from hemostat.relay.http.request import CONTINUE, SAFE_METHODS, RequestHead
from hemostat.relay.http.response import ResponseHead
from hemostat.relay.limits import MAX_READ_AHEAD_BYTES
from hemostat.relay.outcomes import OutcomeObserver
from hemostat.relay.outgoing_request import OutgoingRequest
from hemostat.relay.request_budget import UPLOADS_EXHAUSTED
from hemostat.relay.request_watch import RequestWatch
from hemostat.relay.tunnel import Tunnel
from hemostat.relay.upstreams.connection import UpstreamConnection

_EXPECT: Final = frozenset((b"expect",))

# Module globals, for the reason that `exchange_state` gives.
_ASKED: Final = (FORWARDED, HEAD_HELD, STREAMING)
_RAW: Final = BodyMode.RAW
_CHUNKED: Final = BodyMode.CHUNKED
_COLLECTED: Final = BodyMode.COLLECTED


class Exchange:
    """One request and its response. Owns their state."""

    __slots__ = (
        "_client",
        "_context",
        "_hook",
        "_keep_alive",
        "_observer",
        "_overhead",
        "_probed",
        "_received",
        "_report",
        "_request",
        "_request_id",
        "_response",
        "_route",
        "_started",
        "_transport",
        "_watch",
        "outgoing",
        "request_complete",
        "state",
        "upstream",
    )

    def __init__(
        self, context: RelayContext, client: ClientSide, request: RequestHead, request_id: str, started: float
    ) -> None:
        """started: when the request's head had been received (perf_counter)."""
        self.state = STARTING
        self.request_complete = False
        """It is True if the client has sent the whole request."""
        self.upstream: UpstreamConnection | None = None
        self.outgoing = OutgoingRequest(context, request, client, started)
        self._context = context
        self._client = client
        self._request = request
        self._request_id = request_id
        target, query = request.target, request.target.find(b"?")
        self._route = routes.LABELS.get(target if query < 0 else target[:query], routes.OTHER)
        self._started = started
        self._transport = client.transport
        self._watch: RequestWatch | None = None
        if context.access_log is not None or context.client_limits is not None:
            self._watch = RequestWatch(context, request, self._route, request_id, client, started)
            self._transport = self._watch.transport
        self._report: GenerationReport | None = None  # only for a generation
        self._observer: OutcomeObserver | None = None  # the report's, used for every piece of a response
        self._hook: FailOpenHook | None = None
        self._keep_alive = request.keep_alive
        """The client's connection stays open after the response."""
        self._response = ClientResponse()
        self._received = 0.0  # when the bytes were read that release the head (perf_counter)
        self._overhead = 0.0
        """The seconds in the relay so far, see `Counters.update_overhead`. In QUEUED the time at which that state
        began is subtracted.
        """
        self._probed = False

    def _enter(self, state: ExchangeState) -> None:
        assert state in TRANSITIONS[self.state], f"no transition from {self.state!r} to {state!r}"
        self.state = state

    # The request, from the client's connection.

    def start(self, body: bytes, *, complete: bool, more_read: bool) -> None:
        """Asks the hook, then begins to send the request upstream. body: the whole body, if `complete`; otherwise it
        follows by `request_data`. more_read: the client has sent some of it already."""
        context, request = self._context, self._request
        self.request_complete = complete
        if self._watch is not None and (exceeded := self._watch.exceeded) is not None:
            self._respond(429, exceeded.body(), ends.REFUSED, exceeded.field_line())
            return
        if self._route is routes.OTHER and not context.limits.adapter_routes and loads_adapters(request.target):
            self._respond(403, error_body(403, ADAPTER_ROUTE_REFUSED, "adapter_routes"), ends.REFUSED)
            return
        if self._route in routes.SCORED and request.method == b"POST":
            self._report = report = GenerationReport(context, self._route, self._request_id, self._started)
            self._observer = report.observer
            if context.tracing is not None:
                report.start_span(context.tracing, request)
        if context.hook is not None:
            answer = ask_hook(context.hook, request, self._request_id, context.counters.hook_raised)
            if isinstance(answer, Refusal):
                self._respond(answer.status, answer.body, ends.REFUSED)
                return
            self._hook = self.outgoing.hook = answer
        if complete:
            if self._observer is not None:
                self._observer.feed_request(body)
            self._send(body, self._started)
        elif request.length > self.outgoing.max_collected_bytes:
            self._send(b"", self._started)
        else:
            self._enter(COLLECTING)
            self.outgoing.hold(b"")  # its head counts
            if request.expect:
                # The upstream cannot ask for the body, because it gets nothing before the body is whole.
                request.expect = False
                request.drop(_EXPECT)
                if not more_read:
                    self._transport.write(CONTINUE)
            context.budget.enforce()

    def request_data(self, pieces: list[bytes], *, complete: bool, started: float) -> None:
        """Takes more of the request's body, without its framing. complete: it is the last of it. started: when it was
        received (perf_counter).
        """
        self.request_complete = complete
        data = b"".join(pieces)
        if self._observer is not None:
            self._observer.feed_request(data)
        if self.state is not COLLECTING:
            self._send_more(self.outgoing.encode_more(pieces, complete=complete), started)
            return
        outgoing = self.outgoing
        outgoing.hold(data)
        if complete or outgoing.unsent_bytes > outgoing.max_collected_bytes:
            self._send(outgoing.take(), perf_counter())
        else:
            self._context.budget.enforce()

    def fail_request(self, error: BadRequest) -> None:
        """Fails the request: the rest of it is malformed, too long or overdue."""
        self._give_up(error.status, error_body(error.status, error.message, error.code), ends.REFUSED)

    def give_way(self, reason: str) -> None:
        """Answers the client with 503, because others need what the request takes of the relay."""
        self._give_up(503, error_body(503, reason, "overloaded"), ends.OVERLOADED)

    def _give_up(self, status: int, body: bytes, outcome: str) -> None:
        self._leave_upstream()
        self._fail(status, body, outcome, reset=False)

    def _overloaded(self, reason: str) -> None:
        self._respond(503, error_body(503, reason, "overloaded"), ends.OVERLOADED)

    def _send(self, body: bytes, started: float) -> None:
        """Sends the request upstream, as the hook wants it: whole, or as much as is here of a long one."""
        hook, outgoing = self._hook, self.outgoing
        if not outgoing.choose_engine(body, self._route, draw=hook is not None and hook.draws_engine):
            self.response_failed("the name in upstream.url has no address yet")
            return
        verdict = None
        if hook is not None:
            readable = self.request_complete and len(body) <= hook.body_limit and not self._context.budget.scarce
            verdict = hook.request(body if readable else None)
            if isinstance(verdict, Refusal):
                self._respond(verdict.status, verdict.body, ends.REFUSED)
                return
            if self._report is not None:
                self._report.begin_comparison(hook.comparison, body)
        if isinstance(verdict, Rewrite):
            payload = outgoing.rewrite(body, verdict)
        else:
            payload = outgoing.encode(body, complete=self.request_complete)
        self._dispatch(payload, started)

    def _dispatch(self, payload: bytes, started: float) -> None:
        """Sends a request, or its beginning, upstream: now, or when there is a connection."""
        if not self.request_complete and not self.outgoing.begin_upload():
            self._overloaded(UPLOADS_EXHAUSTED)
            return
        connection = self.outgoing.engine.pool.acquire(self)
        if connection is None:
            self._enter(QUEUED)
            self.outgoing.hold(payload, complete=self.request_complete)
            self._overhead = -started
            self._context.budget.enforce()
            return
        self._send_on(connection, payload)
        self._overhead = perf_counter() - started

    def _send_on(self, connection: UpstreamConnection, payload: bytes) -> None:
        self._enter(FORWARDED)
        request = self._request
        self.upstream = connection
        to_head, paused = request.method == b"HEAD", self._client.write_paused
        connection.assign(self, to_head=to_head, may_upgrade=request.upgrade, paused=paused)
        connection.transport.write(payload)
        if self._watch is not None:
            self._watch.sent()
        if self.request_complete:
            self.outgoing.sent(payload)

    def _send_more(self, data: bytes, started: float) -> None:
        """Sends more of a body upstream."""
        if self.request_complete:
            self.outgoing.end_upload()
        if self.upstream is not None:
            self.upstream.transport.write(data)
            if self.request_complete:
                self._overhead = perf_counter() - started
        elif self.state is QUEUED:
            self.outgoing.hold(data)
            if self.request_complete:
                self._overhead = -started
            elif self.outgoing.unsent_bytes > MAX_READ_AHEAD_BYTES:
                self._client.pause_reading()

    # From the pool.

    def connection_ready(self, connection: UpstreamConnection) -> None:
        if not self.request_complete:
            self._client.resume_reading()  # before sending, which may pause it again
        self._send_on(connection, self.outgoing.take())
        self._overhead += perf_counter()

    def connection_failed(self, error: OSError) -> None:
        """Handles an engine that cannot be reached. Nothing has been sent, so that every request can go to another
        engine."""
        if self.outgoing.connection_failed():
            self._acquire()
        else:
            self.response_failed(f"the upstream cannot be reached ({error.strerror or type(error).__name__})")

    def wait_expired(self) -> None:
        self._overloaded("all connections to the upstream are in use")

    def _acquire(self) -> None:
        """Sends what is held, now or when there is a connection; the state is QUEUED."""
        connection = self.outgoing.engine.pool.acquire(self)
        if connection is not None:
            self.connection_ready(connection)

    # From the upstream's connection.

    def retry(self) -> bool:
        """Sends the request once more if it may be repeated, and returns if it was sent. A connection that had been
        idle was closed, most likely for that: the engine itself has not failed."""
        outgoing = self.outgoing
        if not outgoing.repeatable(self._route):
            return False
        outgoing.engine.pool.close_idle()  # they are as old
        outgoing.engine.resent += 1
        self._send_again()
        return True

    def _send_again(self) -> None:
        self.outgoing.repeat()
        self.upstream = None
        self._enter(QUEUED)
        self._overhead = -perf_counter()
        self._acquire()

    def _answered_elsewhere(self, status: int) -> bool:
        """Notes a status of 500 or above. Returns True if the request has been sent to another engine."""
        if not self.outgoing.answered_with_error(status, self._route):
            return False
        assert self.upstream is not None
        self.upstream.abort()
        self._send_again()
        return True

    def pause_request(self) -> None:
        self._client.pause_reading()

    def resume_request(self) -> None:
        self._client.resume_reading()

    def interim_response(self, head: ResponseHead) -> None:
        """Forwards an interim response, except to clients of HTTP/1.0, which do not know interim responses."""
        request = self._request
        if request.minor == 0 or (head.status == 100 and not request.expect):
            return
        self._transport.write(head.encode())

    def switch_protocols(self, head: ResponseHead) -> Tunnel:
        assert self.upstream is not None
        self._enter(TUNNEL)
        self.outgoing.forget()
        self.outgoing.end_upload()
        self._response.head = head
        head.lines.append(b"Connection: Upgrade")
        self._transport.write(head.encode())
        tunnel = Tunnel(self._transport, self.upstream.transport)
        self._client.tunnel_opened(tunnel)
        return tunnel

    def response_started(self, head: ResponseHead, received: float) -> bool:
        if head.status >= 500:
            if self._answered_elsewhere(head.status):
                return False
        else:
            outgoing = self.outgoing
            if (health := outgoing.engine.health).failures:
                health.request_succeeded()
            if outgoing.failed:
                outgoing.settle(answered=True)
        self._enter(HEAD_HELD)
        request, hook, response = self._request, self._hook, self._response
        response.head = head
        self._received = received
        if self._watch is not None:
            self._watch.answered(received)
        close = not self._keep_alive or not self.request_complete or self._client.last_request
        if self._report is not None:
            self._report.begin_response(head)
        if hook is not None and hook.response_head(head):
            hook.transforming = request.method != b"HEAD" and head.status not in {204, 304}
        if hook is not None and hook.lost:
            self._response_lost()
            return False
        transformed = hook is not None and hook.transforming
        self._keep_alive = not response.frame(head, http11=request.minor == 1, transformed=transformed, close=close)
        return response.mode is not _RAW

    def response_data(self, data: bytes) -> None:
        response = self._response
        mode = response.mode
        if mode is _COLLECTED:
            assert response.collected is not None
            response.collected.append(data)
            return
        hook = self._hook
        if hook is not None and hook.transforming:
            if data:
                data = hook.response_data(data)
                if hook.lost:
                    self._response_lost()
                    return
            if not data and self.outgoing.rewritten:
                self._received = perf_counter()
                response.limit_hold(self._context.loop, self._release_held_head)
                return  # the hook may still want to replay
        if self._observer is not None:
            self._observer.feed_response(data)
        if mode is _CHUNKED:
            data = chunk(data)
        if response.held_head:
            self._send_head(data)
        elif data:
            self._transport.write(data)

    def response_end(self) -> None:
        self.upstream = None
        if not (self._end_collected() if self._response.mode is _COLLECTED else self._end_streamed()):
            return
        head = self._response.head
        assert head is not None
        self._context.counters.update_overhead(self._overhead)
        status, keep_alive = head.status, self._keep_alive and self.request_complete
        outcome = ends.OK if status < 400 else ends.CLIENT_ERROR if status < 500 else ends.SERVER_ERROR
        self._finish(outcome, complete=True)
        self._client.exchange_ended(keep_alive=keep_alive)

    def _end_collected(self) -> bool:
        """Sends the response, its body whole; returns False if the request is sent again instead."""
        started = perf_counter()
        hook, body = self._hook, self._response.take_collected()
        if hook is not None and hook.transforming:
            transformed = hook.response_data(body)
            if self._replay():
                return False
            if hook.transforming:
                transformed += hook.response_end()
            if hook.lost and hook.rewrote:
                self._response_lost()
                return False
            if hook.transforming:
                body = transformed
        if self._observer is not None:
            self._observer.feed_response(body)
        self._transport.write(self._response.whole(body))
        self._overhead += perf_counter() - started
        return True

    def _end_streamed(self) -> bool:
        """Sends the end of the response; returns False if the request is sent again instead."""
        response = self._response
        if response.held_head and self._replay():
            return False
        if self._hook is not None and self._hook.lost:
            self._response_lost()
            return False
        tail = b""
        if self._hook is not None and self._hook.transforming:
            tail = self._hook.response_end()
            if self._hook.lost:
                self._response_lost()
                return False
            if self._observer is not None:
                self._observer.feed_response(tail)
        if response.mode is _CHUNKED:
            tail = chunk(tail) + LAST_CHUNK
        if response.held_head:
            self._send_head(tail)
        elif tail:
            self._transport.write(tail)
        return True

    def response_failed(self, reason: str) -> None:
        """Answers with 502, or closes the client's connection if the response's head has been sent already."""
        self.outgoing.broke_off()
        self.upstream = None
        body = error_body(502, reason, "upstream_failed")
        self._fail(502, body, ends.UPSTREAM_FAILED, reset=self._response.ends_by_close)

    # The held-back head.

    def _release_held_head(self) -> None:
        """Sends the head, which has been held back for too long."""
        hook = self._hook
        assert hook is not None
        if self._response.held_head and self.state is HEAD_HELD and not hook.withholds:
            if hook.lost:
                self._response_lost()
            else:
                self._send_head(b"")

    def _send_head(self, data: bytes) -> None:
        """Sends the head, with the first bytes of the body in their framing."""
        self._enter(STREAMING)
        self._transport.write(self._response.take_head() + data)
        self.outgoing.forget()
        self._overhead += perf_counter() - self._received

    def _replay(self) -> bool:
        """Sends the client's own request if the hook wants the response that is now complete to be discarded. Returns
        if it was sent."""
        hook = self._hook
        if not self.outgoing.rewritten or hook is None or not hook.transforming or not hook.replay():
            return False
        self._send_own(hook)
        return True

    def _send_own(self, hook: FailOpenHook) -> None:
        """Sends the client's own request in place of the one that was rewritten."""
        started = perf_counter()
        self._keep_alive = self._request.keep_alive
        self._response.discard()
        hook.restored()
        self._dispatch(self.outgoing.restore(), started)

    def _response_lost(self) -> None:
        """Handles a lost response: the hook has failed, and the rest of the response is not for the client, or cannot
        be joined to what it got.

        The client's own request is sent where nothing has gone to the client and that has no effect but its cost. Else
        the client sees an error.
        """
        hook = self._hook
        assert hook is not None
        self._leave_upstream()
        repeatable = self._request.method in SAFE_METHODS or self._route in routes.REPEATABLE
        if self.state is not STREAMING and self.outgoing.rewritten and repeatable:
            self._send_own(hook)
        else:
            body = error_body(502, "the response could not be read to its end", "response_lost")
            self._fail(502, body, ends.UPSTREAM_FAILED, reset=self._response.ends_by_close)

    # The client, and the end.

    def pause_response(self) -> None:
        """Pauses the response, since the client does not read fast enough."""
        if self.upstream is not None:
            self.upstream.pause()

    def resume_response(self) -> None:
        if self.upstream is not None:
            self.upstream.resume()

    def probe(self) -> bool:
        """Sends bytes without a meaning to a client that has shut down its sending side, to find out whether it is
        gone.

        Before the response's head an interim response is sent, before a chunk's size a zero; elsewhere nothing can be.
        Returns False if the client has been probed before.
        """
        if self._probed:
            return False
        data, mode = b"", self._response.mode
        if self._request.minor == 0 or self.state is TUNNEL:
            pass
        elif self.state is not STREAMING:
            data = CONTINUE
        elif mode is _CHUNKED or (mode is _RAW and self.upstream and self.upstream.between_chunks):
            data = b"0"
        if data:
            self._probed = True
            self._transport.write(data)
        return True

    def client_lost(self) -> None:
        """Ends the exchange, since the client's connection is closed."""
        if self.state is TUNNEL:
            assert self.upstream is not None
            self.upstream.close()
            self._finish(ends.OK)
            return
        self._leave_upstream()
        self._finish(ends.CLIENT_GONE)

    def _leave_upstream(self) -> None:
        """Stops waiting for a connection, or closes the one whose response is no longer wanted."""
        if self.state is QUEUED:
            self.outgoing.engine.pool.cancel(self)
        upstream, self.upstream = self.upstream, None
        if upstream is not None:
            upstream.abort()

    def _fail(self, status: int, body: bytes, outcome: str, *, reset: bool) -> None:
        """Answers the request with an error; if the response's head has gone to the client, closes its connection
        instead. reset: see `ClientSide.exchange_broken`."""
        if self.state is STREAMING:
            self._finish(outcome)
            self._client.exchange_broken(reset=reset)
        else:
            self._respond(status, body, outcome)

    def _respond(self, status: int, body: bytes, outcome: str, fields: bytes = b"") -> None:
        """Answers the request with a response of the relay's own. fields: more field lines, each with its CRLF."""
        request = self._request
        keep = self._keep_alive and self.request_complete and not self._client.last_request
        if not keep or not request.minor:
            fields += b"Connection: %b\r\n" % (b"keep-alive" if keep else b"close")
        self._transport.write(error_response(status, body, fields=fields, bodyless=request.method == b"HEAD"))
        self._finish(outcome, own_status=status)
        self._client.exchange_ended(keep_alive=keep)

    def _finish(self, outcome: str, *, complete: bool = False, own_status: int = 0) -> None:
        """Counts and reports the exchange. complete: the whole response has been sent. own_status: of the relay's
        own."""
        asked = self.request_complete and self.state in _ASKED
        self._enter(DONE)
        self.outgoing.end()
        self._response.end_hold()
        self._context.counters.request(self._route, outcome)
        hook, generated = self._hook, None
        arm, comparison = ("none", None) if hook is None else (hook.arm, hook.comparison)
        head = self._response.head
        status = 0 if head is None else head.status
        if self._report is not None:
            generated = self._report.finish(arm, comparison, status, outcome, asked=asked, complete=complete)
        if self._watch is not None:
            self._watch.finish(own_status or status, outcome, arm)
        if hook is not None:
            hook.closed(
                complete=complete,
                output_tokens=generated,
                engine=self.outgoing.engine_name,
                own_status=own_status,
            )
