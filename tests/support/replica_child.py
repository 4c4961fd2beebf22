"""A replica in a process of its own, which a test may kill: a `Control` with its loops, fed with simulated requests.

It appends a line to `scored` in its folder for each request that it has scored, and writes what it says of itself to
`status` (JSON, replaced in one step). It ends in order once the file `stop` is there.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from tests.support.captures import capture
from tests.support.profile_bench import BIASED, MODEL
from tests.support.replicas import MODELS, deployment, scored
from tests.support.world import V

from hemostat.control import composition
from hemostat.control.composition import Control
from hemostat.control.evidence import checkpoint, inbox, outbox
from hemostat.store import replica as replica_module
from hemostat.store import writer

STATUS_SECONDS = 0.1
BASELINE_REQUESTS = 10_000
"""So many requests are counted by the alarm's mix of kinds."""


@dataclass(frozen=True, slots=True)
class Child:
    """folder: its own. seed: of its requests. per_second: requests that it scores."""

    url: str
    prefix: str
    folder: Path
    seed: int
    per_second: float = 50.0


def hurry() -> None:
    """Shorter times than in production, so that a run takes seconds."""
    replica_module.LEASE_SECONDS = 3.0
    replica_module.HEARTBEAT_SECONDS = 0.05
    replica_module.RETRY_SECONDS = inbox.RETRY_SECONDS = outbox.RETRY_SECONDS = writer.RETRY_SECONDS = (0.05,)
    outbox.SEND_SECONDS = inbox.TAKE_SECONDS = composition.PERIODIC_SECONDS = 0.05
    inbox.REMOVE_SECONDS = 0.2
    checkpoint.SAVE_SECONDS = 0.5


def run(child: Child) -> None:
    hurry()
    asyncio.run(_run(child))


async def _run(child: Child) -> None:
    child.folder.mkdir(parents=True, exist_ok=True)
    socket = child.folder / f"socket-{os.getpid()}"
    made = deployment(child.url, child.prefix, alarm={"baseline_requests": BASELINE_REQUESTS})
    one = Control(made, socket, 1234)
    await one.start(None)
    one.profile_manager.set_model_pair(MODEL, V)
    one.learned.set_models(MODELS)
    assert one.evidence is not None
    assert one.replica is not None
    running = [one.run_periodic(), one.writer.run(), one.replica.run(), one.learned.run(), *one.evidence.loops()]
    tasks = [asyncio.create_task(loop) for loop in running]
    tasks.append(asyncio.create_task(_report(one, child)))
    with (child.folder / "scored").open("a", buffering=1) as log:
        n = 0
        while not (child.folder.parent / "quiet").exists():
            _score(one, child, n)
            log.write(f"{n}\n")
            n += 1
            await asyncio.sleep(1.0 / child.per_second)
    while not (child.folder.parent / "stop").exists():
        await asyncio.sleep(0.05)
    for task in tasks:
        task.cancel()
    found = await asyncio.gather(*tasks, return_exceptions=True)
    await one.close()
    socket.unlink(missing_ok=True)
    failures = [error for error in found if isinstance(error, Exception)]
    (child.folder / f"ended-{os.getpid()}").write_text(repr(failures))


def _score(one: Control, child: Child, n: int) -> None:
    """No conversation is recognized: nothing but the positions keeps a request from being counted twice."""
    key = b"%d %d %d" % (child.seed, os.getpid(), n)
    record = scored(one, BIASED.truth(n % 500), key)
    one.pipeline.use_record(replace(record, conversation=b""), capture(kind=record.kind))


async def _report(one: Control, child: Child) -> None:
    while True:
        _write(child.folder / "status", report(one))
        await asyncio.sleep(STATUS_SECONDS)


def report(one: Control) -> dict[str, Any]:
    assert one.evidence is not None
    return {
        "pid": os.getpid(),
        "leads": one.lease.leads,
        "serving": one.profile_manager.serving.version_by_kind,
        "tested": one.profile_manager.trials.tested_versions,
        "evidence": one.evidence.status(),
        "errors": one.store_errors.count,
        "calibration_errors": one.pipeline.calibration_errors,
    }


def _write(file: Path, value: Any) -> None:
    part = file.with_suffix(".part")
    part.write_text(json.dumps(value))
    part.replace(file)


def read(file: Path) -> dict[str, Any]:
    """{} where there is none yet."""
    with contextlib.suppress(OSError, ValueError):
        found: dict[str, Any] = json.loads(file.read_text())
        return found
    return {}
