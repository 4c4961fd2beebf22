"""How far each model is from itself: `make bench-floor`, a table and build/bench/floor.json.

The noise floor as Hemostat itself measures it while serving: vLLM with the W4A16 checkpoint, the reference in process,
a few requests at once, every one of them scored and, as fast as the floor's queue takes them, scored again.
"compressed": what vLLM decoded against its own prefill of the same tokens. "reference": its answer against its answer
in another batch. Nats per token from the top 64 ids, with asymptotic intervals over requests for all looks together.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from pathlib import Path
from typing import Any

import httpx
import yaml

from hemostat_lab.demo import prompts
from hemostat_lab.demo.checkpoints import cached_checkpoints
from hemostat_lab.demo.options import DemoOptions
from hemostat_lab.demo.programs import serve_command, serve_settings, vllm_arguments
from hemostat_lab.demo.vllm_server import VllmServer, free_port, with_parent

BUILD = Path(__file__).resolve().parents[2] / "build" / "bench"
FIGURES = {"kl_nats": "KL(r‖c), at least", "total_variation": "TV, at least", "top1_agreement": "same top-1"}
TOKEN = "of-the-benchmark"
SETTLES_WITHIN = 300.0
"""Seconds."""


def until(what: str, done: Callable[[], bool]) -> None:
    ends = time.monotonic() + SETTLES_WITHIN
    while not done():
        if time.monotonic() > ends:
            raise SystemExit(f"not within {SETTLES_WITHIN:.0f} s: {what}")
        time.sleep(0.5)


def measure(requests: int, at_once: int, folder: Path) -> dict[str, Any]:
    """The status of a Hemostat that has scored `requests`."""
    checkpoints = cached_checkpoints("w4a16", lambda line: print(line, file=sys.stderr))
    vllm = VllmServer(checkpoints.compressed, "compressed", folder / "vllm.log", vllm_arguments())
    port, admin_port = free_port(), free_port()
    settings = serve_settings(DemoOptions(), checkpoints, vllm.url, port, admin_port, TOKEN)
    settings["shadow"]["floor_fraction"] = 1.0
    settings["calibration"] = {"mode": "off"}
    config = folder / "hemostat.yaml"
    config.write_text(yaml.safe_dump(settings))
    vllm.start()
    try:
        vllm.wait_ready(progress=lambda line: print(line, file=sys.stderr))
        with (folder / "hemostat.log").open("wb") as log:
            command = with_parent(serve_command(config))
            serving = subprocess.Popen(command, stdout=log, stderr=log, stdin=subprocess.DEVNULL)
        try:
            return _measured(requests, at_once, f"http://127.0.0.1:{port}", f"http://127.0.0.1:{admin_port}")
        finally:
            serving.terminate()
            serving.wait()
    finally:
        vllm.stop()


def _measured(requests: int, at_once: int, url: str, admin: str) -> dict[str, Any]:
    def status() -> dict[str, Any]:
        try:
            result: dict[str, Any] = httpx.get(f"{admin}/api/v1/status", timeout=30).json()
        except httpx.TransportError:
            return {}
        return result

    until("the reference is ready", lambda: status().get("reference", {}).get("state") == "ready")

    def ask(planned: tuple[str, dict[str, Any]]) -> None:
        _, body = planned
        httpx.post(f"{url}/v1/chat/completions", json=body, timeout=300).raise_for_status()

    with ThreadPoolExecutor(at_once) as pool:
        for done, _ in enumerate(pool.map(ask, islice(prompts.plan(prompts.load(), "compressed", 0), requests)), 1):
            if done % 10 == 0:
                print(f"{done} of {requests} requests", file=sys.stderr)

    def seen() -> int:
        return sum(figures["requests"] for figures in status()["noise_floor"].values())

    before = -1
    while (now := seen()) != before or status()["requests"]["pending"]:
        before = now
        time.sleep(8.0)
    return status()


def _told(figures: dict[str, Any], name: str) -> tuple[float, list[float]]:
    figure = figures[name]
    return (figure["estimate"], figure["ci95"]) if isinstance(figure, dict) else (figure, figures["ci95"][name])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", type=int, default=100)
    parser.add_argument("--at-once", type=int, default=4)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="hemostat-floor-") as folder:
        result = measure(given.requests, given.at_once, Path(folder))
    rows = {"reference against compressed": result["raw"]} | {
        f"{model} against itself": figures for model, figures in result["noise_floor"].items()
    }
    BUILD.mkdir(parents=True, exist_ok=True)
    report = {"rows": rows, "excess": result["excess"]}
    (BUILD / "floor.json").write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    print(f"{'':<30}{'requests':>9}{'tokens':>8}" + "".join(f"  {name:>32}" for name in FIGURES.values()))
    for name, figures in rows.items():
        told = [f"{mean:.3g} [{low:.3g}, {high:.3g}]" for mean, (low, high) in (_told(figures, f) for f in FIGURES)]
        print(f"{name:<30}{figures['requests']:>9}{figures['tokens']:>8}" + "".join(f"  {cell:>32}" for cell in told))


if __name__ == "__main__":
    main()
