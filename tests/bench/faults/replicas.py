"""Several replicas with one Valkey: how many scored requests a proof takes, and what is left after kills at random."""

from __future__ import annotations

import asyncio
import sys
import tempfile
from collections.abc import Iterator
from multiprocessing.context import ForkServerContext
from pathlib import Path

from tests.bench.faults import Row
from tests.support import replica_kills, valkey
from tests.support.profile_bench import BIASED
from tests.support.replicas import requests_until_promoted

NAME = "replicas"
TAKES = "40 minutes"
RUNS = 200
"""Deployments of three replicas."""
KILLS = 3
"""In each of them."""
SEEDS = 10
REPLICAS = 4
MAX_RATIO = 1.15


def rows() -> Iterator[Row]:
    with tempfile.TemporaryDirectory(prefix="hemostat-bench-") as folder:
        yield asyncio.run(_proofs(Path(folder)))
        yield from _kills(Path(folder))


async def _proofs(folder: Path) -> Row:
    alone = together = 0
    with valkey.running(folder / "valkey") as server:
        for seed in range(SEEDS):
            alone += await requests_until_promoted("", folder / f"one-{seed}", 1, BIASED, seed)
            together += await requests_until_promoted(server.url, folder / f"four-{seed}", REPLICAS, BIASED, seed)
    ratio = together / alone
    return Row(
        f"scored requests until promotion, {REPLICAS} replicas: those of one with all the traffic = 1",
        f"{REPLICAS}: the leader judged by its own part alone",
        f"{ratio:.3f} ({together} and {alone} in {SEEDS} runs)",
        f"<= {MAX_RATIO}",
        ratio <= MAX_RATIO,
    )


def _kills(folder: Path) -> Iterator[Row]:
    context = replica_kills.context()
    found = [_run(context, folder, n) for n in range(RUNS)]
    kills = sum(len(one.killed) for one in found)
    case = f"kill -9 of leader, follower or store, {RUNS} runs, {kills} kills"
    before = "alarms and outcomes since the last minute were lost with the leader"
    harmful = sum(one.harmful_promotions for one in found)
    yield Row(f"{case}: harmful promotions", "", float(harmful), "0", harmful == 0)
    twice = sum(max(0, -one.lost) for one in found)
    yield Row(f"{case}: requests counted twice", "", float(twice), "0", twice == 0)
    most = max(one.lost / max(1, len(one.killed)) for one in found)
    stated = replica_kills.MAX_LOST
    within = all(one.lost <= one.may_lose for one in found)
    limit = f"<= {stated['leader']} (leader), {stated['follower']} (follower), {stated['store']} (store)"
    yield Row(f"{case}: requests lost by a kill, most", before, most, limit, within)
    lost, scored = sum(one.lost for one in found), sum(one.scored for one in found)
    yield Row(f"{case}: requests lost", before, f"{lost} of {scored}", "as stated", within)
    refused = sum(one.not_serving for one in found)
    yield Row(f"{case}: looks at replicas that did not serve the profile", "", float(refused), "0", refused == 0)
    failed = [text for one in found for text in one.failures]
    yield Row(f"{case}: replicas that failed", "", "; ".join(failed[:3]) or "0", "0", not failed)


def _run(context: ForkServerContext, folder: Path, number: int) -> replica_kills.Outcome:
    """Of a run that does not end, the failure: the others go on."""
    try:
        found = replica_kills.run(context, folder / f"run-{number}", number, KILLS)
    except Exception as error:  # noqa: BLE001  whatever it is, it is reported
        found = replica_kills.Outcome(failures=[f"run {number}: {error!r}"])
    if (number + 1) % 10 == 0:
        print(f"replicas: {number + 1} of {RUNS} runs", file=sys.stderr, flush=True)
    return found
