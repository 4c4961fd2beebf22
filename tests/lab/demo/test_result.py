"""The page that the demo leaves, from a response of /api/v1/status and the records of a run."""

from __future__ import annotations

import json
import re
from html import unescape
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer
from tokenizers.decoders import ByteLevel
from tokenizers.models import BPE

from hemostat_lab.demo import view
from hemostat_lab.demo.checkpoints import Checkpoints
from hemostat_lab.demo.result import page
from hemostat_lab.demo.token_classes import ClassLoss, losses_by_class
from hemostat_lab.demo.traffic import Traffic

CHECKPOINTS = Checkpoints(Path("/models/reference"), Path("/models/w4a16"))
HEADINGS = ["What compression cost", "What was recovered", "Where it is lost", "What to do next"]
CLASSES = [ClassLoss("word start", 6000, 1800.0), ClassLoss("digits", 200, 200.0)]


def figure(estimate: float, low: float | None = None, high: float | None = None) -> dict[str, Any]:
    return {"estimate": estimate, "ci95": [low, high], "bound": "lower"}


def figures(requests: int, tokens: int, kl: dict[str, Any]) -> dict[str, Any]:
    return {
        "requests": requests,
        "tokens": tokens,
        "kl_nats": kl,
        "kl_nats_estimate": kl,
        "total_variation": 0.25,
        "top1_agreement": 0.602,
        "ci95": {"total_variation": [0.23, 0.27], "top1_agreement": [0.558, 0.646]},
    }


def scene(**changes: Any) -> view.Scene:
    status = {
        "tokens_scored": 9217,
        "background": "adapter 171c242c: 38 of about 56 conversations of chat, 4 min left",
        "raw": figures(204, 9217, figure(0.354, 0.322, 0.392)),
        "kinds": [
            {"kind": "chat text sampled", "raw": figures(148, 7217, figure(0.3, 0.28, 0.32))},
            {"kind": "chat json sampled", "raw": figures(56, 2000, figure(0.55, 0.5, 0.6))},
        ],
        "places": {
            "position": [
                {"place": "0-15", **figures(204, 3200, figure(0.389))},
                {"place": "16-63", **figures(192, 6017, figure(0.335))},
            ],
            "context": [{"place": "0-511", **figures(204, 9217, figure(0.354))}],
        },
        "trajectory": {"sampled": {"half_life_tokens": figure(1.44, 0.99, 1.85)}},
        "profile": {"version": "identity", "family": "identity", "mode": "auto"},
        "calibration": {"kinds": [{"kind": "chat json sampled", "summary": "identity; 25 <of> the evidence"}]},
        **changes,
    }
    return view.Scene(
        "m",
        "http://127.0.0.1:1",
        "http://127.0.0.1:2",
        "/logs",
        Traffic(began_at=1.9e9 - 180, sent=240, ok=232),
        status,
    )


def text_of(document: str) -> str:
    """Returns the words of a page, without its plots."""
    body = document.partition("<main>")[2]
    return " ".join(unescape(re.sub(r"<[^>]+>", " ", re.sub(r"<svg.*?</svg>", "", body))).split())


def test_page_says_what_it_cost_where_it_is_lost_and_what_to_do() -> None:
    document = page(scene(), CHECKPOINTS, CLASSES)
    assert re.findall(r"<h2>(.*)</h2>", document) == HEADINGS
    text = text_of(document)
    for expected in (
        "232 of 240 requests were answered; 9,217 tokens were scored by the reference.",
        "KL, nats per token, at least 0.354 [0.322, 0.392]",
        "Total variation 0.250 [0.230, 0.270]; about one token in 4.0 differs",
        "Same most likely token 60.2 % [55.8, 64.6]",
        "half of the sampled texts have parted 1.4 [0.990, 1.850]",
        "chat json sampled 56 2,000 0.550 [0.500, 0.600] 33.7 % identity; 25 <of> the evidence",
        "16-63 192 6,017 0.335 interval not known yet 61.8 %",
        "word start 6,000 0.300 90.0 %",
        "digits 200 1.000 10.0 %",
        "No profile was promoted in this run",
        "At the end of the run: adapter 171c242c: 38 of about 56 conversations of chat, 4 min left.",
        "let the demo run longer",
        "chat json sampled loses most: 0.550 [0.500, 0.600] nats per token, against 0.354 in all traffic.",
        "hemostat doctor /models/reference /models/w4a16 --html doctor.html",
    ):
        assert expected in text, text
    assert "<of>" not in document, "texts are escaped"
    assert document.count("<svg") == 3, "kinds, positions and classes of tokens"
    assert "By length of the context" not in text, "one row would say nothing"


def test_page_compares_the_arms_with_intervals_after_a_promotion() -> None:
    less = {"kl_nats_estimate": figure(-0.35, -0.4, -0.3), "total_variation": figure(-0.15, -0.17, -0.13)}
    arms = {
        "control": figures(52, 2500, figure(0.55, 0.5, 0.6)),
        "treated": figures(49, 2400, figure(0.2, 0.17, 0.23)),
        "treated_minus_control": {**less, "top1_agreement": figure(0.12, 0.1, 0.14)},
    }
    promoted = scene(
        arms=arms,
        profile={"version": "ab" * 16, "family": "adapter", "mode": "auto"},
        recovered={"ratio": 0.71, "ci95": [0.68, 0.74], "gain_nats": figure(0.35, 0.3, 0.4)},
    )
    promoted.update_decisions(
        [
            {
                "decision": "promote",
                "at": 1.9e9,
                "reason": "evidence",
                "version": "ab" * 16,
                "kind": "chat",
                "why": "better",
            }
        ]
    )
    text = text_of(page(promoted, CHECKPOINTS, []))
    for expected in (
        "the profile removes 71.0 % [68.0, 74.0] of the KL: 0.350 [0.300, 0.400] nats.",
        "The first profile was promoted after 240 requests, 180 s after the first one.",
        "Decision: promote abababab for chat (evidence): better.",
        "control, 52 requests treated, 49 requests treated minus control",
        "KL, nats, estimate with the tail 0.550 [0.500, 0.600] 0.200 [0.170, 0.230] -0.350 [-0.400, -0.300]",
        "total variation 0.250 [0.230, 0.270] 0.250 [0.230, 0.270] -0.150 [-0.170, -0.130]",
        "same most likely token 60.2 % [55.8, 64.6] 60.2 % [55.8, 64.6] 12.0 % [10.0, 14.0]",
        "Profile abababab is proven here.",
        "Keep evidence.cycle_hours at its default there",
    ):
        assert expected in text, text
    assert "No profile was promoted" not in text
    assert "class of the token" not in text, "no records, no table"


@pytest.fixture
def reference(tmp_path: Path) -> Path:
    """A folder with a tokenizer: `a`, ` b`, `7`, and the end of a text."""
    vocabulary = {"a": 0, "\u0120b": 1, "7": 2, "<end>": 3}
    tokenizer = Tokenizer(BPE(vocabulary, []))
    tokenizer.decoder = ByteLevel()
    tokenizer.add_special_tokens(["<end>"])
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    return tmp_path


def test_classes_are_of_requests_that_no_profile_has_changed(tmp_path: Path, reference: Path) -> None:
    records = tmp_path / "records.jsonl"
    lines = [
        {"profile": "identity", "output_token_ids": [1, 0, 2], "kl_nats": [0.5, 0.25, 1.0]},
        {"profile": "identity", "output_token_ids": [1, 3, 2], "kl_nats": [0.25, 0.125, None]},
        {"profile": "ab" * 16, "output_token_ids": [1, 0, 2], "kl_nats": [9.0, 9.0, 9.0]},
    ]
    records.write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert losses_by_class(records, reference) == [
        ClassLoss("word start", 2, 0.75),
        ClassLoss("word continuation", 1, 0.25),
        ClassLoss("digits", 1, 1.0),
        ClassLoss("special", 1, 0.125),
    ]
