"""Traces at a real OTLP receiver, and logs as JSON; neither contains prompts or generated texts."""

from __future__ import annotations

import asyncio
import json
import logging
import sys
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.proto.trace.v1.trace_pb2 import Span as SpanKind
from opentelemetry.semconv._incubating.attributes import gen_ai_attributes
from opentelemetry.semconv.schemas import Schemas
from tests.support.control import control, scored, settings
from tests.support.fake_vllm import FakeVllm, serving
from tests.support.relay import Request, answering, chat_json, relaying
from tests.support.served import hemostat
from tests.support.waiting import HANG_SECONDS

from hemostat.config.errors import ConfigError
from hemostat.config.loading import load
from hemostat.logs import JsonFormatter, TextFormatter
from hemostat.tracing import EVALUATION, SCHEMA_URL, Tracing

SECRET = "the patient's name"
CONVENTIONAL = {
    *(value for name, value in vars(gen_ai_attributes).items() if name.startswith("GEN_AI_")),
    *("http.request.method", "http.response.status_code", "url.path", "error.type"),
}
"""Attributes that the semantic conventions name."""
TRACE = "0af7651916cd43dd8448eb211c80319c"
PARENT = "b7ad6b7169203331"


class Receiver:
    """OTLP over HTTP, as a collector takes it."""

    def __init__(self) -> None:
        self.requests: list[ExportTraceServiceRequest] = []
        self.raw = b""
        receiver = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["content-length"]))
                assert self.path == "/v1/traces"
                receiver.raw += body
                receiver.requests.append(ExportTraceServiceRequest.FromString(body))
                self.send_response(200)
                self.end_headers()

            def log_message(self, *args: Any) -> None: ...

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"
        threading.Thread(target=self._server.serve_forever, args=(0.01,), daemon=True).start()

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()

    def spans(self) -> list[Any]:
        scopes = [scope for r in self.requests for resource in r.resource_spans for scope in resource.scope_spans]
        assert {scope.schema_url for scope in scopes} <= {SCHEMA_URL}
        return [span for scope in scopes for span in scope.spans]


def said(attributes: Any) -> dict[str, Any]:
    return {a.key: getattr(a.value, a.value.WhichOneof("value")) for a in attributes}


@pytest.fixture
def receiver() -> Iterator[Receiver]:
    instance = Receiver()
    yield instance
    instance.close()


def asking(headers: bytes = b"", target: bytes = b"/v1/chat/completions") -> bytes:
    body = json.dumps({"model": "m-w4a16", "messages": [{"role": "user", "content": SECRET}]}).encode()
    return b"POST %b HTTP/1.1\r\nHost: x\r\n%bContent-Length: %d\r\n\r\n%b" % (target, headers, len(body), body)


def answer(status: bytes = b"200 OK") -> bytes:
    body = chat_json(SECRET, "stop", 7)
    head = b"HTTP/1.1 %b\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n" % (status, len(body))
    return head + body


async def test_a_request_is_a_span_between_the_clients_and_the_upstreams(receiver: Receiver) -> None:
    seen: list[Request] = []
    tracing = Tracing(receiver.url, 1.0, "0")
    async with relaying(answering(seen, answer()), tracing=tracing) as (_, _, connect):
        client = await connect()
        await client.send(asking(b"traceparent: 00-%b-%b-01\r\n" % (TRACE.encode(), PARENT.encode())))
        assert (await client.response("POST")).status == 200
        await client.send(asking())
        await client.response("POST")
        await client.send(asking(target=b"/v1/models"))
        await client.response("POST")
    await asyncio.to_thread(tracing.close)
    first, second = receiver.spans()
    assert (first.trace_id.hex(), first.parent_span_id.hex()) == (TRACE, PARENT)
    assert seen[0].get(b"traceparent") == [f"00-{TRACE}-{first.span_id.hex()}-01".encode()]
    assert second.parent_span_id == b""
    assert second.trace_id.hex() in seen[1].get(b"traceparent")[0].decode()
    assert first.name == "chat m-w4a16"
    attributes = said(first.attributes)
    assert (first.kind, attributes["gen_ai.provider.name"]) == (SpanKind.SPAN_KIND_CLIENT, "vllm")
    assert attributes["gen_ai.operation.name"] == "chat"
    assert attributes["gen_ai.request.model"] == "m-w4a16"
    assert [v.string_value for v in attributes["gen_ai.response.finish_reasons"].values] == ["stop"]
    assert attributes["gen_ai.usage.output_tokens"] == 7
    assert attributes["http.response.status_code"] == 200
    assert attributes["hemostat.outcome"] == "ok"
    assert SECRET.encode() not in receiver.raw


async def test_an_error_is_marked_in_its_span(receiver: Receiver) -> None:
    tracing = Tracing(receiver.url, 1.0, "0")
    async with relaying(answering([], answer(b"500 Oh")), tracing=tracing) as (_, _, connect):
        client = await connect()
        await client.send(asking())
        await client.response("POST")
    await asyncio.to_thread(tracing.close)
    (span,) = receiver.spans()
    assert span.status.code == 2
    assert said(span.attributes)["error.type"] == "server_error"
    assert SECRET.encode() not in receiver.raw


async def test_a_clients_decision_not_to_sample_is_kept(receiver: Receiver, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "hemostat.request")
    seen: list[Request] = []
    tracing = Tracing(receiver.url, 1.0, "0")
    async with relaying(answering(seen, answer()), tracing=tracing, log_requests=True) as (_, _, connect):
        client = await connect()
        await client.send(asking(b"traceparent: 00-%b-%b-00\r\n" % (TRACE.encode(), PARENT.encode())))
        await client.response("POST")
    await asyncio.to_thread(tracing.close)
    assert receiver.spans() == []
    assert seen[0].get(b"traceparent")[0].startswith(f"00-{TRACE}-".encode())
    assert seen[0].get(b"traceparent")[0].endswith(b"-00")
    (line,) = [json.loads(JsonFormatter().format(r)) for r in caplog.records if r.name == "hemostat.request"]
    assert (line["trace_id"], line["sampled"]) == (TRACE, False)


async def test_a_tracing_failure_does_not_affect_requests() -> None:
    class Broken:
        def begin(self, *_: Any) -> None:
            raise RuntimeError("no")

    async with relaying(answering([], answer()), tracing=Broken()) as (relay, _, connect):  # type: ignore[arg-type]
        client = await connect()
        await client.send(asking())
        assert (await client.response("POST")).status == 200
        assert relay.counters.other["hemostat_internal_errors_total"] == {("tracing",): 1.0}


async def test_a_shadow_score_is_linked_to_its_request(receiver: Receiver, tmp_path: Path) -> None:
    made = settings(tracing={"endpoint": receiver.url})
    async with control(tmp_path, made) as plane:
        captured = time.monotonic() - 0.5
        plane.pipeline.update(*scored("traced", traceparent=f"00-{TRACE}-{PARENT}-01", captured_at=captured))
        plane.pipeline.update(*scored("unsampled", traceparent=f"00-{TRACE}-{PARENT}-00"))
        plane.pipeline.update(*scored("untraced"))
        plane.pipeline.update(*scored("nonsense", traceparent="00-xyz"))
    (span,) = receiver.spans()
    assert span.trace_id.hex() == TRACE
    assert [(link.trace_id.hex(), link.span_id.hex()) for link in span.links] == [(TRACE, PARENT)]
    assert 0.4e9 < span.end_time_unix_nano - span.start_time_unix_nano < 30e9
    results = {said(e.attributes)["gen_ai.evaluation.name"]: said(e.attributes) for e in span.events}
    assert {event.name for event in span.events} == {EVALUATION}
    assert results["hemostat.tv"]["gen_ai.evaluation.score.value"] >= 0.0
    assert said(span.attributes)["hemostat.request.id"] == "traced"


async def test_served_each_request_has_its_span_its_score_and_its_line(receiver: Receiver, tmp_path: Path) -> None:
    """Through all of the processes of `hemostat serve`."""
    upstream = FakeVllm(noise=0.5)
    with (
        serving(upstream) as url,
        hemostat(
            tmp_path, upstream, url, workers=2, reference={"backend": "vllm", "url": url},
            tracing={"endpoint": receiver.url, "ratio": 1.0}, log={"format": "json", "requests": True},
        ) as process,
    ):  # fmt: skip
        await process.until(lambda status: status["reference"]["state"] == "ready" and status["relays"] == 2)
        end = time.monotonic() + HANG_SECONDS
        while time.monotonic() < end:  # a relay hears of the reference a moment later than the status says it
            answer = await process.ask(f"say: {SECRET}", max_tokens=40)
            assert SECRET in answer.json()["choices"][0]["message"]["content"]
            await asyncio.sleep(0.1)
            if (await process.status())["requests"]["scored"] >= 3:
                break
        await process.until(lambda status: status["requests"]["scored"] >= 3)
    spans = receiver.spans()
    asked = {span.span_id: span for span in spans if span.name == "chat fake"}
    scores = [span for span in spans if span.name == "shadow_score fake"]
    assert len(scores) >= 3
    for span in scores:
        (link,) = span.links
        origin = asked[link.span_id]
        assert (link.trace_id, span.trace_id) == (origin.trace_id, origin.trace_id)
        assert said(span.attributes)["hemostat.request.id"] == said(origin.attributes)["hemostat.request.id"]
        assert "hemostat.kl_rc" in {said(event.attributes)["gen_ai.evaluation.name"] for event in span.events}
    names = {a.key for span in spans for part in (span, *span.events) for a in part.attributes}
    assert {name for name in names if not name.startswith("hemostat.")} <= CONVENTIONAL
    log = (tmp_path / "log").read_text()
    lines = [json.loads(line) for line in log.splitlines()]
    of_requests = {line["trace_id"]: line["request_id"] for line in lines if line["logger"] == "hemostat.request"}
    assert of_requests == {span.trace_id.hex(): said(span.attributes)["hemostat.request.id"] for span in asked.values()}
    assert SECRET.encode() not in receiver.raw + log.encode()


def test_the_version_of_the_conventions_exists() -> None:
    assert SCHEMA_URL in {schema.value for schema in Schemas}


def test_an_endpoint_without_the_extra_names_the_package_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.metadata.distributions", lambda **_: [])
    environment = {"HEMOSTAT_UPSTREAM__URL": "http://v:1", "HEMOSTAT_TRACING__ENDPOINT": "http://c:4318"}
    with pytest.raises(
        ConfigError, match=r"tracing.endpoint.*pip install 'opentelemetry-exporter-otlp-proto-http<2,>="
    ):
        load(None, environment, [])


async def test_one_line_of_json_per_request(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "hemostat.request")
    async with relaying(answering([], answer()), log_requests=True) as (_, _, connect):
        client = await connect()
        await client.send(asking(b"X-Request-Id: mine\r\n"))
        await client.response("POST")
    (record,) = [r for r in caplog.records if r.name == "hemostat.request"]
    line = json.loads(JsonFormatter().format(record))
    assert line["request_id"] == "mine"
    assert (line["route"], line["status"], line["outcome"]) == ("/v1/chat/completions", 200, "ok")
    assert (line["finish_reasons"], line["output_tokens"], line["arm"]) == (["stop"], 7, "none")
    assert line["level"] == "info"
    assert line.keys() & {"trace_id", "sampled"} == set()  # without traces
    assert SECRET not in json.dumps(line)
    assert "request_id=mine" in TextFormatter().format(record)


async def test_a_long_request_id_is_cut_in_the_log_and_goes_upstream_whole(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "hemostat.request")
    seen: list[Request] = []
    async with relaying(answering(seen, answer()), log_requests=True) as (_, _, connect):
        client = await connect()
        await client.send(asking(b"X-Request-Id: %b\r\n" % (b"i" * 5000)))
        await client.response("POST")
    (record,) = [r for r in caplog.records if r.name == "hemostat.request"]
    assert json.loads(JsonFormatter().format(record))["request_id"] == "i" * 200
    assert seen[0].get(b"x-request-id") == [b"i" * 5000]


def test_an_exception_stays_one_line_of_json() -> None:
    try:
        raise ValueError("oh\nno")
    except ValueError:
        record = logging.getLogger("x").makeRecord("x", logging.ERROR, "f", 1, "broke", (), sys.exc_info())
    text = JsonFormatter().format(record)
    assert "\n" not in text
    assert "ValueError" in json.loads(text)["exception"]
