"""Requests to a real vLLM with the plugin, scored at once and from the spool by the real reference: the figures are the
same, to the byte."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from tests.support.running_vllm import VLLM_ARGUMENTS, running_vllm
from tests.support.stack import Stack, hemostat, sampling_settings, wait_for

from hemostat.reference.transformers import TransformersReference
from hemostat.scoring.offline.evidence import read_evidence
from hemostat.scoring.offline.folder import score_folder
from hemostat.scoring.spool.columns import SCHEMA_VERSION, VERSION_KEY, from_rows
from hemostat.scoring.spool.keys import SpoolKey
from hemostat.scoring.spool.segments import read_segment, segments
from hemostat_lab.demo.checkpoints import Checkpoints
from hemostat_lab.demo.vllm_server import dtype, free_port

pytestmark = [pytest.mark.vllm, pytest.mark.slow, pytest.mark.timeout(1200)]

KEY = SpoolKey(bytes(range(32)))
ENGINE_TOKEN = "a-token-for-the-engine"
SAME = {
    "tokens_scored": "tokens",
    "raw": "raw",
    "conditional": "conditional",
    "trajectory": "survival",
    "kinds": "by_kind",
    "where": "where",
}
"""The figures, by their names in the status and in the report."""
SUBJECTS = ("the sea", "a small town", "bread", "winter", "a bridge", "two friends")


def user(text: str) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": text}]}


def requests() -> Iterator[tuple[str, dict[str, Any]]]:
    """Yields requests of all kinds: their route, and their body."""
    for number, subject in enumerate(SUBJECTS):
        chat = user(f"Tell me about {subject}.")
        yield "/v1/chat/completions", chat | {"max_tokens": 24, "temperature": 0.8, "seed": number}
        yield "/v1/chat/completions", chat | {"max_tokens": 12 + number, "temperature": 0.0, "stream": True}
        yield "/v1/completions", {"prompt": f"Once, {subject} was", "max_tokens": 16, "top_p": 0.9, "seed": number}
        yield "/v1/messages", chat | {"max_tokens": 9}
        yield "/v1/responses", {"input": f"A word about {subject}:", "max_output_tokens": 8}
        choices = {"structured_outputs": {"choice": ["yes", "no", f"perhaps in {subject}"]}}
        yield "/v1/chat/completions", user(f"Do you like {subject}?") | {"max_tokens": 8} | choices


@pytest.fixture
def stack(checkpoints: Checkpoints, tmp_path: Path) -> Iterator[Stack]:
    """`hemostat serve` that scores at once and keeps what it scores. The plugin of the engine reports to it."""
    key, port = tmp_path / "key", free_port()
    key.write_text(bytes(range(32)).hex())
    reference = {"backend": "transformers", "model": str(checkpoints.reference), "dtype": dtype()}
    more = {
        "admin": {"port": port, "engine_token": ENGINE_TOKEN},
        "spool": {"path": str(tmp_path / "spool"), "key": str(key)},
    }
    told = {"HEMOSTAT_ADMIN_URL": f"http://127.0.0.1:{port}", "HEMOSTAT_ENGINE_TOKEN": ENGINE_TOKEN}
    (tmp_path / "vllm").mkdir()
    with (
        running_vllm(checkpoints, tmp_path / "vllm", VLLM_ARGUMENTS, told) as engine,
        hemostat(sampling_settings(engine.url, reference, **more), tmp_path / "hemostat") as made,
    ):
        made.wait_scoring(300.0)
        wait_for("the plugin's report", lambda: made.status()["engines"]["live"] == 1, 60.0)
        yield made


def ask(stack: Stack, route: str, body: dict[str, Any]) -> None:
    """Returns once the request was scored: the next one then comes after it, in both orders."""
    before = stack.requests()
    httpx.post(stack.url + route, json={"model": "smollm2"} | body, timeout=120).raise_for_status()
    wait_for(f"the score of {route} {body}", lambda: stack.requests()["scored"] > before["scored"], 60.0)


async def test_what_is_scored_later_has_the_figures_of_what_is_scored_at_once(
    stack: Stack, checkpoints: Checkpoints, tmp_path: Path
) -> None:
    for route, body in requests():
        ask(stack, route, body)
    stack.wait_settled()
    live = stack.status()
    wait_for("a segment", lambda: not list((tmp_path / "spool").glob("*.journal")), 120.0, 1.0)
    folder = tmp_path / "spool"
    rows = [read_segment(path, KEY, {VERSION_KEY: SCHEMA_VERSION}) for path in segments(folder)]
    spooled = [each for part in rows for each in from_rows(part)]
    assert len(spooled) == live["requests"]["scored"] > 6 * len(SUBJECTS)
    taps = [each.tap for each in spooled if each.tap is not None]
    assert len(taps) >= 6 * len(SUBJECTS)
    assert sum(bool(tap.runs) for tap in taps) >= len(SUBJECTS), "the sets of ids that a grammar allowed"

    (tmp_path / "scored").mkdir()
    reference = TransformersReference(str(checkpoints.reference), dtype(), "auto", None)
    try:
        scored = await score_folder(
            folder, tmp_path / "scored", reference, key=KEY, model=None, progress=lambda *_: None
        )
    finally:
        await reference.close()
    assert scored == len(spooled)
    report = await read_evidence(tmp_path / "scored", KEY, 0.0)
    later = json.loads(json.dumps(report))
    different = {name: (live[name], later[other]) for name, other in SAME.items() if live[name] != later[other]}
    assert different == {}
    for name, other in SAME.items():
        assert json.dumps(live[name], sort_keys=True) == json.dumps(later[other], sort_keys=True)
    assert live["raw"]["requests"] >= len(SUBJECTS)
    print(f"{scored} captures, {len(taps)} with taps: KL {live['raw']['kl_nats']['estimate']!r} both ways")
