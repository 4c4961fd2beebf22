"""What replicas send each other of the contextual learner: how soon it proposes, bytes, and time; and what the same
would be for adapters."""

from __future__ import annotations

import asyncio
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import msgspec
import numpy as np
from tests.bench.faults import Row
from tests.support import valkey
from tests.support.learning_replicas import SHORTER, requests_until_min_tokens

from hemostat.control.evidence.outbox import MAX_BATCH_BYTES
from hemostat.learner import wire
from hemostat_calibration.arrays import Singles
from hemostat_calibration.learning.contextual.learner import ContextualLearner
from hemostat_calibration.learning.contextual.rows import FOLDS
from hemostat_calibration.learning.contextual.sharing import (
    MIN_CONVERSATIONS,
    SharedRows,
    Sharing,
    Unshared,
    condensed,
    spread,
)

NAME = "shared_learning"
TAKES = "2 minutes"
REPLICAS = 4
MAX_RATIO = 1.3
ANCHORS = 512
"""`calibration.anchors`"""
REQUEST_TOKENS = 100
MIN_TOKENS = 20_000
"""`calibration.min_tokens`"""
SMOLLM2 = {"hidden": 576, "key": 192, "middle": 1536, "layers": 30}
"""SmolLM2-135M."""


def rows() -> Iterator[Row]:
    with tempfile.TemporaryDirectory(prefix="hemostat-bench-") as folder:
        yield asyncio.run(_until_min_tokens(Path(folder)))
    for hidden in (SMOLLM2["hidden"], 4096):
        yield from _sizes(hidden)
    yield _adapters()


async def _until_min_tokens(folder: Path) -> Row:
    for module, name, value in SHORTER:
        setattr(module, name, value)
    with valkey.running(folder / "valkey") as server:
        one = await requests_until_min_tokens(server.url, folder / "one", 1)
        four = await requests_until_min_tokens(server.url, folder / "four", REPLICAS)
    return Row(
        f"requests until the contextual learner has its min_tokens, {REPLICAS} replicas: those of one = 1",
        f"{REPLICAS}: it learned from the leader's own part alone",
        f"{four / one:.2f} ({four} and {one})",
        f"<= {MAX_RATIO}",
        four / one <= MAX_RATIO,
    )


def _sizes(hidden: int) -> Iterator[Row]:
    """Of `MIN_CONVERSATIONS` requests of one fold, each of another conversation, and over a follower's life."""
    rng = np.random.default_rng(0)
    sharing = Sharing(ContextualLearner(np.zeros((ANCHORS, hidden), np.float32), np.arange(ANCHORS)))
    values = rng.normal(size=(MIN_CONVERSATIONS * REQUEST_TOKENS, 1 + ANCHORS + hidden)).astype(np.float32)
    began = time.process_time()
    shared = SharedRows(0, len(values), MIN_CONVERSATIONS, spread(condensed(values, ANCHORS + 1)))
    seconds = time.process_time() - began
    sent = [
        len(
            msgspec.msgpack.encode(
                wire.Shared("", 0, 1, 1, shared.rows.shape[1], part.rows.tobytes(), "0" * 32),
            )
        )
        for part in sharing.parts(shared, wire.MAX_SHARED_BYTES)
    ]
    case = f"hidden states of {hidden}, {ANCHORS} anchors, requests of {REQUEST_TOKENS} tokens"
    largest = f"{sum(sent) / 1e6:.2f} MB in {len(sent)} batches, the largest {max(sent) / 1024:.0f} KiB"
    yield Row(f"{case}: one fold's sums", "", largest, "<= 256 KiB a batch", max(sent) <= MAX_BATCH_BYTES)
    yield Row(f"{case}: CPU seconds for them", "", f"{seconds:.2f}", "<= 5", seconds <= 5.0)
    for tokens in (MIN_TOKENS // REPLICAS, 1_000_000):
        sets, requests = _sets(sharing, tokens), tokens // REQUEST_TOKENS
        each = sets * sum(sent) / requests
        limit = sum(sent) / MIN_CONVERSATIONS
        found = f"{each / 1e3:.1f} kB ({sets} times)"
        yield Row(f"{case}: sent a request, of {tokens:,} tokens", "", found, f"<= {limit / 1e3:.0f} kB", each <= limit)
    ratio = _requests(sharing) * REQUEST_TOKENS / MIN_TOKENS
    before = f"{REPLICAS}: it learned from the leader's own part alone"
    what = f"requests until {MIN_TOKENS:,} tokens are known, {REPLICAS} replicas: those of one = 1"
    yield Row(f"{case}: {what}", before, f"{ratio:.2f}", f"<= {MAX_RATIO}", ratio <= MAX_RATIO)


def _sets(sharing: Sharing, tokens: int) -> int:
    """How often one fold's sums are sent while a follower learns from so many tokens."""
    rng = np.random.default_rng(0)
    unshared, sent = list(sharing.init()), 0
    one_row = np.ones((1, unshared[0].rows.shape[1]), np.float32)
    for _ in range(tokens // REQUEST_TOKENS):
        fold = int(rng.integers(FOLDS))
        held = unshared[fold]
        unshared[fold] = _with_request(held, one_row)
        if sharing.is_due(unshared[fold]):
            sent += 1
            unshared[fold] = Unshared(one_row, shared=held.shared + held.tokens + REQUEST_TOKENS)
    return sent


def _with_request(held: Unshared, row: Singles) -> Unshared:
    """Of a conversation of its own."""
    requests = held.requests + 1
    units = held.units | {b"%d" % requests}
    return Unshared(row, held.tokens + REQUEST_TOKENS, requests, held.shared, units)


def _requests(sharing: Sharing) -> float:
    """Of the deployment, until the leader knows of `MIN_TOKENS`, on average."""
    found = []
    for seed in range(20):
        rng = np.random.default_rng(seed)
        followers = [list(sharing.init()) for _ in range(REPLICAS - 1)]
        one_row = np.ones((1, followers[0][0].rows.shape[1]), np.float32)
        known = requests = 0
        while known < MIN_TOKENS:
            at, fold = requests % REPLICAS, int(rng.integers(FOLDS))
            requests += 1
            if at == REPLICAS - 1:
                known += REQUEST_TOKENS
                continue
            held = followers[at][fold]
            now = _with_request(held, one_row)
            if sharing.is_due(now):
                known += now.tokens
                now = Unshared(one_row, shared=held.shared + now.tokens)
            followers[at][fold] = now
        found.append(requests)
    return float(np.mean(found))


def _adapters() -> Row:
    """Second moments of inputs and of gradients at outputs (K-FAC), one half of each symmetric matrix, in float32."""
    d, k, m = SMOLLM2["hidden"], SMOLLM2["key"], SMOLLM2["middle"]
    inputs, outputs = [d, d, d, m], [d, k, k, d, m, m, d]
    size = 4 * SMOLLM2["layers"] * sum(n * (n + 1) // 2 for n in inputs + outputs)
    only_inputs = 4 * SMOLLM2["layers"] * sum(n * (n + 1) // 2 for n in inputs)
    return Row(
        "adapters of SmolLM2-135M: statistics of all layers, however many tokens",
        "",
        f"{size / 1e6:.0f} MB ({only_inputs / 1e6:.0f} MB of inputs alone): {size / MAX_BATCH_BYTES:.0f} batches",
        "not sent",
        True,
    )
