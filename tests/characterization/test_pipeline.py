"""From captures to records, figures, status, metrics and policies: one seeded day of a control process."""

from __future__ import annotations

import asyncio
import hashlib
import json
import tempfile
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from tests.characterization import driver, golden
from tests.characterization.driver import Clock, Pipeline, Relay
from tests.characterization.worlds import World

CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"
USUAL = World(bias=1.2, noise=0.2)
BROKEN = World(bias=1.2, noise=6.0)
"""What the chat route's model has become in the end."""
SAMPLINGS = (
    {"temperature": 1.0},
    {"temperature": 0.0},
    {"temperature": 0.7, "top_p": 0.9, "sampling_top_k": 4, "min_p": 0.05},
    {"temperature": float("nan")},
)
SHOWN_RECORDS = ("request-2", "request-91", "request-204")
FILES = (
    "pipeline_records.json",
    "pipeline_policies.json",
    "pipeline_status.json",
    "pipeline_profiles.json",
    "pipeline_metrics.txt",
    "pipeline_store.json",
)
SETTINGS: dict[str, Any] = {
    "shadow": {"rate": 0.5, "top_k": driver.K, "floor_fraction": 0.25},
    "calibration": {"mode": "auto", "min_tokens": 250, "alpha": 0.3, "control_fraction": 0.4},
    "alarm": {"budget_nats": 0.5, "baseline_requests": 30, "alpha": 0.05},
    "labels": ["gold"],
}


def usual(pipeline: Pipeline, n: int, world: World = USUAL, **more: Any) -> Any:
    """The n-th request of an ordinary mix of routes, labels, lengths and ways of decoding."""
    mixed = {
        "route": CHAT if n % 4 == 3 else COMPLETIONS,
        "label": "gold" if n % 5 == 0 else "",
        "tokens": 3 + n % 7,
        "sampling": SAMPLINGS[n % 4],
    }
    return pipeline.capture(n, world, **(mixed | more))


async def before_scoring(pipeline: Pipeline, relay: Relay) -> None:
    """The reference is not ready; then the queue runs full while nobody scores."""
    pipeline.send(relay, usual(pipeline, 300))
    await pipeline.received()
    pipeline.models_are_known()
    for n in range(10):
        pipeline.send(relay, usual(pipeline, n))
    await pipeline.received()
    pipeline.start_scoring()
    await pipeline.settled()


async def identity(pipeline: Pipeline, relay: Relay) -> None:
    """No profile: measuring, the noise floor, the alarm's baselines."""
    for n in range(10, 50):
        await pipeline.captures(relay, usual(pipeline, n))
        pipeline.housekeeping(1.0)


async def skipped_and_dropped(pipeline: Pipeline, relay: Relay) -> None:
    """Captures that come to nothing, each for a reason of its own."""
    version = "ab" * 16
    wrong_shape = pipeline.capture(200, USUAL, top_k=driver.K + 1)
    foreign = pipeline.capture(201, USUAL, output_token_ids=b"\xff\xff\xff\x7f" * 6)
    unordered = pipeline.capture(202, USUAL, candidate_logprobs=b"\x00" * 4 * 6 * (driver.K + 1))
    await pipeline.captures(relay, wrong_shape, foreign, unordered)
    # Some that are scored with an adapter, one that the reference lacks, one that nobody serves.
    for n, model in ((203, "sql"), *((n, "sql") for n in range(230, 236)), (205, "lora"), (206, "unknown")):
        await pipeline.captures(relay, pipeline.capture(n, USUAL, model=model))
    # Asked for is not applied; the engine changed its mind; it has spoken about a part only, and not within its time.
    await pipeline.captures(relay, pipeline.capture(207, USUAL, requested=version, arm="treated"))
    mixed = pipeline.capture(208, USUAL, requested=version, arm="treated")
    await pipeline.tap(208, mixed, None, rows=slice(0, 3))
    await pipeline.captures(relay, await pipeline.tap(208, mixed, version, rows=slice(3, 6)))
    part = await pipeline.tap(204, pipeline.capture(204, USUAL), None, rows=slice(0, 4))
    pipeline.send(relay, part)
    await pipeline.received()
    pipeline.housekeeping(10.0)
    await pipeline.settled()
    # The reference refuses, has a bug, is away until the breaker opens, and comes back.
    for reason, times in (("too_long", 1), ("no_adapter", 1), ("bug", 1), ("down", 6)):
        pipeline.reference.fails = reason
        for n in range(times):
            await pipeline.captures(relay, pipeline.capture(210 + n, USUAL))
    pipeline.reference.fails = ""
    pipeline.housekeeping(1.0)
    pipeline.housekeeping(20.0)
    await pipeline.captures(relay, pipeline.capture(220, USUAL))


async def promoted_by_evidence(pipeline: Pipeline, relay: Relay) -> None:
    """A profile is imported, held by the engine, proven and served; another one is proposed; one serves a label, by the
    operator."""
    await pipeline.import_profile(driver.helpful())
    for n in range(60, 660):
        if pipeline.selected is not None:
            break
        await pipeline.captures(relay, await pipeline.tap(n, usual(pipeline, 1000 + n), None))
        pipeline.housekeeping(0.1)
    assert pipeline.selected is not None
    await pipeline.propose(driver.harmful(), 300)
    hold = await pipeline.engine_reports([pipeline.selected], {"rows_clamped": 3, "rows_masked": 1})
    assert hold["hold"][0] == pipeline.selected
    for n in range(60, 80):
        served = n % 3 != 0
        arm = "treated" if served else "control"
        made = usual(pipeline, n, arm=arm, requested=pipeline.selected if served else None)
        await pipeline.captures(relay, await pipeline.tap(n, made, pipeline.selected if served else None))
    # The engine applied something else than was asked for: of neither arm.
    made = usual(pipeline, 90, arm="treated", requested=pipeline.selected)
    await pipeline.captures(relay, await pipeline.tap(90, made, None))
    await pipeline.captures(relay, usual(pipeline, 98, label="gold", kind="chat label gold"))
    own = await pipeline.import_profile(driver.reading())
    await pipeline.post("/api/v1/profiles/promote", {"version": own, "kind": "chat label gold"})
    for n, features in ((91, "given"), (92, "other"), (93, "masked"), (94, ""), (95, "given"), (96, "given")):
        await pipeline.captures(
            relay,
            await pipeline.tap(n, usual(pipeline, n, label="gold", kind="chat label gold"), None, features=features),
        )
    await pipeline.captures(relay, usual(pipeline, 97))


async def broken(pipeline: Pipeline, relay: Relay) -> None:
    """The chat route's model changes: the alarm. Its baseline is set anew in the end."""
    for n in range(110, 145):
        await pipeline.captures(relay, usual(pipeline, n, BROKEN, route=CHAT, tokens=10))
        pipeline.housekeeping(1.0)


async def operators(pipeline: Pipeline) -> list[Any]:
    """What the admin port answers to operators, refusals included."""
    calls = [
        ("/api/v1/profiles/pin", {"version": pipeline.selected}),
        ("/api/v1/profiles/promote", {"version": pipeline.selected}),
        ("/api/v1/profiles/pin", {"version": None}),
        ("/api/v1/profiles/rollback", {"kind": "chat label gold"}),
        ("/api/v1/profiles/rollback", {"kind": "nobody"}),
        ("/api/v1/profiles/promote", {"version": "short"}),
        ("/api/v1/calibration", {"mode": "observe"}),
        ("/api/v1/calibration", {"mode": "auto"}),
        ("/api/v1/alarm/rebase", {"kind": "poems"}),
    ]
    answers = []
    for path, body in calls:
        answer = await pipeline.post(path, body)
        answers.append([path, answer if isinstance(answer, str) else sorted(answer)])
    return answers


FIGURES: dict[str, dict[tuple[str, ...], float]] = {
    "hemostat_requests_total": {
        (CHAT, "ok"): 120.0,
        (COMPLETIONS, "ok"): 40.0,
        ("other", "client_gone"): 2.0,
        (CHAT, "upstream_failed"): 1.0,
    },
    "hemostat_shadow_requests_total": {
        ("shadowed", ""): 90.0,
        ("skipped", "too_long"): 2.0,
        ("dropped", "queue_full"): 3.0,
    },
    "hemostat_calibration_requests_total": {("treated", "assigned"): 60.0, ("none", "off"): 30.0},
    "hemostat_responses_finished_total": {("treated", "stop"): 80.0, ("control", "length"): 6.0},
    "hemostat_output_tokens_total": {("treated",): 3400.0, ("control",): 1800.0},
    "hemostat_repetition_loops_total": {("treated",): 1.0, ("control",): 3.0},
    "hemostat_structured_outputs_total": {("treated", "json", "valid"): 7.0, ("control", "tool_call", "cut"): 1.0},
    "hemostat_internal_errors_total": {("outcome",): 0.0},
}


async def relays_come_and_go(pipeline: Pipeline) -> None:
    """Of three links two processes: one leaves for good, one comes back with more."""
    first, second = await pipeline.relay(2, 1), await pipeline.relay(3, 2)
    await pipeline.stats(first, FIGURES, [0, 5, 100])
    await pipeline.stats(second, {"hemostat_requests_total": {(CHAT, "ok"): 10.0}}, [10])
    await pipeline.relay_leaves(first)
    await pipeline.relay_leaves(second)
    second = await pipeline.relay(3, 2)
    await pipeline.stats(second, {"hemostat_requests_total": {(CHAT, "ok"): 25.0}}, [20, 5])


GROUPED = ("arms", "noise_floor", "where", "decoding")
"""Parts of the status that tell the same figures of many groups."""
LEFT_OUT = ("entropy", "reverse", "js", "delta", "perplexity", "covered", "kl_nats_upper", "total_variation_upper")
"""Beginnings of the figures that are not compared by place and by way of decoding."""


def compact(status: dict[str, Any]) -> dict[str, Any]:
    """The status with figures of groups as values only, in the order of their keys, which `raw` and `calibrated` show.

    A golden file of the whole status would be twice as long.
    """
    result = status | {name: _values(status[name]) for name in GROUPED}
    for name in ("where", "decoding"):
        result[name] = _without(result[name])
    return result


def _values(told: Any) -> Any:
    if isinstance(told, list):
        return [_values(item) for item in told]
    if not isinstance(told, dict):
        return told
    if "estimate" in told:
        return [told[key] for key in sorted(told)]
    return {key: _values(value) for key, value in told.items()}


def _without(told: Any) -> Any:
    if isinstance(told, list):
        return [_without(item) for item in told]
    if not isinstance(told, dict):
        return told
    return {key: _without(value) for key, value in told.items() if not key.startswith(LEFT_OUT)}


def told_policies(relay: Relay) -> dict[str, Any]:
    """Every policy frame: its digest and what it changes; the bytes of the last one. Sets are sorted."""
    frames = [driver.with_sorted_sets(frame) for frame in relay.frames]
    policies = [driver.policy_of(frame) for frame in frames]
    changes: list[dict[str, Any]] = []
    before: dict[str, Any] = {}
    for frame, policy in zip(frames, policies, strict=True):
        changed = {name: value for name, value in policy.items() if before.get(name, ...) != value}
        changes.append({"sha256": hashlib.sha256(frame).hexdigest()[:24], "changes": changed})
        before = policy
    return {"frames": changes, "last": frames[-1].hex()}


async def day(folder: Path) -> dict[str, str]:
    store = folder / "store.db"
    settings = SETTINGS | {"records": {"path": str(folder / "records.jsonl")}, "store": {"url": f"sqlite:///{store}"}}
    clock = Clock()
    status: dict[str, Any] = {}
    async with driver.pipeline(folder, clock, **settings) as bench:
        relay = await bench.relay(1, 0)
        await before_scoring(bench, relay)
        status["of the first requests"] = {
            name: part
            for name, part in (await bench.get("/api/v1/status")).items()
            if name in {"requests", "reference"}
        }
        await identity(bench, relay)
        await skipped_and_dropped(bench, relay)
        await promoted_by_evidence(bench, relay)
        await broken(bench, relay)
        await relays_come_and_go(bench)
        status["in the end"] = compact(await bench.get("/api/v1/status"))
        metrics = await bench.get("/metrics")
        profiles = await bench.get("/api/v1/profiles")
        history = await bench.get("/api/v1/history")
        status["history"] = {name: column[-3:] for name, column in history["points"].items()}
        status["operators"] = await operators(bench)
        await bench.post("/api/v1/alarm/rebase", {"kind": None})
        status["alarm set anew"] = (await bench.get("/api/v1/status"))["alarm"]["tests"]
        records = {name: bench.record(name) for name in SHOWN_RECORDS}
        await bench.relay_leaves(relay)
    kept = driver.stored(store)
    for name in ("alarm", "noise_floors"):
        kept["state"][name] = driver.alarm_shape(kept["state"][name])
    lines = [json.loads(line) for line in (folder / "records.jsonl").read_text().splitlines()]
    async with driver.pipeline(folder, clock, **settings) as bench:
        restarted = await bench.relay(1, 0)
        bench.models_are_known()
        after = await bench.get("/api/v1/status")
        status["after a restart"] = {name: after[name] for name in ("calibration", "profile", "reference")}
        status["after a restart"]["alarm"] = [
            [test[name] for name in ("test", "kind", "raised", "evidence", "requests", "tokens")]
            for test in after["alarm"]["tests"]
        ]
        await bench.relay_leaves(restarted)
    policies = {
        "the day": told_policies(relay),
        "after a restart": told_policies(restarted),
    }
    return {
        "pipeline_records.json": golden.dumps({"records": records, "lines": [lines[0], lines[-1], len(lines)]}),
        "pipeline_policies.json": golden.dumps(policies),
        "pipeline_status.json": golden.dumps(status),
        "pipeline_profiles.json": golden.dumps(profiles),
        "pipeline_metrics.txt": golden.metrics(metrics),
        "pipeline_store.json": golden.dumps(kept),
    }


@cache
def made() -> dict[str, str]:
    """Golden files of this module: name -> text."""
    with tempfile.TemporaryDirectory(prefix="hemostat-") as folder:
        return asyncio.run(day(Path(folder)))


@pytest.mark.parametrize("name", FILES)
def test_the_pipeline_is_as_recorded(name: str) -> None:
    difference = golden.difference(name, made()[name])
    assert not difference, difference


def test_no_file_is_left_out() -> None:
    assert set(FILES) == set(made())
