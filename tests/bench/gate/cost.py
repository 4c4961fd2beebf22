"""Measures the CPU time of a relay for a request, and of the control process, with a live gate and without one.

`python -m tests.bench.gate.cost`: two `hemostat serve` with the same engine and the same reference, of which one has a
gate whose candidate answers a fifth of the prompts. In each round both get the same requests, 50 in a second of which
5 % are sampled, one after the other; the next round begins with the other one. CPU time is what the kernel counted for
all threads of a process, so it depends little on what else the machine does.
"""

from __future__ import annotations

import argparse
import asyncio
import statistics
import sys
import tempfile
from contextlib import ExitStack
from pathlib import Path

import httpx
import numpy as np
from tests.bench.bench_proxy import cpu_seconds, median_interval
from tests.support.served import RELAY
from tests.support.stack import Stack, fake_engine, hemostat, sampling_settings

RATE = 50.0
SAMPLED = 0.05
PROCESSES = {"relay": RELAY, "control process": "hemostat.control.process"}


async def send(url: str, prompts: list[list[int]]) -> None:
    async with httpx.AsyncClient(trust_env=False, timeout=60.0) as client:

        async def one(number: int, prompt: list[int]) -> None:
            await asyncio.sleep(number / RATE)
            body = {"model": "fake", "prompt": prompt, "max_tokens": 48, "temperature": 1.0}
            (await client.post(f"{url}/v1/completions", json=body)).raise_for_status()

        await asyncio.gather(*(one(number, prompt) for number, prompt in enumerate(prompts)))


def measured(stack: Stack, prompts: list[list[int]]) -> dict[str, float]:
    """Returns the CPU seconds that each process took for the prompts, and for three seconds after them."""
    pids = {name: stack.process(module) for name, module in PROCESSES.items()}
    before = {name: cpu_seconds(pid) for name, pid in pids.items()}

    async def load() -> None:
        await send(stack.url, prompts)
        await asyncio.sleep(3.0)

    asyncio.run(load())
    return {name: cpu_seconds(pid) - before[name] for name, pid in pids.items()}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=12)
    parser.add_argument("--requests", type=int, default=400, help="for each of both, in a round")
    options = parser.parse_args()
    random = np.random.default_rng(4)
    with ExitStack() as opened:
        work = Path(opened.enter_context(tempfile.TemporaryDirectory()))
        engine, judge, candidate = (opened.enter_context(fake_engine()) for _ in range(3))
        settings = sampling_settings(engine.url, {"backend": "vllm", "url": judge.url})
        settings["shadow"]["rate"] = SAMPLED
        gate = {"gate": {"candidate": candidate.url, "tokens_per_hour": 100_000_000}}
        stacks = {
            "with": opened.enter_context(hemostat(settings | gate, work / "with")),
            "without": opened.enter_context(hemostat(settings, work / "without")),
        }
        taken: dict[str, dict[str, list[float]]] = {which: {name: [] for name in PROCESSES} for which in stacks}
        for number in range(options.rounds + 1):
            prompts = random.integers(0, 200, (options.requests, 48)).tolist()
            for which in sorted(stacks, reverse=bool(number % 2)):
                found = measured(stacks[which], prompts)
                for name, seconds in found.items() if number else ():  # the first round warms up
                    taken[which][name].append(seconds)
        units = stacks["with"].admin.get("/api/v1/gate").json()["units"]
    seconds = options.requests / RATE
    relay = [a / b for a, b in zip(taken["with"]["relay"], taken["without"]["relay"], strict=True)]
    low, high = median_interval(relay)
    ms = 1000.0 * statistics.median(taken["without"]["relay"]) / options.requests
    print(f"relay: {ms:.3f} ms of CPU a request; with a gate × {statistics.median(relay):.3f} [{low:.3f}, {high:.3f}]")
    name = "control process"
    more = [100.0 * (a - b) / seconds for a, b in zip(taken["with"][name], taken["without"][name], strict=True)]
    low, high = median_interval(more)
    base = 100.0 * statistics.median(taken["without"][name]) / seconds
    print(
        f"{name}: {base:.1f} % of a core; with a gate {statistics.median(more):+.1f} [{low:.1f}, {high:.1f}] points "
        f"more ({units} requests were compared)"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
