"""A profile that fails while it is applied or tapped is off; vLLM, its requests and other profiles go on."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from tests.support import oracle
from tests.support.engine_profiles import VOCAB_SIZE, make_contextual, make_profile

pytest.importorskip("vllm")
import torch
from tests.support.slots import context, request_states
from vllm import SamplingParams
from vllm.v1.sample.logits_processor import BatchUpdate

from hemostat_engine import transform
from hemostat_engine.processor import BatchV1, SlotsV2

GOOD, BAD = make_profile(1), make_contextual(2)
ERRORS = [torch.OutOfMemoryError("CUDA out of memory.\nmore"), ValueError("a bug")]


@pytest.fixture(params=ERRORS, ids=lambda error: type(error).__name__)
def failing(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Exception:
    """BAD raises this wherever its shift is computed."""
    shift = transform.HeldProfile.shift

    def raising(held: transform.HeldProfile, *arguments: Any) -> transform.Shift:
        if held.version == BAD.version:
            raise request.param
        return shift(held, *arguments)

    monkeypatch.setattr(transform.HeldProfile, "shift", raising)
    error: Exception = request.param
    return error


def params(version: str | None, nonce: str) -> SamplingParams:
    return SamplingParams(extra_args={"hemostat_tap": nonce} | ({"hemostat": version} if version else {}))


def drawn(rows: int, seed: int) -> torch.Tensor:
    return torch.randn(rows, VOCAB_SIZE, generator=torch.Generator().manual_seed(seed))


def loaded(make_core: Callable[..., Any]) -> Any:
    core = make_core(tapping=True)
    for profile in (GOOD, BAD):
        core.library.put(profile)
    return core


def check_off(core: Any, caplog: pytest.LogCaptureFixture, error: Exception) -> None:
    assert core.library.versions() == (GOOD.version,)
    assert core.library.get(BAD.version) is None
    assert (core.library.requested(), core.counters.read()["profiles_failed"]) == ((), 1)
    said = f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"
    errors = [record.getMessage() for record in caplog.records if record.levelno >= logging.ERROR]
    assert errors == [f"profile {BAD.version} is off in this engine: {said}"]


def test_rows_of_a_profile_that_fails_stay_as_they_are_and_it_is_off(
    make_core: Callable[..., Any], failing: Exception, caplog: pytest.LogCaptureFixture
) -> None:
    core = loaded(make_core)
    batch = BatchV1(core)
    outputs: list[list[int]] = [[], [], []]
    asked = [BAD.version, GOOD.version, None]
    added = [(row, params(version, f"n{row}"), [1], outputs[row]) for row, version in enumerate(asked)]
    batch.update(BatchUpdate(3, [], added, []))
    for step in range(3):
        z = drawn(3, step)
        got = batch.apply(z.clone())
        assert torch.equal(got[[0, 2]], z[[0, 2]])
        np.testing.assert_allclose(got[1].numpy(), oracle.apply(GOOD, z[1].numpy()), atol=1e-5)
        for output in outputs:
            output.append(1)
    check_off(core, caplog, failing)
    runs = {run["nonce"]: run for run in core.taps.drain(9, 1 << 20)}
    assert {nonce: (run["applied"], run["tokens"]) for nonce, run in runs.items()} == {
        "n0": (None, 3),
        "n1": (GOOD.version, 3),
        "n2": (None, 3),
    }
    batch.update(BatchUpdate(4, [], [(3, params(BAD.version, "n3"), [1], [])], []))
    assert core.counters.read()["requests_unknown"] == 1


def test_a_candidate_that_fails_in_a_tap_is_off_and_the_tap_has_all_else(
    make_core: Callable[..., Any], failing: Exception, caplog: pytest.LogCaptureFixture
) -> None:
    core = loaded(make_core)
    core.library.hold([BAD.version, GOOD.version])
    batch = BatchV1(core)
    batch.update(BatchUpdate(1, [], [(0, params(None, "n"), [1], [])], []))
    batch.apply(drawn(1, 0))
    check_off(core, caplog, failing)
    (run,) = core.taps.drain(9, 1 << 20)
    assert set(run["versions"]) == {GOOD.version}


def test_a_tap_that_cannot_be_read_costs_its_numbers_alone(
    make_core: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    core = loaded(make_core)
    monkeypatch.setattr(core, "_to_host", lambda *_: torch.zeros(1) @ torch.zeros(2))
    batch = BatchV1(core)
    batch.update(BatchUpdate(1, [], [(0, params(GOOD.version, "n"), [1], [])], []))
    for seed in range(2):
        z = drawn(1, seed)
        np.testing.assert_allclose(batch.apply(z.clone()).numpy(), oracle.apply(GOOD, z.numpy()), atol=1e-5)
    assert (len(core.taps), core.counters.read()["taps_dropped"]) == (0, 2)
    assert len([record for record in caplog.records if record.levelno >= logging.ERROR]) == 1


@pytest.mark.parametrize("rows_each", [[1, 1], [2, 3]])
def test_the_same_of_model_runner_v2(
    make_core: Callable[..., Any], failing: Exception, caplog: pytest.LogCaptureFixture, rows_each: list[int]
) -> None:
    core = loaded(make_core)
    slots = SlotsV2(core, request_states())
    for slot, version in enumerate((BAD.version, GOOD.version)):
        slots.add(slot, params(version, f"n{slot}"))
    slots.bind()
    split = rows_each[0]
    for step in range(2):
        z = drawn(sum(rows_each), step)
        got = slots.apply(z.clone(), context([0, 1], rows_each, [0, 0]))
        assert torch.equal(got[:split], z[:split])
        np.testing.assert_allclose(got[split:].numpy(), oracle.apply(GOOD, z[split:].numpy()), atol=1e-5)
    check_off(core, caplog, failing)
    assert {run["nonce"]: run["applied"] for run in core.taps.drain(9, 1 << 20)} == {"n0": None, "n1": GOOD.version}


def test_everything_is_allocated_when_a_profile_is_put(
    make_core: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    core = make_core()
    core.library.put(BAD)
    batch = BatchV1(core)
    batch.update(BatchUpdate(1, [], [(0, SamplingParams(extra_args={"hemostat": BAD.version}), [1], [])], []))
    monkeypatch.setattr(torch.Tensor, "to", lambda *_, **__: pytest.fail("a copy to the device"))
    z = drawn(1, 0)
    np.testing.assert_allclose(batch.apply(z.clone()).numpy(), oracle.apply(BAD, z.numpy()), atol=1e-5)
