"""JSON lines are scored as captures are, and what cannot be scored is refused with the reason."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tests.support.captures import K, capture
from tests.support.scorer_bench import FakeReference

from hemostat.config.packages import missing
from hemostat.scoring.capture_arrays import candidates
from hemostat.scoring.offline import lines as module
from hemostat.scoring.offline.evidence import read_evidence
from hemostat.scoring.offline.folder import score_folder
from hemostat.scoring.offline.lines import captures_of, parts
from hemostat.scoring.offline.summary import headline
from hemostat.scoring.score_rows import VERSIONS, scored_rows
from hemostat.scoring.spool.keys import SpoolError
from hemostat.scoring.spool.segments import read_segment, segments
from hemostat.scoring.spool.spooled import Spooled

PROMPT, OUTPUT = [5, 6, 7], [0, 3]
TOP = [{0: -0.1, 1: -3.0, 2: -4.0}, {0: -0.5, 1: -1.5, 2: -2.5, 3: -9.0}]
"""The ids of each position; the last one was emitted, and is none of the three likeliest."""
IDS = {"prompt_token_ids": PROMPT, "token_ids": OUTPUT}


def chat() -> dict[str, Any]:
    content = []
    for token, row in zip(OUTPUT, TOP, strict=True):
        top = [{"token": f"token_id:{i}", "logprob": row[i]} for i in sorted(row, key=lambda i: i != token)]
        content.append({"token": f"token_id:{token}", "logprob": row[token], "top_logprobs": top})
    return {"content": content}


def completion() -> dict[str, Any]:
    return {
        "tokens": [f"token_id:{token}" for token in OUTPUT],
        "token_logprobs": [row[token] for token, row in zip(OUTPUT, TOP, strict=True)],
        "top_logprobs": [{f"token_id:{i}": value for i, value in row.items()} for row in TOP],
        "text_offset": [0, 1],
    }


def written(folder: Path, *lines: object) -> Path:
    path = folder / "lines.jsonl"
    path.write_text("\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines) + "\n")
    return path


async def read(path: Path, compressed: FakeReference | None = None) -> list[Spooled]:
    return [one for part in parts(path) for one in (await captures_of(path, part, compressed))[0]]


@pytest.mark.parametrize(
    "line",
    [
        IDS | {"logprobs": chat()},
        IDS | {"logprobs": completion()},
        IDS | {"logprobs": TOP},
        IDS | {"logprobs": [{i: {"logprob": v, "rank": 1} for i, v in row.items()} for row in TOP]},
        {
            "prompt_token_ids": PROMPT,
            "choices": [{"token_ids": OUTPUT, "logprobs": chat()}],
            "object": "chat.completion",
        },
        {"choices": [IDS | {"logprobs": completion(), "text": "…"}], "usage": {"prompt_tokens": 3}},
        {"prompt_token_ids": PROMPT, "output_token_ids": OUTPUT, "logprobs": TOP},
    ],
    ids=["chat", "completion", "generate", "generate objects", "chat response", "completion response", "output ids"],
)
async def test_each_form_of_vllm_gives_the_same_candidates(tmp_path: Path, line: dict[str, Any]) -> None:
    (one,) = await read(written(tmp_path, line))
    given = candidates(one.capture)
    assert given.ids.tolist() == [[0, 1, 2, -1], [0, 1, 2, 3]]
    np.testing.assert_allclose(given.logprobs, [[-0.1, -3.0, -4.0, -math.inf], [-0.5, -1.5, -2.5, -9.0]], rtol=1e-6)
    assert np.frombuffer(one.capture.prompt_token_ids, "<i4").tolist() == PROMPT


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ({"prompt": "Hello", "text": " world"}, "Texts cannot be scored"),
        ({"prompt_token_ids": PROMPT, "text": " world"}, "no token_ids"),
        (IDS, "--compressed"),
        (IDS | {"logprobs": None}, "--compressed"),
        (IDS | {"logprobs": TOP[:1]}, "1 positions"),
        (IDS | {"logprobs": [{0: -0.1}, {3: -0.1}]}, "fewer than 2 ids"),
        (IDS | {"logprobs": [TOP[0], TOP[0]]}, "does not list the token 3"),
        (IDS | {"logprobs": json.loads(json.dumps(chat()).replace("token_id:", ""))}, "return_tokens_as_token_ids"),
        (IDS | {"logprobs": "text"}, "logprobs: "),
        ({"prompt_token_ids": [-1], "token_ids": OUTPUT, "logprobs": TOP}, "negative"),
        ({"prompt_token_ids": [], "token_ids": OUTPUT, "logprobs": TOP}, "no prompt"),
        ("{", "one JSON object a line"),
        ("[]", "one JSON object a line"),
    ],
)
async def test_what_cannot_be_scored_is_named_in_one_line(tmp_path: Path, line: object, says: str) -> None:
    good = IDS | {"logprobs": TOP}
    with pytest.raises(SpoolError) as error:
        await read(written(tmp_path, good, line))
    assert says in str(error.value)
    assert ", line 2: " in str(error.value)
    assert "\n" not in str(error.value)


async def test_lines_are_scored_in_parts_and_a_run_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "LINES", 4)
    made = capture(tokens=3)
    given = candidates(made)
    top = [
        {int(i): float(v) for i, v in zip(row, values, strict=True) if i >= 0}
        for row, values in zip(given.ids, given.logprobs, strict=True)
    ]
    assert len(top[0]) == K
    line = {"prompt_token_ids": [1, 2], "token_ids": [0, 0, 0], "logprobs": top, "kind": "chat text sampled"}
    path = written(tmp_path, *(line | {"request_id": str(n), "client": f"c{n % 3}"} for n in range(10)), "")
    out = tmp_path / "out"
    out.mkdir()

    async def score() -> int:
        return await score_folder(path, out, FakeReference(), key=None, model=None, progress=lambda *_: None)

    assert await score() == 10
    assert await score() == 0
    assert len(segments(out)) == 3
    segments(out)[1].unlink()
    assert await score() == 4
    report = await read_evidence(out, None, 0.0)
    assert (report["captures"], report["scored"], report["tokens"], report["period"]) == (10, 10, 30, None)
    assert "UTC" not in headline(report)
    rows = [row for part in segments(out) for row in scored_rows(read_segment(part, None, VERSIONS))]
    assert [row.spooled.capture.request_id for row in rows] == [str(n) for n in range(10)]
    assert len({row.spooled.capture.client for row in rows}) == 3


async def test_records_are_scored_by_the_model_that_generated_them(tmp_path: Path) -> None:
    record = {
        "request_id": "a",
        "prompt_token_ids": PROMPT,
        "output_token_ids": [0, 2],
        "kl_nats": [0.1, None],
        "temperature": None,
        "conversation": "00",
        "arm": "none",
        "profile": "identity",
        "adapter": None,
        "constraint": "",
        "distances": {},
    }
    path = written(tmp_path, record, record | {"profile": "a" * 32}, record | {"adapter": "b" * 32})
    compressed = FakeReference()
    (one,) = await read(path, compressed)
    assert len(compressed.asked) == 1
    given = candidates(one.capture)
    assert given.ids.tolist() == [[0, 1, 2, -1], [0, 1, 2, -1]]
    assert not missing("spool")
