"""How far scales clip: compared with every scale of the grid, and with gradients of the whole model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from tests.support.adapter_models import random_texts, save, tiny_model

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")
pytest.importorskip("compressed_tensors")

from hemostat_lab.compression.calibrated import CALIBRATIONS, Calibrated  # noqa: E402
from hemostat_lab.compression.checkpoint_writer import BuildEnvironment, compress_with  # noqa: E402
from hemostat_lab.compression.formats import WeightFormat  # noqa: E402
from hemostat_lab.compression.frame import Run, Source  # noqa: E402
from hemostat_lab.compression.rounding import clipped_scale, weight_groups  # noqa: E402
from hemostat_lab.models.checkpoint import Checkpoint  # noqa: E402
from hemostat_lab.models.copies import Copy  # noqa: E402
from hemostat_lab.models.parts import Parts  # noqa: E402

W4A16 = WeightFormat(4, 32)
NAME = "model.layers.0.mlp.down_proj"


def best_scale(row: Any, importance: Any) -> float:
    """Of one group, float64, one scale after the other."""
    losses = {}
    for shrink in torch.linspace(1.0, 0.6, 21):
        scale = row.abs().max() / 7.5 * shrink
        rounded = (row / scale).round().clamp(-8, 7) * scale
        losses[float(scale)] = float((importance * (rounded - row).double().square()).sum())
    return min(losses, key=lambda scale: losses[scale])


@pytest.mark.parametrize("by_weight", [True, False])
def test_no_scale_of_the_grid_has_less_weighted_error(by_weight: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(6, 64, generator=generator)
    importance = torch.rand(6, 64, generator=generator).pow(6) if by_weight else torch.rand(64, generator=generator)
    result = clipped_scale(weight_groups("layer", weight, 16), 4, importance, torch.float32)
    spread = importance.expand(6, 64)
    for row in range(6):
        for group in range(4):
            inside = slice(16 * group, 16 * group + 16)
            assert float(result[row, group]) == pytest.approx(best_scale(weight[row, inside], spread[row, inside]))


def test_clip_kl_weighs_each_weight_by_its_fisher_information(tmp_path: Path) -> None:
    """Against autograd on the whole model, with the labels that the walk draws."""
    source = save(tiny_model(hidden_size=64, intermediate_size=128, num_hidden_layers=2), tmp_path / "source")
    texts = [text.ids for text in random_texts(1, longest=60)]
    opened = Source.open(source)
    method = Calibrated(dict.fromkeys(opened.shapes, W4A16), CALIBRATIONS["clip_kl"])
    compress_with(source, tmp_path / "out", method, texts, environment=BuildEnvironment(tmp_path / "work"))
    walk = Run(opened, texts, Parts(None), 0, lambda *_: None).texts_walk
    top = walk.gradient(2)[0]
    model = Copy.load(source).model
    seen: dict[str, Any] = {}
    module = model.get_submodule(NAME)

    def watch(_: Any, given: tuple[Any, ...], output: Any) -> None:
        seen["x"] = given[0].detach()
        output.register_hook(lambda gradient: seen.update(g=gradient))

    module.register_forward_hook(watch)
    ended: list[Any] = []
    model.model.layers[-1].register_forward_hook(lambda _, __, output: ended.append(output))
    embedded = model.model.embed_tokens(walk.batches[0].ids).requires_grad_(True)
    model(inputs_embeds=embedded, use_cache=False)
    torch.autograd.backward(ended[0] if isinstance(ended[0], torch.Tensor) else ended[0][0], top)
    fisher = torch.einsum("to,ti->oi", seen["g"][0].square(), seen["x"][0].square())
    groups = weight_groups(NAME, module.weight.detach(), 32)
    result = Checkpoint(tmp_path / "out", "OUT").tensor(f"{NAME}.weight_scale")
    same = torch.isclose(result, clipped_scale(groups, 4, fisher, torch.float32))
    assert float(same.float().mean()) > 0.99, "rounding decides where two scales are as good"
    by_inputs = clipped_scale(groups, 4, seen["x"][0].square().mean(0), torch.float32)
    assert float(torch.isclose(result, by_inputs).float().mean()) < 0.9


def test_inputs_that_the_loss_is_not_sensitive_to_do_not_count() -> None:
    """An attention sink: one token has inputs that are large where the layer's other inputs are small, and no gradient.
    The second-order KL ½ E[(gᵀ ΔW x)²] is then less with the Fisher information as weight."""
    generator = torch.Generator().manual_seed(0)
    x, g = torch.randn(400, 32, generator=generator), torch.randn(400, 48, generator=generator)
    x[0], g[0] = 0.0, 1e-4
    x[0, 3] = 1000.0
    weight = torch.randn(48, 32, generator=generator)
    groups = weight_groups("layer", weight, 32)
    loss = {}
    for name, importance in (("inputs", x.square().mean(0)), ("kl", g.square().T @ x.square())):
        scale = clipped_scale(groups, 3, importance, torch.float32)
        delta = (weight / scale).round().clamp(-4, 3) * scale - weight
        loss[name] = float((g @ delta * x).sum(-1).square().mean()) / 2
    assert loss["kl"] < 0.8 * loss["inputs"]
