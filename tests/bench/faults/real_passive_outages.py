"""Measures what clients of a real vLLM see while the control process of passive mode fails for ten minutes.

Each request is sent to two servers with the same weights, one after the other and in turns as the first: one has the
plugin in passive mode, the other has no plugin that acts. So what disturbs the machine disturbs both, and ratios of
their quantiles have intervals from a bootstrap over pairs. Each outage has servers of its own; its row is kept in
build/bench/passive_outages/, and an interrupted run goes on behind it. Needs vLLM.
"""

from __future__ import annotations

import json
import tempfile
import time
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hemostat_lab.demo import vllm_server
from hemostat_lab.demo.checkpoints import cached_checkpoints

from . import Row

NAME = "real_passive_outages"
TAKES = "about 50 minutes; an interrupted run goes on"
KEPT = Path(__file__).resolve().parents[3] / "build" / "bench" / "passive_outages"

FAULTS = ("killed", "slow", "absent", "wrong token")
SECONDS, REQUESTS = 600.0, 1000
"""The length of each outage, and the pairs of requests in it."""
WARM = 30
"""Requests before the outage, for which the clock does not count."""
RATE = 0.05
TOKENS = 8
P99_LIMIT = 1.1
"""The largest upper end of the interval of the p99's ratio that counts as noise. The interval need not have 1 in it:
it knows the noise of requests, but not how much two servers that were started alike differ."""
GROWTH_MIB = 16.0
"""The largest difference between the growths of the two API servers' memory."""


def ask(url: str, n: int) -> tuple[float, list[int]]:
    """Returns the seconds until the answer was there, and its ids."""
    body: dict[str, Any] = {"model": "smollm2", "prompt": f"Number {n} is", "max_tokens": TOKENS, "temperature": 0.0}
    data = json.dumps(body | {"ignore_eos": True, "return_token_ids": True}).encode()
    request = urllib.request.Request(f"{url}/v1/completions", data, {"content-type": "application/json"})
    begun = time.perf_counter()
    with urllib.request.urlopen(request, timeout=120) as response:
        given = response.read()
    return time.perf_counter() - begun, json.loads(given)["choices"][0]["token_ids"]


def memory_mib(server: vllm_server.VllmServer) -> float:
    """Returns what the API server's process holds."""
    text = Path(f"/proc/{server.pid}/status").read_text(encoding="ascii")
    return int(text.split("VmRSS:")[1].split()[0]) / 1024


def ratio(times: NDArray[np.float64], quantile: float) -> tuple[float, float, float]:
    """times: (2, pairs), the plugin's first. Returns the ratio of both quantiles and its 95 % interval."""
    generator = np.random.default_rng(1)
    drawn = generator.integers(times.shape[1], size=(2000, times.shape[1]))
    passive, plain = np.quantile(times[:, drawn], quantile, axis=2)
    low, high = np.quantile(passive / plain, (0.025, 0.975))
    given = np.quantile(times, quantile, axis=1)
    return float(given[0] / given[1]), float(low), float(high)


def asked(servers: Sequence[vllm_server.VllmServer], seconds: float, requests: int) -> tuple[NDArray[np.float64], int]:
    """Returns the seconds of each pair (2, requests), and how many answers differed."""
    times, different = np.empty((2, requests)), 0
    begun = time.monotonic()
    for n in range(requests):
        time.sleep(max(0.0, begun + seconds * n / requests - time.monotonic()))
        ids: list[list[int]] = [[], []]
        for side in (n % 2, 1 - n % 2):
            times[side, n], ids[side] = ask(servers[side].url, n)
        different += ids[0] != ids[1]
    return times, different


def row_of(fault: str) -> Row:
    from tests.support.engine_admin import TOKEN, EngineAdmin
    from tests.support.passive_vllm import PASSIVE_ARGUMENTS, POLICY

    checkpoint = cached_checkpoints("w4a16", print).compressed
    admin = EngineAdmin()
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        admin.registry.passive.enabled = True
        admin.registry.passive.policy = type(POLICY)(**asdict(POLICY) | {"rate": RATE})
        url = f"http://127.0.0.1:{vllm_server.free_port()}" if fault == "absent" else admin.url
        named = {"HEMOSTAT_ADMIN_URL": url, "HEMOSTAT_ENGINE_TOKEN": TOKEN}
        servers = []
        for name, environment in (("passive", named), ("plain", {})):
            log = folder / f"{name}.log"
            server = vllm_server.VllmServer(checkpoint, "smollm2", log, PASSIVE_ARGUMENTS, environment)
            stack.callback(server.stop)
            server.start()
            servers.append(server)
        for server in servers:
            server.wait_ready(900.0)
        time.sleep(5.0)  # the plugin asks for its policy every two seconds
        asked(servers, 0.0, WARM)
        before = [memory_mib(server) for server in servers]
        admin.fail(fault)
        times, different = asked(servers, SECONDS, REQUESTS)
        grown = [memory_mib(server) - held for server, held in zip(servers, before, strict=True)]
    if fault != "killed":
        admin.close()
    (p50, *about50), (p99, *about99) = ratio(times, 0.5), ratio(times, 0.99)
    measured = (
        f"p50 × {p50:.3f} [{about50[0]:.3f}, {about50[1]:.3f}], p99 × {p99:.3f} [{about99[0]:.3f}, {about99[1]:.3f}]; "
        f"{different} differ; memory {grown[0]:+.1f} MiB, without the plugin {grown[1]:+.1f} MiB"
    )
    holds = about99[1] <= P99_LIMIT and not different and grown[0] - grown[1] < GROWTH_MIB
    case = f"passive mode on real vLLM, control process {fault} for {SECONDS:.0f} s, {REQUESTS} pairs of requests"
    return Row(case, "", measured, f"p99 <= × {P99_LIMIT:g}, 0 differ, memory flat", holds)


def rows() -> Iterator[Row]:
    KEPT.mkdir(parents=True, exist_ok=True)
    for fault in FAULTS:
        kept = KEPT / f"{fault.replace(' ', '_')}.json"
        if not kept.exists():
            kept.write_text(json.dumps(asdict(row_of(fault)), ensure_ascii=False))
        yield Row(**json.loads(kept.read_text()))
