"""What the relay costs, beside nginx and PyPI's vllm-router: `make bench-proxy`, a table and build/bench/proxy.json.

Every proxy is pinned to one core, the same for all, and has the same upstreams; load and upstreams have the other
cores. Rounds are interleaved, so that whatever else the machine does hits all alike; ratios are taken round by round.

requests/s  wrk, 64 kept-alive connections, a chat completion as vLLM answers it (JSON), the upstream an nginx that has
            the answers ready: one for what the client sent, one with logprobs for a request that has grown on its way.
sampled     what one sampled answer costs, as CPU time of the threads that do the work, relay and control process
            together: see proxy/sampled_cost.py. Independent of what else the machine does, but for its caches.
cpu/chunk   CPU time of the proxy (all of its threads, /proc/PID/task/*/schedstat) for each SSE chunk of streams that
            bring one every 10 ms, 50 at a time.

"hemostat N" samples the fraction N of the requests and treats none: it asks for logprobs in the response, and removes
them. "By plugin", the engine's plugin hands out the tokens, past the relay, as a vLLM does that runs it.
"profile" and "adapter" sample none and treat all: with a profile of the logits, whose answers are read for their first
event, and with an adapter, whose name is replaced in every chunk. Their ratios to "hemostat 0" and to each other are
taken in the same rounds. All these relays are compiled, as in the image (build/bench/compiled, built once and after
each change of the sources), and "hemostat 0, interpreted" runs the sources. Without a C compiler they are interpreted,
and the table says so; "sampled" always is.
"bare relay" hands on bytes and does nothing else, "bare relay, heads" also parses the heads of messages: the bounds of
what Python can do (proxy/bare_relay.py).
LiteLLM's proxy forwards the same chat completions, in the same rounds. It is not measured with streams.
"direct" is the upstream without a proxy: no proxy can be measured beyond it.

`--latency` measures only what each proxy adds to the wait of a client, in microseconds, where all get half of the
requests/s that the slowest of them takes (proxy/latency.py).

`--beside FOLDER` compares the relay with the one of another checkout (`git worktree add FOLDER REVISION`), and measures
nothing else: untreated, sampled, and treated requests, and what a sampled answer costs (proxy/sampled_beside.py). In
each round both are started, since two starts of one relay differ by up to 4 %, and measured, one immediately after the
other; the next round begins with the other one. Printed is the median of the rounds' ratios with its interval. Both
relays are compiled; with `--interpreted`, or without a C compiler, both run their sources. The CPU time is the figure
to look at if the machine does other things.
Instructions, which do not depend on these at all: `python -m tests.bench.proxy.instructions --beside FOLDER`.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import math
import os
import random
import shutil
import statistics
import sys
import tempfile
import time
from collections import Counter
from collections.abc import AsyncIterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import httpx
import uvloop

ROOT = Path(__file__).resolve().parents[2]
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))

from tests.bench.proxy import plugin_cost, sampled_beside, sampled_cost  # noqa: E402
from tests.bench.proxy.latency import QUANTILES, run_latency  # noqa: E402
from tests.bench.proxy.load import (  # noqa: E402  the root is no package
    BUILD,
    INSTALL,
    PATH,
    PROXY_CORE,
    STREAMS_AT_ONCE,
    Answers,
    StreamUpstream,
    chat_request,
    free_port,
    request_body,
    run_streams,
    run_wrk,
    upstream_config,
    wrk_script,
)
from tests.bench.proxy.proxies import (  # noqa: E402
    BARE_RELAY,
    BY_PLUGIN,
    HEADS_RELAY,
    Bench,
    Proxy,
    compiled_build,
    install_litellm,
    install_vllm_router,
    tapped_length,
)

INTERPRETED = "hemostat 0, interpreted"
BARE_RELAYS = (BARE_RELAY, HEADS_RELAY)
BESIDE = ((0.0, "", False), (0.05, "", False), (0.05, "", True), (0.0, "profile", False), (0.0, "adapter", False))
"""The traffic that is compared with another checkout; arguments of `Bench.hemostat`: rate, treated, by_plugin."""
START_SECONDS = 300.0
"""LiteLLM's proxy imports for a minute on a busy machine."""


def cpu_seconds(pid: int) -> float:
    """CPU time of all threads that live, user and system."""
    total = 0
    for task in Path(f"/proc/{pid}/task").iterdir():
        with contextlib.suppress(FileNotFoundError):
            total += int((task / "schedstat").read_text().split()[0])
    return total / 1e9


async def until_answering(port: int, name: str, log: Path) -> None:
    deadline = time.monotonic() + START_SECONDS
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


def spread(values: Sequence[float]) -> dict[str, float] | None:
    """None where nothing was measured."""
    if not values:
        return None
    low, high = median_interval(values)
    return {
        "min": min(values),
        "median": statistics.median(values),
        "max": max(values),
        "low": low,
        "high": high,
    }


def median_interval(values: Sequence[float], confidence: float = 0.95) -> tuple[float, float]:
    """Of the median of what the rounds were drawn from, whatever its distribution: two order statistics. With fewer
    than six rounds the confidence is lower, and the interval is from the smallest value to the largest.

    >>> median_interval([1, 2, 3, 4, 5, 6, 7])
    (1, 7)
    >>> median_interval(range(1, 10))
    (2, 8)
    """
    ordered, number = sorted(values), len(values)
    outside, dropped = 2.0 * 0.5**number, 0
    while outside + 2 * math.comb(number, dropped + 1) * 0.5**number <= 1.0 - confidence:
        dropped += 1
        outside += 2 * math.comb(number, dropped) * 0.5**number
    return ordered[dropped], ordered[-1 - dropped]


def ratios(values: Sequence[float], base: Sequence[float]) -> dict[str, float] | None:
    return spread([value / other for value, other in zip(values, base, strict=True)])


@dataclass
class Setting:
    """The upstreams, the load, and what starts proxies between them."""

    bench: Bench
    stack: contextlib.AsyncExitStack
    answers: Answers
    script: Path
    """The script that wrk runs."""
    request_bytes: int
    seconds: int

    @property
    def chunks(self) -> int:
        """The number of chunks of all streams that are sent at a time."""
        return len(self.answers.stream_plain) * STREAMS_AT_ONCE

    async def warm_up(self, proxies: Sequence[Proxy], folder: Path) -> None:
        """folder: of their logs."""
        for proxy in proxies:
            for kind, port in proxy.ports.items():
                await until_answering(port, proxy.name, folder / f"{proxy.name.replace(' ', '-')}-{kind}.log")
        for proxy in proxies:
            await run_wrk(proxy.ports["json"], self.seconds, self.script)


@contextlib.asynccontextmanager
async def upstreams(arguments: argparse.Namespace, folder: Path) -> AsyncIterator[Setting]:
    answers = await Answers.make()
    script, length = wrk_script(folder)
    kinds = ("json",) if arguments.without_streams else ("json", "stream")
    bench = Bench(folder, {kind: free_port() for kind in kinds})
    (folder / "answers.json").write_text(
        json.dumps(
            {
                "stream_plain": [event.decode() for event in answers.stream_plain],
                "stream_asked": [event.decode() for event in answers.stream_asked],
            }
        )
    )
    tapped = tapped_length(json.dumps(request_body(stream=False)).encode())
    config = upstream_config(folder / "upstream", bench.upstreams["json"], answers, length, tapped)
    async with contextlib.AsyncExitStack() as stack:
        stack.callback(bench.stop)
        bench.start(
            ["nginx", "-e", "stderr", "-p", str(config.parent), "-c", str(config)], pinned=False, log="upstream-json"
        )
        if not arguments.without_streams:
            port, file = bench.upstreams["stream"], folder / "answers.json"
            bench.start(
                [sys.executable, __file__, "--stream-upstream", str(port), str(file)],
                pinned=False,
                log="upstream-stream",
            )
        for kind, port in bench.upstreams.items():
            await until_answering(port, f"the {kind} upstream", folder / f"upstream-{kind}.log")
        yield Setting(bench, stack, answers, script, length, arguments.seconds)


class Figures:
    """The figures of each proxy, round by round."""

    def __init__(self, names: Sequence[str]) -> None:
        self.rate: dict[str, list[float]] = {name: [] for name in names}
        self.request_cpu: dict[str, list[float]] = {name: [] for name in names}
        """Microseconds."""
        self.chunk_cpu: dict[str, list[float]] = {name: [] for name in names}
        """Microseconds; nothing where no streams are measured."""

    async def measure(self, proxy: Proxy, setting: Setting) -> None:
        before = cpu_seconds(proxy.pids["json"])
        load = await run_wrk(proxy.ports["json"], setting.seconds, setting.script)
        spent = cpu_seconds(proxy.pids["json"]) - before
        self.rate[proxy.name].append(load.per_second)
        self.request_cpu[proxy.name].append(spent / load.requests * 1e6)
        if "stream" not in proxy.pids:
            return
        before = cpu_seconds(proxy.pids["stream"])
        await run_streams(proxy.ports["stream"])
        self.chunk_cpu[proxy.name].append((cpu_seconds(proxy.pids["stream"]) - before) / setting.chunks * 1e6)

    def to(self, name: str, other: str) -> dict[str, dict[str, float] | None]:
        """Returns the ratios of one proxy's figures to the other's, in the same rounds."""
        return {
            "requests_per_second": ratios(self.rate[name], self.rate[other]),
            "cpu_per_request": ratios(self.request_cpu[name], self.request_cpu[other]),
            "cpu_per_chunk": ratios(self.chunk_cpu[name], self.chunk_cpu[other]),
        }


async def measure_beside(arguments: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """The relay, and the one of another checkout, in alternating rounds."""
    builds = [None if arguments.interpreted else compiled_build(checkout) for checkout in (None, arguments.beside)]
    if None in builds and builds != [None, None]:
        print("one of the two cannot be compiled, so that both run their sources", flush=True)
        builds = [None, None]
    figures: Figures | None = None
    received: Counter[str] = Counter()
    costs: list[tuple[dict[str, float], dict[str, float]]] = []
    folders = (ROOT, arguments.beside.resolve())
    async with upstreams(arguments, folder) as setting:
        for number in range(arguments.rounds):
            print(f"round {number + 1} of {arguments.rounds}", flush=True)
            bench = Bench(folder / f"round-{number}", setting.bench.upstreams)
            bench.folder.mkdir()
            turn = (0, 1) if number % 2 == 0 else (1, 0)
            spent = {at: sampled_beside.measure(folders[at], builds[at]) for at in turn}
            costs.append((spent[0], spent[1]))
            async with contextlib.AsyncExitStack() as stack:
                stack.callback(bench.stop)
                pairs = [
                    [
                        await bench.hemostat(
                            rate, stack, checkout, compiled=build, treated=treated, by_plugin=by_plugin
                        )
                        for checkout, build in zip((None, arguments.beside), builds, strict=True)
                    ]
                    for rate, treated, by_plugin in BESIDE
                ]
                proxies = [proxy for pair in pairs for proxy in pair]
                figures = figures or Figures([proxy.name for proxy in proxies])
                await setting.warm_up(proxies, bench.folder)
                for pair in pairs:
                    for at in turn:
                        await figures.measure(pair[at], setting)
                for proxy in proxies:
                    received[proxy.name] += proxy.received
    assert figures is not None
    names = [pair[0].name for pair in pairs]
    for which in ("", "beside, "):
        for name in names[1:]:
            if received[which + name] < 2 * received[f"{which}hemostat 0"]:
                raise SystemExit(f"{which}{name} sampled and treated nothing, so that its comparison is none")
    return {
        "settings": {"rounds": arguments.rounds, "seconds": arguments.seconds, "compiled": builds != [None, None]},
        "requests_per_second": {name: spread(values) for name, values in figures.rate.items()},
        "cpu_us_per_request": {name: spread(values) for name, values in figures.request_cpu.items()},
        "cpu_us_per_chunk": {name: spread(values) for name, values in figures.chunk_cpu.items()},
        "sampled_answer_ms": {
            name: [spread([cost[at][name] for cost in costs]) for at in (0, 1)] for name in costs[0][0]
        },
        "to_beside": {name: figures.to(name, f"beside, {name}") for name in names}
        | {
            f"a sampled answer, {name}": {
                "cpu": ratios([ours[name] for ours, _ in costs], [theirs[name] for _, theirs in costs])
            }
            for name in costs[0][0]
        },
        "to_untreated": {
            which + name: figures.to(which + name, f"{which}hemostat 0")
            for which in ("", "beside, ")
            for name in names[1:]
        },
    }


def table_beside(result: dict[str, Any]) -> str:
    rounds, how = result["settings"]["rounds"], "compiled" if result["settings"]["compiled"] else "interpreted"
    kind = "95 % interval" if rounds >= 6 else "range"  # see median_interval
    lines = [f"both relays are {how}; {rounds} rounds; a CPU time below 1 is better, requests/s above 1"]
    for title, group in (("the same of the other checkout", "to_beside"), ("untreated", "to_untreated")):
        for name, figures in result[group].items():
            for figure, ratio in figures.items():
                if ratio is not None:
                    interval = f"{kind} [{ratio['low']:.3f}, {ratio['high']:.3f}]"
                    lines.append(f"{name} / {title}, {figure}: {ratio['median']:.3f}, {interval}")
    return "\n".join(lines)


async def measure_latency(arguments: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Returns the time that each proxy adds to a wait, all at half of the rate that the slowest of them takes."""
    compiled = compiled_build()
    arguments.without_streams = True
    async with upstreams(arguments, folder) as setting:
        bench, stack = setting.bench, setting.stack
        proxies = [
            await bench.hemostat(0.0, stack, compiled=compiled),
            await bench.hemostat(0.05, stack, compiled=compiled),
            await bench.hemostat(0.05, stack, compiled=compiled, by_plugin=True),
            await bench.hemostat(0.0, stack, compiled=compiled, treated="profile"),
            await bench.hemostat(0.0, stack, compiled=compiled, treated="adapter"),
            await bench.nginx(),
            await bench.vllm_router(install_vllm_router()),
        ]
        await setting.warm_up(proxies, folder)
        figures = Figures([proxy.name for proxy in proxies])
        for proxy in proxies:
            await figures.measure(proxy, setting)
        rate = min(values[0] for values in figures.rate.values()) / 2
        request = folder / "request"
        request.write_bytes(chat_request())
        ports = {"direct": bench.upstreams["json"]} | {proxy.name: proxy.ports["json"] for proxy in proxies}
        waits: dict[str, list[dict[str, float]]] = {name: [] for name in ports}
        order = random.Random(1)
        for number in range(arguments.rounds):
            print(f"round {number + 1} of {arguments.rounds}", flush=True)
            for name in order.sample(list(ports), len(ports)):
                waits[name].append(await run_latency(ports[name], rate, arguments.seconds, number, request))
    added = {
        name: {
            quantile: [wait[quantile] - base[quantile] for wait, base in zip(waits[name], waits["direct"], strict=True)]
            for quantile in QUANTILES
        }
        for name in ports
        if name != "direct"
    }
    return {
        "settings": {"rounds": arguments.rounds, "seconds": arguments.seconds, "compiled": compiled is not None},
        "requests_per_second": rate,
        "most_requests_per_second": {name: values[0] for name, values in figures.rate.items()},
        "direct_us": {quantile: spread([wait[quantile] for wait in waits["direct"]]) for quantile in QUANTILES},
        "added_us": {name: {q: spread(values) for q, values in each.items()} for name, each in added.items()},
        "to_untreated": {
            name: {q: ratios(values, added["hemostat 0"][q]) for q, values in each.items()}
            for name, each in added.items()
        },
    }


def table_latency(result: dict[str, Any]) -> str:
    def cell(values: dict[str, float], form: str) -> str:
        return f"{values['median']:{form}} ({values['min']:{form}}-{values['max']:{form}})"

    rate, rounds = result["requests_per_second"], result["settings"]["rounds"]
    lines = [f"at {rate:,.0f} requests/s, µs, median (range) of {rounds} rounds; added to the wait without a proxy"]
    lines.append("without a proxy: " + ", ".join(f"{q} {cell(v, '.0f')}" for q, v in result["direct_us"].items()))
    for name, added in result["added_us"].items():
        shown = ", ".join(
            f"{q} {cell(values, '.0f')}, {cell(result['to_untreated'][name][q], '.2f')} × untreated"
            for q, values in added.items()
        )
        lines.append(f"{name} (at most {result['most_requests_per_second'][name]:,.0f} requests/s): {shown}")
    return "\n".join(lines)


async def measure(arguments: argparse.Namespace, folder: Path) -> dict[str, Any]:
    costs = await sampled_cost.measure_both()
    by_plugin = plugin_cost.lines(await plugin_cost.measure_both(), plugin_cost.message_ms())
    compiled = compiled_build()
    async with upstreams(arguments, folder) as setting:
        bench, stack = setting.bench, setting.stack
        proxies = [
            await bench.hemostat(0.0, stack, compiled=compiled),
            await bench.hemostat(0.05, stack, compiled=compiled),
            await bench.hemostat(0.05, stack, compiled=compiled, by_plugin=True),
            await bench.hemostat(0.0, stack, compiled=compiled, treated="profile"),
            await bench.hemostat(0.0, stack, compiled=compiled, treated="adapter"),
            await bench.bare_relay(name=BARE_RELAY),
            await bench.bare_relay("--heads", name=HEADS_RELAY),
            await bench.nginx(),
            await bench.vllm_router(install_vllm_router()),
        ]
        if compiled is not None:
            proxies.append(await bench.hemostat(0.0, stack, name=INTERPRETED))
        if not arguments.without_litellm:
            proxies.append(await bench.litellm(install_litellm()))
        names = [proxy.name for proxy in proxies]
        figures = Figures([*names, "direct"])
        order = random.Random(1)
        await setting.warm_up(proxies, folder)
        for number in range(arguments.rounds):
            print(f"round {number + 1} of {arguments.rounds}", flush=True)
            direct = await run_wrk(bench.upstreams["json"], arguments.seconds, setting.script)
            figures.rate["direct"].append(direct.per_second)
            for proxy in order.sample(proxies, len(proxies)):
                await figures.measure(proxy, setting)
        await asyncio.sleep(1.5)  # the relays report once a second
        sampled = next(p for p in proxies if p.name == "hemostat 0.05").stats
    rate, request_cpu, chunk_cpu = figures.rate, figures.request_cpu, figures.chunk_cpu
    return {
        "settings": {
            "rounds": arguments.rounds,
            "seconds": arguments.seconds,
            "cores": os.cpu_count(),
            "request_bytes": setting.request_bytes,
            "response_bytes": {"plain": len(setting.answers.json_plain), "asked": len(setting.answers.json_asked)},
            "chunks_per_stream": len(setting.answers.stream_plain),
            "streams_at_once": STREAMS_AT_ONCE,
            "compiled": compiled is not None,
        },
        "requests_per_second": {name: spread(values) for name, values in rate.items()},
        "cpu_us_per_request": {name: spread(request_cpu[name]) for name in names},
        "cpu_us_per_chunk": {name: spread(chunk_cpu[name]) for name in names},
        "sampled_answer": {
            name: asdict(cost) | {"until_queued": cost.until_queued, "total": cost.total}
            for name, cost in costs.items()
        },
        "sampled_answer_by_plugin": by_plugin,
        "sampled_rate_to_unsampled": {
            name: ratios(rate[name], rate["hemostat 0"]) for name in ("hemostat 0.05", BY_PLUGIN)
        },
        "to_nginx": {
            figure: {name: ratios(values[name], values["nginx"]) for name in ("hemostat 0", *BARE_RELAYS)}
            for figure, values in (("requests_per_second", rate), ("cpu_per_request", request_cpu))
        },
        "to_bare_relay": {name: figures.to("hemostat 0", name) for name in BARE_RELAYS},
        "to_vllm_router": {
            "requests_per_second": {name: ratios(rate[name], rate["vllm-router"]) for name in names},
            "cpu_per_request": {name: ratios(request_cpu[name], request_cpu["vllm-router"]) for name in names},
            "cpu_per_chunk": {
                name: ratios(chunk_cpu[name], chunk_cpu["vllm-router"] if chunk_cpu[name] else []) for name in names
            },
        },
        "to_interpreted": None if compiled is None else figures.to("hemostat 0", INTERPRETED),
        "treated": {
            f"{name} / {base}": {
                **figures.to(name, base),
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
    if result["to_interpreted"] is None:
        lines.append("hemostat, profile and adapter are interpreted: there is no C compiler here")
    else:
        shown = ", ".join(f"{figure} {cell(values, '.3f')}" for figure, values in result["to_interpreted"].items())
        lines.append(f"hemostat 0 / {INTERPRETED}: {shown}")
    lines += sampled_cost.lines(
        {
            name: sampled_cost.Cost(cost["relay"], cost["queued"], cost["parsed"], sampled_cost.Floor(**cost["floor"]))
            for name, cost in result["sampled_answer"].items()
        }
    )
    lines += result["sampled_answer_by_plugin"]
    chunk = ratio["cpu_per_chunk"]["hemostat 0"]
    for what, interval in (
        ("CPU per streamed chunk / vllm-router (aim: the interval reaches 1.0)", chunk),
        ("requests/s / vllm-router (aim: 2.5)", ratio["requests_per_second"]["hemostat 0"]),
        ("requests/s / nginx (aim: 0.45)", result["to_nginx"]["requests_per_second"]["hemostat 0"]),
        *(
            (f"requests/s of {name} / of hemostat 0 (aim: 0.7)", ratio)
            for name, ratio in result["sampled_rate_to_unsampled"].items()
        ),
    ):
        if interval is not None:
            lines.append(
                f"{what}: {interval['median']:.2f}, 95 % interval [{interval['low']:.2f}, {interval['high']:.2f}]"
            )
    for name in BARE_RELAYS:
        of_router, of_nginx = ratio["requests_per_second"][name], result["to_nginx"]["requests_per_second"][name]
        lines.append(f"{name}: requests/s {cell(of_router, '.2f')} × vllm-router, {cell(of_nginx, '.2f')} × nginx")
        shown = ", ".join(f"{figure} {cell(values, '.2f')}" for figure, values in result["to_bare_relay"][name].items())
        lines.append(f"hemostat 0 / {name}: {shown}")
    for name, interval in result["treated"].items():
        lines.append(f"{name}: " + ", ".join(f"{figure} {cell(values, '.3f')}" for figure, values in interval.items()))
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
    parser.add_argument("--seconds", type=int, default=3, help="of wrk, each time; it takes whole seconds")
    parser.add_argument(
        "--beside", type=Path, metavar="FOLDER", help="compare with the checkout of another revision alone"
    )
    parser.add_argument("--interpreted", action="store_true", help="with --beside: compile neither of the two")
    parser.add_argument("--latency", action="store_true", help="measure only what each proxy adds to a client's wait")
    parser.add_argument("--without-litellm", action="store_true", help="do not install and measure LiteLLM's proxy")
    parser.add_argument("--without-streams", action="store_true", help="measure requests alone, as on a busy machine")
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
        measured, shown, name = measure, table, "proxy"
        if arguments.latency:
            measured, shown, name = measure_latency, table_latency, "proxy-latency"
        elif arguments.beside is not None:
            measured, shown, name = measure_beside, table_beside, "proxy-beside"
        result = uvloop.run(measured(arguments, Path(folder)))
    path = BUILD / f"{name}.json"
    path.write_text(json.dumps(result, indent=2) + "\n")
    print(shown(result))
    print(f"written to {path.relative_to(ROOT)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
