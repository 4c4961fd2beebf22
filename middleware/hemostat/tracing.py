"""OpenTelemetry traces, where `tracing.endpoint` is set: a span for each generation that is relayed, and one for its
shadow score, linked to it. Needs the extra `hemostat[tracing]`.

Names are those of the GenAI semantic conventions (`SCHEMA_URL`), pinned here, since they are still in development:
`gen_ai.*` for what they name, `hemostat.*` for what they do not. What clients say or get is in no attribute.

W3C trace context goes on: the upstream gets the relay's span as its parent. Without tracing the relay passes a client's
`traceparent` on as it is.
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
    """A request on its way."""

    def __init__(self, span: Span, operation: str) -> None:
        self._span = span
        self._operation = operation

    def carried(self) -> dict[str, str]:
        """The trace context for the upstream: this span is the parent there."""
        carrier: dict[str, str] = {}
        _context.inject(carrier, trace.set_span_in_context(self._span))
        return carrier

    def logged(self) -> dict[str, Any]:
        """What a line of log says of it."""
        context = self._span.get_span_context()
        return {"trace_id": f"{context.trace_id:032x}", "sampled": context.trace_flags.sampled}

    def end(self, *, status: int, outcome: str, error: bool, facts: Mapping[str, Any]) -> None:
        """status: of HTTP, 0 for none. facts: attributes that are known by now; None is left out."""
        span = self._span
        if not span.is_recording():
            return
        known = {name: value for name, value in facts.items() if value is not None}
        if model := known.get("gen_ai.request.model"):
            # The conventions name a span so: operation and model.
            span.update_name(f"{self._operation} {model}")
        if status:
            known["http.response.status_code"] = status
        if error:
            known["error.type"] = outcome
            span.set_status(Status(StatusCode.ERROR))
        span.set_attributes({**known, "hemostat.outcome": outcome})
        span.end()


class Tracing:
    """One a process. `begin` and `ended` cost some 20 µs for a trace that is sampled; sending happens in a thread."""

    def __init__(self, endpoint: str, ratio: float, version: str) -> None:
        """endpoint: of an OTLP/HTTP receiver, without /v1/traces. ratio: of traces that begin here."""
        self._provider = TracerProvider(
            sampler=ParentBased(TraceIdRatioBased(ratio)),
            resource=Resource.create({"service.name": "hemostat", "service.version": version}),
            shutdown_on_exit=False,
        )
        exporter = OTLPSpanExporter(f"{endpoint.rstrip('/')}/v1/traces", timeout=5)
        self._provider.add_span_processor(BatchSpanProcessor(exporter, schedule_delay_millis=1000))
        self._tracer = self._provider.get_tracer("hemostat", version, schema_url=SCHEMA_URL)

    def begin(self, route: str, parent: Mapping[str, str], request_id: str) -> RequestSpan:
        """The span of a request that has just come.

        parent: `traceparent` and `tracestate` as the client sent them, if it did.
        """
        span = self._tracer.start_span(
            OPERATIONS[route],
            context=_context.extract(dict(parent)),
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

    def score(
        self, traceparent: str, model: str, *, seconds: float, results: Mapping[str, float], said: Mapping[str, Any]
    ) -> None:
        """The shadow score of a request that went upstream with `traceparent`, where that one is sampled.

        seconds: how long ago the response ended. results: figure -> value, each an evaluation result; what is not a
        finite number is left out. said: more attributes, under `hemostat.`.
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
            attributes={"gen_ai.request.model": model, **{f"hemostat.{name}": value for name, value in said.items()}},
        )
        for name, value in results.items():
            if math.isfinite(value):
                attributes = {"gen_ai.evaluation.name": f"hemostat.{name}", "gen_ai.evaluation.score.value": value}
                span.add_event(EVALUATION, attributes, timestamp=now)
        span.end(now)

    def close(self) -> None:
        """Send what is left; waits for it, some seconds at most."""
        self._provider.shutdown()
