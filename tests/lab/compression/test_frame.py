"""The frame of compression: interruptions, memory, formats, and one line for each failure."""

from __future__ import annotations

import errno
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tests.support.adapter_models import random_texts, save, tiny_model

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")
pytest.importorskip("compressed_tensors")

from safetensors import safe_open  # noqa: E402

from hemostat_calibration.errors import HemostatError  # noqa: E402
from hemostat_lab.compression.calibrated import Calibrated, Calibration  # noqa: E402
from hemostat_lab.compression.checkpoint_writer import BuildEnvironment, compress_with  # noqa: E402
from hemostat_lab.compression.fisher_information import measure_token_weights  # noqa: E402
from hemostat_lab.compression.formats import Quantized, WeightFormat, on_grid, restored, stored  # noqa: E402
from hemostat_lab.compression.frame import STAGE, Run, Source, compress_layers  # noqa: E402
from hemostat_lab.compression.methods import nearest, without_texts  # noqa: E402
from hemostat_lab.compression.pruning.weights import Pattern  # noqa: E402
from hemostat_lab.compression.tensor_files import TensorFiles  # noqa: E402
from hemostat_lab.models import work_folder  # noqa: E402
from hemostat_lab.models.checkpoint import Checkpoint  # noqa: E402
from hemostat_lab.models.checkpoint_folders import CompressError, is_complete  # noqa: E402
from hemostat_lab.models.copies import Copy  # noqa: E402
from hemostat_lab.models.parts import Parts  # noqa: E402

TEXTS = [text.ids for text in random_texts(8)]
W4A16 = WeightFormat(4, 64)


def small(folder: Path, layers: int = 2, **changed: Any) -> Path:
    model = tiny_model(hidden_size=64, intermediate_size=128, num_hidden_layers=layers, **changed)
    return save(model, folder)


def everything(source: Path) -> Calibrated:
    """A method that walks both ways, moves scales and compensates."""
    return Calibrated(dict.fromkeys(Source.open(source).shapes, W4A16), Calibration("descent", "awq", True))


def test_what_is_killed_at_any_write_ends_with_the_same_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = small(tmp_path / "source")
    method = everything(source)
    work = BuildEnvironment(tmp_path / "work")
    compress_with(source, tmp_path / "whole", method, TEXTS, environment=work)
    expected = {path.name: path.read_bytes() for path in (tmp_path / "whole").iterdir()}
    work = BuildEnvironment(tmp_path / "work2")
    write, writes, killed = work_folder.write_atomically, 0, 0

    def dying(path: Path, data: bytes) -> None:
        nonlocal writes
        writes += 1
        if writes == 3:
            writes = 0
            raise KeyboardInterrupt
        write(path, data)

    monkeypatch.setattr(work_folder, "write_atomically", dying)
    while True:
        try:
            compress_with(source, tmp_path / "resumed", method, TEXTS, environment=work)
            break
        except KeyboardInterrupt:
            killed += 1
            assert not (tmp_path / "resumed").exists()
            assert killed < 50
    assert killed > 5, "every run got two writes further"
    assert {path.name: path.read_bytes() for path in (tmp_path / "resumed").iterdir()} == expected


def test_one_layer_is_in_memory(tmp_path: Path) -> None:
    opened = Source.open(small(tmp_path / "source", layers=5))
    run = Run(opened, TEXTS, Parts(None), 0, lambda *_: None)
    compress_layers(run, Calibrated(dict.fromkeys(opened.shapes, W4A16), Calibration("gptq", guided=True)))
    assert opened.skeleton.most_loaded == 1
    assert all(parameter.is_meta for parameter in opened.skeleton.model.parameters())


def test_the_checkpoint_is_what_the_layers_computed(tmp_path: Path) -> None:
    """Untouched tensors are the source's; compressed ones are those on which later layers were calibrated."""
    source = small(tmp_path / "source")
    opened = Source.open(source)
    between: list[Any] = []

    def keep(stage: str, done: int, total: int) -> None:
        if (stage, done) == (STAGE, 1):
            between.extend(run.parts.get_list("compressed-hidden-0001") or ())

    run = Run(opened, TEXTS, Parts(None), 0, keep)
    method = everything(source)
    compress_layers(run, method)
    hidden = run.parts.get_list("compressed-hidden-0001")
    report = compress_with(source, tmp_path / "out", method, TEXTS, environment=BuildEnvironment(tmp_path / "work"))
    assert report["bytes"] > 0
    written, original = Checkpoint(tmp_path / "out", "OUT"), Checkpoint(source, "SOURCE")
    assert torch.equal(written.tensor("model.embed_tokens.weight"), original.tensor("model.embed_tokens.weight"))
    assert written.is_quantized("model.layers.0.mlp.down_proj")
    assert hidden is None, "the last hidden states are deleted"
    before, after = Copy.load(source), Copy.load(tmp_path / "out")
    result: list[Any] = []
    after.skeleton.layers["model.layers.0"].register_forward_hook(lambda _, __, output: result.append(output))
    for batch, states in zip(run.texts_walk.batches, between, strict=True):
        with torch.no_grad():
            after.skeleton.base(input_ids=batch.ids, use_cache=False)
        torch.testing.assert_close(result[-1][batch.valid], states[batch.valid], rtol=1e-4, atol=1e-4)
    for ids in TEXTS[:2]:
        assert np.abs(before.logits(ids) - after.logits(ids)).max() < 0.5 * np.abs(before.logits(ids)).max()


def test_token_weights_are_squared_gradients(tmp_path: Path) -> None:
    """Compared with autograd on the whole model, with the labels that the walk draws."""
    opened = Source.open(small(tmp_path / "source"))
    run = Run(opened, TEXTS[:1], Parts(None), 0, lambda *_: None)
    walk = run.texts_walk
    top = walk.gradient(2)[0]
    name = "model.layers.0.mlp.down_proj"
    model = Copy.load(tmp_path / "source").model
    seen: list[Any] = []

    def watch(_: Any, __: Any, output: Any) -> None:
        output.register_hook(seen.append)

    model.get_submodule(name).register_forward_hook(watch)
    embedded = model.model.embed_tokens(walk.batches[0].ids).requires_grad_(True)
    ended: list[Any] = []
    model.model.layers[-1].register_forward_hook(lambda _, __, output: ended.append(output))
    model(inputs_embeds=embedded, use_cache=False)
    torch.autograd.backward(ended[0] if isinstance(ended[0], torch.Tensor) else ended[0][0], top)
    measure_token_weights(run)
    result = run.parts.get("token-weights-0000")
    assert result is not None
    assert torch.allclose(result[f"{name}|0"], seen[0][walk.batches[0].valid].square().mean(-1), rtol=1e-3)


@pytest.mark.parametrize(
    "chosen",
    [
        W4A16,
        WeightFormat(4),
        WeightFormat(8, 32),
        WeightFormat(8, inputs="int8"),
        WeightFormat(8, None, "float", "fp8"),
    ],
)
def test_stored_weights_are_restored(chosen: WeightFormat) -> None:
    weight = torch.randn(16, 128, generator=torch.Generator().manual_seed(0)).to(torch.bfloat16)
    result: Quantized = nearest("layer", weight, chosen)
    values = restored(chosen, stored(result))
    assert torch.allclose(values, on_grid(result), rtol=1e-6)
    assert float((values - weight.float()).norm() / weight.float().norm()) < (0.15 if chosen.bits == 4 else 0.04)
    again = Quantized(chosen, values, result.scale)
    assert torch.equal(restored(chosen, stored(again)), values), "what is on the grid stays"


def test_settings_name_every_layer_that_is_changed() -> None:
    """A copy is not made again where they are equal."""
    half = (0.5, Pattern.UNSTRUCTURED)
    sparse = Calibrated({"a": W4A16}, Calibration(), sparse={"a": half, "b": half, "c": half})
    layers = sparse.settings["layers"]
    assert sorted(name for names in layers.values() for name in names) == ["a", "b", "c"]
    assert layers[json.dumps({"sparse": half})] == ["b", "c"]


def test_files_of_several_parts_are_read_by_safetensors(tmp_path: Path) -> None:
    tensors = {
        "a": torch.arange(3, dtype=torch.int8), "b": torch.ones(2, 3), "c": torch.tensor([7], dtype=torch.int64),
        "d": torch.randn(5).to(torch.bfloat16), "e": torch.zeros(0, 4),
    }  # fmt: skip
    for limit, count in ((1 << 20, 1), (16, 4)):
        folder = tmp_path / str(limit)
        folder.mkdir()
        files = TensorFiles(folder, limit)
        for name, tensor in tensors.items():
            files.add(name, tensor)
        files.close()
        paths = sorted(folder.glob("*.safetensors"))
        assert len(paths) == count
        result = {}
        for path in paths:
            with safe_open(path, "pt") as file:
                result |= {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        assert result.keys() == tensors.keys()
        assert all(torch.equal(result[name], tensors[name]) for name in tensors)
        if count > 1:
            index = json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"]
            assert {folder / name for name in index.values()} == set(paths)
        assert not list(folder.glob("*.part"))


def one_line(source: Path, out: Path, **environment: Any) -> str:
    with pytest.raises(HemostatError) as error:
        compress_with(source, out, without_texts(W4A16), environment=BuildEnvironment(**environment))
    assert not out.exists()
    assert "\n" not in str(error.value)
    return str(error.value)


def test_damaged_and_incomplete_checkpoints(tmp_path: Path) -> None:
    source = small(tmp_path / "source")
    weights = source / "model.safetensors"
    data = weights.read_bytes()
    weights.write_bytes(data[: len(data) // 2])
    assert "cannot be read" in one_line(source, tmp_path / "out")
    weights.write_bytes(b"encrypted" * 100)
    assert "cannot be read" in one_line(source, tmp_path / "out")
    weights.unlink()
    assert "has no .safetensors file" in one_line(source, tmp_path / "out")


def test_an_unknown_architecture(tmp_path: Path) -> None:
    source = small(tmp_path / "source")
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps(config | {"model_type": "abacus"}))
    assert "abacus" in one_line(source, tmp_path / "out")


def test_a_full_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = small(tmp_path / "source")

    def full(self: TensorFiles, name: str, tensor: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(TensorFiles, "add", full)
        assert "No space left on device" in one_line(source, tmp_path / "out", work=tmp_path / "work")
    assert {path.name for path in tmp_path.iterdir()} == {"source", "work"}, "nothing half-written"
    compress_with(source, tmp_path / "out", without_texts(W4A16))
    assert is_complete(tmp_path / "out")


def test_a_method_that_needs_texts_is_refused_without(tmp_path: Path) -> None:
    source = small(tmp_path / "source")
    with pytest.raises(CompressError, match="give --prompts or --records"):
        compress_with(source, tmp_path / "out", everything(source), environment=BuildEnvironment(tmp_path / "work"))


@pytest.mark.parametrize("calibrated", [True, False])
def test_weights_that_are_not_finite(calibrated: bool, tmp_path: Path) -> None:
    model = tiny_model(hidden_size=64, intermediate_size=128, num_hidden_layers=2)
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight[0, 0] = float("nan")
    source = save(model, tmp_path / "source")
    method = everything(source) if calibrated else without_texts(W4A16)
    with pytest.raises(CompressError, match=r"model\.layers\.0\.mlp\.up_proj\.weight holds values that are not finite"):
        compress_with(source, tmp_path / "out", method, TEXTS, environment=BuildEnvironment(tmp_path / "work"))
    assert not (tmp_path / "out").exists()
