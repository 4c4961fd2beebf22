"""Forced tokens, in both of vLLM's model runners, with its own types; a real server: tests/canaries/test_real.py."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
from tests.support.engine_profiles import VOCAB_SIZE, make_profile

pytest.importorskip("vllm")
import torch
from tests.support.slots import context, request_states
from vllm import SamplingParams
from vllm.v1.sample.logits_processor import BatchUpdate
from vllm.v1.worker.gpu.sample.logits_processor import build_custom_logits_processors

from hemostat_engine.processor import BatchV1


def params(*forced: int, **more: Any) -> SamplingParams:
    return SamplingParams(extra_args={"hemostat_force": list(forced)} | more)


def random(rows: int) -> torch.Tensor:
    return torch.randn(rows, VOCAB_SIZE, generator=torch.Generator().manual_seed(0))


def only(logits: torch.Tensor, row: int) -> int:
    """The id of the one token that a row leaves."""
    (token,) = torch.nonzero(logits[row] > -torch.inf).flatten().tolist()
    return int(token)


def test_v1_forces_each_position_in_turn_and_then_samples(make_core: Callable[..., Any]) -> None:
    batch, output = BatchV1(make_core()), list[int]()
    batch.update(BatchUpdate(2, [], [(0, params(5, 3), [1], output), (1, SamplingParams(), [1], [])], []))
    for token in (5, 3):
        before = random(2)
        logits = batch.apply(before.clone())
        assert only(logits, 0) == token
        assert logits[0, token] == before[0, token]
        assert torch.equal(logits[1], before[1])
        output.append(token)
    assert torch.equal(batch.apply(random(2)), random(2))


def test_v1_keeps_a_masked_token_masked_and_ignores_ids_that_the_vocabulary_does_not_have(
    make_core: Callable[..., Any],
) -> None:
    batch = BatchV1(make_core())
    batch.update(BatchUpdate(2, [], [(0, params(5), [1], []), (1, params(VOCAB_SIZE), [1], [])], []))
    before = random(2)
    before[0, 5] = -torch.inf
    assert torch.equal(batch.apply(before.clone()), before)


def test_v1_forces_after_a_profile_was_applied(make_core: Callable[..., Any]) -> None:
    core, profile = make_core(), make_profile(1)
    core.library.put(profile)
    batch = BatchV1(core)
    batch.update(BatchUpdate(1, [], [(0, params(5, hemostat=profile.version), [1], [])], []))
    before = random(1)
    logits = batch.apply(before.clone())
    assert only(logits, 0) == 5
    assert logits[0, 5] != before[0, 5]


@pytest.mark.parametrize("rows_each", [[1, 1], [3, 1]])
def test_v2_forces_by_position_with_and_without_draft_rows(rows_each: list[int]) -> None:
    states = request_states()
    (processor,) = build_custom_logits_processors(
        SimpleNamespace(parallel_config=SimpleNamespace()), states, False, ["hemostat_engine:LogitsProcessor"]
    )
    states.prompt_len.np[[5, 2]] = [4, 9]
    assert processor.add_request(5, params(7, 8))
    assert not processor.add_request(2, SamplingParams())
    processor.apply_staged_writes()
    before = random(sum(rows_each))
    # The input token at position 3 is the prompt's last one: its row is that of the output's first token.
    logits = processor.apply(before.clone(), context([5, 2], rows_each, [3, 20]))
    assert only(logits, 0) == 7
    if rows_each[0] == 3:
        assert only(logits, 1) == 8
    assert torch.equal(logits[2 if rows_each[0] == 3 else 1 :], before[2 if rows_each[0] == 3 else 1 :])
    assert torch.equal(processor.apply(before.clone(), context([5, 2], rows_each, [5, 20])), before)
    # Another request in the same slot.
    processor.add_request(5, SamplingParams())
    processor.apply_staged_writes()
    assert torch.equal(processor.apply(before.clone(), context([5, 2], rows_each, [3, 20])), before)
