"""What the relay costs, beside nginx and PyPI's vllm-router: `make bench-proxy`, a table and build/bench/proxy.json.

Every proxy is pinned to one core, the same for all, and has the same upstreams; load and upstreams have the other
cores. Rounds are interleaved, so that whatever else the machine does hits all alike; ratios are taken round by round.

requests/s  wrk, 64 kept-alive connections, a chat completion as vLLM answers it (JSON), the upstream an nginx that has
            the answers ready: one for what the client sent, one with logprobs for a request that has grown on its way.
cpu/chunk   CPU time of the proxy (all of its threads, /proc/PID/task/*/schedstat) for each SSE chunk of streams that
            bring one every 10 ms, 50 at a time.

"hemostat N" samples the fraction N of the requests and treats none. "profile" and "adapter" sample none and treat all:
with a profile of the logits, whose answers are read for their first event, and with an adapter, whose name is replaced
in every chunk. Their ratios to "hemostat 0" and to each other are taken in the same rounds.
"direct" is the upstream without a proxy: no proxy can be measured beyond it. `--beside FOLDER` measures the relay of
another checkout in the same rounds (`git worktree add FOLDER REVISION`), and the ratio of this one to it.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import random
import shutil
import socket
import statistics
import subprocess
import sys
import tempfile
import time
import venv
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import httpx
import uvloop

from hemostat.ipc.messages import REST_KIND, MessageReader, Policy, Stats, encode

ROOT = Path(__file__).resolve().parents[2]
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))

from tests.support.fake_vllm import FakeVllm  # noqa: E402  the root is no package

BUILD = ROOT / "build" / "bench"
PATH = "/v1/chat/completions"
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


async def run_streams(port: int) -> None:
    """STREAMS_AT_ONCE whole streams, their starts spread so that chunks do not arrive in step."""
    body = json.dumps(request_body(stream=True)).encode()
    request = (
        f"POST {PATH} HTTP/1.1\r\nHost: 127.0.0.1:{port}\r\nAccept: text/event-stream\r\n"
        f"Authorization: Bearer sk-none\r\nUser-Agent: bench\r\nContent-Type: application/json\r\n"
        f"Content-Length: {len(body)}\r\n\r\n"
    ).encode() + body
    loop = asyncio.get_running_loop()

    async def one(n: int) -> None:
        await asyncio.sleep(n * CHUNK_SECONDS / STREAMS_AT_ONCE)
        done: asyncio.Future[int] = loop.create_future()
        transport, _ = await loop.create_connection(lambda: StreamClient(request, done), "127.0.0.1", port)
        try:
            await asyncio.wait_for(done, 60)
        finally:
            transport.close()

    await asyncio.gather(*(one(n) for n in range(STREAMS_AT_ONCE)))


async def run_wrk(port: int, seconds: float, script: Path) -> float:
    """Requests a second; RuntimeError when any of them failed."""
    process = await asyncio.create_subprocess_exec(
        *("wrk", "-t1", "-c64", f"-d{seconds:g}s", "-s", str(script), f"http://127.0.0.1:{port}{PATH}"),
        stdout=asyncio.subprocess.PIPE,
    )
    out = (await process.communicate())[0].decode()
    result = json.loads(out.splitlines()[-1])
    if result["failed"] or not result["requests"]:
        raise RuntimeError(f"wrk saw failures: {result}")
    return float(result["requests"] / result["seconds"])


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


def upstream_config(folder: Path, port: int, answers: Answers, length: int) -> Path:
    """Static files answer POST with 405: the error page is the answer, chosen by the length of the request."""
    root = folder / "root"
    root.mkdir(parents=True)
    (root / "plain.json").write_bytes(answers.json_plain)
    (root / "asked.json").write_bytes(answers.json_asked)
    (root / "adapter.json").write_bytes(answers.json_adapter)
    server = f"""listen 127.0.0.1:{port} backlog=4096; root {root};
    location = {PATH} {{ error_page 405 =200 $answer; try_files /plain.json =404; }}
    location = /plain.json {{ }} location = /asked.json {{ }} location = /adapter.json {{ }}
    location / {{ return 200 '{{}}'; }}"""
    profile = length + len(f',"vllm_xargs":{{"hemostat":"{ADAPTER}"}}')
    adapter = length - len("fake") + len(ADAPTER)
    by_length = f"{length} /plain.json; {profile} /plain.json; {adapter} /adapter.json; default /asked.json;"
    return nginx_config(folder, server, f"map $content_length $answer {{ {by_length} }}")


# Proxies -------------------------------------------------------------------------------------------------------------


@dataclass
class Proxy:
    name: str
    ports: dict[str, int]
    """By upstream: `json` and `stream`."""
    pids: dict[str, int]
    stats: Stats | None = None


@dataclass
class Bench:
    folder: Path
    upstreams: dict[str, int]
    processes: list[subprocess.Popen[bytes]] = field(default_factory=list)

    def start(
        self,
        command: Sequence[str],
        *,
        pinned: bool = True,
        stdin: bytes | None = None,
        log: str,
        environment: dict[str, str] | None = None,
    ) -> int:
        prefix = ["taskset", "-c", str(PROXY_CORE)] if pinned else []
        with (self.folder / f"{log}.log").open("wb") as out:
            process = subprocess.Popen(
                [*prefix, *command],
                stdin=subprocess.DEVNULL if stdin is None else subprocess.PIPE,
                stdout=out,
                stderr=subprocess.STDOUT,
                cwd=ROOT,
                env=os.environ | (environment or {}),
            )
        if stdin is not None:
            assert process.stdin is not None
            process.stdin.write(stdin)
            process.stdin.close()
        self.processes.append(process)
        return process.pid

    def stop(self) -> None:
        for process in self.processes:
            process.terminate()
        for process in self.processes:
            try:
                process.wait(10)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()

    async def nginx(self) -> Proxy:
        proxy = Proxy("nginx", {}, {})
        for kind, upstream in self.upstreams.items():
            port = proxy.ports[kind] = free_port()
            server = f"""listen 127.0.0.1:{port} backlog=4096;
            location / {{ proxy_pass http://up; proxy_http_version 1.1; proxy_set_header Connection "";
              proxy_buffering off; proxy_set_header Host $http_host; }}"""
            extra = f"upstream up {{ server 127.0.0.1:{upstream}; keepalive 128; keepalive_requests 1000000000; }}"
            config = nginx_config(self.folder / f"nginx-{kind}", server, extra)
            proxy.pids[kind] = self.start(
                ["nginx", "-e", "stderr", "-p", str(config.parent), "-c", str(config)], log=f"nginx-{kind}"
            )
        return proxy

    async def vllm_router(self, program: Path) -> Proxy:
        proxy = Proxy("vllm-router", {}, {})
        for kind, upstream in self.upstreams.items():
            port = proxy.ports[kind] = free_port()
            proxy.pids[kind] = self.start(
                [
                    *(str(program), "--host", "127.0.0.1", "--port", str(port), "--policy", "round_robin"),
                    *("--worker-urls", f"http://127.0.0.1:{upstream}", "--log-level", "error"),
                    *("--prometheus-port", str(free_port()), "--max-concurrent-requests", "1024"),
                ],
                log=f"vllm-router-{kind}",
            )
        return proxy

    async def hemostat(
        self,
        rate: float,
        stack: contextlib.AsyncExitStack,
        checkout: Path | None = None,
        *,
        treated: str = "",
    ) -> Proxy:
        """checkout: of another revision, whose relay is run instead of this one's. treated: what every request gets,
        `profile` or `adapter`."""
        proxy = Proxy(treated or f"{'hemostat' if checkout is None else 'beside'} {rate:g}", {}, {})
        paths = [str(checkout / folder) for folder in ("middleware", "calibration")] if checkout is not None else []
        for kind, upstream in self.upstreams.items():
            port = proxy.ports[kind] = free_port()
            path = self.folder / f"{proxy.name.replace(' ', '-')}-{kind}.sock"
            await stack.enter_async_context(control(path, rate, proxy))
            config = {
                "worker": 0,
                "host": "127.0.0.1",
                "port": port,
                "reuse_port": True,
                "upstream_url": f"http://127.0.0.1:{upstream}",
                "upstream_api_key": None,
                "control_socket": str(path),
                "shutdown_seconds": 1.0,
            }
            proxy.pids[kind] = self.start(
                [sys.executable, "-m", "hemostat.relay.main"],
                stdin=json.dumps(config).encode(),
                log=f"{proxy.name.replace(' ', '-')}-{kind}",
                environment={"PYTHONPATH": os.pathsep.join(paths)} if paths else None,
            )
        return proxy


@contextlib.asynccontextmanager
async def control(path: Path, rate: float, proxy: Proxy) -> AsyncIterator[None]:
    """Stands in for the control process: gives the policy, takes captures and figures."""
    treats = proxy.name in {"profile", "adapter"}
    policy = Policy(
        generation=1,
        mode="auto" if treats else "observe",
        shadow_rate=rate,
        shadow_allow_on=False,
        shadow_top_k=TOP_K,
        shadow_max_tokens=8192,
        scoring=True,
        tap=False,
        forced=None,
        control_fraction=0.0,
        acknowledged=frozenset({ADAPTER}),
        labels=frozenset(),
        serving_by_kind={REST_KIND: ADAPTER} if treats else {},
        adapters={ADAPTER: False} if proxy.name == "adapter" else {},
        base_models=frozenset({"fake"}),
        answered_name="fake",
    )
    writers: set[asyncio.StreamWriter] = set()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writers.add(writer)
        writer.write(encode(policy))
        frames = MessageReader()
        while data := await reader.read(1 << 20):
            # What another revision reports may have another form.
            for message in frames.feed(data) if proxy.name.startswith("hemostat") else ():
                if isinstance(message, Stats):
                    proxy.stats = message
        writer.close()

    server = await asyncio.start_unix_server(serve, str(path))
    try:
        yield
    finally:
        server.close()
        for writer in writers:
            writer.close()


def install_vllm_router() -> Path:
    """Its own environment under build/, made once."""
    folder = BUILD / "vllm-router"
    program = folder / "bin" / "vllm-router"
    if not program.exists():
        print("installing vllm-router into", folder.relative_to(ROOT), flush=True)
        venv.create(folder, with_pip=True)
        subprocess.run([folder / "bin" / "pip", "install", "--quiet", "vllm-router"], check=True)
    return program


# Measuring -----------------------------------------------------------------------------------------------------------


def cpu_seconds(pid: int) -> float:
    """CPU time of all threads that live, user and system."""
    total = 0
    for task in Path(f"/proc/{pid}/task").iterdir():
        with contextlib.suppress(FileNotFoundError):
            total += int((task / "schedstat").read_text().split()[0])
    return total / 1e9


async def until_answering(port: int, name: str, log: Path) -> None:
    deadline = time.monotonic() + 60
    body = json.dumps(request_body(stream=False))
    async with httpx.AsyncClient(trust_env=False) as client:
        while True:
            with contextlib.suppress(httpx.HTTPError):
                response = await client.post(
                    f"http://127.0.0.1:{port}{PATH}", content=body, headers={"content-type": "application/json"}
                )
                if response.status_code == 200:
                    return
            if time.monotonic() > deadline:
                said = log.read_text()  # noqa: ASYNC240  the end of the run
                raise RuntimeError(f"{name} does not answer: {said[-2000:]}")
            await asyncio.sleep(0.1)


def spread(values: Sequence[float]) -> dict[str, float]:
    return {"min": min(values), "median": statistics.median(values), "max": max(values)}


def ratios(values: Sequence[float], base: Sequence[float]) -> dict[str, float]:
    return spread([value / other for value, other in zip(values, base, strict=True)])


async def measure(arguments: argparse.Namespace, folder: Path) -> dict[str, Any]:
    answers = await Answers.make()
    script, length = wrk_script(folder)
    bench = Bench(folder, {"json": free_port(), "stream": free_port()})
    (folder / "answers.json").write_text(
        json.dumps(
            {
                "stream_plain": [event.decode() for event in answers.stream_plain],
                "stream_asked": [event.decode() for event in answers.stream_asked],
            }
        )
    )
    config = upstream_config(folder / "upstream", bench.upstreams["json"], answers, length)
    chunks = len(answers.stream_plain) * STREAMS_AT_ONCE
    async with contextlib.AsyncExitStack() as stack:
        stack.callback(bench.stop)
        bench.start(
            ["nginx", "-e", "stderr", "-p", str(config.parent), "-c", str(config)], pinned=False, log="upstream-json"
        )
        bench.start(
            [
                sys.executable,
                __file__,
                "--stream-upstream",
                str(bench.upstreams["stream"]),
                str(folder / "answers.json"),
            ],
            pinned=False,
            log="upstream-stream",
        )
        for kind, port in bench.upstreams.items():
            await until_answering(port, f"the {kind} upstream", folder / f"upstream-{kind}.log")
        proxies = [
            await bench.hemostat(0.0, stack),
            await bench.hemostat(0.05, stack),
            await bench.hemostat(0.0, stack, treated="profile"),
            await bench.hemostat(0.0, stack, treated="adapter"),
            await bench.nginx(),
            await bench.vllm_router(install_vllm_router()),
        ]
        if arguments.beside is not None:
            proxies += [await bench.hemostat(rate, stack, arguments.beside) for rate in (0.0, 0.05)]
        for proxy in proxies:
            for kind, port in proxy.ports.items():
                log = folder / f"{proxy.name.replace(' ', '-')}-{kind}.log"
                await until_answering(port, proxy.name, log)
        names = [proxy.name for proxy in proxies]
        rate: dict[str, list[float]] = {name: [] for name in (*names, "direct")}
        request_cpu: dict[str, list[float]] = {name: [] for name in names}
        chunk_cpu: dict[str, list[float]] = {name: [] for name in names}
        order = random.Random(1)
        for proxy in proxies:  # warm up
            await run_wrk(proxy.ports["json"], arguments.seconds, script)
        for number in range(arguments.rounds):
            print(f"round {number + 1} of {arguments.rounds}", flush=True)
            rate["direct"].append(await run_wrk(bench.upstreams["json"], arguments.seconds, script))
            for proxy in order.sample(proxies, len(proxies)):
                before = cpu_seconds(proxy.pids["json"])
                per_second = await run_wrk(proxy.ports["json"], arguments.seconds, script)
                spent = cpu_seconds(proxy.pids["json"]) - before
                rate[proxy.name].append(per_second)
                request_cpu[proxy.name].append(spent / (per_second * arguments.seconds) * 1e6)
                before = cpu_seconds(proxy.pids["stream"])
                await run_streams(proxy.ports["stream"])
                chunk_cpu[proxy.name].append((cpu_seconds(proxy.pids["stream"]) - before) / chunks * 1e6)
        await asyncio.sleep(1.5)  # the relays report once a second
        sampled = next(p for p in proxies if p.name == "hemostat 0.05").stats
    to_beside = {
        name: {
            "requests_per_second": ratios(rate[name], rate[other]),
            "cpu_per_request": ratios(request_cpu[name], request_cpu[other]),
            "cpu_per_chunk": ratios(chunk_cpu[name], chunk_cpu[other]),
        }
        for name, other in (("hemostat 0", "beside 0"), ("hemostat 0.05", "beside 0.05"))
        if other in rate
    }
    return {
        "settings": {
            "rounds": arguments.rounds,
            "seconds": arguments.seconds,
            "cores": os.cpu_count(),
            "request_bytes": length,
            "response_bytes": {"plain": len(answers.json_plain), "asked": len(answers.json_asked)},
            "chunks_per_stream": len(answers.stream_plain),
            "streams_at_once": STREAMS_AT_ONCE,
        },
        "requests_per_second": {name: spread(values) for name, values in rate.items()},
        "cpu_us_per_request": {name: spread(values) for name, values in request_cpu.items()},
        "cpu_us_per_chunk": {name: spread(values) for name, values in chunk_cpu.items()},
        "to_vllm_router": {
            "requests_per_second": {name: ratios(rate[name], rate["vllm-router"]) for name in names},
            "cpu_per_request": {name: ratios(request_cpu[name], request_cpu["vllm-router"]) for name in names},
            "cpu_per_chunk": {name: ratios(chunk_cpu[name], chunk_cpu["vllm-router"]) for name in names},
        },
        "to_beside": to_beside,
        "treated": {
            f"{name} / {base}": {
                "requests_per_second": ratios(rate[name], rate[base]),
                "cpu_per_request": ratios(request_cpu[name], request_cpu[base]),
                "cpu_per_chunk": ratios(chunk_cpu[name], chunk_cpu[base]),
                "cpu_us_per_chunk_more": spread([a - b for a, b in zip(chunk_cpu[name], chunk_cpu[base], strict=True)]),
            }
            for name, base in (("profile", "hemostat 0"), ("adapter", "hemostat 0"), ("adapter", "profile"))
        },
        "shadow_counters_at_0.05": {
            name: {"/".join(labels): value for labels, value in series.items()}
            for name, series in (sampled.counters if sampled else {}).items()
        },
    }


def table(result: dict[str, Any]) -> str:
    def cell(values: dict[str, float] | None, form: str) -> str:
        if values is None:
            return "-"
        return f"{values['median']:{form}} ({values['min']:{form}}-{values['max']:{form}})"

    head = ("proxy", "requests/s", "× router", "CPU µs/request", "CPU µs/chunk", "× router")
    rows = [head]
    ratio = result["to_vllm_router"]
    for name, per_second in result["requests_per_second"].items():
        rows.append(
            (
                name,
                cell(per_second, ",.0f"),
                cell(ratio["requests_per_second"].get(name), ".2f"),
                cell(result["cpu_us_per_request"].get(name), ".1f"),
                cell(result["cpu_us_per_chunk"].get(name), ".1f"),
                cell(ratio["cpu_per_chunk"].get(name), ".2f"),
            )
        )
    widths = [max(len(row[i]) for row in rows) for i in range(len(head))]
    lines = ["  ".join(text.ljust(width) for text, width in zip(row, widths, strict=True)) for row in rows]
    for name, found in result["to_beside"].items():
        shown = ", ".join(f"{figure} {cell(values, '.3f')}" for figure, values in found.items())
        lines.append(f"{name} / the same of the other checkout: {shown}")
    for name, found in result["treated"].items():
        lines.append(f"{name}: " + ", ".join(f"{figure} {cell(values, '.3f')}" for figure, values in found.items()))
    return "\n".join(lines)


def serve_streams(port: int, file: Path) -> None:
    loaded = json.loads(file.read_text())
    plain, asked = ([event.encode() for event in loaded[key]] for key in ("stream_plain", "stream_asked"))
    answers = Answers(b"", b"", plain, asked)

    async def run() -> None:
        server = await asyncio.get_running_loop().create_server(lambda: StreamUpstream(answers), "127.0.0.1", port)
        await server.serve_forever()

    uvloop.run(run())


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--seconds", type=float, default=3.0, help="of wrk, each time")
    parser.add_argument("--beside", type=Path, metavar="FOLDER", help="a checkout of another revision to measure, too")
    parser.add_argument("--stream-upstream", nargs=2, metavar=("PORT", "FILE"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.stream_upstream:
        serve_streams(int(arguments.stream_upstream[0]), Path(arguments.stream_upstream[1]))
        return 0
    missing = [name for name in ("nginx", "wrk", "taskset") if shutil.which(name) is None]
    if missing:
        print(f"bench-proxy needs {', '.join(missing)}; on Debian: {INSTALL}", file=sys.stderr)
        return 2
    cores = os.sched_getaffinity(0) - {PROXY_CORE}
    if not cores:
        print("bench-proxy needs two cores: one for the proxy, one for load and upstream", file=sys.stderr)
        return 2
    os.sched_setaffinity(0, cores)
    BUILD.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="hemostat-bench-") as folder:
        result = uvloop.run(measure(arguments, Path(folder)))
    path = BUILD / "proxy.json"
    path.write_text(json.dumps(result, indent=2) + "\n")
    print(table(result))
    print(f"written to {path.relative_to(ROOT)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
