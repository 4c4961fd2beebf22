"""A whole model pruned, on small random checkpoints: what is dropped where, what it costs, and what is refused."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tests.support.adapter_models import VOCABULARY, random_texts, save, tiny_model

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")
pytest.importorskip("compressed_tensors")

from hemostat.compression.checkpoint_writer import BuildEnvironment, compress_with  # noqa: E402
from hemostat.compression.pruning.masks import Pattern, Score  # noqa: E402
from hemostat.compression.pruning.method import (  # noqa: E402
    Budget,
    PruneOptions,
    pathway_lines,
    prune_method,
)
from hemostat.compression.pruning.rows import find_units  # noqa: E402
from hemostat.compression.pruning.totals import observed  # noqa: E402
from hemostat.models.checkpoint_folders import CompressError  # noqa: E402
from hemostat.models.copies import Copy  # noqa: E402

TEXTS = [text.ids for text in random_texts(30)]


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two layers; two heads share keys and values."""
    model = tiny_model(
        hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_key_value_heads=2, initializer_range=0.15
    )
    return save(model, tmp_path_factory.mktemp("pruning") / "source")


def pruned(source: Path, folder: Path, options: PruneOptions, **environment: Any) -> tuple[Copy, dict[str, Any]]:
    report = compress_with(
        source,
        folder,
        prune_method(options),
        TEXTS,
        environment=BuildEnvironment(folder.parent / "work", **environment),
    )
    return Copy.load(folder), report


def zeros(copy: Copy) -> dict[str, float]:
    return {name: float((module.weight == 0).float().mean()) for name, module in copy.linears.items()}


def divergence(reference: Copy, other: Copy) -> float:
    total, count = 0.0, 0
    for text in random_texts(12, seed=9):
        log_r, log_o = (torch.log_softmax(torch.from_numpy(copy.logits(text.ids)), -1) for copy in (reference, other))
        total += float((log_r.exp() * (log_r - log_o)).sum())
        count += len(text)
    return total / count


@pytest.mark.parametrize("score", list(Score))
def test_every_layer_has_the_sparsity(score: Score, source: Path, tmp_path: Path) -> None:
    options = PruneOptions(0.5, score, compensate=False)
    copy, report = pruned(source, tmp_path / "out", options)
    assert all(part == 0.5 for part in zeros(copy).values())
    assert report["settings"] == {
        "scheme": "prune",
        "sparsity": 0.5,
        "score": score.value,
        "pattern": "unstructured",
        "budget": "layer",
        "compensate": False,
    }
    for linears in report["layers"].values():
        assert all(0.5 < row["kept_score"] < 1.0 for row in linears.values())
    assert len(pathway_lines(report["layers"])) == 3
    # What is left is as it was.
    dense = Copy.load(source)
    for name, module in copy.linears.items():
        kept = module.weight != 0
        assert torch.equal(module.weight[kept], dense.linears[name].weight[kept])


def test_a_global_budget_has_the_sparsity_as_a_whole(source: Path, tmp_path: Path) -> None:
    copy, report = pruned(source, tmp_path / "out", PruneOptions(0.5, Score.FISHER, budget=Budget.GLOBAL))
    rows = [row for linears in report["layers"].values() for row in linears.values()]
    weights = sum(row["weights"] for row in rows)
    assert sum(row["zeros"] for row in rows) == round(0.5 * weights)
    assert sum(int((module.weight == 0).sum()) for module in copy.linears.values()) == round(0.5 * weights)
    parts = zeros(copy).values()
    assert max(parts) - min(parts) > 0.05
    assert max(parts) <= 0.85


def test_scores_and_compensation_beat_magnitude(source: Path, tmp_path: Path) -> None:
    dense = Copy.load(source)
    found = {}
    for name, options in {
        "magnitude": PruneOptions(0.5, Score.MAGNITUDE, compensate=False),
        "fisher": PruneOptions(0.5, Score.FISHER, compensate=False),
        "compensated": PruneOptions(0.5, Score.FISHER),
    }.items():
        found[name] = divergence(dense, pruned(source, tmp_path / name / "out", options)[0])
    assert found["fisher"] < 0.95 * found["magnitude"]
    assert found["compensated"] < 0.9 * found["fisher"]


def test_two_of_four(source: Path, tmp_path: Path) -> None:
    copy, _ = pruned(source, tmp_path / "out", PruneOptions(0.5, Score.WANDA, Pattern.TWO_OF_FOUR))
    for module in copy.linears.values():
        assert ((module.weight != 0).unflatten(1, (-1, 4)).sum(-1) == 2).all()


@pytest.mark.parametrize("score", list(Score))
@pytest.mark.parametrize("budget", list(Budget))
def test_rows(score: Score, budget: Budget, source: Path, tmp_path: Path) -> None:
    """Rows are dropped with the columns that read them; what is dropped makes no difference to the layers that wrote
    it: the model's outputs are those without these units."""
    copy, report = pruned(source, tmp_path / "out", PruneOptions(0.3, score, Pattern.ROWS, budget, compensate=False))
    lost = {name: (module.weight == 0).all(1) for name, module in copy.linears.items()}
    unread = {name: (module.weight == 0).all(0) for name, module in copy.linears.items()}
    for layer in copy.skeleton.layers:
        assert torch.equal(lost[f"{layer}.mlp.gate_proj"], lost[f"{layer}.mlp.up_proj"])
        assert torch.equal(lost[f"{layer}.mlp.gate_proj"], unread[f"{layer}.mlp.down_proj"])
        assert torch.equal(lost[f"{layer}.self_attn.q_proj"], unread[f"{layer}.self_attn.o_proj"])
        heads = lost[f"{layer}.self_attn.q_proj"].unflatten(0, (2, 2, 16))
        assert torch.equal(heads.all(2), heads.any(2)), "a head is dropped whole"
        for name in ("k_proj", "v_proj"):
            assert torch.equal(lost[f"{layer}.self_attn.{name}"].unflatten(0, (2, 16)).all(1), heads.all(2).all(1))
    units = [(kind, layer) for layer in copy.skeleton.layers for kind in find_units(copy.skeleton, layer)]
    weights = sum(kind.count * kind.weights for kind, _ in units)
    dropped = sum(int(unread[kind.reader].sum()) // kind.width * kind.weights for kind, _ in units)
    assert 0.3 <= dropped / weights < 0.3 + 2 * 4 * 16 * 128 / weights
    assert any(row["kept_score"] is not None for row in report["layers"]["model.layers.0"].values())


def test_rows_that_stay_make_up_for_the_others(source: Path, tmp_path: Path) -> None:
    dense, options = Copy.load(source), PruneOptions(0.3, Score.FISHER, Pattern.ROWS)
    plain = pruned(source, tmp_path / "a" / "out", replace(options, compensate=False))[0]
    found = pruned(source, tmp_path / "b" / "out", options)[0]
    assert zeros(found) == zeros(plain)
    assert divergence(dense, found) < 0.9 * divergence(dense, plain)


def test_the_second_order_sums_are_those_of_the_gradient_of_each_token(source: Path) -> None:
    """By autograd: one token at a time, the gradient with respect to the weight."""
    copy = Copy.load(source, dtype="float32")
    layer = "model.layers.1"
    ids = torch.from_numpy(TEXTS[0].astype(np.int64))[None]
    valid = torch.ones_like(ids, dtype=torch.bool)
    valid[0, 0] = False
    directions = torch.randn(ids.shape[1], VOCABULARY, generator=torch.Generator().manual_seed(0))

    def outputs() -> torch.Tensor:
        logits: torch.Tensor = copy.model(input_ids=ids, use_cache=False).logits[0]
        return (logits * directions).sum()

    found: dict[Score, dict[str, torch.Tensor]] = {}
    for score in (Score.WANDA, Score.TAYLOR, Score.FISHER):
        totals: dict[str, torch.Tensor] = {}
        # A leaf, so that gradients pass through the layer.
        copy.model.get_input_embeddings().weight.requires_grad_(True)
        with observed(copy.skeleton, layer, valid, score, totals):
            outputs().backward()
        found[score] = totals
    for name in (f"{layer}.self_attn.k_proj", f"{layer}.mlp.down_proj"):
        module = copy.linears[name]
        seen: dict[str, torch.Tensor] = {}

        def see(module: Any, arguments: Any, output: torch.Tensor, seen: dict[str, torch.Tensor] = seen) -> None:
            seen["x"] = arguments[0].detach()[0]
            output.register_hook(lambda gradient: seen.update(g=gradient[0]))

        handle = module.register_forward_hook(see)
        outputs().backward()
        handle.remove()
        by_token = [torch.outer(seen["g"][t], seen["x"][t]) for t in range(1, ids.shape[1])]
        torch.testing.assert_close(found[Score.FISHER][name], torch.stack([w.square() for w in by_token]).sum(0))
        torch.testing.assert_close(found[Score.TAYLOR][name], torch.stack([w.abs() for w in by_token]).sum(0))
        torch.testing.assert_close(found[Score.WANDA][name][0], seen["x"][1:].square().sum(0))
        # Of all tokens together they are the gradient of the weight.
        module.weight.requires_grad_(True)
        outputs().backward()
        whole = torch.stack(by_token).sum(0) + torch.outer(seen["g"][0], seen["x"][0])
        torch.testing.assert_close(module.weight.grad, whole, rtol=1e-3, atol=1e-4)
        module.weight.requires_grad_(False)
        module.weight.grad = None


def test_the_gates_of_units_are_derivatives_of_their_size(source: Path) -> None:
    """Of one text with one token, so that the sum over tokens has one term."""
    copy = Copy.load(source, dtype="float32")
    layer, reader = "model.layers.0", "model.layers.0.mlp.down_proj"
    ids = torch.tensor([[5]])
    gate = torch.ones(24, requires_grad=True)
    module = copy.linears[reader]
    totals: dict[str, torch.Tensor] = {}
    handle = module.register_forward_pre_hook(lambda _, given: given[0] * gate.repeat_interleave(4))
    with observed(copy.skeleton, layer, torch.ones_like(ids, dtype=torch.bool), Score.FISHER, totals, {reader: 4}):
        copy.model(input_ids=ids, use_cache=False).logits[0, 0, 3].backward()
    handle.remove()
    assert gate.grad is not None
    torch.testing.assert_close(totals[reader][0], gate.grad.square(), rtol=1e-3, atol=1e-9)


def test_it_goes_on_where_it_was_interrupted(source: Path, tmp_path: Path) -> None:
    options = PruneOptions(0.5, Score.FISHER, budget=Budget.GLOBAL)
    expected, _ = pruned(source, tmp_path / "a" / "out", options)
    for stage, stop in (("scores", 1), ("compressed layers", 1)):

        def interrupt(found: str, done: int, total: int, stage: str = stage, stop: int = stop) -> None:
            if (found, done) == (stage, stop):
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            pruned(source, tmp_path / "b" / "out", options, step=interrupt)
        assert not (tmp_path / "b" / "out").exists()
    seen: list[tuple[str, int]] = []
    found, _ = pruned(
        source, tmp_path / "b" / "out", options, step=lambda stage, done, total: seen.append((stage, done))
    )
    for name, module in expected.linears.items():
        assert torch.equal(module.weight, found.linears[name].weight)
    assert seen[-1] == ("compressed layers", 2)


def test_magnitude_alone_needs_no_texts(source: Path, tmp_path: Path) -> None:
    method = prune_method(PruneOptions(0.5, Score.MAGNITUDE, budget=Budget.GLOBAL, compensate=False))
    assert not method.needs_texts
    compress_with(source, tmp_path / "out", method, environment=BuildEnvironment(tmp_path / "work"))
    assert sum(zeros(Copy.load(tmp_path / "out")).values()) > 0.0


def test_what_cannot_be_pruned_in_that_way(tmp_path: Path) -> None:
    with pytest.raises(CompressError, match=r"--sparsity 1\.2: "):
        PruneOptions(1.2)
    with pytest.raises(CompressError, match=r"--budget global: the pattern 2:4 drops one half"):
        PruneOptions(0.5, pattern=Pattern.TWO_OF_FOUR, budget=Budget.GLOBAL)
    import transformers

    config = transformers.Phi3Config(
        vocab_size=97,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        pad_token_id=0,
        eos_token_id=1,
    )
    folder = save(transformers.Phi3ForCausalLM(config), tmp_path / "source")
    with pytest.raises(CompressError, match=r"--pattern rows: the heads of .*self_attn are not known") as caught:
        pruned(folder, tmp_path / "out", PruneOptions(0.3, pattern=Pattern.ROWS))
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists()
    json.dumps(prune_method(PruneOptions(0.5)).settings)
