"""A real `Control`, without the processes around it, and what relays and the scorer hand to it."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

import msgspec
import numpy as np
import pytest
from tests.support.captures import V, capture, record_of
from tests.support.relay_listener import hello, listen
from tests.support.temperature_bias import temperature_bias
from tests.support.waiting import until

from hemostat.config.schema import Settings
from hemostat.control.composition import Control
from hemostat.gate.live import stored
from hemostat.ipc.messages import OVERHEAD_BUCKETS, Capture, Policy, Stats, encode
from hemostat.store.protocol import BlobKey, ExclusionLost
from hemostat_calibration import state_codec
from hemostat_calibration.profiles.profile import CalibrationProfile
from hemostat_calibration.records import TokenRecord

TOKEN = "secret"
AUTHORIZED = {"Authorization": f"Bearer {TOKEN}"}
MODEL = "m"
_told: WeakKeyDictionary[Control, list[Policy]] = WeakKeyDictionary()
"""The policies that each process has sent to its relays."""


def settings(url: str = "http://127.0.0.1:1", **more: Any) -> Settings:
    given: dict[str, Any] = {
        "upstream": {"url": url},
        "admin": {"port": 0, "token": TOKEN},
        "shadow": {"rate": 1.0, "top_k": 4},
    }
    evidence = {"cycle_hours": 0.0} | more.pop("evidence", {})
    return Settings.model_validate(given | {"evidence": evidence} | more)


@asynccontextmanager
async def control(
    folder: Path, made: Settings | None = None, *, loops: bool = False, **clocks: Callable[[], float]
) -> AsyncIterator[Control]:
    """Listening to relays; with `loops` it looks after house, store and reference as the process does. clocks: see
    `Control`."""
    plane = Control(made or settings(), 1234, **clocks)
    listen_to_policies(plane)
    await plane.start()
    relays = listen(plane.link, folder / "control.sock")
    tasks = []
    if loops:
        running = [plane.run_periodic(), plane.writer.run()]
        if plane.pipeline.scorer is not None:
            running += [plane.monitor.run(), plane.pipeline.scorer.run(1)]
        tasks = [asyncio.create_task(loop) for loop in running]
    try:
        yield plane
        assert not any(task.done() and not task.cancelled() and task.exception() for task in tasks)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await relays.close()
        await plane.close()


async def lose(plane: Control, why: str) -> None:
    """Has the process notice that its store is not its own any more."""

    def verify() -> None:
        raise ExclusionLost(why)

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(plane.store, "verify", verify)
        await plane.ownership.verify()


def set_gate(plane: Control, state: str) -> None:
    """Has the gate go on from what it would store, with another verdict."""
    blobs: dict[BlobKey, bytes] = {}
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(plane.writer, "put_blob", blobs.__setitem__)
        plane.gate.save()
    kept = state_codec.decode(stored.Stored, blobs[stored.BLOB_KEY], stored.SCHEMA)
    assert kept.gate is not None
    kept.gate.state = state
    plane.gate.restore({stored.BLOB_KEY: state_codec.encode(kept, stored.SCHEMA)})


def listen_to_policies(plane: Control) -> None:
    """Has `told` know what this process sends from now on."""
    sent, send = _told.setdefault(plane, []), plane.link.set_policy

    def set_policy(policy: Policy) -> None:
        sent.append(policy)
        send(policy)

    plane.link.set_policy = set_policy  # type: ignore[method-assign]


def told(plane: Control) -> Policy:
    """Returns the policy that relays have, once it is brought up to date."""
    plane.policy.publish()
    return _told[plane][-1]


def status_json(plane: Control) -> dict[str, Any]:
    """As the admin port sends it."""
    result: dict[str, Any] = msgspec.json.decode(msgspec.json.encode(plane.status.current()))
    return result


def profile(seed: int = 0, vocabulary: int = V) -> CalibrationProfile:
    return temperature_bias(MODEL, vocabulary, 1.0, np.random.default_rng(seed).normal(0, 0.5, vocabulary), 1.0)


def scored(request_id: str = "r", prompt: int = 0, **more: Any) -> tuple[TokenRecord, Capture]:
    """A record and its capture, as the scorer hands them on."""
    prompt_ids = np.array([prompt % V, prompt // V % V], "<i4").tobytes()
    more.setdefault("captured_at", time.monotonic())
    captured = capture(request_id, prompt_token_ids=prompt_ids, **more)
    return record_of(captured), captured


def relay_stats(requests: float = 1.0, *, ready: bool = True) -> Stats:
    """A relay's figures after so many requests."""
    return Stats(
        counters={
            "hemostat_requests_total": {("/v1/completions", "ok"): requests, ("other", "client_gone"): 1.0},
            "hemostat_shadow_requests_total": {("shadowed", ""): requests, ("skipped", "too_long"): 2.0},
            "hemostat_calibration_requests_total": {("none", "off"): requests},
        },
        overhead_buckets=[int(requests)] * (len(OVERHEAD_BUCKETS) + 1),
        overhead_sum=requests / 1000,
        ready=ready,
    )


async def connect_relay(plane: Control, folder: Path, pid: int, figures: Stats) -> asyncio.StreamWriter:
    """The connection of a relay that has sent these figures."""
    before = plane.link.reporting
    _, writer = await asyncio.open_unix_connection(str(folder / "control.sock"))
    writer.write(encode(hello(str(pid), pid=pid)) + encode(figures))
    await until(lambda: plane.link.reporting > before)
    return writer
