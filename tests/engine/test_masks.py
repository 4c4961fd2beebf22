"""What the plugin says of a grammar's mask is what vLLM masked the logits by."""

from __future__ import annotations

import functools
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import msgspec
import numpy as np
import pytest
from tests.support.allowed import packed
from tests.support.engine_profiles import VOCAB_SIZE

pytest.importorskip("vllm")
import torch
from tests.support.slots import context, request_states
from vllm import SamplingParams
from vllm.v1.core.sched.output import GrammarOutput
from vllm.v1.sample.logits_processor import BatchUpdate

from hemostat.engines.messages import UNKNOWN, decode_tap
from hemostat.scoring.conditioning import ConditioningFailure, allowed_sets
from hemostat_engine import masks as module
from hemostat_engine.core import Core
from hemostat_engine.masks import GrammarMasks
from hemostat_engine.processor import BatchV1, SlotsV2

MASK = np.random.default_rng(5).random((4, VOCAB_SIZE)) < 0.3
MASK[:, 0] = True
V1 = "vllm.v1.worker.gpu_model_runner"
V2 = "vllm.v1.worker.gpu.structured_outputs"


def params(nonce: str, **more: Any) -> SamplingParams:
    return SamplingParams(extra_args={"hemostat_tap": nonce}, **more)


def handed_out(core: Core) -> dict[str, Any]:
    """The runs by nonce, as the control process decodes them."""
    body = msgspec.msgpack.encode({"boot_id": "b", "taps": core.taps.drain(99, 1 << 20)})
    return {run.nonce: run for run in decode_tap(body).taps}


def allowed(run: Any) -> np.ndarray:
    return allowed_sets([run], slice(run.start, run.start + run.tokens), VOCAB_SIZE).mask(slice(0, run.tokens))


@pytest.fixture
def runner_v1(monkeypatch: pytest.MonkeyPatch) -> Any:
    """vLLM's module, whose function is as it was afterwards."""
    result = pytest.importorskip(V1)
    monkeypatch.setattr(result, "apply_grammar_bitmask", result.apply_grammar_bitmask)
    return result


def batch_of(core: Core, *nonces: str, **more: Any) -> tuple[BatchV1, list[list[int]]]:
    batch, outputs = BatchV1(core), [[] for _ in nonces]
    added = [(row, params(nonce, **more), [1], outputs[row]) for row, nonce in enumerate(nonces)]
    batch.update(BatchUpdate(len(nonces), [], added, []))
    return batch, outputs


@pytest.mark.parametrize("edits", [{}, {"logit_bias": {3: 1.0}}])
def test_under_v1_the_sets_are_those_that_vllm_masks_by(
    make_core: Callable[..., Core], runner_v1: Any, edits: dict[str, Any]
) -> None:
    core = make_core(tapping=True)
    assert GrammarMasks().watch("v1")
    assert core.masks.watch("v1"), "the newest is told"
    batch, outputs = batch_of(core, "a", "b", "c", **edits)
    z = np.random.default_rng(1).normal(size=(2, 3, VOCAB_SIZE)).astype(np.float32)
    # In the first step two of three are masked, in another order than the batch's; in the second one is.
    for step, (restricted, rows) in enumerate(((["rc", "ra"], [2, 0]), (["rb"], [1]))):
        core.masks.begin()
        logits = torch.from_numpy(z[step].copy())
        runner_v1.apply_grammar_bitmask(
            SimpleNamespace(scheduled_spec_decode_tokens={}),
            GrammarOutput(restricted, packed(MASK[[step * 2 + i for i in range(len(rows))]]).copy()),
            SimpleNamespace(req_ids=["ra", "rb", "rc"]),
            logits,
        )
        for i, row in enumerate(rows):
            np.testing.assert_array_equal(np.isfinite(logits[row].numpy()), MASK[step * 2 + i])
        batch.apply(logits)
        for output in outputs:
            output.append(step)
    core.masks.begin()
    batch.apply(torch.from_numpy(z[0].copy()))  # nothing is masked
    runs = handed_out(core)
    every = np.ones(VOCAB_SIZE, np.bool_)
    for nonce, expected in (
        ("a", [MASK[1], every, every]),
        ("b", [every, MASK[2], every]),
        ("c", [MASK[0], every, every]),
    ):
        np.testing.assert_array_equal(allowed(runs[nonce]), expected)
    assert core.counters.read().get("sets_unknown") is None


def test_a_mask_that_allows_everything_is_none(make_core: Callable[..., Core]) -> None:
    """As before the end of a model's thinking."""
    core = make_core(tapping=True)
    batch, _ = batch_of(core, "a")
    step = module.Step(["ra"], ["ra"], np.full((1, packed(MASK).shape[1]), -1, np.int32), 1)
    core.masks.update(lambda: step)
    batch.apply(torch.zeros(1, VOCAB_SIZE))
    run = handed_out(core)["a"]
    assert (run.set_rows, run.sets) == (b"", b"")


def noted(core: Core, restricted: list[str], rows: int = 2) -> None:
    core.masks.begin()
    core.masks.update(lambda: module.Step(["ra", "rb"], restricted, packed(MASK[: rows - 1]).copy(), rows))


@pytest.mark.parametrize("why", ["several rows", "no room", "it raises", "another vLLM"])
def test_what_is_not_known_is_said_so_and_counted(
    make_core: Callable[..., Core], monkeypatch: pytest.MonkeyPatch, why: str
) -> None:
    core = make_core(tapping=True)
    batch, _ = batch_of(core, "a", "b")
    noted(core, ["rb"], 3 if why == "several rows" else 2)
    if why == "no room":
        monkeypatch.setattr(core.taps, "has_room", lambda size: False)
    if why == "it raises":
        core.masks.begin()
        core.masks.update(lambda: SimpleNamespace().req_ids)
    if why == "another vLLM":
        monkeypatch.setitem(module._PLACES, "v1", module._Place(V1, None, ("logits",), lambda given: given["logits"]))
        assert not core.masks.watch("v1")
    batch.apply(torch.zeros(2, VOCAB_SIZE))
    runs = handed_out(core)
    with pytest.raises(ConditioningFailure, match="position 0"):
        allowed(runs["b"])
    unknown = why in ("it raises", "another vLLM")
    assert (np.frombuffer(runs["a"].set_rows, "<i4") == UNKNOWN).any() == unknown
    assert core.counters.read()["sets_unknown"] == 1 + unknown
    # The next step has nothing to do with it.
    if why != "another vLLM":
        core.masks.begin()
        batch.apply(torch.zeros(2, VOCAB_SIZE))
        assert handed_out(core)["b"].set_rows == b""


@pytest.mark.parametrize("place", [("no.such.module", None), ("types", "NoSuchClass"), ("types", None)])
def test_a_vllm_that_masks_elsewhere_is_no_error(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, place: tuple[str, str | None]
) -> None:
    monkeypatch.setitem(module._PLACES, "v2", module._Place(*place, ("self",), lambda given: given["self"]))
    assert GrammarMasks().watch("v2") is False
    assert "which ids grammars allow is not known" in caplog.text


def slots_of(core: Core, *nonces: str) -> SlotsV2:
    slots = SlotsV2(core, request_states())
    for slot, nonce in enumerate(nonces):
        slots.add(slot, params(nonce))
    slots.bind()
    return slots


def test_under_v2_masks_go_by_the_place_in_the_batch(
    make_core: Callable[..., Core], monkeypatch: pytest.MonkeyPatch
) -> None:
    worker = pytest.importorskip(V2).StructuredOutputsWorker
    real, seen = worker.apply_grammar_bitmask, []
    # It needs a GPU; its parameters are the real one's.
    stub = functools.wraps(real, updated=())(lambda *given: seen.append(given))
    monkeypatch.setattr(worker, "apply_grammar_bitmask", stub)
    core = make_core(tapping=True)
    assert core.masks.watch("v2")
    slots = slots_of(core, "a", "b", "c")
    core.masks.begin()
    logits = torch.zeros(3, VOCAB_SIZE)
    batch = SimpleNamespace(req_ids=["rc", "ra", "rb"])
    given = (object(), logits, batch, ["ra", "rc"], packed(MASK[:2]).copy())
    worker.apply_grammar_bitmask(*given)
    assert seen == [given]
    slots.apply(logits, context([2, 0, 1], [1, 1, 1], [4, 4, 4]))
    runs = handed_out(core)
    np.testing.assert_array_equal(allowed(runs["a"])[-1:], MASK[:1])
    np.testing.assert_array_equal(allowed(runs["c"])[-1:], MASK[1:2])
    assert runs["b"].set_rows == b""


def test_under_speculative_decoding_a_restricted_request_is_not_known(make_core: Callable[..., Core]) -> None:
    core = make_core(tapping=True)
    slots = slots_of(core, "a", "b")
    core.masks.update(lambda: module.Step(["ra", "rb"], ["rb"], packed(MASK[:2]).copy(), 3))
    slots.apply(torch.zeros(3, VOCAB_SIZE), context([0, 1], [1, 2], [4, 4]))
    runs = handed_out(core)
    assert runs["a"].set_rows == b""
    assert set(np.frombuffer(runs["b"].set_rows, "<i4").tolist()) == {UNKNOWN}
