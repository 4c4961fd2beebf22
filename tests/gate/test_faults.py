"""Servers that answer wrongly, and reruns: none of it lets a candidate pass that was not compared."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tests.support.fake_vllm import FakeVllm
from tests.support.gate_servers import Change, Changed, emptied, servers

from hemostat.reference.own_answers import listed_by
from hemostat.reference.protocol import ReferenceScores
from hemostat_calibration.gate.distance import Listed, sampled_distance
from hemostat_calibration.records import Candidates

PASS, FAIL, UNDECIDED = 0, 1, 2

Gate = Callable[..., tuple[int, str]]


@pytest.mark.parametrize("lost", ["token_ids", "all tokens"])
def test_models_whose_tokens_are_not_there_do_not_pass(gate: Gate, lost: str) -> None:
    """They were counted as equal, as different as they are, because neither had a token."""

    def fake(noise: float) -> FakeVllm:
        if lost == "token_ids":
            return FakeVllm(noise=noise, returns_token_ids=False)
        return Changed(noise=noise, change=emptied)

    with servers(fake(0.0), fake(2.0)) as (stable, candidate):
        code, text = gate(stable, candidate)
    assert code == UNDECIDED, text
    assert "could not be measured" in text


def test_reruns_while_the_stable_server_fails_add_up_to_no_pass(gate: Gate, tmp_path: Path) -> None:
    state = tmp_path / "gate.state"
    with servers(FakeVllm(max_logprobs=5), FakeVllm(noise=2.0)) as (stable, candidate):
        for _ in range(5):
            code, text = gate(stable, candidate, "--state", str(state))
            assert code == UNDECIDED, text
            assert "3 prompts in a row failed at the stable model" in text
    assert '"unit"' not in state.read_text()


def out_of_vocabulary(choice: dict[str, Any]) -> None:
    rename(choice, 1_000_000)


def beyond_32_bits(choice: dict[str, Any]) -> None:
    rename(choice, 99_999_999_999)


def rename(choice: dict[str, Any], token: int) -> None:
    lists = choice["logprobs"]
    old, new = lists["tokens"][0], f"token_id:{token}"
    choice["token_ids"][0] = token
    lists["tokens"][0] = new
    lists["top_logprobs"][0] = {new if key == old else key: value for key, value in lists["top_logprobs"][0].items()}


def raw_logits(choice: dict[str, Any]) -> None:
    lists = choice["logprobs"]
    lists["token_logprobs"] = [value + 900.0 for value in lists["token_logprobs"]]
    lists["top_logprobs"] = [{key: value + 900.0 for key, value in row.items()} for row in lists["top_logprobs"]]


@pytest.mark.parametrize("change", [out_of_vocabulary, beyond_32_bits, raw_logits])
@pytest.mark.parametrize("expect", ["same", "other"])
def test_a_candidate_that_answers_garbage_fails(gate: Gate, change: Change, expect: str, tmp_path: Path) -> None:
    """Its prompts were left out where the other model refused its tokens, so that only its good answers counted."""
    state = tmp_path / "gate.state"
    with servers(FakeVllm(), Changed(change=change), FakeVllm()) as (stable, candidate, reference):
        more = ("--reference", reference) if expect == "other" else ()
        code, text = gate(stable, candidate, "--expect", expect, *more, "--state", str(state))
    assert code == FAIL, text
    assert "null" not in "".join(state.read_text().splitlines()[1:]).replace('"log_ratio":null', "")


def test_a_kind_that_had_to_pass_still_has_to_after_its_prompts_are_gone(
    gate: Gate, prompts: Path, tmp_path: Path
) -> None:
    state = tmp_path / "gate.state"
    lines = prompts.read_text().splitlines()
    rare = [json.dumps({**json.loads(line), "kind": "rare"}) for line in lines[:30]]
    with servers(FakeVllm(), FakeVllm()) as (stable, candidate):
        prompts.write_text("\n".join([*rare, *lines[30:32]]))
        code, text = gate(stable, candidate, "--state", str(state))
        assert code == UNDECIDED
        lines_kept = state.read_text().splitlines(keepends=True)
        state.write_text("".join(lines_kept[:6]))  # as after a kill
        prompts.write_text("\n".join([*rare[:10], *lines[30:]]))
        code, text = gate(stable, candidate, "--state", str(state))
    assert code == UNDECIDED, text
    assert "all prompts were asked" in text


def test_a_folder_that_does_not_exist_is_named_before_anything_is_asked(gate: Gate, tmp_path: Path) -> None:
    code, text = gate("http://127.0.0.1:1", "http://127.0.0.1:1", "--json", str(tmp_path / "none" / "result.json"))
    assert code == UNDECIDED
    assert "its folder does not exist" in text


@pytest.mark.parametrize("top_k", [1, 5])
def test_the_list_of_a_server_does_not_depend_on_the_emitted_token(top_k: int) -> None:
    """A vLLM server's answer has the emitted id whatever its rank, so `at` knows it: in the list it is a bias."""
    vocabulary = 40
    random = np.random.default_rng(3)
    logits = random.normal(0.0, 1.5, vocabulary)
    p, q = (np.exp(x) / np.exp(x).sum() for x in (logits, logits + random.normal(0.0, 1.5, vocabulary)))
    output = np.arange(vocabulary, dtype=np.int32)
    top_p, top_q = (np.tile(np.argsort(-x)[:top_k].astype(np.int32), (vocabulary, 1)) for x in (p, q))
    known = (top_p[:, :, None] == top_q[:, None, :]).any(axis=2) | (top_p == output[:, None])
    at = np.where(known, np.log(q)[top_p], np.nan)
    reference = listed_by(ReferenceScores(at, Candidates(top_q, np.log(q)[top_q]), np.log(q)), top_p)
    values = sampled_distance(Listed(top_p, np.log(p)[top_p], np.log(p)), reference, output)
    assert p @ values == pytest.approx(0.5 * np.abs(p - q).sum(), abs=1e-12)
