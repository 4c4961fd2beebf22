"""Equivalent scales leave what a layer computes unchanged, and lower the error of rounding."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from tests.support.adapter_models import random_texts, save, tiny_model

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from hemostat_lab.compression import equivalent  # noqa: E402
from hemostat_lab.compression.equivalent import Site, awq_scale, scale_layer, sites, smooth_scale  # noqa: E402
from hemostat_lab.compression.formats import WeightFormat  # noqa: E402
from hemostat_lab.compression.frame import LayerData, Run, Source  # noqa: E402
from hemostat_lab.models.copies import weights_of  # noqa: E402
from hemostat_lab.models.parts import Parts  # noqa: E402

W4A16, W8A8 = WeightFormat(4, 64), WeightFormat(8, inputs="int8")


@contextmanager
def layer(folder: Path) -> Iterator[LayerData]:
    """The first layer, loaded, of a checkpoint; texts are random."""
    run = Run(Source.open(folder), [t.ids for t in random_texts(6)], Parts(None), 0, lambda *_: None)
    hidden, _ = run.texts_walk.embeddings()
    with run.skeleton.loaded(run.skeleton.parameters_of("model.layers.0"), weights_of(run.source.checkpoint)):
        yield LayerData(run, 0, hidden)


def gemma(folder: Path) -> Path:
    """Its norms multiply by 1 + weight, and it has other norms between the layers."""
    torch.manual_seed(0)
    config = transformers.Gemma2Config(
        vocab_size=97, hidden_size=64, intermediate_size=128, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1, head_dim=32, max_position_embeddings=128,
    )  # fmt: skip
    model = transformers.Gemma2ForCausalLM(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.copy_(0.3 * torch.randn_like(parameter))
    return save(model, folder)


def random_scale(weights: Mapping[str, Any], inputs: Any, formats: Mapping[str, WeightFormat]) -> Any:
    return torch.exp(torch.randn(len(inputs.largest), generator=torch.Generator().manual_seed(1)))


@pytest.mark.parametrize("kind", ["llama", "gemma"])
def test_any_scales_leave_the_function_unchanged(kind: str, tmp_path: Path) -> None:
    folder = save(tiny_model(), tmp_path / "llama") if kind == "llama" else gemma(tmp_path / "gemma")
    with layer(folder) as data:
        before = torch.cat([states.flatten() for states in data.forward()])
        original = {name: data.parameter(name) for name in data.run.skeleton.parameters_of(data.name)}
        changed = scale_layer(data, dict.fromkeys(data.linears, W4A16), random_scale)
        after = torch.cat([states.flatten() for states in data.forward()])
        assert torch.allclose(before, after, rtol=1e-4, atol=1e-4 * float(before.abs().max()))
        norms = {site.before for site in sites(data) if site.is_norm}
        assert len(norms) == 2
        assert changed.keys() == {f"{name}.weight" for name in norms}
        moved = [name for name, value in original.items() if not torch.equal(value, data.parameter(name))]
        # Values and outputs have grouped heads in Gemma: nothing can be moved between them.
        assert len(moved) == len(norms) + len(data.linears) - (0 if kind == "llama" else 1)


@pytest.mark.parametrize("embedded", [1.0, 1e6])
def test_a_norm_that_something_else_reads_is_left_out(
    embedded: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where the hidden states are so large that the layer's outputs hardly depend on what it computes."""
    model = tiny_model()
    with torch.no_grad():
        model.model.embed_tokens.weight.mul_(embedded)
    with layer(save(model, tmp_path / "llama")) as data:
        norm, query = f"{data.name}.input_layernorm", f"{data.name}.self_attn.q_proj"
        monkeypatch.setattr(equivalent, "sites", lambda _: [Site(norm, (query,), True)])
        weight = data.parameter(f"{query}.weight").clone()
        assert scale_layer(data, dict.fromkeys(data.linears, W4A16), random_scale) == {}
        assert torch.equal(data.parameter(f"{query}.weight"), weight)


def test_outliers_among_the_inputs_are_moved_to_the_weights() -> None:
    """One input channel is 30 times the others: AWQ rounds its weights more finely, SmoothQuant shrinks it."""
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(256, 64, generator=generator)
    rows[:, 5] *= 30.0
    weight = {"l": torch.randn(32, 64, generator=generator)}
    inputs = equivalent.SiteInputs((rows.T @ rows).double(), rows.abs().amax(0), rows)
    for find, chosen in ((awq_scale, W4A16), (smooth_scale, W8A8)):
        scale = find(weight, inputs, {"l": chosen})
        assert scale is not None
        assert float(scale[5]) > 2.0 * float(scale.median()), find.__name__


def test_scales_that_do_not_help_are_not_moved() -> None:
    """Weights on the grid already: any scale would only add error."""
    weight = torch.randint(-7, 8, (16, 64)).float()
    weight[:, 0] = 7.5
    rows = torch.randn(128, 64, generator=torch.Generator().manual_seed(0))
    inputs = equivalent.SiteInputs((rows.T @ rows).double(), rows.abs().amax(0), rows)
    assert awq_scale({"l": weight.clamp(-7, 7.5)}, inputs, {"l": W4A16}) is None
