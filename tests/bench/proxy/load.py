"""What is sent through a proxy, by whom, and the upstreams that answer it."""

from __future__ import annotations

import asyncio
import json
import socket
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, cast

import httpx
from tests.support.fake_vllm import FakeVllm

ROOT = Path(__file__).resolve().parents[3]
BUILD = ROOT / "build" / "bench"
PATH = "/v1/chat/completions"
PLAIN_BASE = "/plain/v1"
"""For a proxy that writes requests anew, so that their length does not tell what is asked for."""
PROXY_CORE = 0
STREAMS_AT_ONCE = 50
CHUNK_SECONDS = 0.01
TOP_K = 20
INSTALL = "apt-get install -y --no-install-recommends nginx wrk"
ASK = {"return_token_ids": True, "return_tokens_as_token_ids": True, "logprobs": True, "top_logprobs": TOP_K}
ADAPTER = "0123456789abcdef" * 2
SAID = "The capital of France is Paris, and has been for a long while; it lies on the river Seine."


def request_body(*, stream: bool) -> dict[str, Any]:
    said = SAID * 3 if stream else SAID[:48]
    messages = [
        {"role": "system", "content": "You are a helpful assistant that answers briefly."},
        {"role": "user", "content": f"What is the capital of France?\nsay: {said}"},
    ]
    return {"model": "fake", "messages": messages, "max_tokens": 4096, "temperature": 0.7, "stream": stream}


@dataclass
class Answers:
    """What the upstreams answer, made once by the fake vLLM of the tests."""

    json_plain: bytes
    json_asked: bytes
    stream_plain: list[bytes]
    stream_asked: list[bytes]

    @property
    def json_adapter(self) -> bytes:
        return _of_adapter(self.json_plain)

    @property
    def stream_adapter(self) -> list[bytes]:
        return [_of_adapter(event) for event in self.stream_plain]

    @classmethod
    async def make(cls) -> Answers:
        transport = httpx.ASGITransport(FakeVllm(model="fake"))
        async with httpx.AsyncClient(transport=transport, base_url="http://fake") as client:

            async def ask(stream: bool, extra: dict[str, Any]) -> bytes:
                response = await client.post(PATH, json=request_body(stream=stream) | extra)
                response.raise_for_status()
                return response.content

            usage = {"stream_options": {"include_usage": True}}
            plain = await ask(True, {})
            asked = await ask(True, ASK | usage)
            return cls(await ask(False, {}), await ask(False, ASK), events(plain), events(asked))


def _of_adapter(answer: bytes) -> bytes:
    return answer.replace(b'"model":"fake"', b'"model":"%b"' % ADAPTER.encode())


def events(stream: bytes) -> list[bytes]:
    return [event + b"\n\n" for event in stream.split(b"\n\n") if event]


def free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return int(sock.getsockname()[1])


# Upstreams and load --------------------------------------------------------------------------------------------------


class StreamUpstream(asyncio.Protocol):
    """Answers every request with the events, one chunk each, one every CHUNK_SECONDS."""

    def __init__(self, answers: Answers) -> None:
        self.answers = answers
        self.adapter = answers.stream_adapter
        self.buffer = b""
        self.transport: Any = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = transport

    def data_received(self, data: bytes) -> None:
        self.buffer += data
        head, separator, body = self.buffer.partition(b"\r\n\r\n")
        if not separator:
            return
        length = 0
        for line in head.lower().split(b"\r\n"):
            if line.startswith(b"content-length:"):
                length = int(line[15:])
            elif line == b"transfer-encoding: chunked":
                length = -1
        if not body.endswith(b"0\r\n\r\n") if length < 0 else len(body) < length:
            return
        self.buffer = b""
        if head.startswith(b"GET"):
            self.transport.write(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n{}")
            return
        chunks = self.answers.stream_plain
        if b'"return_token_ids"' in body:
            chunks = self.answers.stream_asked
        elif b'"model": "%b"' % ADAPTER.encode() in body:
            chunks = self.adapter
        self.transport.write(
            b"HTTP/1.1 200 OK\r\ndate: today\r\nserver: uvicorn\r\ncontent-type: text/event-stream; charset=utf-8\r\n"
            b"transfer-encoding: chunked\r\n\r\n"
        )
        self.send(chunks, 0)

    def send(self, chunks: list[bytes], at: int) -> None:
        if self.transport.is_closing():
            return
        if at == len(chunks):
            self.transport.write(b"0\r\n\r\n")
            return
        self.transport.write(b"%x\r\n%b\r\n" % (len(chunks[at]), chunks[at]))
        asyncio.get_running_loop().call_later(CHUNK_SECONDS, self.send, chunks, at + 1)


class StreamClient(asyncio.Protocol):
    """Sends one request and reads its stream to the end."""

    def __init__(self, request: bytes, done: asyncio.Future[int]) -> None:
        self.request = request
        self.done = done
        self.tail = b""
        self.size = 0

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        cast("asyncio.Transport", transport).write(self.request)

    def data_received(self, data: bytes) -> None:
        if not self.size and not data.startswith(b"HTTP/1.1 200"):
            self.fail(f"not a stream: {data[:200]!r}")
        self.size += len(data)
        self.tail = (self.tail + data)[-64:]
        if self.tail.endswith(b"\r\n0\r\n\r\n") and b"[DONE]" in self.tail and not self.done.done():
            self.done.set_result(self.size)

    def connection_lost(self, exc: Exception | None) -> None:
        self.fail(f"the stream broke off: {exc}")

    def fail(self, why: str) -> None:
        if not self.done.done():
            self.done.set_exception(RuntimeError(why))


def chat_request(*, stream: bool = False) -> bytes:
    body = json.dumps(request_body(stream=stream)).encode()
    accept = "text/event-stream" if stream else "application/json"
    head = (
        f"POST {PATH} HTTP/1.1\r\nHost: 127.0.0.1\r\nAccept: {accept}\r\n"
        f"Authorization: Bearer sk-none\r\nUser-Agent: bench\r\nContent-Type: application/json\r\n"
        f"Content-Length: {len(body)}\r\n\r\n"
    )
    return head.encode() + body


async def run_streams(port: int) -> None:
    """STREAMS_AT_ONCE whole streams, their starts spread so that chunks do not arrive in step."""
    request = chat_request(stream=True)
    loop = asyncio.get_running_loop()

    async def stream_once(n: int) -> None:
        await asyncio.sleep(n * CHUNK_SECONDS / STREAMS_AT_ONCE)
        done: asyncio.Future[int] = loop.create_future()
        transport, _ = await loop.create_connection(lambda: StreamClient(request, done), "127.0.0.1", port)
        try:
            await asyncio.wait_for(done, 60)
        finally:
            transport.close()

    await asyncio.gather(*(stream_once(n) for n in range(STREAMS_AT_ONCE)))


class Load(NamedTuple):
    """What wrk has sent."""

    requests: int
    seconds: float
    """That it took: on a busy machine more than it was told to."""

    @property
    def per_second(self) -> float:
        return self.requests / self.seconds


async def run_wrk(port: int, seconds: float, script: Path) -> Load:
    """RuntimeError when any request failed."""
    process = await asyncio.create_subprocess_exec(
        *("wrk", "-t1", "-c64", "--timeout", "30s", f"-d{seconds:g}s", "-s", str(script)),
        f"http://127.0.0.1:{port}{PATH}",
        stdout=asyncio.subprocess.PIPE,
    )
    out = (await process.communicate())[0].decode()
    result = json.loads(out.splitlines()[-1])
    if result["failed"] or not result["requests"]:
        raise RuntimeError(f"wrk saw failures: {result}")
    return Load(result["requests"], result["seconds"])


def wrk_script(folder: Path) -> tuple[Path, int]:
    """The script, and the length of the body that it sends."""
    body = json.dumps(request_body(stream=False))
    path = folder / "post.lua"
    path.write_text(
        f"""wrk.method = "POST"
wrk.body = [==[{body}]==]
wrk.headers["Content-Type"] = "application/json"
wrk.headers["Authorization"] = "Bearer sk-none"
wrk.headers["User-Agent"] = "bench"
wrk.headers["Accept"] = "application/json"
function done(summary, latency, requests)
  local e = summary.errors
  print(string.format('{{"requests": %d, "seconds": %f, "failed": %d}}', summary.requests, summary.duration / 1e6,
    e.connect + e.read + e.write + e.status + e.timeout))
end
"""
    )
    return path, len(body)


def nginx_config(folder: Path, server: str, extra: str = "") -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "nginx.conf"
    path.write_text(
        f"""daemon off; master_process off; worker_processes 1; pid {folder}/pid; error_log stderr crit;
worker_rlimit_nofile 65536;
events {{ worker_connections 4096; }}
http {{
  access_log off; keepalive_requests 1000000000; tcp_nodelay on; default_type application/json;
  open_file_cache max=10; client_body_buffer_size 64k;
  client_body_temp_path {folder}/a; proxy_temp_path {folder}/b; fastcgi_temp_path {folder}/c;
  uwsgi_temp_path {folder}/d; scgi_temp_path {folder}/e;
  {extra}
  server {{ {server} }}
}}
"""
    )
    return path


def upstream_config(folder: Path, port: int, answers: Answers, *lengths: int) -> Path:
    """Static files answer POST with 405: the error page is the answer, chosen by the length of the request.

    lengths: of requests without logprobs; the first one is the client's own.
    """
    length = lengths[0]
    root = folder / "root"
    root.mkdir(parents=True)
    (root / "plain.json").write_bytes(answers.json_plain)
    (root / "asked.json").write_bytes(answers.json_asked)
    (root / "adapter.json").write_bytes(answers.json_adapter)
    server = f"""listen 127.0.0.1:{port} backlog=4096; root {root};
    location = {PATH} {{ error_page 405 =200 $answer; try_files /plain.json =404; }}
    location = {PLAIN_BASE}/chat/completions {{ error_page 405 =200 /plain.json; try_files /plain.json =404; }}
    location = /plain.json {{ }} location = /asked.json {{ }} location = /adapter.json {{ }}
    location / {{ return 200 '{{}}'; }}"""
    profile = length + len(f',"vllm_xargs":{{"hemostat":"{ADAPTER}"}}')
    adapter = length - len("fake") + len(ADAPTER)
    plain = "".join(f"{name} /plain.json; " for name in (*lengths, profile))
    by_length = f"{plain}{adapter} /adapter.json; default /asked.json;"
    return nginx_config(folder, server, f"map $content_length $answer {{ {by_length} }}")
