"""The two programs that the demo runs: vLLM with the compressed model, and `hemostat serve`."""

from __future__ import annotations

import asyncio
import os
import secrets
import socket
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx

from hemostat_calibration.messages import in_words
from hemostat_lab.demo.checkpoints import Checkpoints
from hemostat_lab.demo.options import RECORDS, DemoFailure, DemoOptions
from hemostat_lab.demo.vllm_server import (
    LOGITS_PROCESSOR,
    STOP_SECONDS,
    VllmFailure,
    VllmServer,
    dtype,
    free_port,
    on_cpu,
    with_parent,
)

TOP_K = 64
CALIBRATION = {
    "mode": "auto",
    "min_tokens": 100_000,
    "held_out_fraction": 0.7,
    "control_fraction": 0.5,
    "clamp_nats": 0.5,
    "anchors": 1024,
}
"""These settings suit a run of minutes: an adapter needs few texts and a proof many, so most prompts are held out. A
profile of another family recovers less and takes time of the cores: it comes only in long runs. A small clamp, because
the number of requests that a proof needs grows with the range of possible gains. Arms of equal size detect a
difference soonest. More anchors than the model's hidden size (576), so that the features determine the hidden state."""
ADAPTER = {"enabled": True, "rank": 16, "max_tokens": 6000}
"""After the test of the first one, the next is made from twice as many tokens, of at most so many."""
ADAPTER_SLOTS = 2
"""One more than the adapters that are loaded at a time: vLLM's operations on a CPU need a free one."""
POLL_SECONDS = 0.5


def vllm_arguments() -> list[str]:
    """Arguments in addition to those of VllmServer. A GPU build keeps its defaults (graphs, compilation)."""
    arguments = ["--dtype", dtype(), "--max-model-len", "4096", "--max-logprobs", str(TOP_K)]
    if on_cpu():
        arguments.append("--enforce-eager")
    arguments += ["--enable-lora", "--max-loras", str(ADAPTER_SLOTS), "--max-lora-rank", str(ADAPTER["rank"])]
    return [*arguments, "--logits-processors", LOGITS_PROCESSOR]


def vllm_environment(admin_url: str, token: str) -> dict[str, str]:
    """What the plugins in vLLM need."""
    return {
        "HEMOSTAT_ADMIN_URL": admin_url,
        "HEMOSTAT_ENGINE_TOKEN": token,
        "HEMOSTAT_ADAPTERS": "1",
        "VLLM_ALLOW_RUNTIME_LORA_UPDATING": "True",
    }


def serve_settings(
    options: DemoOptions, checkpoints: Checkpoints, upstream: str, data_port: int, admin_port: int, engine_token: str
) -> dict[str, Any]:
    """The configuration of the demo's `hemostat serve`."""
    settings: dict[str, Any] = {
        "listen": {"host": "127.0.0.1", "port": data_port},
        "admin": {
            "host": "127.0.0.1",
            "port": admin_port,
            "token": secrets.token_urlsafe(24),
            "engine_token": engine_token,
        },
        "upstream": {"url": upstream, "openai_sampling_defaults": True},
        "reference": {"backend": "transformers", "model": str(checkpoints.reference.absolute()), "dtype": dtype()},
        "shadow": {"rate": 1.0, "top_k": TOP_K},
        "calibration": dict(CALIBRATION),
        "evidence": {"cycle_hours": 0.0},
        "adapter": dict(ADAPTER),
        "shutdown_seconds": 5.0,
    }
    if options.keep is not None:
        settings["records"] = {"path": str((options.keep / RECORDS).absolute())}
    return settings


def serve_command(config: Path, overrides: Sequence[str] = ()) -> list[str]:
    """The command line of `hemostat serve`; `overrides` are `KEY=VALUE`."""
    flags = [flag for override in overrides for flag in ("--set", override)]
    return [str(Path(sys.executable).parent / "hemostat"), "serve", "--config", str(config), *flags]


@contextmanager
def stopping(vllm: VllmServer) -> Iterator[None]:
    """Stop vLLM on exit."""
    try:
        yield
    finally:
        vllm.stop()


@contextmanager
def serving(command: list[str], log: Path) -> Iterator[subprocess.Popen[bytes]]:
    """Run `hemostat serve`, with its output in `log`; it is stopped on exit."""
    with log.open("wb") as output:
        process = subprocess.Popen(
            with_parent(command),
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            env={name: value for name, value in os.environ.items() if not name.startswith("HEMOSTAT_")},
            start_new_session=True,
        )
    try:
        yield process
    finally:
        process.terminate()
        try:
            process.wait(STOP_SECONDS)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


async def watch_programs(vllm: VllmServer, serve: subprocess.Popen[bytes], logs: Path) -> None:
    """Raises VllmFailure or DemoFailure when one of the two programs ends."""
    while True:
        if (code := vllm.poll()) is not None:
            raise VllmFailure(f"vLLM ended with code {code}; {vllm.log_tail()}")
        if (code := serve.poll()) is not None:
            raise DemoFailure(f"hemostat serve ended with code {code}; {log_tail(logs)}")
        await asyncio.sleep(POLL_SECONDS)


def log_tail(logs: Path) -> str:
    """The last lines of Hemostat's log."""
    log = logs / "hemostat.log"
    lines = log.read_text(encoding="utf-8", errors="replace").splitlines()[-25:]
    return "\n".join([f"the end of {log}:", *lines])


async def warm_up(vllm: VllmServer) -> None:
    """Send one request; vLLM's first one takes longer. Raises DemoFailure."""
    body = {"model": vllm.model, "prompt": "Hello", "max_tokens": 2}
    async with httpx.AsyncClient(timeout=120.0, trust_env=False) as http:
        try:
            (await http.post(f"{vllm.url}/v1/completions", json=body)).raise_for_status()
        except httpx.HTTPError as error:
            raise DemoFailure(f"vLLM's first request failed ({in_words(error)}); {vllm.log_tail()}") from None


def preferred_port(preferred: int) -> int:
    """`preferred` if it is free, else any free port."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", preferred))
        except OSError:
            return free_port()
    return preferred
