"""The output embedding as it stands in a checkpoint, and checkpoints that are none."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.numpy
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.support.slow import examples

from hemostat.checkpoints.output_embedding import EmbeddingError, load
from hemostat.learner.learner_process import special_ids

W = np.random.default_rng(0).normal(0, 1, (10, 4)).astype(np.float32)


def save(folder: Path, tensors: dict[str, Any], name: str = "model.safetensors", config: Any = None) -> Path:
    safetensors.numpy.save_file(tensors, folder / name)
    if config is not None:
        (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.mark.parametrize("dtype", [np.float32, np.float16])
def test_an_output_embedding_of_its_own(tmp_path: Path, dtype: Any) -> None:
    other = {"model.embed_tokens.weight": -W, "model.norm.weight": W[0]}
    save(tmp_path, {"lm_head.weight": W.astype(dtype), **other}, config={"tie_word_embeddings": False})
    result = load(tmp_path, 10)
    assert result.dtype == np.float32
    np.testing.assert_array_equal(result, W.astype(dtype).astype(np.float32))


@pytest.mark.parametrize("config", [None, {}, {"tie_word_embeddings": True}])
def test_the_inputs_where_there_is_no_other(tmp_path: Path, config: Any) -> None:
    save(tmp_path, {"model.language_model.embed_tokens.weight": W}, config=config)
    np.testing.assert_array_equal(load(tmp_path, 10), W)


def test_tied_means_the_inputs_even_beside_another(tmp_path: Path) -> None:
    save(
        tmp_path,
        {"lm_head.weight": W + 1, "embed_tokens.weight": W},
        config={"text_config": {"tie_word_embeddings": True}},
    )
    np.testing.assert_array_equal(load(tmp_path, 10), W)


def test_one_of_several_files_named_by_the_index(tmp_path: Path) -> None:
    save(tmp_path, {"model.embed_tokens.weight": -W}, "model-1.safetensors", {"tie_word_embeddings": False})
    save(tmp_path, {"lm_head.weight": W}, "model-2.safetensors")
    index = {
        "weight_map": {"model.embed_tokens.weight": "model-1.safetensors", "lm_head.weight": "model-2.safetensors"}
    }
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    np.testing.assert_array_equal(load(tmp_path, 10), W)


@settings(max_examples=examples(30), deadline=None)
@given(st.integers(0, 2**16 - 1))
def test_bfloat16_is_the_upper_half_of_float32(tmp_path_factory: pytest.TempPathFactory, half: int) -> None:
    folder = tmp_path_factory.mktemp("bf16")
    header = json.dumps({"lm_head.weight": {"dtype": "BF16", "shape": [1, 2], "data_offsets": [0, 4]}}).encode()
    data = np.array([half, 0x3F80], "<u2").tobytes()
    (folder / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + data)
    value = np.array([half << 16], np.uint32).view(np.float32)[0]
    if np.isfinite(value):
        np.testing.assert_array_equal(load(folder, 1), [[value, 1.0]])
    else:
        with pytest.raises(EmbeddingError, match="NaN or an infinity"):
            load(folder, 1)


def test_bad_checkpoints_are_one_line_that_names_the_file(tmp_path: Path) -> None:
    def refused(folder: Path, words: str, vocab_size: int = 10) -> None:
        with pytest.raises(EmbeddingError, match=words) as caught:
            load(folder, vocab_size)
        assert str(folder) in str(caught.value)
        assert "\n" not in str(caught.value)

    def fresh(name: str) -> Path:
        (tmp_path / name).mkdir()
        return tmp_path / name

    refused(tmp_path / "missing", "no .safetensors file")
    refused(fresh("empty"), "no .safetensors file")
    refused(save(fresh("unknown"), {"model.norm.weight": W}), "no output embedding under a known name")
    untied = save(fresh("untied"), {"embed_tokens.weight": W}, config={"tie_word_embeddings": False})
    refused(untied, "no output embedding under a known name")
    refused(save(fresh("vocabulary"), {"lm_head.weight": W}), r"shape \[10, 4\]; the model has 11 ids", 11)
    refused(save(fresh("flat"), {"lm_head.weight": W[0]}), "shape")
    refused(save(fresh("integers"), {"lm_head.weight": W.astype(np.int32)}), "is I32")
    good = save(fresh("cut"), {"lm_head.weight": W}) / "model.safetensors"
    data = good.read_bytes()
    for length in (0, 7, 20, len(data) - 1):
        good.write_bytes(data[:length])
        refused(good.parent, "safetensors|truncated")
    good.write_bytes(data[:8] + b"{" * (len(data) - 8))
    refused(good.parent, "safetensors")
    good.write_bytes(data)
    (good.parent / "model.safetensors.index.json").write_text('{"weight_map": {"lm_head.weight": "gone.safetensors"}}')
    refused(good.parent, "gone.safetensors")
    (good.parent / "model.safetensors.index.json").write_text("[]")
    refused(good.parent, "not a readable safetensors checkpoint")


def test_special_ids_come_from_whatever_files_there_are(tmp_path: Path) -> None:
    assert special_ids(tmp_path) == set()
    (tmp_path / "config.json").write_text('{"bos_token_id": 1, "eos_token_id": [2, 3], "pad_token_id": null}')
    (tmp_path / "generation_config.json").write_text("no json")
    added = [{"id": 7, "special": True}, {"id": 8, "special": False}, "nonsense"]
    (tmp_path / "tokenizer.json").write_text(json.dumps({"added_tokens": added}))
    assert special_ids(tmp_path) == {1, 2, 3, 7}


@pytest.mark.vllm
def test_the_real_checkpoint(checkpoints: Any) -> None:
    torch = pytest.importorskip("torch")
    from safetensors.torch import load_file

    result = load(checkpoints.reference, 49152)
    wanted = load_file(checkpoints.reference / "model.safetensors")["model.embed_tokens.weight"]
    assert wanted.dtype == torch.bfloat16
    np.testing.assert_array_equal(result, wanted.float().numpy())
