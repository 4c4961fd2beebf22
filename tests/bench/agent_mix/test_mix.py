"""The short version of `make bench-coverage`, on the fake engine: every request of the mix is counted once, and what is
not scored has a reason with an explanation."""

from __future__ import annotations

import asyncio
from collections import Counter
from itertools import islice
from pathlib import Path

from tests.bench.agent_mix.figures import combine, explained, reasons, table
from tests.bench.agent_mix.workload import Mix, filled, first, send
from tests.support.fake_vllm import FakeVllm, serving
from tests.support.served import hemostat

SCORED = (
    "chat",
    "chat-greedy",
    "chat-system",
    "completions",
    "tools-auto",
    "two-choices",
    "completions-two",
    "reasoning",
)
"""Entries of the mix that need no plugin in the engine."""
REQUESTS = 40


async def test_every_request_of_the_mix_is_counted_once_and_explained(tmp_path: Path) -> None:
    mix, upstream = Mix.load(), FakeVllm(seed=3)
    planned = first(mix, "fake", REQUESTS)
    with serving(upstream) as url, serving(FakeVllm(seed=3, noise=0.1)) as reference:
        more = {"labels": mix.names, "evidence": {"kinds": 100}}
        with hemostat(tmp_path, upstream, url, reference={"backend": "vllm", "url": reference}, **more) as served:
            await served.until(lambda status: status["reference"]["state"] == "ready" and status["relays"] > 0)
            await asyncio.to_thread(send, served.data, planned, 4)
            status = await served.until(lambda s: round(s["coverage"]["requests"], 3) >= REQUESTS)
    result = combine([status["coverage"]])
    assert result["requests"] == REQUESTS
    by_entry = {row["entry"]: row for row in result["by_entry"]}
    assert sum(row["requests"] for row in by_entry.values()) == REQUESTS
    assert sum(row["requests"] for row in result["by_kind"]) == REQUESTS
    sent = Counter(request.name for request in planned)
    for name in SCORED:
        row = by_entry[name]
        assert (row["requests"], row["scored_share"], row["scored_share_tokens"]) == (sent[name], 1.0, 1.0)
    assert sum(row["requests"] for row in result["not_scored"]) == REQUESTS - result["scored_requests"]
    for row in result["not_scored"]:
        assert row["explanation"] != "not explained", row
        assert row["reason"] in table(result)


def test_the_plan_has_every_entry_by_its_weight_and_spread_evenly() -> None:
    mix = Mix.load()
    weights = {entry["name"]: entry["weight"] for entry in mix.entries}
    assert len(set(mix.names)) == len(mix.entries)
    total = sum(weights.values())
    assert Counter(request.name for request in islice(mix.plan("m"), 2 * total)) == {
        name: 2 * n for name, n in weights.items()
    }
    assert len({request.name for request in islice(mix.plan("m"), 20)}) > 12
    streams = [request.body.get("stream") for request in islice(mix.plan("m"), 2 * total) if request.name == "chat"]
    assert streams.count(True) == streams.count(False) == weights["chat"]


def test_each_request_is_a_conversation_of_its_own() -> None:
    planned = list(islice(Mix.load().plan("m"), 200))
    assert len({str(r.body.get("messages") or r.body.get("prompt") or r.body["input"]) for r in planned}) == 200
    assert filled({"a": ["{prompt}!", {"b": 3}]}, "Hi") == {"a": ["Hi!", {"b": 3}]}


def test_an_unknown_reason_is_reported_as_such() -> None:
    texts = reasons()
    assert explained("invalid_mass", texts) == texts["invalid_…"]
    assert explained("made_up", texts) == "not explained"
