"""The main job on real models, as a user starts it; its figures computed again from the weights."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tests.support.recompute import observations, recompute

from hemostat_lab.demo.checkpoints import Checkpoints
from hemostat_lab.demo.prompts import generated_prompts

pytestmark = [
    pytest.mark.vllm,
    pytest.mark.timeout(1000),
]

REQUESTS = 10
LIVE_REQUESTS = 450
"""Of which 135 were enough where it was tried."""
TOP_K = 64
PROMPTS = [
    "What is the tallest mountain on Earth?",
    "Write one sentence about the sea.",
    "Name three things that one finds in a kitchen.",
    "Write a Python function that adds two numbers.",
    'Answer in JSON: {"city": ...}. Text: "Anna moved to Lisbon in May."',
    "Why is the sky blue? Answer briefly.",
]


def demo(
    folder: Path, *flags: str, requests: int = REQUESTS, texts: Sequence[str] = PROMPTS, max_tokens: int = 48
) -> dict[str, Any]:
    """Run `hemostat demo` on our own prompts; its report."""
    prompts = folder / "prompts.jsonl"
    lines = [{"messages": [{"role": "user", "content": text}], "max_tokens": max_tokens} for text in texts]
    prompts.write_text("".join(json.dumps(line) + "\n" for line in lines))
    command = [Path(sys.executable).parent / "hemostat", "demo", "--requests", str(requests), "--prompts", prompts]
    done = subprocess.run(
        [*command, "--report", folder / "report.json", "--keep", folder / "kept", "--no-console", *flags],
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=900,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    report: dict[str, Any] = json.loads((folder / "report.json").read_text())
    return report


def test_figures_are_those_of_the_weights(tmp_path: Path, checkpoints: Checkpoints) -> None:
    report = demo(tmp_path, "--seed", "3")
    requests, raw = report["requests"], report["raw"]
    assert (requests["sent"], requests["ok"], requests["failed"]) == (REQUESTS, REQUESTS, 0)
    assert (requests["shadowed"], requests["scored"]) == (REQUESTS, REQUESTS)
    assert (requests["skipped"], requests["dropped"]) == ({}, {})
    assert report["top_k"] == TOP_K
    assert raw["kl_nats"]["bound"] == "lower"
    assert report["calibrated"] == raw, "identity serves"
    assert report["profile"] == {"version": "identity", "family": "identity", "mode": "auto"}

    result = recompute(tmp_path / "kept", TOP_K)
    assert len(result) == REQUESTS
    assert report["tokens_scored"] == sum(len(f.exact) for f in result)
    # Prompts come again: a conversation is one observation in each kind.
    result = observations(result)
    assert raw["requests"] == len(result) < REQUESTS
    exact, reported = (np.concatenate([getattr(f, name) for f in result]) for name in ("exact", "reported"))
    top, covered = (np.concatenate([getattr(f, name) for f in result]) for name in ("compressed_top", "covered"))
    # The report is the mean of the records.
    assert raw["kl_nats"]["estimate"] == pytest.approx(reported.mean(), rel=1e-9)
    assert raw["covered_mass"] == pytest.approx(covered.mean(), rel=1e-9)
    assert raw["kl_nats"]["ci95"] == [None, None], "so few requests do not tell how much they depend on each other"
    # A lower bound, and not a vacuous one. Token by token the two engines differ by their own rounding (bf16).
    assert 0.5 * exact.mean() < reported.mean() < exact.mean()
    assert (reported > exact + 0.05).mean() < 0.05
    assert covered.mean() == pytest.approx(top.mean(), abs=0.01)
    # The estimate has no truncation bias; it speaks of the sampled requests only, greedy ones have none.
    sampled = np.concatenate([f.exact for f in result if f.temperature == 1.0])
    assert raw["kl_nats_estimate"]["estimate"] == pytest.approx(sampled.mean(), rel=0.5)


@pytest.mark.slow
def test_a_profile_is_promoted_live(tmp_path: Path) -> None:
    """Learned from a real vLLM's features and the real reference, proven on held-out conversations of one kind, served
    to half of that kind's: as in `make demo`, but from a model that lost more, so that it takes some minutes. Which
    family is proven first depends on the run."""
    report = demo(
        tmp_path,
        *("--seed", "3", "--compression", "prune50", "--set", "calibration.min_tokens=600"),
        requests=LIVE_REQUESTS,
        texts=[prompt.messages[0].content for prompt in generated_prompts()[::2]],
        max_tokens=32,
    )
    promotions = [event for event in report["decisions"] if event["decision"] == "promote"]
    assert promotions, [(event["decision"], event["why"]) for event in report["decisions"]]
    assert {event["reason"] for event in promotions} == {"evidence"}
    for evidence in (event["evidence"] for event in promotions):
        assert evidence["log_e_adjusted"] >= evidence["needed"]
        assert evidence["mean_gain"] > 0.0
        assert evidence["mean_gain_by_token"] > 0.0
        assert evidence["alpha"] < 0.05
    version = report["profile"]["version"]
    promoted = {event["version"] for event in promotions}
    assert version in promoted
    # What serves was applied by the engine, to the treated of the kinds that it was proven in and to nobody else.
    records = [json.loads(line) for line in (tmp_path / "kept" / "records.jsonl").read_text().splitlines()]
    treated, control = ([r for r in records if r["arm"] == arm] for arm in ("treated", "control"))
    assert treated
    assert control
    assert {r["profile"] for r in treated} <= promoted
    assert {r["profile"] for r in records if r["arm"] != "treated"} == {"identity"}
    kinds = {(event["version"], event["kind"]) for event in promotions}
    assert {(r["profile"], r["kind"]) for r in treated} <= kinds
