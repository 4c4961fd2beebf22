"""How much of a mixed agent workload is scored: `make bench-coverage`, a table and build/bench/coverage.json.

The mix (tests/bench/agent_mix/mix.yaml) goes through Hemostat to a real vLLM with the W4A16 checkpoint, once with the
plugin in the engine and once without it; the reference is in process. It then goes to vLLM itself, where the plugin
measures alone, with the logits processor and without it. Every request is sampled. `scored_share` is the share of
requests whose tokens both models scored; each reason for which one is not scored is listed with its explanation.

`--only same_figures` sends the same requests to vLLM itself and through a relay, and compares the figures.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
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
SAME_FIGURES = "same_figures"
POLICY_SECONDS = 5.0
"""The plugin asks for its policy every two seconds."""


@dataclass(frozen=True, slots=True)
class Run:
    """relay: requests go through `hemostat serve`. plugin: vLLM has its variables. processor: vLLM has its flag."""

    relay: bool
    plugin: bool
    processor: bool


RUNS = {
    "with_plugin": Run(relay=True, plugin=True, processor=True),
    "without_plugin": Run(relay=True, plugin=False, processor=False),
    "plugin_alone": Run(relay=False, plugin=True, processor=True),
    "plugin_alone_without_processor": Run(relay=False, plugin=True, processor=False),
}
ARGUMENTS = ("--enforce-eager", "--dtype", dtype(), "--max-model-len", "2048", "--max-logprobs", "64")


def say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def until(what: str, done: Callable[[], bool]) -> None:
    ends = time.monotonic() + SETTLES_WITHIN
    while not done():
        if time.monotonic() > ends:
            raise SystemExit(f"not within {SETTLES_WITHIN:.0f} s: {what}")
        time.sleep(0.5)


class Hemostat:
    """A running `hemostat serve`, or `hemostat control` where the plugin measures alone."""

    def __init__(self, run: Run, checkpoints: Checkpoints, upstream: str, admin_port: int, folder: Path) -> None:
        port = free_port()
        self.run = run
        self.url = f"http://127.0.0.1:{port}" if run.relay else upstream
        self._admin = f"http://127.0.0.1:{admin_port}"
        settings = serve_settings(DemoOptions(), checkpoints, upstream, port, admin_port, TOKEN)
        # The least that is more than 0, without which nothing is scored again.
        settings["shadow"] = {**settings["shadow"], "rate": 1.0, "floor_fraction": 1e-9}
        settings["calibration"] = {"mode": "off"}
        settings["adapter"] = {"enabled": False}
        settings["labels"] = Mix.load().names
        settings["evidence"] = {"kinds": 100}
        config = folder / "hemostat.yaml"
        config.write_text(yaml.safe_dump(settings))
        self._command = serve_command(config)
        if not run.relay:
            self._command[self._command.index("serve")] = "control"
        self._log = folder / "hemostat.log"

    def status(self) -> dict[str, Any]:
        try:
            result: dict[str, Any] = httpx.get(f"{self._admin}/api/v1/status", timeout=30).json()
        except httpx.TransportError:
            return {}
        return result

    @contextmanager
    def running(self) -> Iterator[None]:
        with self._log.open("ab") as log:
            process = subprocess.Popen(with_parent(self._command), stdout=log, stderr=log, stdin=subprocess.DEVNULL)
        try:
            yield
        finally:
            process.terminate()
            process.wait()

    def wait_ready(self) -> None:
        """Returns when every request will be sampled."""
        until("the reference is ready", lambda: self.status().get("reference", {}).get("state") == "ready")
        if self.run.processor:
            until("the plugin reports", lambda: self.status()["engines"]["live"] > 0)
        if not self.run.relay:
            until("the plugin samples", lambda: self.status()["passive"]["servers"] > 0)
            time.sleep(POLICY_SECONDS)

    def wait_ended(self, requests: int) -> None:
        until(
            "every request has ended",
            lambda: (
                round(self.status()["coverage"]["requests"]) >= requests and not self.status()["requests"]["pending"]
            ),
        )


def start_vllm(run: Run, checkpoints: Checkpoints, arguments: list[str], admin_port: int, folder: Path) -> VllmServer:
    """Returns vLLM, which is starting."""
    arguments = [*ARGUMENTS, *arguments]
    environment = {}
    if run.plugin:
        environment = {"HEMOSTAT_ADMIN_URL": f"http://127.0.0.1:{admin_port}", "HEMOSTAT_ENGINE_TOKEN": TOKEN}
    if run.processor:
        arguments += ["--logits-processors", LOGITS_PROCESSOR]
    if not run.relay:
        arguments += ["--middleware", "hemostat_engine.client_headers.ClientHeaders"]
    vllm = VllmServer(checkpoints.compressed, MODEL, folder / "vllm.log", arguments, environment)
    vllm.start()
    return vllm


def measure(
    mix: Mix, server: str, checkpoints: Checkpoints, requests: int, at_once: int, folder: Path, *, run: Run
) -> tuple[dict[str, Any], dict[str, list[str]]]:
    """The coverage of the part of the mix that goes to one server, and the requests that vLLM refused."""
    planned = first(mix, MODEL, requests, server)
    admin_port = free_port()
    vllm = start_vllm(run, checkpoints, mix.servers[server], admin_port, folder)
    try:
        hemostat = Hemostat(run, checkpoints, vllm.url, admin_port, folder)
        with hemostat.running():
            vllm.wait_ready(progress=say)
            hemostat.wait_ready()
            failed = send(hemostat.url, planned, at_once)
            hemostat.wait_ended(len(planned))
            coverage: dict[str, Any] = hemostat.status()["coverage"]
            return coverage, failed
    finally:
        vllm.stop()


def same_figures(checkpoints: Checkpoints, requests: int, folder: Path) -> dict[str, Any]:
    """The figures of the same greedy requests, one after another, to vLLM itself and then through a relay to it."""
    admin_port = free_port()
    alone = RUNS["plugin_alone"]
    result: dict[str, Any] = {}
    vllm = start_vllm(alone, checkpoints, ["--no-enable-prefix-caching"], admin_port, folder)
    try:
        vllm.wait_ready(progress=say)
        for name in ("plugin_alone", "with_plugin"):
            hemostat = Hemostat(RUNS[name], checkpoints, vllm.url, admin_port, folder)
            with hemostat.running():
                hemostat.wait_ready()
                for n in range(requests):
                    route, text = ROUTES[n % len(ROUTES)]
                    body = {"model": MODEL, "max_tokens": 24, "temperature": 0.0} | text(f"{n} things about bread:")
                    httpx.post(hemostat.url + route, json=body, timeout=300).raise_for_status()
                hemostat.wait_ended(requests)
                raw = hemostat.status()["raw"]
            result[name] = {key: raw[key] for key in ("requests", "tokens", "total_variation", "top1_agreement")}
            result[name] |= {"kl_nats": raw["kl_nats"]["estimate"], "ci95_seen": raw["kl_nats"].get("ci95_seen")}
            print(f"{name}: {result[name]}", flush=True)
    finally:
        vllm.stop()
    return result


ROUTES: list[tuple[str, Callable[[str], dict[str, Any]]]] = [
    ("/v1/completions", lambda text: {"prompt": text}),
    ("/v1/chat/completions", lambda text: {"messages": [{"role": "user", "content": text}]}),
    ("/v1/chat/completions", lambda text: {"messages": [{"role": "user", "content": text}], "stream": True}),
]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", type=int, default=162, help="of the mix; twice the sum of its weights by default")
    parser.add_argument("--at-once", type=int, default=4)
    parser.add_argument("--only", choices=[*RUNS, SAME_FIGURES])
    given = parser.parse_args()
    began = time.monotonic()
    mix = Mix.load()
    checkpoints = cached_checkpoints("w4a16", say)
    results: dict[str, Any] = {}
    for name, run in RUNS.items():
        if given.only not in (None, name):
            continue
        coverages: list[dict[str, Any]] = []
        refused: dict[str, list[str]] = {}
        for server in mix.servers:
            say(f"{name}: vLLM {server}")
            with tempfile.TemporaryDirectory(prefix="hemostat-") as folder:
                coverage, failed = measure(
                    mix, server, checkpoints, given.requests, given.at_once, Path(folder), run=run
                )
            coverages.append(coverage)
            refused |= failed
        results[name] = {**combine(coverages), "refused_by_vllm": refused}
        print(f"\n{name.replace('_', ' ')}\n{table(results[name])}", flush=True)
        for request, errors in refused.items():
            print(f"answered with an error: {request}, {len(errors)} times, {errors[0]}")
    shares = ", ".join(f"{name.replace('_', ' ')} {run['scored_share']:.1%}" for name, run in results.items())
    if given.only in (None, SAME_FIGURES):
        with tempfile.TemporaryDirectory(prefix="hemostat-") as folder:
            results[SAME_FIGURES] = same_figures(checkpoints, given.requests, Path(folder))
    result = {**results, "seconds": round(time.monotonic() - began, 1)}
    BUILD.mkdir(parents=True, exist_ok=True)
    path = BUILD / "coverage.json"
    path.write_text(json.dumps(result, indent=1, ensure_ascii=False) + "\n")
    print(f"\nrequests scored: {shares}; {path}, {result['seconds']} s")


if __name__ == "__main__":
    main()
