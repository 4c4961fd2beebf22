"""The worker's part, called directly: what a request for an output head gets, by torch and by numpy."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.numpy
from tests.support.fake_vllm.pooling import as_float, bfloat16
from tests.support.state_recovery import compare, variances

from hemostat.reference import worker_messages
from hemostat.reference.hidden import products
from hemostat.reference.protocol import CompressedLogits
from hemostat.reference.scoring import RequestFailed
from hemostat_calibration.state_recovery import recover_states

V, D, T, ANCHORS, K = 300, 16, 7, 64, 9


@pytest.fixture
def weight(tmp_path: Path) -> Any:
    weight = np.random.default_rng(0).normal(0, 1, (V, D)).astype(np.float32)
    safetensors.numpy.save_file({"lm_head.weight": weight}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps({"vocab_size": V, "logit_scale": 0.5}))
    return weight


def log_softmax(z: Any) -> Any:
    return z - np.log(np.exp(z).sum(1, keepdims=True))


def request(states: Any, compressed: CompressedLogits | None, output: Any, ids: Any) -> worker_messages.Score:
    return worker_messages.Score(
        id=3,
        prompt=b"",
        output=output.astype("<i4").tobytes(),
        ids=ids.astype("<i4").tobytes(),
        width=ids.shape[1],
        bases={},
        wanted=[],
        codes={},
        hidden=True,
        compressed=None if compressed is None else worker_messages.Compressed.of(compressed),
        states=states.astype("<u2").tobytes(),
    )


@pytest.mark.parametrize("with_torch", [True, False])
def test_scores_states_and_the_distance_from_the_recovered_side(
    with_torch: bool, weight: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not with_torch:
        monkeypatch.setattr(products.importlib.util, "find_spec", lambda name: None)
    else:
        pytest.importorskip("torch")
    head = products.Head(worker_messages.LoadHead(str(tmp_path), "cpu", 1))
    assert (head.loaded.compares, head.loaded.hidden_size, head.loaded.width) == (with_torch, D, D)
    rng = np.random.default_rng(1)
    states = bfloat16(rng.normal(0, 1, (T, D)))
    reference = log_softmax(0.5 * as_float(states).astype(np.float64) @ weight.T)
    z = 0.5 * (as_float(states) + 0.2 * rng.normal(0, 1, (T, D))) @ weight.T
    anchors = rng.permutation(V)[:ANCHORS].astype(np.int32)
    truth = log_softmax(z)
    ids = np.argsort(-truth, axis=1)[:, :K].astype(np.int32)
    output = ids[:, 2]
    features = (z[:, anchors] - z[:, anchors].mean(1, keepdims=True)).astype(np.float32)
    given = CompressedLogits(anchors, features, np.take_along_axis(truth, ids, 1))
    answer = head.answer(request(states, given if with_torch else None, output, ids))
    assert isinstance(answer, worker_messages.Scored)
    np.testing.assert_allclose(np.frombuffer(answer.emitted), reference[np.arange(T), output], atol=1e-5)
    np.testing.assert_allclose(np.frombuffer(answer.at).reshape(T, K), np.take_along_axis(reference, ids, 1), atol=1e-5)
    hidden = np.frombuffer(answer.hidden, "<f4").reshape(T, D)
    np.testing.assert_allclose(hidden, 0.5 * as_float(states), atol=1e-6)
    if not with_torch:
        assert answer.recovered == b""
        return
    recovery = recover_states(weight[anchors])
    wanted = compare(
        reference,
        log_softmax(recovery.states(features).astype(np.float64) @ weight.T),
        variances(recovery, weight, weight.mean(0)),
        ids,
        given.logprobs,
    )
    result = np.frombuffer(answer.recovered).reshape(7, T)
    np.testing.assert_allclose(result[0], wanted.kl_rc, atol=2e-3)
    np.testing.assert_allclose(result[0], (np.exp(reference) * (reference - truth)).sum(1), atol=5e-3)


def test_what_does_not_fit_the_head_is_refused(weight: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(products.importlib.util, "find_spec", lambda name: None)
    head = products.Head(worker_messages.LoadHead(str(tmp_path), "cpu", 1))
    output, ids = np.array([1], np.int32), np.array([[2]], np.int32)
    for states, token in ((np.zeros((1, D - 1), np.uint16), 1), (np.zeros((1, D), np.uint16), V)):
        with pytest.raises(RequestFailed) as failed:
            head.answer(request(states, None, np.full(1, token, np.int32), ids))
        assert failed.value.reason == "vocabulary"
    assert isinstance(head.answer(request(np.zeros((1, D), np.uint16), None, output, ids)), worker_messages.Scored)
    with pytest.raises(RequestFailed, match="only scores"):
        head.answer(worker_messages.Tokenize(1, "x"))
    with pytest.raises(RequestFailed, match="needs torch"):
        products.Head(worker_messages.LoadHead(str(tmp_path), "cuda", 1))
    with pytest.raises(RequestFailed, match="vocab_size"):
        products.Head(worker_messages.LoadHead(str(tmp_path / "none"), "cpu", 1))
