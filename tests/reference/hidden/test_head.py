"""The output head read from a checkpoint: logits of every kind of head, and scores by numpy beside those by torch."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tests.support.fake_vllm.pooling import FakePooling, as_float, bfloat16

from hemostat.checkpoints.output_embedding import EmbeddingError
from hemostat.reference.full_scores import Basis, ExactScores
from hemostat.reference.hidden.head import FinalMap, NotModelled, TorchHead, open_head, read_final_map
from hemostat.reference.hidden.probe import TEXT, fit_of_head
from hemostat.reference.hidden.products import numpy_scores
from hemostat_calibration.allowed_sets import AllowedSets

HEADS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "untied": ({}, {}),
    "tied": ({}, {"tied": True}),
    "padded": ({}, {"padding": 64}),
    "bias": ({"bias": True}, {}),
    "scale": ({"scale": 0.0625}, {}),
    "soft cap": ({"soft_cap": 30.0}, {}),
    "all": ({"bias": True, "scale": 2.0, "soft_cap": 20.0}, {"padding": 1}),
    "granite": ({"scale": 0.125}, {"model_type": "granite", "logits_scaling": 8.0, "logit_scale": None}),
    "of a text part": ({"scale": 0.5}, {"logit_scale": None, "text_config": {"logit_scale": 0.5}}),
}


@pytest.mark.parametrize("name", HEADS)
def test_logits_are_those_of_the_model(name: str, tmp_path: Path) -> None:
    model, saved = HEADS[name]
    fake = FakePooling(TEXT, **model)
    head = open_head(fake.save(tmp_path, **saved))
    ids = list(TEXT.encode()[:40])
    wanted = fake.logprobs(ids)
    z = head.logits(as_float(fake.states(ids)))
    assert z.shape == (40, 512)
    np.testing.assert_allclose(z - np.log(np.exp(z.astype(np.float64)).sum(1, keepdims=True)), wanted, atol=2e-4)
    torch_head = TorchHead(head, "cpu")
    np.testing.assert_allclose(torch_head.logits(torch_head.states(as_float(fake.states(ids)))).numpy(), z, atol=2e-4)
    assert bool(head.nonlinearity) == ("bias" in model or "soft_cap" in model)


@pytest.mark.parametrize("name", ["scale", "granite"])
def test_what_the_configuration_leaves_out_is_found_by_the_probe(name: str, tmp_path: Path) -> None:
    """The head without what follows the embedding: the probe's text costs too much, or is too certain."""
    model, saved = HEADS[name]
    fake = FakePooling(TEXT, **model)
    folder = fake.save(tmp_path, **saved)
    ids = np.array(list(TEXT.encode()), np.int32)
    states = fake.states(ids[:-1].tolist())

    def fit() -> str:
        head = open_head(folder)
        nothing = np.full((len(ids) - 1, 1), -1, np.int32)
        result = numpy_scores(lambda rows: head.logits(as_float(states[rows])), 512, ids[1:], nothing, {}, {})
        return fit_of_head(result.emitted, result.entropy, 512)

    assert fit() == ""
    assert head_scale(folder) != 1.0
    config = json.loads((folder / "config.json").read_text())
    plain = {key: config[key] for key in ("vocab_size", "tie_word_embeddings")}
    (folder / "config.json").write_text(json.dumps(plain))
    assert head_scale(folder) == 1.0
    assert "another" in fit()


def head_scale(folder: Path) -> float:
    return open_head(folder).final.scale


def test_another_models_head_is_found_by_the_probe(tmp_path: Path) -> None:
    fake = FakePooling(TEXT)
    ids = np.array(list(TEXT.encode()), np.int32)
    nothing = np.full((len(ids) - 1, 1), -1, np.int32)
    rng = np.random.default_rng(0)
    for other in (rng.permutation(fake.weight.reshape(-1)).reshape(fake.weight.shape), fake.weight[::-1]):
        fake_states = as_float(fake.states(ids[:-1].tolist()))
        z = fake_states @ np.ascontiguousarray(other).T
        result = numpy_scores(lambda rows, z=z: z[rows].copy(), 512, ids[1:], nothing, {}, {})
        assert "another model" in fit_of_head(result.emitted, result.entropy, 512)


@pytest.mark.parametrize(
    ("config", "name"),
    [
        ({"model_type": "new", "output_multiplier_scale": 0.5}, "output_multiplier_scale"),
        ({"model_type": "telefm", "use_mup": True}, "use_mup"),
        ({"model_type": "other", "logits_scaling": 8.0}, "logits_scaling"),
        ({"model_type": "cohere", "logit_scale": "big"}, "logit_scale"),
        ({"model_type": "gemma2", "final_logit_softcapping": 0}, "final_logit_softcapping"),
        ({"model_type": "mpt", "logit_scale": "inv_sqrt_d_model"}, "logit_scale"),
    ],
)
def test_what_is_not_modelled_is_refused_by_name(config: dict[str, Any], name: str, tmp_path: Path) -> None:
    with pytest.raises(NotModelled, match=name):
        read_final_map(config)
    FakePooling(TEXT).save(tmp_path, **config)
    with pytest.raises(EmbeddingError, match=name) as refused:
        open_head(tmp_path)
    assert "\n" not in str(refused.value)
    assert str(tmp_path) in str(refused.value)


def test_settings_of_other_parts_do_not_matter() -> None:
    others = {
        "attn_logit_softcapping": 50.0,
        "router_logits_scale": 2.0,
        "output_router_logits": True,
        "final_logit_softcapping": None,
        "embedding_multiplier": 12.0,
        "use_mup": False,
        "attention_multiplier": 0.1,
    }
    assert read_final_map({"model_type": "any", **others}) == FinalMap()
    assert read_final_map({"model_type": "minicpm", "dim_model_base": 256, "hidden_size": 1024}) == FinalMap(0.25)
    assert read_final_map({"model_type": "falcon_h1", "lm_head_multiplier": 0.5}) == FinalMap(0.5)


@pytest.mark.parametrize("constrained", [False, True])
def test_numpy_gives_the_scores_that_torch_gives(constrained: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    torch = pytest.importorskip("torch")
    from hemostat.reference import exact, full_scores

    monkeypatch.setattr(full_scores, "CHUNK_ELEMENTS", 400)  # four positions at a time
    rng = np.random.default_rng(3)
    tokens, size, width, rank = 10, 97, 5, 3
    z = rng.normal(0, 3, (tokens, size)).astype(np.float32)
    allowed = None
    output = rng.integers(0, size, tokens).astype(np.int32)
    if constrained:
        table = rng.integers(0, 2**32, (3, 4), dtype=np.uint32)
        table[:, -1] &= np.uint32(1)
        table[0] = [0b111, 0, 0, 0]
        allowed = AllowedSets(size, table, rng.integers(0, 3, tokens).astype(np.int32))
        output = np.array([np.flatnonzero(row)[0] for row in allowed.mask(slice(None))], np.int32)
    ids = rng.integers(-1, size, (tokens, width)).astype(np.int32)
    up = rng.normal(0, 1, (size, rank)).astype(np.float16)
    codes = {"basis": rng.normal(0, 1, (tokens, rank)).astype(np.float32)}

    def equal(ours: ExactScores, theirs: ExactScores) -> None:
        for name in ("at", "emitted", "entropy", "top_logprobs"):
            np.testing.assert_allclose(getattr(ours, name), getattr(theirs, name), atol=1e-5, err_msg=name)
        np.testing.assert_array_equal(ours.top_ids, theirs.top_ids)
        np.testing.assert_allclose(ours.expected["basis"], theirs.expected["basis"], atol=1e-5)

    ours = numpy_scores(
        lambda rows: z[rows].copy(),
        size,
        output,
        ids,
        {"basis": Basis(up, 1.0)},
        codes,
        allowed=allowed,
    )
    theirs = exact.scores_of(
        lambda rows: torch.from_numpy(z[rows].copy()),
        size,
        output,
        ids,
        {"basis": Basis(torch.from_numpy(up), 1.0)},
        codes,
        allowed=allowed,
    )
    equal(ours, theirs)
    assert constrained == bool((ours.top_ids < 0).any() or np.isinf(ours.at[ids >= 0]).any())
    with pytest.raises(ValueError, match="vocabulary of 97"):
        numpy_scores(lambda rows: z[rows], size, output + 97, ids, {}, {})


def test_bfloat16_is_rounded_to_the_nearest() -> None:
    values = np.array([1.0, 1.00390625, 1.005, -3.14159], np.float32)
    np.testing.assert_allclose(as_float(bfloat16(values)), values, rtol=2**-8)
