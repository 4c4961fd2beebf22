"""A whole model pruned, on small random checkpoints: what is dropped where, what it costs, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from tests.support.adapter_models import random_texts, save, tiny_model

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")
pytest.importorskip("compressed_tensors")


from hemostat_lab.compression.calibrated import CALIBRATIONS, Calibrated  # noqa: E402
from hemostat_lab.compression.checkpoint_writer import BuildEnvironment, compress_with  # noqa: E402
from hemostat_lab.compression.error_compensation import damped  # noqa: E402
from hemostat_lab.compression.frame import Method, Run, Source, compress_layers  # noqa: E402
from hemostat_lab.compression.methods import by_name  # noqa: E402
from hemostat_lab.compression.pruning import method  # noqa: E402
from hemostat_lab.compression.pruning.compensation import shrunk  # noqa: E402
from hemostat_lab.compression.pruning.dense_model import measure_gradients, stored_gradients  # noqa: E402
from hemostat_lab.compression.pruning.method import PruneMethod, PruneOptions, pathway_lines  # noqa: E402
from hemostat_lab.compression.pruning.rows import find_units  # noqa: E402
from hemostat_lab.compression.pruning.weights import (  # noqa: E402
    Pattern,
    pruned_by_blocks,
)
from hemostat_lab.models.checkpoint_folders import CompressError  # noqa: E402
from hemostat_lab.models.copies import Copy  # noqa: E402
from hemostat_lab.models.parts import Parts  # noqa: E402

TEXTS = [text.ids for text in random_texts(30)]


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two layers; two heads share keys and values."""
    model = tiny_model(
        hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_key_value_heads=2, initializer_range=0.15
    )
    return save(model, tmp_path_factory.mktemp("pruning") / "source")


def made(source: Path, folder: Path, method: Method, **environment: Any) -> tuple[Copy, dict[str, Any]]:
    build = BuildEnvironment(folder.parent / "work", **environment)
    report = compress_with(source, folder, method, TEXTS, environment=build)
    return Copy.load(folder), report


def pruned(source: Path, folder: Path, options: PruneOptions, **environment: Any) -> tuple[Copy, dict[str, Any]]:
    return made(source, folder, PruneMethod(options), **environment)


def zeros(copy: Copy) -> dict[str, float]:
    return {name: float((module.weight == 0).float().mean()) for name, module in copy.linears.items()}


def divergence(reference: Copy, other: Copy) -> float:
    total, count = 0.0, 0
    for text in random_texts(12, seed=9):
        log_r, log_o = (torch.log_softmax(torch.from_numpy(copy.logits(text.ids)), -1) for copy in (reference, other))
        total += float((log_r.exp() * (log_r - log_o)).sum())
        count += len(text)
    return total / count


def test_the_model_has_the_sparsity_as_a_whole(source: Path, tmp_path: Path) -> None:
    copy, report = pruned(source, tmp_path / "out", PruneOptions(0.5))
    assert report["settings"] == {"scheme": "prune", "sparsity": 0.5, "pattern": "unstructured"}
    rows = [row for linears in report["layers"].values() for row in linears.values()]
    weights = sum(row["weights"] for row in rows)
    assert sum(row["zeros"] for row in rows) == round(0.5 * weights)
    assert sum(int((module.weight == 0).sum()) for module in copy.linears.values()) == round(0.5 * weights)
    parts = zeros(copy).values()
    assert max(parts) - min(parts) > 0.05
    assert min(parts) >= 0.2
    assert max(parts) <= 0.75
    for linears in report["layers"].values():
        assert all(0.5 < row["kept_score"] < 1.0 for row in linears.values())
    assert len(pathway_lines(report["layers"])) == 3


def test_gradients_beat_the_inputs_alone_and_those_beat_magnitude(source: Path, tmp_path: Path) -> None:
    dense = Copy.load(source)
    half = dict.fromkeys(dense.linears, (0.5, Pattern.UNSTRUCTURED))
    methods: dict[str, Method] = {
        "magnitude": by_name("prune50"),
        "inputs": Calibrated({}, CALIBRATIONS["clip"], sparse=half),
        "gradients": PruneMethod(PruneOptions(0.5)),
    }
    divergences = {name: divergence(dense, made(source, tmp_path / name / "out", m)[0]) for name, m in methods.items()}
    assert divergences["inputs"] < 0.9 * divergences["magnitude"]
    assert divergences["gradients"] < 0.9 * divergences["inputs"]


def test_layers_make_up_for_what_those_before_them_lost(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    dense, options = Copy.load(source), PruneOptions(0.5, Pattern.TWO_OF_FOUR)
    fitted = divergence(dense, pruned(source, tmp_path / "a" / "out", options)[0])
    monkeypatch.setattr(method, "towards_dense", lambda moments, gap: torch.zeros_like(gap, dtype=torch.float32))
    plain = divergence(dense, pruned(source, tmp_path / "b" / "out", options)[0])
    assert fitted < 0.95 * plain


def test_one_layer_is_in_memory(source: Path) -> None:
    opened = Source.open(source)
    run = Run(opened, TEXTS, Parts(None), 0, lambda *_: None)
    compress_layers(run, PruneMethod(PruneOptions(0.5)))
    assert opened.skeleton.most_loaded == 1


def test_two_of_four(source: Path, tmp_path: Path) -> None:
    copy, _ = pruned(source, tmp_path / "out", PruneOptions(0.5, Pattern.TWO_OF_FOUR))
    for module in copy.linears.values():
        assert ((module.weight != 0).unflatten(1, (-1, 4)).sum(-1) == 2).all()


def test_rows(source: Path, tmp_path: Path) -> None:
    """Rows are dropped with the columns that read them; what is dropped makes no difference to the layers that wrote
    it: the model's outputs are those without these units. What stays makes up for it."""
    copy, report = pruned(source, tmp_path / "out", PruneOptions(0.3, Pattern.ROWS))
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
    dense, plain = Copy.load(source), Copy.load(source)
    for name, module in plain.linears.items():
        module.weight[copy.linears[name].weight == 0] = 0.0
    assert divergence(dense, copy) < 0.95 * divergence(dense, plain)


def test_gradients_and_predicted_losses_are_those_of_the_whole_model(source: Path) -> None:
    """By autograd on the whole model, with the labels that the walk draws."""
    text, opened, parts = TEXTS[0], Source.open(source), Parts(None)
    top = Run(opened, [text], Parts(None), 0, lambda *_: None).texts_walk.gradient(2)[0]
    run = Run(opened, [text], parts, 0, lambda *_: None)
    losses = measure_gradients(run)
    copy = Copy.load(source)
    assert losses.keys() == copy.linears.keys()
    seen: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}

    def see(name: str, x: torch.Tensor, output: torch.Tensor) -> None:
        output.register_hook(lambda g: seen.update({name: (x.detach()[0].double(), g[0].double())}))

    for name, module in copy.linears.items():
        module.register_forward_hook(lambda _, given, output, name=name: see(name, given[0], output))
    copy.model.get_input_embeddings().weight.requires_grad_(True)
    copy.model.model.norm.register_forward_pre_hook(lambda _, given: given[0].backward(top, retain_graph=True))
    copy.model(input_ids=torch.from_numpy(text.astype("int64"))[None], use_cache=False)
    for index, layer in enumerate(copy.skeleton.layers):
        stored = stored_gradients(run, index)
        for name in copy.skeleton.linears_of(layer):
            x, g = seen[name]
            torch.testing.assert_close(
                stored[name].double(), g.T @ g, rtol=0.02, atol=1e-3 * float((g.T @ g).abs().max())
            )
            weight = copy.linears[name].weight.float()
            second, gram = damped(shrunk(x.T @ x, len(x))), g.T @ g
            change = (pruned_by_blocks(weight, 0.5, Pattern.UNSTRUCTURED, second, damped(gram))[0] - weight).double()
            errors = x[1:] @ change.T
            expected = 0.5 * float(((errors @ (gram / len(x))) * errors).sum()) / len(x)
            assert losses[name] == pytest.approx(expected, rel=0.1)


def test_it_goes_on_where_it_was_interrupted(source: Path, tmp_path: Path) -> None:
    options = PruneOptions(0.5)
    expected, _ = pruned(source, tmp_path / "a" / "out", options)
    for stage, stop in (("gradients", 1), ("compressed layers", 1)):

        def interrupt(name: str, done: int, total: int, stage: str = stage, stop: int = stop) -> None:
            if (name, done) == (stage, stop):
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            pruned(source, tmp_path / "b" / "out", options, step=interrupt)
        assert not (tmp_path / "b" / "out").exists()
    seen: list[tuple[str, int]] = []
    result, _ = pruned(
        source, tmp_path / "b" / "out", options, step=lambda stage, done, total: seen.append((stage, done))
    )
    for name, module in expected.linears.items():
        assert torch.equal(module.weight, result.linears[name].weight)
    assert seen[-1] == ("compressed layers", 2)


def test_what_cannot_be_pruned_in_that_way(tmp_path: Path) -> None:
    with pytest.raises(CompressError, match=r"--sparsity 1\.2: "):
        PruneOptions(1.2)
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
    json.dumps(PruneMethod(PruneOptions(0.5)).settings)
