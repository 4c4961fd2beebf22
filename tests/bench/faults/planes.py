"""kill -9 and SIGSTOP of control processes and relays at random moments, while clients stream through two relays."""

from __future__ import annotations

import asyncio
import os
import random
import signal
import tempfile
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

from tests.bench.faults import Row
from tests.support.fake_vllm import FakeVllm, serving
from tests.support.planes import CONTROL, RELAY, Instance, Planes, Relay, planes
from tests.support.streaming_load import Load, streaming_load

NAME = "planes"
TAKES = "2 minutes with 5 runs (`--runs`)"

RUNS_VARIABLE = "FAULT_RUNS"
RUNS = 5
CLIENTS = 8
"""Of each relay."""
TOKEN_SECONDS = 0.02
STOPPED_SECONDS = (0.5, 14.0)
"""Shortest and longest SIGSTOP: relays leave a silent control process after ten seconds."""
TAKEOVER_SECONDS = 5.0


@dataclass
class Found:
    """failed: requests that were refused, cut or failed, without those that streamed through a relay that was killed.
    takeovers: seconds from the kill of the active control process until all relays have another one. lost: what was
    stored and is not there any more."""

    failed: list[str] = field(default_factory=list)
    takeovers: list[float] = field(default_factory=list)
    lost: list[str] = field(default_factory=list)
    done: Counter[str] = field(default_factory=Counter)


async def _mode(one: Instance) -> str:
    status = await one.status()
    return str(status.get("profile", {}).get("mode"))


async def _one_run(one: Planes, draw: random.Random, found: Found) -> None:
    """One fault at a random moment, under load; all relays have an active control process at the end."""
    active = await one.active()
    standby = next(each for each in one.controls if each is not active)
    mode = draw.choice(["observe", "off"])
    (await active.post("/api/v1/calibration", json={"mode": mode})).raise_for_status()
    victim: Instance = draw.choice([active, active, standby, *one.relays])
    stop = draw.random() < 0.4
    kind = "control" if victim in one.controls else "relay"
    found.done[f"{'SIGSTOP' if stop else 'kill -9'} of {'the active' if victim is active else 'a'} {kind}"] += 1
    loads: dict[Relay, Load] = {}
    async with (
        streaming_load(one.relays[0].data, CLIENTS, 20) as loads[one.relays[0]],
        streaming_load(one.relays[1].data, CLIENTS, 20) as loads[one.relays[1]],
    ):
        await asyncio.sleep(draw.uniform(0.0, 2.0))
        cut = 0
        if stop:
            victim.signal(signal.SIGSTOP)
            await asyncio.sleep(draw.uniform(*STOPPED_SECONDS))
            victim.signal(signal.SIGCONT)
        elif isinstance(victim, Relay):
            cut = CLIENTS  # its supervisor goes on, and no connection is refused
            for pid in victim.children(RELAY):
                os.kill(pid, signal.SIGKILL)
        elif draw.random() < 0.5:
            for pid in victim.children(CONTROL):  # its supervisor starts it anew
                os.kill(pid, signal.SIGKILL)
        else:
            victim.kill()
            began = time.monotonic()
            if victim is active:
                await one.active(but=victim)
                found.takeovers.append(time.monotonic() - began)
            victim.start()
        now = await one.active()
        for load in loads.values():
            await load.until_more(2 * CLIENTS)
    for relay, load in loads.items():
        allowed = cut if relay is victim else 0
        if load.refused or load.failed or load.cut > allowed:
            found.failed += [f"{victim.name}, {'SIGSTOP' if stop else 'kill -9'}: {text}" for text in load.failures]
    if (kept := await _mode(now)) != mode:
        found.lost.append(f"mode {mode} became {kept}")


async def _runs(number: int, seed: int) -> Found:
    found, draw = Found(), random.Random(seed)
    with tempfile.TemporaryDirectory() as folder, serving(FakeVllm(token_delay=TOKEN_SECONDS)) as url:
        async with planes(Path(folder), url, shadow={"rate": 0.0}) as one:
            for _ in range(number):
                await _one_run(one, draw, found)
    return found


def rows() -> list[Row]:
    number = int(os.environ.get(RUNS_VARIABLE, RUNS))
    found = asyncio.run(_runs(number, seed=26))
    done = ", ".join(f"{count} x {what}" for what, count in sorted(found.done.items()))
    case = f"{number} faults at random moments, two control processes and two relays ({done})"
    slowest = max(found.takeovers, default=0.0)
    return [
        Row(f"{case}: requests that fail", "", "; ".join(found.failed[:3]) or 0, "0", not found.failed),
        Row("what was stored and is lost", "", "; ".join(found.lost[:3]) or 0, "nothing", not found.lost),
        Row(
            f"from the kill of the active control process until both relays have the other ({len(found.takeovers)} x)",
            "",
            f"{slowest:.1f} s",
            f"at most {TAKEOVER_SECONDS:g} s",
            slowest <= TAKEOVER_SECONDS,
        ),
    ]
