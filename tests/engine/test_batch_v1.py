"""Model runner V1: random batch updates compared with a dict, with vLLM's own types."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tests.support import oracle
from tests.support.engine_profiles import VOCAB_SIZE, make_contextual, make_profile
from tests.support.slow import examples
from tests.support.taps import received

from hemostat_calibration.profiles.contextual import probe_profile

pytest.importorskip("vllm")
import torch
from vllm import SamplingParams
from vllm.v1.sample.logits_processor import BatchUpdate, LogitsProcessors, MoveDirectionality

from hemostat_engine import LogitsProcessor, numbering
from hemostat_engine.processor import BatchV1
from hemostat_engine.taps import Taps

PROFILES = {p.version: p for p in (make_profile(1), make_contextual(2))}
UNKNOWN = "f" * 32
CHOICES = [None, *PROFILES, UNKNOWN]


def params(version: str | None = None, nonce: str | None = None, **more: Any) -> SamplingParams:
    extra = {"hemostat": version} if version else {}
    return SamplingParams(extra_args=(extra | ({"hemostat_tap": nonce} if nonce else {})) or None, **more)


def update(batch_size: int, removed: Any = (), added: Any = (), moved: Any = ()) -> BatchUpdate:
    return BatchUpdate(batch_size, list(removed), list(added), list(moved))


def counted(core: Any, *names: str) -> list[int]:
    return [core.counters.read().get(name, 0) for name in names]


def expected(z: np.ndarray, rows: dict[int, str | None]) -> np.ndarray:
    out = z.copy()
    for row, version in rows.items():
        if version in PROFILES:
            out[row] = oracle.apply(PROFILES[version], z[row])
    return out


def check(batch: BatchV1, rows: dict[int, str | None], seed: int, size: int) -> None:
    z = np.random.default_rng(seed).normal(0, 3, (size, VOCAB_SIZE)).astype(np.float32)
    got = batch.apply(torch.from_numpy(z.copy())).numpy()
    np.testing.assert_allclose(got, expected(z, rows), rtol=1e-5, atol=1e-5)
    untouched = [row for row in range(size) if rows.get(row) not in PROFILES]
    assert got[untouched].tobytes() == z[untouched].tobytes()


@settings(deadline=None, max_examples=examples(80), suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_sequence_of_updates_equals_the_dict(make_core: Callable[..., Any], data: st.DataObject) -> None:
    core = make_core()
    for profile in PROFILES.values():
        core.library.put(profile)
    batch = BatchV1(core)
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


def test_running_request_keeps_its_profile(make_core: Callable[..., Any]) -> None:
    core = make_core()
    first, second = PROFILES
    core.library.put(PROFILES[first])
    batch = BatchV1(core)
    bound, unbound = params(first), params(second)
    batch.update(update(2, added=[(0, bound, [1], []), (1, unbound, [1], [])]))
    assert counted(core, "requests_bound", "requests_unknown") == [1, 1]
    assert core.library.requested() == (second,)
    core.library.put(PROFILES[second])
    core.library.fail(first)  # it is not held any more
    check(batch, {0: first, 1: None}, 0, 2)
    # Preempted and resumed: the same binding.
    batch.update(update(0, removed=[1, 0]))
    check(batch, {}, 1, 2)
    batch.update(update(2, added=[(0, unbound, [1], [5]), (1, bound, [1], [5])]))
    check(batch, {1: first}, 2, 2)
    # A new request with that version is bound to it.
    batch.update(update(3, added=[(2, params(second), [1], [])]))
    check(batch, {1: first, 2: second}, 3, 3)
    assert core.counters.read()["requests_bound"] == 2


def test_batch_without_profiles_returns_the_same_tensor(make_core: Callable[..., Any]) -> None:
    batch = BatchV1(make_core())
    batch.update(update(1, added=[(0, params(), [1], [])]))
    logits = torch.zeros(1, VOCAB_SIZE)
    version = logits._version
    assert batch.apply(logits) is logits
    assert logits._version == version


def test_request_with_logit_editing_parameters_gets_identity_and_no_numbers(
    make_core: Callable[..., Any],
) -> None:
    core = make_core(tapping=True)
    version = next(iter(PROFILES))
    core.library.put(PROFILES[version])
    batch = BatchV1(core)
    batch.update(update(1, added=[(0, params(version, "n", logit_bias={3: 1.0}), [1], [])]))
    check(batch, {}, 0, 1)
    assert counted(core, "requests_declined", "requests_bound", "requests_unknown", "rows_applied") == [1, 0, 0, 0]
    (run,) = core.taps.drain(9, 1)
    assert (run["versions"], run["applied"], "features" in run) == ({}, None, False)


def test_penalties_do_not_prevent_a_profile_under_v1(make_core: Callable[..., Any]) -> None:
    core = make_core()
    version = next(iter(PROFILES))
    core.library.put(PROFILES[version])
    batch = BatchV1(core)
    batch.update(update(1, added=[(0, params(version, presence_penalty=0.5), [1], [])]))
    check(batch, {0: version}, 0, 1)


def test_logits_of_another_vocabulary_size_are_unchanged_and_counted(make_core: Callable[..., Any]) -> None:
    core = make_core()
    version = next(iter(PROFILES))
    core.library.put(PROFILES[version])
    batch = BatchV1(core)
    batch.update(update(1, added=[(0, params(version), [1], [])]))
    logits = torch.ones(1, VOCAB_SIZE + 1)
    assert torch.equal(batch.apply(logits), torch.ones(1, VOCAB_SIZE + 1))
    assert core.counters.read()["steps_misfit"] == 1


def test_taps_measure_unmodified_logits_by_output_position(make_core: Callable[..., Any]) -> None:
    core = make_core(tapping=True)
    for profile in PROFILES.values():
        core.library.put(profile)
    first, second = PROFILES
    core.library.hold([second])
    batch = BatchV1(core)
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
    z = np.random.default_rng(0).normal(0, 3, (2, 3, VOCAB_SIZE)).astype(np.float32)
    for step in range(2):
        batch.apply(torch.from_numpy(z[step].copy()))
        for output in (treated, control, plain):
            output.append(-1)
    runs = {run["nonce"]: run for run in core.taps.drain(99, 1 << 20)}
    assert set(runs) == {"treated", "control"}
    assert [runs[n]["start"] for n in ("treated", "control")] == [0, 2]
    assert [runs[n]["tokens"] for n in ("treated", "control")] == [2, 2]
    assert [runs[n]["applied"] for n in ("treated", "control")] == [first, None]
    for row, nonce in enumerate(("treated", "control")):
        for version, profile in PROFILES.items():
            exact = z[:, row].astype(np.float64)
            delta = oracle.shift(profile, exact)
            want = np.log(np.exp(exact + delta).sum(-1)) - np.log(np.exp(exact).sum(-1))
            np.testing.assert_allclose(received(runs[nonce]["versions"][version]), want, atol=1e-5)
        ids = oracle.anchors(PROFILES[second])
        assert ids is not None
        assert runs[nonce]["anchors"] == oracle.anchors_digest(ids)
        features = np.frombuffer(runs[nonce]["features"], "<f2").reshape(2, -1)
        want = z[:, row][:, ids] - z[:, row][:, ids].mean(-1, keepdims=True)
        np.testing.assert_allclose(features, want, rtol=1e-3, atol=1e-3)


def test_masked_rows_get_identity_and_have_no_features(make_core: Callable[..., Any]) -> None:
    core = make_core(tapping=True)
    profile = PROFILES[list(PROFILES)[1]]
    core.library.put(profile)
    core.library.hold([profile.version])
    batch = BatchV1(core)
    batch.update(update(3, added=[(row, params(profile.version, f"n{row}"), [1], []) for row in range(3)]))
    z = np.random.default_rng(0).normal(0, 3, (3, VOCAB_SIZE)).astype(np.float32)
    z[0, profile.parameters["anchors"][0]] = -np.inf
    z[1, profile.parameters["anchors"][1]] = np.nan
    got = batch.apply(torch.from_numpy(z.copy())).numpy()
    np.testing.assert_allclose(got, oracle.apply(profile, z), rtol=1e-5, atol=1e-5)
    assert got[:2].tobytes() == z[:2].tobytes()
    assert counted(core, "rows_masked", "rows_applied") == [2, 3]
    runs = {run["nonce"]: run for run in core.taps.drain(9, 1 << 20)}
    known = {nonce: np.isfinite(np.frombuffer(run["features"], "<f2")).any() for nonce, run in runs.items()}
    assert known == {"n0": False, "n1": False, "n2": True}
    numbers = [received(runs[f"n{row}"]["versions"][profile.version]) for row in range(2)]
    np.testing.assert_array_equal(numbers, [[0.0], [np.nan]])


def test_active_clamps_are_counted_for_the_applied_profile(make_core: Callable[..., Any]) -> None:
    core = make_core(tapping=True)
    tight = make_contextual(5, clamp=0.05, kl_limit=3e-3)
    for profile in (tight, make_contextual(6, clamp=0.05)):
        core.library.put(profile)
    core.library.hold([tight.version])
    batch = BatchV1(core)
    batch.update(
        update(3, added=[(row, params(tight.version if row else None, f"n{row}"), [1], []) for row in range(3)])
    )
    z = np.random.default_rng(0).normal(0, 4, (3, VOCAB_SIZE)).astype(np.float32)
    treated, free = z[1:], replace(tight, clamp_nats=20.0)
    # The KL limit is applied first, then the clamp.
    clamped = (np.abs(oracle.shift(free, treated)).max(axis=-1) > tight.clamp_nats).sum()
    unlimited = replace(make_contextual(5, clamp=0.05), clamp_nats=20.0)
    limited = (oracle.shift(free, treated) != oracle.shift(unlimited, treated)).any(axis=-1).sum()
    assert (clamped, limited) == (2, 2)
    batch.apply(torch.from_numpy(z))
    assert core.counters.read()["rows_kl_clamped"] == limited
    core.taps.drain(9, 1 << 20)
    assert counted(core, "rows_clamped") == [clamped]


def test_probe_is_tapped_but_neither_evaluated_nor_applied(make_core: Callable[..., Any]) -> None:
    core = make_core(tapping=True)
    asks = probe_profile("m", VOCAB_SIZE, np.arange(5), 1.0)
    core.library.put(asks)
    core.library.hold([asks.version])
    batch = BatchV1(core)
    batch.update(update(1, added=[(0, params(asks.version, "n"), [1], [])]))
    logits = torch.randn(1, VOCAB_SIZE, generator=torch.Generator().manual_seed(0))
    before = logits.clone()
    assert torch.equal(batch.apply(logits), before)
    (run,) = core.taps.drain(9, 1 << 20)
    assert (run["versions"], run["applied"], run["anchors"]) == ({}, asks.version, oracle.anchors_digest(np.arange(5)))
    assert len(run["features"]) == 10


def test_features_are_of_the_first_anchors_in_the_order_to_hold(make_core: Callable[..., Any]) -> None:
    core = make_core(tapping=True)
    plain, first, second = make_profile(1), make_contextual(1), make_contextual(2)
    for profile in (second, first, plain):
        core.library.put(profile)
    batch = BatchV1(core)
    batch.update(update(1, added=[(0, params(None, "n"), [1], [])]))
    anchors = []
    for hold in ([plain.version], [plain.version, "e" * 32, first.version, second.version], [second.version]):
        core.library.hold(hold)
        batch.apply(torch.randn(1, VOCAB_SIZE, generator=torch.Generator().manual_seed(0)))
        anchors += [run.get("anchors") for run in core.taps.drain(9, 1 << 20)]
    digests = [oracle.anchors_digest(p.parameters["anchors"]) for p in (first, second)]
    assert anchors == [None, *digests]


def test_full_queue_drops_features_before_values(
    make_core: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("hemostat_engine.core.Taps", functools.partial(Taps, max_bytes=2 * 12 * 3))
    core = make_core(tapping=True)
    profile = make_contextual(1)
    core.library.put(profile)
    core.library.hold([profile.version])
    batch = BatchV1(core)
    output: list[int] = []
    batch.update(update(1, added=[(0, params(None, "n"), [1], output)]))

    def decode() -> None:
        batch.apply(torch.randn(1, VOCAB_SIZE, generator=torch.Generator().manual_seed(0)))
        output.append(1)

    for _ in range(5):
        decode()
    assert counted(core, "features_dropped") == [2]
    with_features, without = core.taps.drain(9, 1 << 20)
    assert (with_features["tokens"], len(with_features["features"])) == (3, 72)
    assert (without["start"], without["tokens"], len(without["versions"])) == (3, 2, 1)
    assert "features" not in without
    for _ in range(3):
        decode()
    # A flush ends with the step that reaches its bytes.
    assert [run["tokens"] for run in core.taps.drain(9, 25)] == [2]
    assert [run["tokens"] for run in core.taps.drain(9, 25)] == [1]
    assert counted(core, "features_dropped") == [2]


def test_full_queue_drops_and_counts_steps(make_core: Callable[..., Any]) -> None:
    from hemostat_engine import taps

    core = make_core(tapping=True)
    batch = BatchV1(core)
    batch.update(update(1, added=[(0, params(None, "n"), [1], [])]))
    for _ in range(taps.MAX_STEPS + 3):
        batch.apply(torch.zeros(1, VOCAB_SIZE))
    assert len(core.taps) == taps.MAX_STEPS
    assert core.counters.read()["taps_dropped"] == 3


def test_vllm_loads_the_class_under_v1_and_rejects_invalid_xargs() -> None:
    from vllm.exceptions import VLLMValidationError
    from vllm.v1.sample.logits_processor import _load_logitsprocs_by_fqcns, validate_logits_processors_parameters

    name = "hemostat_engine:LogitsProcessor"
    assert _load_logitsprocs_by_fqcns([name]) == [LogitsProcessor]
    validate_logits_processors_parameters([name], params(UNKNOWN, "n"))
    with pytest.raises(VLLMValidationError, match=r"vllm_xargs\.hemostat must"):
        validate_logits_processors_parameters([name], params("nonsense"))


def test_class_under_v1() -> None:
    config: Any = SimpleNamespace(
        model_config=SimpleNamespace(get_vocab_size=lambda: VOCAB_SIZE), parallel_config=SimpleNamespace()
    )
    processor = LogitsProcessor(config, torch.device("cpu"), False)
    assert list(LogitsProcessors([processor]).non_argmax_invariant) == [processor]
    version = next(iter(PROFILES))
    processor.core.library.put(PROFILES[version])
    processor.update_state(update(1, added=[(0, params(version), [1], [])]))
    processor.update_state(None)
    z = np.random.default_rng(0).normal(0, 3, (1, VOCAB_SIZE)).astype(np.float32)
    got = processor.apply(torch.from_numpy(z.copy())).numpy()
    np.testing.assert_allclose(got, expected(z, {0: version}), rtol=1e-5, atol=1e-5)


def test_requests_with_one_nonce_are_numbered_and_tell_the_ids_before_each_position(
    make_core: Callable[..., Any],
) -> None:
    core = make_core(tapping=True)
    batch = BatchV1(core)
    outputs: list[list[int]] = [[], []]
    shared = params(None, "n")
    batch.update(update(3, added=[(0, shared, [1], outputs[0]), (2, params(None, "other"), [1], [])]))
    batch.update(update(3, added=[(1, params(None, "n"), [1], outputs[1])]))
    for step in range(3):
        batch.apply(torch.zeros(3, VOCAB_SIZE))
        outputs[0].append(step)
        # vLLM's place of a token that is not on the host yet.
        outputs[1].append(-1 if step == 1 else 10 + step)
    # Preempted and resumed: the same number.
    batch.update(update(0, removed=[0]))
    batch.update(update(3, added=[(0, shared, [1], outputs[0])]))
    batch.apply(torch.zeros(3, VOCAB_SIZE))
    runs = {(run["nonce"], run["child"]): run for run in core.taps.drain(9, 1 << 20)}
    assert runs.keys() == {("n", 0), ("n", 1), ("other", 0)}
    before = {key: np.frombuffer(run["previous_ids"], "<i4").tolist() for key, run in runs.items()}
    assert before == {("n", 0): [-1, 0, 1, 2], ("n", 1): [-1, 10, -1, 12], ("other", 0): [-1]}


def test_numbers_of_nonces_are_bounded(make_core: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(numbering, "MAX_NONCES", 2)
    monkeypatch.setattr(numbering, "NUMBERS", 3)
    core = make_core(tapping=True)
    names = ["a", "b", "a", "c", "a", "b", "a", "a"]
    bound = core.bind([params(None, name) for name in names])
    assert [binding.child for binding in bound] == [0, 0, 1, 0, 2, 0, 0, 1]
