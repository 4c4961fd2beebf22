"""What a sampled answer costs vLLM, by the source of its tokens: CPU time of API server and engine core.

    python -m tests.bench.proxy.engine_cost [--requests 40]

On a real server with SmolLM2-135M (W4A16) on CPUs. Each round sends the same requests without sampling, with logprobs
in the response, and by the plugin, in turn. A request generates 49 tokens; sampled ones carry 20 logprobs at each. The
plugin's time is counted until the answer has come.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import httpx
from tests.support.running_vllm import (
    VLLM_ARGUMENTS,
    RunningVllm,
    answers_of,
    running_vllm,
    wait_until_signed_answers_are_recorded,
)

from hemostat.openai.routes import CHAT
from hemostat_lab.demo.checkpoints import cached_checkpoints

from .load import ASK, TOP_K
from .sampled_cost import TOKENS

ROUNDS = 5
WAYS = ("not sampled", "logprobs in the response", "by the plugin")
USAGE = {"stream_options": {"include_usage": True}}


def cpu_ms(pid: int) -> float:
    """Of all threads of a process since its start; threads that have ended are not in it."""
    tasks = Path(f"/proc/{pid}/task").iterdir()
    return sum(int((task / "schedstat").read_text().split()[0]) for task in tasks) / 1e6


def processes(port: str) -> tuple[int, int]:
    """The API server that listens on the port, and its engine's core."""
    server = next(
        int(folder.name)
        for folder in Path("/proc").glob("[0-9]*")
        if {b"--port", port.encode(), b"vllm.entrypoints.openai.api_server"} <= set(_words(folder))
    )
    core = next(
        int(folder.name)
        for folder in Path("/proc").glob("[0-9]*")
        if b"EngineCore" in b"".join(_words(folder)) and f"\nPPid:\t{server}\n" in (folder / "status").read_text()
    )
    return server, core


def _words(process: Path) -> list[bytes]:
    try:
        return (process / "cmdline").read_bytes().split(b"\0")
    except OSError:
        return []  # it has ended


def ask(server: RunningVllm, client: httpx.Client, way: str, number: int, *, stream: bool) -> None:
    nonce = f"{'stream' if stream else 'json'}-{number}"
    body: dict[str, Any] = {
        "model": server.model,
        "messages": [{"role": "user", "content": "Describe the sea."}],
        **{"max_tokens": TOKENS, "ignore_eos": True, "temperature": 0.7, "seed": number, "stream": stream},
    }
    if way != "not sampled":
        body["vllm_xargs"] = {"hemostat_tap": nonce}
    if way == "logprobs in the response":
        body |= ASK | (USAGE if stream else {})
    if way == "by the plugin":
        body["vllm_xargs"]["hemostat_tap_top"] = str(TOP_K)
    if way != "not sampled":
        body["vllm_xargs"] = server.admin.signed(body["vllm_xargs"])
    client.post(CHAT, json=body).raise_for_status()
    if way == "by the plugin":
        (answer,) = answers_of(server, nonce)
        assert (answer.tokens, answer.top_k) == (TOKENS, TOP_K)


def measure(server: RunningVllm, requests: int, *, stream: bool) -> dict[str, tuple[list[float], list[float]]]:
    """By way: milliseconds per request of the API server and of the engine's core, of each round."""
    pids = processes(server.url.rpartition(":")[2])
    result: dict[str, tuple[list[float], list[float]]] = {way: ([], []) for way in WAYS}
    wait_until_signed_answers_are_recorded(server)
    with httpx.Client(base_url=server.url, timeout=600) as client:
        for way in WAYS:
            ask(server, client, way, 0, stream=stream)
        for first in range(1, requests + 1, requests // ROUNDS):
            numbers = range(first, first + requests // ROUNDS)
            for way in WAYS:
                before = [cpu_ms(pid) for pid in pids]
                for number in numbers:
                    ask(server, client, way, number, stream=stream)
                for spent, pid, start in zip(result[way], pids, before, strict=True):
                    spent.append((cpu_ms(pid) - start) / len(numbers))
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--requests", type=int, default=40, help="of each way, for JSON and for streams")
    requests = parser.parse_args().requests
    if requests < ROUNDS:
        parser.error(f"--requests is {requests}: at least {ROUNDS}, one of each round")
    started = time.monotonic()
    with (
        tempfile.TemporaryDirectory() as folder,
        running_vllm(cached_checkpoints("w4a16", print), Path(folder), VLLM_ARGUMENTS) as server,
    ):
        for stream in (False, True):
            for way, spent in measure(server, requests, stream=stream).items():
                shown = [f"{statistics.median(ms):.1f} ({min(ms):.1f}-{max(ms):.1f})" for ms in spent]
                print(f"{'stream' if stream else 'JSON'}, {way}: API server {shown[0]} ms, engine core {shown[1]} ms")
    print(f"{time.monotonic() - started:.0f} s")


if __name__ == "__main__":
    main()
