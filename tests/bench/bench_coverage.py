"""How much of a mixed agent workload is scored: `make bench-coverage`, a table and build/bench/coverage.json.

The mix (tests/bench/agent_mix/mix.yaml) goes through Hemostat to a real vLLM with the W4A16 checkpoint, once with the
plugin in the engine and once without it; the reference is in process. Every request is sampled. `scored_share` is the
share of requests whose tokens both models scored; each reason for which one is not scored is listed with its
explanation.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import yaml

ROOT = Path(__file__).resolve().parents[2]
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))

from tests.bench.agent_mix.figures import combine, table  # noqa: E402
from tests.bench.agent_mix.workload import Mix, first, send  # noqa: E402

from hemostat_lab.demo.checkpoints import Checkpoints, cached_checkpoints  # noqa: E402
from hemostat_lab.demo.options import DemoOptions  # noqa: E402
from hemostat_lab.demo.programs import serve_command, serve_settings  # noqa: E402
from hemostat_lab.demo.vllm_server import LOGITS_PROCESSOR, VllmServer, dtype, free_port, with_parent  # noqa: E402

BUILD = ROOT / "build" / "bench"
TOKEN = "of-the-benchmark"
MODEL = "compressed"
SETTLES_WITHIN = 900.0
"""Seconds."""
RUNS = {"with_plugin": True, "without_plugin": False}
ARGUMENTS = ("--enforce-eager", "--dtype", dtype(), "--max-model-len", "2048", "--max-logprobs", "64")


def say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def until(what: str, done: Callable[[], bool]) -> None:
    ends = time.monotonic() + SETTLES_WITHIN
    while not done():
        if time.monotonic() > ends:
            raise SystemExit(f"not within {SETTLES_WITHIN:.0f} s: {what}")
        time.sleep(0.5)


def measure(
    mix: Mix, server: str, checkpoints: Checkpoints, requests: int, at_once: int, folder: Path, *, plugin: bool
) -> tuple[dict[str, Any], dict[str, list[str]]]:
    """The coverage of the part of the mix that goes to one server, and the requests that vLLM refused."""
    planned = first(mix, MODEL, requests, server)
    port, admin_port = free_port(), free_port()
    admin = f"http://127.0.0.1:{admin_port}"
    arguments = [*ARGUMENTS, *mix.servers[server]]
    environment = {}
    if plugin:
        arguments += ["--logits-processors", LOGITS_PROCESSOR]
        environment = {"HEMOSTAT_ADMIN_URL": admin, "HEMOSTAT_ENGINE_TOKEN": TOKEN}
    vllm = VllmServer(checkpoints.compressed, MODEL, folder / "vllm.log", arguments, environment)
    settings = serve_settings(DemoOptions(), checkpoints, vllm.url, port, admin_port, TOKEN)
    # The least that is more than 0, without which nothing is scored again.
    settings["shadow"] = {**settings["shadow"], "rate": 1.0, "floor_fraction": 1e-9}
    settings["calibration"] = {"mode": "off"}
    settings["adapter"] = {"enabled": False}
    settings["labels"] = mix.names
    settings["evidence"] = {"kinds": 100}
    config = folder / "hemostat.yaml"
    config.write_text(yaml.safe_dump(settings))

    def status() -> dict[str, Any]:
        try:
            result: dict[str, Any] = httpx.get(f"{admin}/api/v1/status", timeout=30).json()
        except httpx.TransportError:
            return {}
        return result

    with (folder / "hemostat.log").open("wb") as log:
        serving = subprocess.Popen(with_parent(serve_command(config)), stdout=log, stderr=log, stdin=subprocess.DEVNULL)
    try:
        vllm.start()
        vllm.wait_ready(progress=say)
        until("the reference is ready", lambda: status().get("reference", {}).get("state") == "ready")
        if plugin:
            until("the plugin reports", lambda: status()["engines"]["live"] > 0)
        failed = send(f"http://127.0.0.1:{port}", planned, at_once)
        until(
            "every request has ended",
            lambda: round(status()["coverage"]["requests"]) >= len(planned) and not status()["requests"]["pending"],
        )
        coverage: dict[str, Any] = status()["coverage"]
        return coverage, failed
    finally:
        vllm.stop()
        serving.terminate()
        serving.wait()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", type=int, default=162, help="of the mix; twice the sum of its weights by default")
    parser.add_argument("--at-once", type=int, default=4)
    parser.add_argument("--only", choices=RUNS)
    given = parser.parse_args()
    began = time.monotonic()
    mix = Mix.load()
    checkpoints = cached_checkpoints("w4a16", say)
    results: dict[str, Any] = {}
    for name, plugin in RUNS.items():
        if given.only not in (None, name):
            continue
        coverages, refused = [], {}
        for server in mix.servers:
            say(f"{name}: vLLM {server}")
            with tempfile.TemporaryDirectory(prefix="hemostat-") as folder:
                coverage, failed = measure(
                    mix, server, checkpoints, given.requests, given.at_once, Path(folder), plugin=plugin
                )
            coverages.append(coverage)
            refused |= failed
        results[name] = {**combine(coverages), "refused_by_vllm": refused}
        print(f"\n{name.replace('_', ' ')}\n{table(results[name])}", flush=True)
        for request, errors in refused.items():
            print(f"answered with an error: {request}, {len(errors)} times, {errors[0]}")
    result = {**results, "seconds": round(time.monotonic() - began, 1)}
    BUILD.mkdir(parents=True, exist_ok=True)
    path = BUILD / "coverage.json"
    path.write_text(json.dumps(result, indent=1, ensure_ascii=False) + "\n")
    shares = ", ".join(f"{name.replace('_', ' ')} {run['scored_share']:.1%}" for name, run in results.items())
    print(f"\nrequests scored: {shares}; {path}, {result['seconds']} s")


if __name__ == "__main__":
    main()
