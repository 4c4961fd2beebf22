"""The proxies that are compared, each pinned to one core."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import socket
import subprocess
import sys
import venv
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec
from tests.support import compiled
from tests.support.paths import SOURCES

from hemostat.hooks import Rewrite
from hemostat.interception.intercepted_exchange import InterceptedExchange
from hemostat.interception.interceptor import Interceptor
from hemostat.ipc.messages import ALIVE_SECONDS, REST_KIND, Alive, MessageReader, Policy, Stats, encode

from .load import (
    ADAPTER,
    BUILD,
    PATH,
    PLAIN_BASE,
    PROXY_CORE,
    ROOT,
    TOP_K,
    free_port,
    nginx_config,
)

BY_PLUGIN = "hemostat 0.05, by plugin"
BARE_RELAY = "bare relay"
HEADS_RELAY = "bare relay, heads"
_BARE_RELAY_PROGRAM = Path(__file__).with_name("bare_relay.py")


@dataclass
class Proxy:
    name: str
    ports: dict[str, int]
    """By upstream: `json` and `stream`."""
    pids: dict[str, int]
    checkout: Path | None = None
    """Of another revision, whose relay this is."""
    rate: float = 0.0
    """The sampled share of its requests."""
    treated: str = ""
    """The treatment of every request: `profile` or `adapter`."""
    by_plugin: bool = False
    """If the engine's plugin hands out the tokens of what is sampled."""
    stats: Stats | None = None
    received: int = 0
    """Bytes that its relays sent to the control process: figures and what they sampled."""


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
        pass_fds: Sequence[int] = (),
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
                pass_fds=pass_fds,
            )
        if stdin is not None:
            assert process.stdin is not None
            process.stdin.write(stdin + b"\n")
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

    async def bare_relay(self, *options: str, name: str) -> Proxy:
        """A bound of what a relay in Python can reach; see bare_relay.py, also for the options."""
        proxy = Proxy(name, {}, {})
        for kind, upstream in self.upstreams.items():
            port = proxy.ports[kind] = free_port()
            proxy.pids[kind] = self.start(
                [sys.executable, str(_BARE_RELAY_PROGRAM), str(port), str(upstream), *options],
                log=f"{name.replace(' ', '-')}-{kind}",
            )
        return proxy

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

    async def litellm(self, program: Path) -> Proxy:
        """One worker, without a database, callbacks or logs."""
        proxy = Proxy("litellm", {"json": free_port()}, {})
        config = self.folder / "litellm.yaml"
        base = f"http://127.0.0.1:{self.upstreams['json']}{PLAIN_BASE}"
        parameters = {"model": "openai/fake", "api_base": base, "api_key": "none"}
        config.write_text(json.dumps({"model_list": [{"model_name": "fake", "litellm_params": parameters}]}))
        proxy.pids["json"] = self.start(
            [str(program), "--config", str(config), "--host", "127.0.0.1", "--port", str(proxy.ports["json"])],
            log="litellm-json",
            environment={
                "LITELLM_LOG": "ERROR",
                "LITELLM_LOCAL_MODEL_COST_MAP": "True",
                "LITELLM_DANGEROUSLY_PERMIT_WEAK_OR_UNSET_MASTER_KEY": "true",
            },
        )
        return proxy

    async def hemostat(
        self,
        rate: float,
        stack: contextlib.AsyncExitStack,
        checkout: Path | None = None,
        *,
        compiled: Path | None = None,
        treated: str = "",
        by_plugin: bool = False,
        name: str = "",
    ) -> Proxy:
        """checkout: of another revision, whose relay is run instead of this one's. compiled: the relay is taken from
        there (`compiled_build`). treated, by_plugin: see `Proxy`."""
        named = name or treated or (BY_PLUGIN if by_plugin else f"hemostat {rate:g}")
        if checkout is not None:
            named = f"beside, {named}"
        proxy = Proxy(named, {}, {}, checkout, rate, treated, by_plugin)
        paths = [str(checkout / folder) for folder in SOURCES] if checkout is not None else []
        if compiled is not None:
            paths = [str(compiled)]
        for kind, upstream in self.upstreams.items():
            port = proxy.ports[kind] = free_port()
            path = self.folder / f"{proxy.name.replace(' ', '-')}-{kind}.sock"
            await stack.enter_async_context(control(path, proxy))
            config = {
                "worker": 0,
                "host": "127.0.0.1",
                "port": port,
                "reuse_port": True,
                "upstream": {"urls": [f"http://127.0.0.1:{upstream}"]},
                "upstream_url": f"http://127.0.0.1:{upstream}",  # for relays of before there were several
                "control": {"path": str(path)},
                "control_socket": str(path),  # the same, for relays of before they could be on other machines
                "shutdown_seconds": 1.0,
            }
            with listening(port) as sock:
                fds = [sock.fileno()]
                proxy.pids[kind] = self.start(
                    [sys.executable, "-m", "hemostat.relay.main"],
                    stdin=json.dumps(config | {"fds": fds}).encode(),
                    log=f"{proxy.name.replace(' ', '-')}-{kind}",
                    environment={"PYTHONPATH": os.pathsep.join(paths)} if paths else None,
                    pass_fds=fds,
                )
        return proxy


def compiled_build(checkout: Path | None = None) -> Path | None:
    """Hemostat as the image of this revision or of the checkout has it, with its relay compiled, under build/; made
    again after a change. None where the relay is interpreted: that revision compiles nothing, or nothing can be."""
    if not compiled.modules(checkout or ROOT):
        return None
    folder = BUILD / ("compiled" if checkout is None else "compiled-beside")
    print(f"the compiled relay: {folder.relative_to(ROOT)}", flush=True)
    try:
        return compiled.up_to_date(folder, root=checkout or ROOT)
    except compiled.NoCompilerError as error:
        print(f"relays are interpreted: {error}", flush=True)
        return None


def listening(port: int) -> socket.socket:
    """What the supervisor hands to a relay."""
    return socket.create_server(("127.0.0.1", port), backlog=2048)


def observing(rate: float, **changes: Any) -> Policy:
    """What a relay is told where nothing is treated, with changes."""
    nothing = Policy(
        generation=1,
        mode="observe",
        shadow_rate=rate,
        shadow_allow_on=False,
        shadow_top_k=TOP_K,
        shadow_max_tokens=8192,
        scoring=True,
        tap=False,
        control_fraction=0.0,
        acknowledged=frozenset(),
        labels=frozenset(),
    )
    return msgspec.structs.replace(nothing, **changes)


TAPPED: dict[str, Any] = {"tap": True, "tap_tokens": True, "prefer_plugin": True}
"""Changes of a policy: the engine's plugin hands out the tokens of what is sampled."""


def tapped_length(body: bytes) -> int:
    """Of this body of a chat as a relay sends it on where it is sampled by the plugin."""
    hook = Interceptor(observing(1.0, **TAPPED), lambda capture: True, lambda name, labels: None)
    exchange = hook.begin("POST", PATH.encode(), [], "1", marked=False)
    assert isinstance(exchange, InterceptedExchange)
    rewrite = exchange.request(body)
    assert isinstance(rewrite, Rewrite)
    return len(rewrite.body)


def policy(rate: float, treated: str = "", *, by_plugin: bool = False) -> Policy:
    """Returns what a relay is told; the arguments are described at `Proxy`."""
    return observing(rate, **_changes(treated, by_plugin))


def _changes(treated: str, by_plugin: bool) -> dict[str, Any]:
    return {
        **(TAPPED if by_plugin else {}),
        "mode": "auto" if treated else "observe",
        "acknowledged": frozenset({ADAPTER}),
        "serving_by_kind": {REST_KIND: ADAPTER} if treated else {},
        "adapters": frozenset({ADAPTER} if treated == "adapter" else ()),
        "base_models": frozenset({"fake"}),
        "answered_name": "fake",
    }


def _policy_of_another(checkout: Path, proxy: Proxy) -> bytes:
    """Encoded by that checkout: a relay that cannot read its policy samples nothing, and looks fast."""
    program = "import sys; from tests.bench.proxy.proxies import encode, observing; sys.stdout.buffer.write"
    folders = [str(checkout / folder) for folder in (*SOURCES, ".")]
    changes = _changes(proxy.treated, proxy.by_plugin)
    return subprocess.run(
        [sys.executable, "-c", f"{program}(encode(observing({proxy.rate}, **{changes!r})))"],
        cwd=checkout,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(folders)},
        stdout=subprocess.PIPE,
        check=True,
    ).stdout


@contextlib.asynccontextmanager
async def control(path: Path, proxy: Proxy) -> AsyncIterator[None]:
    """Stands in for the control process: gives the policy, takes captures and figures."""
    if proxy.checkout is not None:
        sent = _policy_of_another(proxy.checkout, proxy)
    else:
        sent = encode(policy(proxy.rate, proxy.treated, by_plugin=proxy.by_plugin))
    writers: set[asyncio.StreamWriter] = set()

    async def stay_alive(writer: asyncio.StreamWriter) -> None:
        """Otherwise a relay takes it for lost, and connects anew."""
        while not writer.is_closing():
            writer.write(encode(Alive()))
            await asyncio.sleep(ALIVE_SECONDS / 2)

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writers.add(writer)
        writer.write(sent)
        # What another revision reports, and takes, may have another form.
        alive = None if proxy.checkout is not None else asyncio.create_task(stay_alive(writer))
        frames = MessageReader()
        with contextlib.suppress(ConnectionError):  # a relay that is stopped
            while data := await reader.read(1 << 20):
                proxy.received += len(data)
                for message in frames.feed(data) if proxy.name.startswith("hemostat") else ():
                    if isinstance(message, Stats):
                        proxy.stats = message
        if alive is not None:
            alive.cancel()
        writer.close()

    server = await asyncio.start_unix_server(serve, str(path))
    try:
        yield
    finally:
        server.close()
        for writer in writers:
            writer.close()


def install_vllm_router() -> Path:
    return _install("vllm-router", "vllm-router")


def install_litellm() -> Path:
    return _install("litellm", "litellm[proxy]")


def _install(program: str, requirement: str) -> Path:
    """In its own environment under build/, made once."""
    folder = BUILD / program
    path = folder / "bin" / program
    if not path.exists():
        print(f"installing {requirement} into {folder.relative_to(ROOT)}", flush=True)
        venv.create(folder, with_pip=True)
        subprocess.run([folder / "bin" / "pip", "install", "--quiet", requirement], check=True)
    return path
