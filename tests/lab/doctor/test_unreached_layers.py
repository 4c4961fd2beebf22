"""A prescription for a model with experts, some of which no token of the texts reaches."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from hemostat_lab.doctor.prescription.words import sentences

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from tests.support.predicted_changes import mean_square_change  # noqa: E402
from tests.support.tiny_models import VOCAB, tiny_model  # noqa: E402

from hemostat.checkpoints.errors import AdaptError  # noqa: E402
from hemostat_lab.compression.plan import LayerPlan  # noqa: E402
from hemostat_lab.doctor.prescription.losses import LayerLosses, predicted_losses, with_unreached  # noqa: E402
from hemostat_lab.doctor.prescription.mixes import dense_bytes, prescribe  # noqa: E402
from hemostat_lab.models.parts import Parts  # noqa: E402
from hemostat_lab.models.work_folder import WorkFolder  # noqa: E402

SHORT, LONG = 500, 800
"""Tokens of two texts, which are two batches."""


@pytest.fixture
def mixture(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A Llama whose MLPs are three experts: one reads texts of at most 700 tokens, one longer ones, and one none."""
    from transformers.models.llama import modeling_llama

    expert = modeling_llama.LlamaMLP

    class Experts(torch.nn.Module):  # type: ignore[misc]  # torch is not analyzed
        def __init__(self, config: Any) -> None:
            super().__init__()
            self.experts = torch.nn.ModuleList(expert(config) for _ in range(3))

        def forward(self, hidden: Any) -> Any:
            return self.experts[int(hidden.shape[1] > 700)](hidden)

    monkeypatch.setattr(modeling_llama, "LlamaMLP", Experts)
    tiny_model("llama").save_pretrained(tmp_path / "mixture")
    return tmp_path / "mixture"


def named(layer: int, expert: int, kind: str) -> str:
    return f"model.layers.{layer}.mlp.experts.{expert}.{kind}_proj"


def test_layers_that_no_token_reached_have_the_median_loss_of_their_kind(mixture: Path, tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    texts = [rng.integers(2, VOCAB, length).astype(np.int32) for length in (SHORT, LONG)]
    with WorkFolder(tmp_path / "work", {}, "test") as work:
        result = predicted_losses(mixture, texts, "any", "cpu", 3, Parts(work), lambda *_: None)
        again = predicted_losses(mixture, texts, "any", "cpu", 3, Parts(work), lambda *_: None)
    assert {name for name, layer in result.items() if not layer.reached} == {
        named(layer, 2, kind) for layer in (0, 1) for kind in ("gate", "up", "down")
    }
    for name, layer in result.items():
        np.testing.assert_array_equal(layer.losses, again[name].losses)
    for kind in ("gate", "up", "down"):
        reached = [result[named(layer, expert, kind)].losses for layer in (0, 1) for expert in (0, 1)]
        assert all((losses[:-1] > 0).all() for losses in reached)
        np.testing.assert_allclose(result[named(1, 2, kind)].losses, np.median(reached, axis=0))
    # The mean is over all tokens: those of the other expert's text count as 0.
    name = named(1, 0, "down")
    model = transformers.AutoModelForCausalLM.from_pretrained(mixture).eval()
    change = mean_square_change(model, texts[0], name, 3)(result[name].plans[0])
    assert result[name].losses[0] == pytest.approx(0.5 * change * SHORT / (SHORT + LONG), rel=1e-3)
    mix, _ = prescribe(result, "any", int(0.25 * dense_bytes(result)))
    least = min(mix.layers[named(layer, expert, "up")].bits for layer in (0, 1) for expert in (0, 1))
    assert min(mix.layers[named(layer, 2, "up")].bits for layer in (0, 1)) >= least


PLANS = [LayerPlan(4, 64), LayerPlan(8, 64), LayerPlan(16)]


def losses(*values: float, reached: bool = True, size: int = 64) -> LayerLosses:
    return LayerLosses(size, 64, PLANS, np.array(values), reached)


def test_a_kind_of_which_no_layer_was_reached_has_the_largest_loss() -> None:
    unknown = losses(np.nan, np.nan, np.nan, reached=False, size=128)
    result = with_unreached({"0.up": losses(0.1, 0.02, 0.0), "0.down": losses(0.3, 0.01, 0.0), "0.gate": unknown})
    np.testing.assert_allclose(result["0.gate"].losses, [0.6, 0.04, 0.0])
    with pytest.raises(AdaptError, match="give other prompts"):
        with_unreached({"0.gate": unknown})


def test_the_report_says_which_layers_are_unknown() -> None:
    compared = {"name": "prescribed", "mean_kld": 0.2, "mean_kld_se_by_request": 0.01}
    prescription = {
        "target": "any", "budget": 100, "bytes": 90, "bits_per_weight": 4.2, "predicted": 0.1,
        "predicted_lower_bound": 0.09, "learned_requests": 3, "learned_positions": 60, "tokens": 20,
        "unreached": ["model.layers.0.mlp.experts.2.up_proj"],
        "requests": 2, "counts": {"4 bits": 8}, "plan": {"layers": {}}, "compared": [compared],
    }  # fmt: skip
    assert any("No token of the texts reached 1 of the layers, such as model.layers.0.mlp.experts.2.up_proj" in text
               for text in sentences(prescription))  # fmt: skip
    assert not any("No token" in text for text in sentences(prescription | {"unreached": []}))
