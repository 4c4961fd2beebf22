"""Checkpoints are complete or absent, are reused only when they match, and are compressed as described."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from hemostat_lab.compression.checkpoint_writer import compress, compress_with
from hemostat_lab.compression.unpacking import is_packed, unpacked_copy
from hemostat_lab.demo.checkpoints import Checkpoints, cached_checkpoints
from hemostat_lab.models.checkpoint_folders import MANIFEST, CompressError, copy_checkpoint, is_complete

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
pytest.importorskip("compressed_tensors")

from hemostat_lab.compression.formats import WeightFormat  # noqa: E402
from hemostat_lab.compression.methods import without_texts  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning", "ignore::FutureWarning")


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random two-layer model of the demo's architecture."""
    folder = tmp_path_factory.mktemp("tiny") / "model"
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        hidden_size=128,
        intermediate_size=192,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        vocab_size=97,
        tie_word_embeddings=True,
    )
    transformers.LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)
    (folder / "chat_template.jinja").write_text("{{ messages }}")
    return folder


def weights(folder: Path) -> dict[str, Any]:
    from safetensors.torch import load_file

    return dict(load_file(folder / "model.safetensors"))


LAYER = "model.layers.0.mlp.down_proj"


def test_w4a16_is_packed_and_close_to_the_original(tiny: Path, tmp_path: Path) -> None:
    compress(tiny, tmp_path / "out", "w4a16")
    quantization = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    assert quantization["format"] == "pack-quantized"
    assert quantization["ignore"] == ["lm_head"]
    state = weights(tmp_path / "out")
    original = weights(tiny)[f"{LAYER}.weight"].float()
    assert f"{LAYER}.weight" not in state
    assert state[f"{LAYER}.weight_packed"].shape == (128, 192 // 8)
    assert state[f"{LAYER}.weight_scale"].shape == (128, 192 // 64)
    shifts = torch.arange(0, 32, 4)
    values = ((state[f"{LAYER}.weight_packed"].unsqueeze(-1) >> shifts) & 15).reshape(128, 192) - 8
    restored = values * state[f"{LAYER}.weight_scale"].float().repeat_interleave(64, 1)
    error = (restored - original).norm() / original.norm()
    assert 0.02 < error < 0.15, "4 bits lose something, but not the weights"
    assert torch.equal(state["model.embed_tokens.weight"], weights(tiny)["model.embed_tokens.weight"])


def test_the_unpacked_copy_is_the_same_model(tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    compress(tiny, tmp_path / "w4a16", "w4a16")
    compress(tiny, tmp_path / "w8a8", "w8a8")
    assert [is_packed(p) for p in (tmp_path / "w4a16", tmp_path / "w8a8", tiny, tmp_path)] == [
        True,
        False,
        False,
        False,
    ]
    dense = unpacked_copy(tmp_path / "w4a16")
    assert is_complete(dense)
    assert not is_packed(dense)
    assert (dense / "chat_template.jinja").read_text() == "{{ messages }}"
    ids = torch.arange(40)[None]
    for dtype in (torch.float32, torch.bfloat16):
        with torch.inference_mode():
            both = [
                transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)(ids).logits
                for folder in (tmp_path / "w4a16", dense)
            ]
        # A processor without instructions for bfloat16 rounds by where a tensor lies in memory.
        off = 0.0 if dtype is torch.float32 else 2**-6 * float(both[0].abs().max())
        assert float((both[0] - both[1]).abs().max()) <= off, dtype
    made = (dense / MANIFEST).stat().st_mtime_ns
    copy_checkpoint(tmp_path / "w4a16", tmp_path / "elsewhere")
    assert unpacked_copy(tmp_path / "w4a16") == unpacked_copy(tmp_path / "elsewhere") == dense
    assert (dense / MANIFEST).stat().st_mtime_ns == made, "made once"


@pytest.mark.parametrize("chosen", [WeightFormat(8, inputs="int8"), WeightFormat(8, None, "float", "fp8")])
def test_a_copy_without_rounded_inputs_is_noted(
    chosen: WeightFormat, tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its weights are those of the quantized checkpoint, and its inputs are exact."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    compress_with(tiny, tmp_path / "small", without_texts(chosen))
    said: list[str] = []
    dense = unpacked_copy(tmp_path / "small", said.append)
    assert any("14 layers round their inputs at run time; the dense copy does not" in text for text in said)
    state, small = weights(dense), weights(tmp_path / "small")
    assert torch.equal(state[f"{LAYER}.weight"], small[f"{LAYER}.weight"].float() * small[f"{LAYER}.weight_scale"])
    assert state.keys() == weights(tiny).keys()
    assert "quantization_config" not in json.loads((dense / "config.json").read_text())


def test_int3_is_dense_with_eight_values_per_group(tiny: Path, tmp_path: Path) -> None:
    compress(tiny, tmp_path / "out", "int3")
    assert "quantization_config" not in json.loads((tmp_path / "out" / "config.json").read_text())
    state, originals = weights(tmp_path / "out"), weights(tiny)
    rounded, original = state[f"{LAYER}.weight"], originals[f"{LAYER}.weight"]
    assert rounded.dtype == torch.bfloat16
    assert max(len(group.unique()) for group in rounded.reshape(-1, 64)) <= 8
    error = (rounded.float() - original.float()).norm() / original.float().norm()
    assert 0.15 < error < 0.3, "twice what 4 bits lose"
    assert torch.equal(state["model.embed_tokens.weight"], originals["model.embed_tokens.weight"])


def test_w8a8_has_eight_bits_and_a_scale_per_channel(tiny: Path, tmp_path: Path) -> None:
    compress(tiny, tmp_path / "out", "w8a8")
    group = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]["config_groups"][
        "group_0"
    ]
    assert group["input_activations"]["dynamic"] is True
    assert group["input_activations"]["strategy"] == "token"
    state = weights(tmp_path / "out")
    assert state[f"{LAYER}.weight"].dtype == torch.int8
    restored = state[f"{LAYER}.weight"].float() * state[f"{LAYER}.weight_scale"].float()
    original = weights(tiny)[f"{LAYER}.weight"].float()
    assert (restored - original).norm() / original.norm() < 0.02


@pytest.mark.parametrize("percent", [10, 30, 50])
def test_pruning_zeroes_the_smallest_part(tiny: Path, tmp_path: Path, percent: int) -> None:
    compress(tiny, tmp_path / "out", f"prune{percent}")
    assert "quantization_config" not in json.loads((tmp_path / "out" / "config.json").read_text())
    pruned, original = weights(tmp_path / "out")[f"{LAYER}.weight"], weights(tiny)[f"{LAYER}.weight"]
    kept = pruned != 0
    assert (~kept).sum() == pruned.numel() * percent // 100
    assert torch.equal(pruned[kept], original[kept])
    assert original[~kept].abs().max() <= original[kept].abs().min()


def test_files_that_are_not_weights_are_copied(tiny: Path, tmp_path: Path) -> None:
    compress(tiny, tmp_path / "out", "prune50")
    assert (tmp_path / "out" / "chat_template.jinja").read_text() == "{{ messages }}"


def test_a_complete_copy_is_reused_and_a_damaged_one_made_again(tiny: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    said: list[str] = []
    compress(tiny, out, "prune50", said.append)
    assert said
    said.clear()
    compress(tiny, out, "prune50", said.append)
    assert said == []
    data = bytearray((out / "model.safetensors").read_bytes())
    data[-1] ^= 1
    (out / "model.safetensors").write_bytes(data)
    assert not is_complete(out)
    with pytest.raises(CompressError, match=r"changed after it was written: name another folder, or .*--overwrite"):
        compress(tiny, out, "prune50")
    compress(tiny, out, "prune50", said.append, overwrite=True)
    assert "damaged" in said[0]
    assert is_complete(out)


def test_an_interrupted_build_leaves_nothing(tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("hemostat_lab.compression.frame.stored", interrupted)
        with pytest.raises(KeyboardInterrupt):
            compress(tiny, tmp_path / "out", "w4a16")
    assert list(tmp_path.iterdir()) == []
    compress(tiny, tmp_path / "out", "w4a16")
    assert is_complete(tmp_path / "out")


def test_a_foreign_folder_is_not_changed(tiny: Path, tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("years of work")
    for overwrite in (False, True):
        with pytest.raises(CompressError, match=r"holds thesis\.txt, which Hemostat did not write there: name"):
            compress(tiny, tmp_path, "prune50", overwrite=overwrite)
    assert (tmp_path / "thesis.txt").read_text() == "years of work"


def test_errors_say_what_to_do(tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(CompressError, match="w4a16, int3, w8a8, prune10"):
        compress(tiny, tmp_path / "out", "w3a3")
    with pytest.raises(CompressError, match=r"no config\.json"):
        compress(tmp_path, tmp_path / "out", "w4a16")
    compress(tiny, tmp_path / "eight", "w8a8")
    with pytest.raises(CompressError, match="quantized already"):
        compress(tmp_path / "eight", tmp_path / "out", "prune50")
    monkeypatch.setattr("hemostat_lab.models.checkpoint_folders.importlib.util.find_spec", lambda name: None)
    with pytest.raises(CompressError, match=r"compressed-tensors; pip install .*'compressed-tensors<"):
        compress(tiny, tmp_path / "out", "w4a16")
    assert not (tmp_path / "out").exists()


def test_a_layer_that_is_not_divisible_into_groups_is_named(tmp_path: Path) -> None:
    config = transformers.LlamaConfig(
        hidden_size=96, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2, vocab_size=31
    )
    transformers.LlamaForCausalLM(config).save_pretrained(tmp_path / "odd")
    with pytest.raises(CompressError, match=r"q_proj has 96 inputs, not a multiple of 64"):
        compress(tmp_path / "odd", tmp_path / "out", "w4a16")


def test_the_demos_checkpoints_are_cached(checkpoints: Checkpoints) -> None:
    said: list[str] = []
    assert cached_checkpoints("w4a16", said.append) == checkpoints
    assert said == []
    assert (checkpoints.compressed / "chat_template.jinja").read_bytes() == (
        checkpoints.reference / "chat_template.jinja"
    ).read_bytes()
    assert (checkpoints.compressed / MANIFEST).is_file()
