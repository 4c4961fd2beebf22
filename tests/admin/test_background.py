"""The line on the background work, from the parts of the status."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tests.support.control import control, settings, status_json

from hemostat.admin.background import background

LEARNING = {"state": "learning", "detail": ""}


def adapter(state: str = "off", detail: str = "", engine: str = "idle", **judge: Any) -> dict[str, Any]:
    return {
        "state": state,
        "detail": detail,
        "known_tokens": 612,
        "next_tokens": 1000,
        "builds": {},
        "engine": {"state": engine},
        "judge": {"state": "idle", "waiting": 0, **judge},
    }


def test_the_line_says_what_runs_and_how_far_it_is() -> None:
    assert background(LEARNING, adapter(), "") == ""
    assert background(LEARNING, adapter("collecting"), "") == "texts for an adapter: 612 of 1,000 tokens"
    assert background(LEARNING, adapter("building", "corrections 12/30"), "") == (
        "an adapter is being made (corrections 12/30)"
    )
    assert background(LEARNING, adapter("off", engine="probing"), "") == "an adapter is being checked at the engines"
    assert background(LEARNING, adapter(state="off") | {"judge": {"state": "starting", "waiting": 3}}, "") == (
        "the copies that judge adapters are loading"
    )


def test_the_line_ends_with_what_the_next_decision_waits_for() -> None:
    training = {"state": "training", "detail": "linear 42%"}
    waits = "adapter 171c242c: 38 of about 56 conversations of chat, 4 min left"
    assert background(training, adapter("off", waiting=7), waits) == (
        "a profile is being learned (linear 42%); 7 answers wait for the copies that judge adapters; " + waits
    )


def test_after_a_build_the_line_does_not_count_towards_the_next_one() -> None:
    assert background(LEARNING, adapter("collecting") | {"builds": {"proposed": 1}}, "waits") == "waits"


async def test_the_status_has_the_line(tmp_path: Path) -> None:
    async with control(tmp_path, settings()) as plane:
        assert status_json(plane)["background"] == ""
