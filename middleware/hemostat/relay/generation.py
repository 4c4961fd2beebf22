"""The report of one generation: its outcome in the counters, its trace span, and its line in the request log.

Neither the span nor the log contains a prompt or an output. Errors here are counted and never affect the request.
"""

from __future__ import annotations

import logging
from time import perf_counter
from typing import TYPE_CHECKING, Final

from hemostat import logs
from hemostat.hooks import Comparison
from hemostat.ipc import ends
from hemostat.ipc.messages import OutcomeReport
from hemostat.metrics import names
from hemostat.metrics.reasons import FailedPart
from hemostat.openai.routes import FORMS
from hemostat.relay.context import RelayContext
from hemostat.relay.http.fields import drop_fields, split_fields
from hemostat.relay.http.request import RequestHead
from hemostat.relay.http.response import ResponseHead
from hemostat.relay.outcomes import EARLY_ENDS, NO_OUTCOME, OutcomeObserver, ResponseOutcome

if TYPE_CHECKING:
    from hemostat.tracing import RequestSpan, Tracing  # an extra; imported only where it is used

_TRACE_FIELDS: Final = frozenset((b"traceparent", b"tracestate"))

request_log = logging.getLogger(logs.REQUEST)


class GenerationReport:
    """Reports one generation. Owns its span."""

    __slots__ = ("_context", "_request_id", "_route", "_span", "_started", "observer")

    def __init__(self, context: RelayContext, route: str, request_id: str, started: float) -> None:
        """started: when the request's head was complete (perf_counter)."""
        self.observer = OutcomeObserver(FORMS[route])
        self._context = context
        self._route = route
        self._request_id = request_id
        self._started = started
        self._span: RequestSpan | None = None

    def start_span(self, tracing: Tracing, request: RequestHead) -> None:
        """Starts the request's span and makes it the parent of the upstream's, also as the hook sees the request."""
        received = {name.lower().decode(): value.decode("latin-1") for name, value in split_fields(request.lines)}
        try:
            self._span = tracing.start_request(self._route, received, self._request_id)
            headers = self._span.upstream_headers()
        except Exception:  # noqa: BLE001  an error in tracing must not affect the request
            self._context.counters.add(names.INTERNAL_ERRORS, (FailedPart.TRACING.value,))
            return
        request.drop(_TRACE_FIELDS)
        request.traceparent = True
        added = [b"%b: %b" % (name.encode(), value.encode("latin-1")) for name, value in headers.items()]
        request.lines += added
        request.received = drop_fields(request.received, -1, _TRACE_FIELDS)[0] + added

    def begin_comparison(self, comparison: Comparison | None, body: bytes) -> None:
        """Begins to compare the answer's outcome, if the hook has found that the request belongs to a comparison. body:
        the whole body, as the client sent it.
        """
        if comparison is None or self._context.report_outcome is None:
            return
        try:
            self.observer.compare(body, json_in_words=comparison.json_in_words)
        except Exception:  # noqa: BLE001  an error in the evaluation must not affect the connection
            self._context.counters.add(names.INTERNAL_ERRORS, (FailedPart.OUTCOME.value,))

    def begin_response(self, head: ResponseHead) -> None:
        """Begins to evaluate a response. It can be evaluated only if it is not an error and not compressed.

        Called again for the response to a request that is sent again.
        """
        self.observer.disabled = head.status != 200 or head.content_coding != b"identity"
        if not self.observer.disabled:
            self.observer.begin_response(stream=head.content_type.startswith(b"text/event-stream"))

    def finish(
        self, arm: str, comparison: Comparison | None, status: int, outcome: str, *, asked: bool, complete: bool
    ) -> int | None:
        """The exchange has ended. Returns the generated tokens by the response's usage, None if it gave none.

        status: of the response, 0 without one. outcome: of `counters`. asked: an engine had the whole request when the
        exchange ended. complete: the whole response was sent.
        """
        context = self._context
        ended = NO_OUTCOME
        try:
            if complete and outcome is ends.OK:
                ended = self.observer.finish(arm, context.counters.add)
            elif comparison is not None and asked and outcome in EARLY_ENDS:
                streamed, add = comparison.streamed, context.counters.add
                ended = self.observer.end_early(EARLY_ENDS[outcome], streamed=streamed, arm=arm, count=add)
            if comparison is not None and ended.bad is not None:
                self._report_outcome(comparison, ended)
        except Exception:  # noqa: BLE001  an error in the evaluation must not affect the connection
            context.counters.add(names.INTERNAL_ERRORS, (FailedPart.OUTCOME.value,))
        try:
            if context.log_requests:
                self._log(ended, arm, status, outcome)
            if self._span is not None:
                self._span.end(
                    status=status,
                    outcome=outcome,
                    error=outcome != ends.OK,
                    attributes={
                        "gen_ai.request.model": self.observer.model,
                        "gen_ai.response.finish_reasons": ended.finish_reasons or None,
                        "gen_ai.usage.output_tokens": ended.output_tokens,
                        "hemostat.arm": arm,
                    },
                )
        except Exception:  # noqa: BLE001  an error in tracing or logging must not affect the connection
            context.counters.add(names.INTERNAL_ERRORS, (FailedPart.TRACING.value,))
        return ended.usage_tokens

    def _report_outcome(self, comparison: Comparison, ended: ResponseOutcome) -> None:
        context = self._context
        if context.report_outcome is None or ended.bad is None:
            return
        report = OutcomeReport(
            kind=comparison.kind,
            version=comparison.version,
            treated=comparison.treated,
            conversation=comparison.conversation,
            client=comparison.client,
            bad=ended.bad,
            output_tokens=ended.output_tokens,
            drawn=comparison.drawn,
        )
        context.report_outcome(report)

    def _log(self, ended: ResponseOutcome, arm: str, status: int, outcome: str) -> None:
        request_log.info(
            "request",
            extra={
                "request_id": self._request_id,
                "route": self._route,
                "status": status,
                "outcome": outcome,
                "arm": arm,
                "finish_reasons": list(ended.finish_reasons),
                "output_tokens": ended.output_tokens,
                "seconds": round(perf_counter() - self._started, 6),
                **({} if self._span is None else self._span.log_fields()),
            },
        )
