"""Model runner V1: batch updates of every shape against a model that is a dict, with vLLM's own types."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from hemostat_calibration import transform as oracle

from .conftest import V, make_profile

pytest.importorskip("vllm")
import torch
from vllm import SamplingParams
from vllm.v1.sample.logits_processor import BatchUpdate, LogitsProcessors, MoveDirectionality

from hemostat_calibration.engine import LogitsProcessor
from hemostat_calibration.engine.processor import Batch

PROFILES = {p.version: p for p in (make_profile(1), make_profile(2))}
UNKNOWN = "f" * 32
CHOICES = [None, *PROFILES, UNKNOWN]


def params(version: str | None = None, nonce: str | None = None, **more: Any) -> SamplingParams:
    extra = {"hemostat": version} if version else {}
    return SamplingParams(extra_args=(extra | ({"hemostat_tap": nonce} if nonce else {})) or None, **more)


def update(batch_size: int, removed: Any = (), added: Any = (), moved: Any = ()) -> BatchUpdate:
    return BatchUpdate(batch_size, list(removed), list(added), list(moved))


def expected(z: np.ndarray, rows: dict[int, str | None]) -> np.ndarray:
    out = z.copy()
    for row, version in rows.items():
        if version in PROFILES:
            out[row] = oracle.apply(PROFILES[version], z[row])
    return out


def check(batch: Batch, rows: dict[int, str | None], seed: int, size: int) -> None:
    z = np.random.default_rng(seed).normal(0, 3, (size, V)).astype(np.float32)
    got = batch.apply(torch.from_numpy(z.copy())).numpy()
    np.testing.assert_allclose(got, expected(z, rows), rtol=1e-5, atol=1e-5)
    untouched = [row for row in range(size) if rows.get(row) not in PROFILES]
    assert got[untouched].tobytes() == z[untouched].tobytes()


@settings(deadline=None, max_examples=80, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_sequence_of_updates_follows_the_dict(make_core: Callable[..., Any], data: st.DataObject) -> None:
    core = make_core()
    for profile in PROFILES.values():
        core.library.put(profile)
    batch = Batch(core)
    capacity = 6
    model: dict[int, str | None] = {}
    for step in range(data.draw(st.integers(1, 8))):
        removed = data.draw(st.lists(st.sampled_from(sorted(model) or [0]), unique=True, max_size=len(model)))
        for row in removed:
            model.pop(row, None)
        added = []
        for row in data.draw(st.lists(st.integers(0, capacity - 1), unique=True, max_size=3)):
            version = data.draw(st.sampled_from(CHOICES))
            added.append((row, params(version), [1], []))
            model[row] = version
        moved = []
        for a, b in data.draw(st.lists(st.tuples(st.integers(0, 5), st.integers(0, 5)), max_size=3)):
            if a == b or a not in model:
                continue
            swap = data.draw(st.booleans())
            moved.append((a, b, MoveDirectionality.SWAP if swap else MoveDirectionality.UNIDIRECTIONAL))
            source, target = model.pop(a), model.pop(b, "gone")
            model[b] = source
            if swap and target != "gone":
                model[a] = target
        if removed or added or moved:
            batch.update(update(capacity, removed, added, moved))
        check(batch, model, step, capacity)


def test_a_version_that_arrives_or_leaves_later_changes_no_running_request(make_core: Callable[..., Any]) -> None:
    core = make_core()
    first, second = PROFILES
    core.library.put(PROFILES[first])
    batch = Batch(core)
    bound, unbound = params(first), params(second)
    batch.update(update(2, added=[(0, bound, [1], []), (1, unbound, [1], [])]))
    assert core.counters.read() == {"requests_bound": 1, "requests_unknown": 1}
    assert core.library.missing() == (second,)
    core.library.put(PROFILES[second])
    core.library._held.pop(first)
    check(batch, {0: first, 1: None}, 0, 2)
    # Set aside (preempted, or not scheduled) and taken up again: the same binding.
    batch.update(update(0, removed=[1, 0]))
    check(batch, {}, 1, 2)
    batch.update(update(2, added=[(0, unbound, [1], [5]), (1, bound, [1], [5])]))
    check(batch, {1: first}, 2, 2)
    # A new request with that version is bound to it.
    batch.update(update(3, added=[(2, params(second), [1], [])]))
    check(batch, {1: first, 2: second}, 3, 3)
    assert core.counters.read()["requests_bound"] == 2


def test_a_batch_without_profiles_gets_the_very_same_tensor_back(make_core: Callable[..., Any]) -> None:
    batch = Batch(make_core())
    batch.update(update(1, added=[(0, params(), [1], [])]))
    logits = torch.zeros(1, V)
    version = logits._version
    assert batch.apply(logits) is logits
    assert logits._version == version


def test_a_request_that_edits_its_own_logits_gets_identity_and_no_tap(make_core: Callable[..., Any]) -> None:
    core = make_core(tapping=True)
    version = next(iter(PROFILES))
    core.library.put(PROFILES[version])
    batch = Batch(core)
    batch.update(update(1, added=[(0, params(version, "n", logit_bias={3: 1.0}), [1], [])]))
    check(batch, {}, 0, 1)
    assert core.counters.read() == {"requests_declined": 1, "requests_bound": 0, "requests_unknown": 0}
    assert not core.taps.drain(9)


def test_penalties_come_later_and_do_not_stand_in_the_way(make_core: Callable[..., Any]) -> None:
    core = make_core()
    version = next(iter(PROFILES))
    core.library.put(PROFILES[version])
    batch = Batch(core)
    batch.update(update(1, added=[(0, params(version, presence_penalty=0.5), [1], [])]))
    check(batch, {0: version}, 0, 1)


def test_logits_of_another_width_are_left_alone_and_counted(make_core: Callable[..., Any]) -> None:
    core = make_core()
    version = next(iter(PROFILES))
    core.library.put(PROFILES[version])
    batch = Batch(core)
    batch.update(update(1, added=[(0, params(version), [1], [])]))
    logits = torch.ones(1, V + 1)
    assert torch.equal(batch.apply(logits), torch.ones(1, V + 1))
    assert core.counters.read()["steps_misfit"] == 1


def test_taps_are_of_the_unmodified_logits_and_carry_the_output_position(make_core: Callable[..., Any]) -> None:
    core = make_core(tapping=True)
    for profile in PROFILES.values():
        core.library.put(profile)
    first, second = PROFILES
    core.library.hold([second])
    batch = Batch(core)
    treated, control, plain = [], [7, 8], []
    batch.update(
        update(
            3,
            added=[
                (0, params(first, "treated"), [1], treated),
                (1, params(None, "control"), [1], control),
                (2, params(first), [1], plain),
            ],
        )
    )
    z = np.random.default_rng(0).normal(0, 3, (2, 3, V)).astype(np.float32)
    for step in range(2):
        batch.apply(torch.from_numpy(z[step].copy()))
        for output in (treated, control, plain):
            output.append(-1)
    runs = {run["nonce"]: run for run in core.taps.drain(99)}
    assert set(runs) == {"treated", "control"}
    assert [runs[n]["start"] for n in ("treated", "control")] == [0, 2]
    assert [runs[n]["tokens"] for n in ("treated", "control")] == [2, 2]
    assert [runs[n]["applied"] for n in ("treated", "control")] == [first, None]
    for row, nonce in enumerate(("treated", "control")):
        for version, profile in PROFILES.items():
            exact = z[:, row].astype(np.float64)
            delta = oracle.shift(profile, exact)
            want = np.log(np.exp(exact + delta).sum(-1)) - np.log(np.exp(exact).sum(-1))
            np.testing.assert_allclose(runs[nonce]["versions"][version], want, atol=1e-5)


def test_more_than_the_queue_holds_is_dropped_and_counted(make_core: Callable[..., Any]) -> None:
    from hemostat_calibration.engine import taps

    core = make_core(tapping=True)
    batch = Batch(core)
    batch.update(update(1, added=[(0, params(None, "n"), [1], [])]))
    for _ in range(taps.STEPS_AT_MOST + 3):
        batch.apply(torch.zeros(1, V))
    assert len(core.taps) == taps.STEPS_AT_MOST
    assert core.counters.read()["taps_dropped"] == 3


def test_vllm_loads_the_class_under_v1_and_refuses_wrong_xargs_through_it() -> None:
    from vllm.exceptions import VLLMValidationError
    from vllm.v1.sample.logits_processor import _load_logitsprocs_by_fqcns, validate_logits_processors_parameters

    name = "hemostat_calibration.engine:LogitsProcessor"
    assert _load_logitsprocs_by_fqcns([name]) == [LogitsProcessor]
    validate_logits_processors_parameters([name], params(UNKNOWN, "n"))
    with pytest.raises(VLLMValidationError, match=r"vllm_xargs\.hemostat must"):
        validate_logits_processors_parameters([name], params("nonsense"))


def test_the_class_itself_under_v1() -> None:
    config: Any = SimpleNamespace(
        model_config=SimpleNamespace(get_vocab_size=lambda: V), parallel_config=SimpleNamespace()
    )
    processor = LogitsProcessor(config, torch.device("cpu"), False)
    assert list(LogitsProcessors([processor]).non_argmax_invariant) == [processor]
    version = next(iter(PROFILES))
    processor.core.library.put(PROFILES[version])
    processor.update_state(update(1, added=[(0, params(version), [1], [])]))
    processor.update_state(None)
    z = np.random.default_rng(0).normal(0, 3, (1, V)).astype(np.float32)
    got = processor.apply(torch.from_numpy(z.copy())).numpy()
    np.testing.assert_allclose(got, expected(z, {0: version}), rtol=1e-5, atol=1e-5)
