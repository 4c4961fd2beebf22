"""What one control process takes, and its load as relays and requests grow: `make bench-load`.

A table and build/bench/load.json. A real control process runs in a process of its own; 1, 8 and 32 relays are
connections with the real messages and framing, and the reference is replaced by stored scores, which cost nothing
(tests/bench/load/). Rates are per second of the control process's CPU time, so they are those of one core that has
nothing else to do.

`--only` runs one part: `work` (captures, outcomes and tokens per second, memory), `flood` (relays that send all they
can, whatever the policy says), `rates` (CPU, captures and reports at 10, 10^3 and 10^6 requests/s, sampled and
reported as the policy says). The exit status is 1 where a row does not hold.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))

from tests.bench.load import PROMPT, TOKENS  # noqa: E402  the root is no package
from tests.bench.load.relays import Relay, connected  # noqa: E402
from tests.bench.rows import Row, publish, timed_rows  # noqa: E402
from tests.support.memory import peak_mib, resident_mib  # noqa: E402

from hemostat.measurement.outcome_sampling import MAX_REPORTS_PER_SECOND  # noqa: E402
from hemostat.measurement.rates import SMOOTHED_SECONDS  # noqa: E402

RESULT = ROOT / "build" / "bench" / "load.json"
RELAYS = (1, 8, 32)
RATES = (10, 1_000, 1_000_000)
BUDGET = 5_000.0
"""Tokens per second that the reference may score, in `rates`: 15 captures."""
HANG_SECONDS = 300.0
MAX_GROWN, MAX_GROWN_BY_RELAY = 64.0, 2.0
"""MiB that a flood may take: the queue, and what waits on each connection."""
MAX_RECEIVED_BESIDE = 30.0
"""Captures that may come beside those that are scored, in the seconds that are measured: the queue's changes."""
MAX_REPORTS = 1.2 * MAX_REPORTS_PER_SECOND
"""A second; more come by chance, and for rounding to the seconds that are measured."""


@dataclass(frozen=True, slots=True)
class Sizes:
    """How much is measured: captures and reports of a case, and seconds of one that takes time by its nature."""

    captures: int = 150
    reports: int = 10_000
    seconds: float = 5.0
    settling: float = 1.2 * SMOOTHED_SECONDS
    adapting: float = 12.0
    """From the reference's first score until it is measured: what is sampled follows within half a second."""


class ControlProcess:
    """The child, by what it says and what the kernel says of it."""

    def __init__(self, process: asyncio.subprocess.Process, socket: Path, version: str) -> None:
        self._process = process
        self.socket = socket
        self.version = version
        """Of the profile that serves."""

    async def ask(self, line: bytes = b"counts") -> dict[str, Any]:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(line + b"\n")
        result: dict[str, Any] = json.loads(await self._process.stdout.readline())
        return result

    @property
    def cpu_seconds(self) -> float:
        fields = Path(f"/proc/{self._process.pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    def memory(self) -> float:
        """MiB."""
        return resident_mib(self._process.pid)

    def peak(self) -> float:
        return peak_mib(self._process.pid)


@asynccontextmanager
async def control_process(budget: float = 0.0) -> AsyncIterator[ControlProcess]:
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "tests.bench.load.control", folder, str(budget)]
        pipe = asyncio.subprocess.PIPE
        process = await asyncio.create_subprocess_exec(*command, stdin=pipe, stdout=pipe, cwd=ROOT)
        assert process.stdin is not None
        assert process.stdout is not None
        try:
            version = json.loads(await process.stdout.readline())["version"]
            yield ControlProcess(process, Path(folder) / "control.sock", version)
        finally:
            process.stdin.close()
            await process.wait()


async def scored(control: ControlProcess, relays: Sequence[Relay], captures: int) -> tuple[float, float]:
    """Captures and tokens per second of CPU time, while the queue is never empty."""
    before, cpu = await control.ask(), control.cpu_seconds
    now, turn = before, 0
    async with asyncio.timeout(HANG_SECONDS):
        while now["scored"] - before["scored"] < captures:
            on_their_way = sum(relay.captures for relay in relays) - now["received"]
            for _ in range(64 - now["queued"] - on_their_way):
                relays[turn % len(relays)].capture()
                turn += 1
            await asyncio.sleep(0.02)
            now = await control.ask()
    spent = control.cpu_seconds - cpu
    return (now["scored"] - before["scored"]) / spent, (now["tokens"] - before["tokens"]) / spent


async def reported(control: ControlProcess, relays: Sequence[Relay], reports: int) -> float:
    """Reports of outcomes per second of CPU time; at least so many, where it is less than the kernel counts."""
    before, cpu, first = (await control.ask())["reports"], control.cpu_seconds, sum_reports(relays)
    while (sent := sum_reports(relays) - first) < reports:
        for relay in relays:
            for _ in range(64):
                relay.report()
            await relay.drain()
        await asyncio.sleep(0)
    async with asyncio.timeout(HANG_SECONDS):
        while (await control.ask())["reports"] - before < sent:
            await asyncio.sleep(0.05)
    return sent / max(control.cpu_seconds - cpu, 1.0 / os.sysconf("SC_CLK_TCK"))


async def work(sizes: Sizes) -> list[Row]:
    result = []
    for number in RELAYS:
        async with control_process() as control:
            alone = control.memory()
            async with connected(control.socket, number, control.version) as relays:
                while (await control.ask())["relays"] < number:
                    await asyncio.sleep(0.05)
                cpu, seconds = control.cpu_seconds, time.monotonic()
                await asyncio.sleep(sizes.seconds)
                idle = (control.cpu_seconds - cpu) / (time.monotonic() - seconds)
                connections = control.memory() - alone
                await control.ask(b"score")
                await scored(control, relays, sizes.captures // 10)  # what is made at first
                captures, tokens = await scored(control, relays, sizes.captures)
                reports = await reported(control, relays, sizes.reports)
                with_work = control.memory()
        case = f"{number} relay{'s' if number > 1 else ''}: "
        result += [
            Row(case + f"captures ({PROMPT} + {TOKENS} tokens) scored per CPU second", captures, "", True),
            Row(case + "tokens scored per CPU second", tokens, "", True),
            Row(case + "reports of outcomes per CPU second", reports, "", True),
            Row(case + "CPU without requests, % of a core", 100.0 * idle, "", True),
            Row(case + "memory of the connections, MiB", connections, "", True),
            Row(case + "memory with all of this work, MiB", with_work, "", True),
        ]
    return result


async def flood(sizes: Sizes) -> list[Row]:
    """Relays that send captures as fast as the connections take them."""
    result = []
    for number in RELAYS:
        async with control_process(BUDGET) as control, connected(control.socket, number, control.version) as relays:
            await control.ask(b"score")
            before, cpu, memory = await control.ask(), control.cpu_seconds, control.memory()
            ends = time.monotonic() + sizes.seconds
            while time.monotonic() < ends:
                for relay in relays:
                    for _ in range(8):
                        relay.capture()
                after = await control.ask()
            spent, grown = control.cpu_seconds - cpu, control.peak() - memory
        case = f"flood by {number} relay{'s' if number > 1 else ''}: "
        most = MAX_GROWN + number * MAX_GROWN_BY_RELAY
        result += [
            Row(case + "captures taken per CPU second", (after["received"] - before["received"]) / spent, "", True),
            Row(case + "dropped by the relays, %", 100.0 * _share_dropped(relays), "", True),
            Row(case + "memory that it takes, MiB", grown, f"<= {most:.0f}", grown <= most),
        ]
    return result


def _share_dropped(relays: Sequence[Relay]) -> float:
    dropped = sum(relay.dropped for relay in relays)
    return dropped / (dropped + sum(relay.captures for relay in relays))


async def rates(sizes: Sizes) -> list[Row]:
    """Relays that answer requests, all of them in an arm, and sample and report what the policy says."""
    result = []
    for rate in RATES:
        number = RELAYS[-1]
        async with control_process(BUDGET) as control, connected(control.socket, number, control.version) as relays:
            serving = [asyncio.create_task(relay.serve(rate / number)) for relay in relays]
            await asyncio.sleep(sizes.settling)  # as while the reference is loaded
            await control.ask(b"score")
            await asyncio.sleep(sizes.adapting)
            before, cpu, seconds = await control.ask(), control.cpu_seconds, time.monotonic()
            await asyncio.sleep(sizes.seconds)
            after, passed = await control.ask(), time.monotonic() - seconds
            used = 100.0 * (control.cpu_seconds - cpu) / passed
            memory = control.memory()
            for task in serving:
                task.cancel()
        received, done = (after[name] - before[name] for name in ("received", "scored"))
        reports = (after["reports"] - before["reports"]) / passed
        case = f"{rate:,} requests/s from {number} relays: "
        limit = 1.5 * done + MAX_RECEIVED_BESIDE
        result += [
            Row(
                case + "captures received per second", received / passed, f"<= {limit / passed:.3g}", received <= limit
            ),
            Row(case + "captures scored per second", done / passed, "", True),
            Row(case + "reports of outcomes per second", reports, f"<= {MAX_REPORTS:.0f}", reports <= MAX_REPORTS),
            Row(case + "CPU, % of a core", used, "", True),
            Row(case + "policies sent per minute", 60.0 * (after["policies"] - before["policies"]) / passed, "", True),
            Row(case + "memory, MiB", memory, "", True),
        ]
    return result


def sum_reports(relays: Sequence[Relay]) -> int:
    return sum(relay.reports for relay in relays)


PARTS = {"work": work, "flood": flood, "rates": rates}


def run(name: str, sizes: Sizes) -> Iterator[Row]:
    yield from asyncio.run(PARTS[name](sizes))


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", action="append", choices=list(PARTS), help="run this part only")
    chosen = parser.parse_args(argv).only or list(PARTS)
    rows = [row for name in chosen for row in timed_rows(name, run(name, Sizes()))[0]]
    return publish(RESULT, chosen, rows, ("measured", "limit"), {})


if __name__ == "__main__":
    sys.exit(main())
