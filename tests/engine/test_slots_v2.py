"""Model runner V2: its real loader, request states and contexts, with the batches built here (a CPU has no V2)."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.support import oracle
from tests.support.engine_profiles import VOCAB_SIZE, make_contextual, make_profile
from tests.support.slow import examples
from tests.support.taps import received

pytest.importorskip("vllm.v1.worker.gpu.sample.logits_processor")
import torch
from tests.support.slots import SLOTS, context, request_states
from vllm import SamplingParams
from vllm.exceptions import VLLMValidationError
from vllm.v1.worker.gpu.sample.logits_processor import (
    LogitsProcRequestState,
    build_custom_logits_processors,
    build_custom_logits_processors_params_validator,
)

from hemostat_engine.library import Library

NAME = "hemostat_engine:LogitsProcessor"
PROFILES = {p.version: p for p in (make_profile(1), make_contextual(2))}
FIRST, SECOND = PROFILES
UNKNOWN = "f" * 32


def load(*versions: str) -> tuple[Any, Any]:
    """(processor, request states), through vLLM's own loader."""
    req_states = request_states()
    config: Any = SimpleNamespace(parallel_config=SimpleNamespace())
    (processor,) = build_custom_logits_processors(config, req_states, False, [NAME])
    for version in versions:
        processor.core.library.put(PROFILES[version])
    return processor, req_states


def tapping(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HEMOSTAT_ADMIN_URL", "http://127.0.0.1:9")


def params(version: str | None = None, nonce: str | None = None, **more: Any) -> SamplingParams:
    extra = {"hemostat": version} if version else {}
    return SamplingParams(extra_args=(extra | ({"hemostat_tap": nonce} if nonce else {})) or None, **more)


def test_vllm_loads_the_class_under_v2_and_validates_xargs() -> None:
    processor, req_states = load(FIRST, SECOND)
    assert isinstance(LogitsProcRequestState.from_request_state(req_states), LogitsProcRequestState)
    assert processor.core.library.vocab_size == VOCAB_SIZE
    validate = build_custom_logits_processors_params_validator([NAME])
    validate(params(UNKNOWN))
    with pytest.raises(VLLMValidationError, match=r"vllm_xargs\.hemostat must"):
        validate(params("no version"))


@settings(deadline=None, max_examples=examples(80))
@given(data=st.data())
def test_recycled_slots_reordered_batches_and_several_rows_a_request(data: st.DataObject) -> None:
    processor, _ = load(FIRST, SECOND)
    model: dict[int, str | None] = {}
    for step in range(data.draw(st.integers(1, 6))):
        for slot in data.draw(st.lists(st.integers(0, SLOTS - 1), unique=True, max_size=4)):
            version = data.draw(st.sampled_from([None, FIRST, SECOND, UNKNOWN]))
            assert processor.add_request(slot, params(version)) is (version is not None)
            model[slot] = version
        processor.apply_staged_writes()
        if not model:
            continue
        slots = data.draw(st.permutations(sorted(model)).flatmap(lambda p: st.sampled_from([p, p[: len(p) // 2 + 1]])))
        rows_each = data.draw(
            st.lists(st.integers(1, 3), min_size=len(slots), max_size=len(slots)) | st.just([1] * len(slots))
        )
        z = np.random.default_rng(step).normal(0, 3, (sum(rows_each), VOCAB_SIZE)).astype(np.float32)
        z[:, 3] = -np.inf
        masked = data.draw(st.integers(0, len(z) - 1))
        z[masked, data.draw(st.integers(0, VOCAB_SIZE - 1))] = -np.inf
        got = processor.apply(torch.from_numpy(z.copy()), context(slots, rows_each, [4] * len(slots))).numpy()
        for row, slot in enumerate(np.repeat(slots, rows_each).tolist()):
            if model[slot] in PROFILES:
                np.testing.assert_allclose(got[row], oracle.apply(PROFILES[model[slot]], z[row]), rtol=1e-5, atol=1e-5)
            else:
                assert got[row].tobytes() == z[row].tobytes()


def test_binding_happens_only_at_admission() -> None:
    processor, _ = load(FIRST)
    processor.add_request(0, params(FIRST))
    processor.add_request(1, params(SECOND))
    processor.apply_staged_writes()
    processor.core.library.put(PROFILES[SECOND])
    processor.core.library.fail(FIRST)  # it is not held any more
    processor.apply_staged_writes()
    z = np.random.default_rng(0).normal(0, 3, (2, VOCAB_SIZE)).astype(np.float32)
    got = processor.apply(torch.from_numpy(z.copy()), context([0, 1], [1, 1], [4, 4])).numpy()
    np.testing.assert_allclose(got[0], oracle.apply(PROFILES[FIRST], z[0]), rtol=1e-5, atol=1e-5)
    assert got[1].tobytes() == z[1].tobytes()


def test_step_without_parameters_returns_immediately() -> None:
    processor, _ = load(FIRST, SECOND)
    processor.add_request(0, params(FIRST))
    assert processor.add_request(1, params()) is False
    processor.apply_staged_writes()
    logits = torch.zeros(1, VOCAB_SIZE)
    version = logits._version
    assert processor.apply(logits, context([1], [1], [4])) is logits
    assert logits._version == version


@pytest.mark.parametrize("edit", [{"logit_bias": {3: 1.0}}, {"repetition_penalty": 1.1}])
def test_request_with_logit_editing_parameters_gets_identity(edit: dict[str, Any]) -> None:
    processor, _ = load(FIRST, SECOND)
    processor.add_request(0, params(FIRST, **edit))
    processor.apply_staged_writes()
    z = torch.randn(1, VOCAB_SIZE, generator=torch.Generator().manual_seed(0))
    assert torch.equal(processor.apply(z.clone(), context([0], [1], [4])), z)
    assert processor.core.counters.read()["requests_declined"] == 1


@pytest.mark.parametrize("rows_each", [[1, 1, 1], [3, 1, 2]])
def test_taps_by_position_with_and_without_draft_rows(rows_each: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    tapping(monkeypatch)
    processor, req_states = load(FIRST, SECOND)
    processor.core.agent.stop()
    processor.core.library.hold([SECOND])
    req_states.prompt_len.np[[5, 2, 0]] = [4, 9, 3]
    processor.add_request(5, params(FIRST, "treated"))
    processor.add_request(2, params(SECOND))
    processor.add_request(0, params(None, "control"))
    processor.apply_staged_writes()
    z = np.random.default_rng(0).normal(0, 3, (sum(rows_each), VOCAB_SIZE)).astype(np.float32)
    # The last prompt token of slot 5 is at position 3: its row is output position 0. Slot 0 is at position 2.
    processor.apply(torch.from_numpy(z.copy()), context([5, 2, 0], rows_each, [3, 8, 4]))
    # The slot is reused before the taps are read.
    processor.add_request(5, params())
    runs = {run["nonce"]: run for run in processor.core.taps.drain(9, 1 << 20)}
    assert {n: (r["start"], r["tokens"], r["applied"]) for n, r in runs.items()} == {
        "treated": (0, rows_each[0], FIRST),
        "control": (2, rows_each[2], None),
    }
    rows = {"treated": z[: rows_each[0]], "control": z[-rows_each[2] :]}
    for nonce, run in runs.items():
        exact = rows[nonce].astype(np.float64)
        for version, profile in PROFILES.items():
            delta = oracle.shift(profile, exact)
            want = np.log(np.exp(exact + delta).sum(-1)) - np.log(np.exp(exact).sum(-1))
            np.testing.assert_allclose(received(run["versions"][version]), want, atol=1e-5)
        ids = oracle.anchors(PROFILES[SECOND])
        assert ids is not None
        assert run["anchors"] == oracle.anchors_digest(ids)
        want = rows[nonce][:, ids] - rows[nonce][:, ids].mean(-1, keepdims=True)
        features = np.frombuffer(run["features"], "<f2").reshape(want.shape)
        np.testing.assert_allclose(features, want, rtol=1e-3, atol=1e-3)


def test_chunk_of_a_prompt_is_not_an_output_position(monkeypatch: pytest.MonkeyPatch) -> None:
    tapping(monkeypatch)
    processor, req_states = load(FIRST, SECOND)
    processor.core.agent.stop()
    req_states.prompt_len.np[0] = 10
    processor.add_request(0, params(FIRST, "n"))
    processor.apply_staged_writes()
    processor.apply(torch.randn(1, VOCAB_SIZE, generator=torch.Generator().manual_seed(0)), context([0], [1], [4]))
    assert processor.core.taps.drain(9, 1 << 20) == []


def test_library_is_bounded_and_keeps_requested_versions() -> None:
    library = Library(VOCAB_SIZE, limit=3)
    profiles = [make_profile(seed) for seed in range(6)]
    versions = [p.version for p in profiles]
    library.hold(versions[:2])
    for profile in profiles[:3]:
        assert library.put(profile)
    library.get(versions[2])
    assert library.put(profiles[3])
    assert set(library.versions()) == {versions[0], versions[1], versions[3]}
    library.hold([versions[0], versions[1], versions[3]])
    assert not library.put(profiles[4])
    for i in range(100):
        library.get(f"{i:032x}")
    assert len(library.requested()) == 32


def test_requests_with_one_nonce_are_numbered_and_tell_the_ids_before_each_position(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    tapping(monkeypatch)
    processor, req_states = load(FIRST, SECOND)
    processor.core.agent.stop()
    req_states.prompt_len.np[[1, 4]] = 3
    processor.add_request(1, params(None, "n"))
    processor.add_request(4, params(None, "n"))
    processor.apply_staged_writes()
    for step, fed in enumerate(([7, 7], [20, 30], [21, 31])):
        ctx = replace(context([4, 1], [1, 1], [2 + step] * 2), input_ids=torch.tensor(fed, dtype=torch.int32))
        processor.apply(torch.zeros(2, VOCAB_SIZE), ctx)
    runs = {run["child"]: run for run in processor.core.taps.drain(9, 1 << 20)}
    before = {child: np.frombuffer(run["previous_ids"], "<i4").tolist() for child, run in runs.items()}
    assert before == {1: [-1, 20, 21], 0: [-1, 30, 31]}
    # Under speculative decoding what is fed may be rejected.
    ctx = replace(context([4, 1], [2, 1], [5, 5]), input_ids=torch.tensor([22, 23, 32], dtype=torch.int32))
    processor.apply(torch.zeros(3, VOCAB_SIZE), ctx)
    for run in processor.core.taps.drain(9, 1 << 20):
        assert np.frombuffer(run["previous_ids"], "<i4").tolist() == [-1] * run["tokens"]
