"""OpenTelemetry traces, used where `tracing.endpoint` is set: a span for each relayed generation, and one for its
shadow score, linked to the first. Needs the extra `tracing`.

Attribute names come from the GenAI semantic conventions (`gen_ai.*`), at the version in `SCHEMA_URL` because the
conventions are still in development; attributes of our own are `hemostat.*`. Prompts and outputs are in no attribute.

W3C trace context is propagated: the relay's span is the parent of the upstream's. Without tracing, the relay forwards a
client's `traceparent` unchanged.
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from typing import Any

from opentelemetry import trace
from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor
from opentelemetry.sdk.trace.sampling import ParentBased, TraceIdRatioBased
from opentelemetry.trace import Link, Span, SpanKind, Status, StatusCode
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

from hemostat.openai.routes import OPERATIONS

SCHEMA_URL = "https://opentelemetry.io/schemas/1.41.1"
PROVIDER = "vllm"
EVALUATION = "gen_ai.evaluation.result"

_context = TraceContextTextMapPropagator()


class RequestSpan:
    """The span of one request in progress."""

    def __init__(self, span: Span, operation: str) -> None:
        self._span = span
        self._operation = operation

    def upstream_headers(self) -> dict[str, str]:
        """Returns the trace context headers for the upstream, with this span as the parent."""
        carrier: dict[str, str] = {}
        _context.inject(carrier, trace.set_span_in_context(self._span))
        return carrier

    def log_fields(self) -> dict[str, Any]:
        """Returns the fields that identify the trace in a log record."""
        context = self._span.get_span_context()
        return {"trace_id": f"{context.trace_id:032x}", "sampled": context.trace_flags.sampled}

    def end(self, *, status: int, outcome: str, error: bool, attributes: Mapping[str, Any]) -> None:
        """Ends the span. status: the HTTP status, 0 without a response. attributes: further ones; those that are None
        are omitted."""
        span = self._span
        if not span.is_recording():
            return
        known = {name: value for name, value in attributes.items() if value is not None}
        if model := known.get("gen_ai.request.model"):
            # The conventions require the span name "{operation} {model}".
            span.update_name(f"{self._operation} {model}")
        if status:
            known["http.response.status_code"] = status
        if error:
            known["error.type"] = outcome
            span.set_status(Status(StatusCode.ERROR))
        span.set_attributes({**known, "hemostat.outcome": outcome})
        span.end()


class Tracing:
    """Creates spans; one per process. Starting and ending a sampled span takes about 20 µs; a thread sends them."""

    def __init__(self, endpoint: str, ratio: float, version: str) -> None:
        """endpoint: URL of an OTLP/HTTP receiver, without /v1/traces.

        ratio: the fraction of traces that is sampled, for requests that arrive without a trace context (0 to 1).
        """
        self._provider = TracerProvider(
            sampler=ParentBased(TraceIdRatioBased(ratio)),
            resource=Resource.create({"service.name": "hemostat", "service.version": version}),
            shutdown_on_exit=False,
        )
        exporter = OTLPSpanExporter(f"{endpoint.rstrip('/')}/v1/traces", timeout=5)
        self._provider.add_span_processor(BatchSpanProcessor(exporter, schedule_delay_millis=1000))
        self._tracer = self._provider.get_tracer("hemostat", version, schema_url=SCHEMA_URL)

    def start_request(self, route: str, headers: Mapping[str, str], request_id: str) -> RequestSpan:
        """Starts and returns the span of a request that has just arrived.

        headers: the client's header fields, names in lower case, which may have `traceparent` and `tracestate`.
        """
        span = self._tracer.start_span(
            OPERATIONS[route],
            context=_context.extract(dict(headers)),
            kind=SpanKind.CLIENT,
            attributes={
                "gen_ai.operation.name": OPERATIONS[route],
                "gen_ai.provider.name": PROVIDER,
                "http.request.method": "POST",
                "url.path": route,
                "hemostat.request.id": request_id,
            },
        )
        return RequestSpan(span, OPERATIONS[route])

    def record_score(
        self,
        traceparent: str,
        model: str,
        *,
        seconds: float,
        results: Mapping[str, float],
        attributes: Mapping[str, Any],
    ) -> None:
        """Records the span of a shadow score, if the scored request's trace is sampled.

        traceparent: the one that the request had upstream. seconds: since the response ended. results: an evaluation
        result for each name; values that are not finite are omitted. attributes: further ones, without their prefix
        `hemostat.`.
        """
        context = _context.extract({"traceparent": traceparent})
        origin = trace.get_current_span(context).get_span_context()
        if not origin.is_valid or not origin.trace_flags.sampled:
            return
        now = time.time_ns()
        span = self._tracer.start_span(
            f"shadow_score {model}",
            context=context,
            links=[Link(origin)],
            start_time=now - int(seconds * 1e9),
            attributes={
                "gen_ai.request.model": model,
                **{f"hemostat.{name}": value for name, value in attributes.items()},
            },
        )
        for name, value in results.items():
            if math.isfinite(value):
                result = {"gen_ai.evaluation.name": f"hemostat.{name}", "gen_ai.evaluation.score.value": value}
                span.add_event(EVALUATION, result, timestamp=now)
        span.end(now)

    def close(self) -> None:
        """Sends the spans that are still queued; blocks for a few seconds at most."""
        self._provider.shutdown()
