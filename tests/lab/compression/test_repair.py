"""Repair of a compressed checkpoint: what is trained, what decides, and which bytes of the files change."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from tests.support.adapter_models import packed, random_texts, rounded, save, tiny_model

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")
pytest.importorskip("compressed_tensors")

from safetensors import safe_open  # noqa: E402

from hemostat.checkpoints.errors import AdaptError  # noqa: E402
from hemostat.checkpoints.texts import Text  # noqa: E402
from hemostat_lab.compression.checkpoint_writer import BuildEnvironment, compress  # noqa: E402
from hemostat_lab.compression.repair import (  # noqa: E402
    Repairable,
    pruned_weights,
    repair,
    write_repaired,
    write_repaired_copy,
)
from hemostat_lab.models.checkpoint import Checkpoint  # noqa: E402
from hemostat_lab.models.checkpoint_folders import REPAIR, REPORT, CompressError, is_complete  # noqa: E402  # noqa: E402
from hemostat_lab.models.copies import Copy  # noqa: E402
from hemostat_lab.models.parts import Parts  # noqa: E402


@pytest.fixture(scope="module")
def model() -> Any:
    return tiny_model(hidden_size=64, intermediate_size=128, num_hidden_layers=2, initializer_range=0.15)


@pytest.fixture(scope="module")
def reference(model: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(model, tmp_path_factory.mktemp("repair") / "reference")


@pytest.fixture(scope="module")
def compressed(model: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Packed, with norms that are wrong: there is something to recover."""
    folder = packed(model, tmp_path_factory.mktemp("repair") / "compressed", group=64)
    vectors = Repairable(Copy.load(folder))
    generator = torch.Generator().manual_seed(0)
    changes = {name: 0.02 * torch.randn(start.shape, generator=generator) for name, start in vectors.start().items()}
    result = folder.with_name("spoiled")
    result.mkdir()
    write_repaired(folder, result, vectors.stored(changes))
    return result


def texts(seed: int = 0) -> list[Text]:
    return random_texts(120, seed=seed)


def divergence(reference: Path, other: Path) -> float:
    copies = [Copy.load(folder, dtype="float32") for folder in (reference, other)]
    total, count = 0.0, 0
    for text in texts(seed=5)[:30]:
        log_r, log_o = (torch.log_softmax(torch.from_numpy(copy.logits(text.ids)), -1) for copy in copies)
        total += float((log_r.exp() * (log_r - log_o)).sum())
        count += len(text)
    return total / count


def tensors(folder: Path) -> dict[str, Any]:
    result = {}
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, "pt") as file:
            result |= {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a dict
    return result


def test_it_wins_back_what_wrong_norms_lose(reference: Path, compressed: Path, tmp_path: Path) -> None:
    parts, seen = Parts(None), []
    result = repair(
        reference, compressed, texts(), parts, rates=(3e-3,), step_positions=64, progress=lambda *s: seen.append(s)
    )
    report = result.report
    assert report["improved"]
    assert report["kl"] < 0.8 * report["kl_start"]
    assert report["won_back"] == pytest.approx(1.0 - report["kl"] / report["kl_start"])
    assert report["numbers"] == sum(tensor.numel() for tensor in result.tensors.values()) == 5 * 64
    assert seen[-1] == (REPAIR, report["tokens"], report["tokens"])
    write_repaired(compressed, tmp_path, result.tensors)
    # On texts that neither was trained on nor decided anything.
    assert divergence(reference, tmp_path) < 0.85 * divergence(reference, compressed)
    # The fold's figure is that of the written checkpoint: rounding is part of it.
    again = repair(reference, compressed, [], parts)
    assert again.report == report
    assert all(torch.equal(again.tensors[name], tensor) for name, tensor in result.tensors.items())
    json.dumps(report, allow_nan=False)


def test_only_the_values_of_the_vectors_change(compressed: Path, tmp_path: Path) -> None:
    before = tensors(compressed)
    changed = {name: tensor + 1.0 for name, tensor in before.items() if "norm" in name}
    assert len(changed) == 5
    write_repaired(compressed, tmp_path, changed)
    after = tensors(tmp_path)
    assert list(after) == list(before)
    for name, tensor in before.items():
        assert after[name].dtype == tensor.dtype
        assert torch.equal(after[name], changed.get(name, tensor))
    size = sum(tensor.numel() * tensor.element_size() for tensor in changed.values())
    for path in compressed.iterdir():
        old, new = path.read_bytes(), (tmp_path / path.name).read_bytes()
        assert len(old) == len(new)
        different = sum(a != b for a, b in zip(old, new, strict=True))
        assert different <= (size if path.suffix == ".safetensors" else 0)


def test_a_repaired_copy_has_its_report_and_is_made_once(reference: Path, compressed: Path, tmp_path: Path) -> None:
    seen: list[tuple[str, int, int]] = []
    environment = BuildEnvironment(tmp_path / "work", step=lambda *step: seen.append(step))
    report = write_repaired_copy(reference, compressed, tmp_path / "out", texts()[:40], environment=environment)
    assert json.loads((tmp_path / "out" / REPORT).read_text())["repair"] == report
    assert is_complete(tmp_path / "out")
    assert (tmp_path / "out" / "config.json").read_bytes() == (compressed / "config.json").read_bytes()
    changed = [n for n, tensor in tensors(tmp_path / "out").items() if not torch.equal(tensor, tensors(compressed)[n])]
    assert bool(changed) == report["improved"]
    assert all("norm" in name for name in changed)
    steps = len(seen)
    again = write_repaired_copy(reference, compressed, tmp_path / "out", texts()[:40], environment=environment)
    assert again == report
    assert len(seen) == steps, "it was made again"
    # The finished training is in the work folder: a copy that was lost is written without training.
    shutil.rmtree(tmp_path / "out")
    assert write_repaired_copy(reference, compressed, tmp_path / "out", texts()[:40], environment=environment) == report
    assert len(seen) == steps


def test_another_model_is_refused(reference: Path, tmp_path: Path) -> None:
    other = save(tiny_model(vocab_size=50, hidden_size=64, num_hidden_layers=1), tmp_path / "other")
    with pytest.raises(AdaptError, match="vocabulary: REFERENCE has 97 tokens, COMPRESSED has 50"):
        write_repaired_copy(reference, other, tmp_path / "out", texts()[:10])
    assert not (tmp_path / "out").exists()


def test_bfloat16_is_rounded_to(reference: Path, tmp_path: Path) -> None:
    model = tiny_model(hidden_size=64, intermediate_size=128, num_hidden_layers=1).bfloat16()
    folder = save(model, tmp_path / "small")
    (tmp_path / "out").mkdir()
    value = torch.full((64,), 1.0 + 2.0**-9)
    write_repaired(folder, tmp_path / "out", {"model.norm.weight": value})
    result = tensors(tmp_path / "out")["model.norm.weight"]
    assert result.dtype == torch.bfloat16
    assert torch.equal(result, value.bfloat16())


def test_a_tensor_of_another_shape_is_refused(compressed: Path, tmp_path: Path) -> None:
    with pytest.raises(CompressError, match=r"model\.norm\.weight is F32 \[64\], .* has the shape \[3\]: not replaced"):
        write_repaired(compressed, tmp_path, {"model.norm.weight": torch.ones(3)})


def test_no_improvement_changes_nothing(model: Any, reference: Path, tmp_path: Path) -> None:
    """A rate that only does harm."""
    folder = save(model, tmp_path / "rounded", rounded(model))
    result = repair(reference, folder, texts()[:30], Parts(None), rates=(50.0,), step_positions=64)
    assert not result.report["improved"]
    assert result.tensors == {}
    assert result.report["kl"] == result.report["kl_start"]
    assert result.report["won_back"] == 0.0


def test_weights_that_pruning_left_are_trained_and_zeros_stay(tmp_path: Path) -> None:
    """Of one layer, without compensation; the other layer, which is dense, stays as it is."""
    model = tiny_model(hidden_size=64, intermediate_size=128, num_hidden_layers=2, initializer_range=0.15)
    reference, state = save(model, tmp_path / "reference"), dict(model.state_dict())
    linears = [name for name in state if "layers.1." in name and name.endswith("proj.weight")]
    for name in linears:
        state[name] = torch.where(state[name].abs() > state[name].abs().median(), state[name], 0.0)
    folder = save(model, tmp_path / "pruned", state)
    result = repair(reference, folder, random_texts(400), Parts(None), rates=(3e-3,), step_positions=64)
    assert result.report["kl"] < 0.9 * result.report["kl_start"]
    (tmp_path / "out").mkdir()
    write_repaired(folder, tmp_path / "out", result.tensors)
    before, after = tensors(folder), tensors(tmp_path / "out")
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert {name for name in changed if "norm" not in name} == set(linears)
    for name in linears:
        assert torch.equal(after[name] == 0, before[name] == 0), name
    # On texts that neither was trained on nor decided anything.
    assert divergence(reference, tmp_path / "out") < 0.95 * divergence(reference, folder)


@pytest.mark.parametrize("scheme", [None, "w4a16", "w8a8", "int3"])
def test_what_is_quantized_is_not_what_pruning_left(scheme: str | None, tmp_path: Path) -> None:
    """Neither packed, nor as bytes under the name of a dense weight, nor rounded and written dense. Of the layers with
    zeros one has no weight left to train."""
    model = tiny_model(hidden_size=64, intermediate_size=128, num_hidden_layers=1)
    mlp = model.model.layers[0].mlp
    mlp.up_proj.weight.data[:] = 0.0
    mlp.gate_proj.weight.data[:64] = 0.0
    folder = save(model.bfloat16(), tmp_path / "pruned")
    if scheme is not None:
        compress(folder, tmp_path / scheme, scheme)
        folder = tmp_path / scheme
    found = pruned_weights(Copy.load(folder), Checkpoint(folder, "COMPRESSED"))
    assert found == ([] if scheme else ["model.layers.0.mlp.gate_proj.weight"])


def test_a_model_is_as_before_after_training(compressed: Path) -> None:
    copy = Copy.load(compressed)
    vectors = Repairable(copy)
    before = copy.logits([1, 2, 3])
    with vectors.applied({name: tensor + 0.05 for name, tensor in vectors.start().items()}):
        assert abs(copy.logits([1, 2, 3]) - before).max() > 1e-3
    assert (copy.logits([1, 2, 3]) == before).all()
    with vectors.served(None):
        assert (copy.logits([1, 2, 3]) == before).all()
