"""Distillation on a small random model: what is minimised, what decides, and when the start is kept."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from hemostat.checkpoints.errors import AdaptError  # noqa: E402
from hemostat.checkpoints.texts import Text  # noqa: E402
from hemostat_calibration.adapters.correction import low_rank  # noqa: E402
from hemostat_calibration.adapters.factors import LowRank  # noqa: E402
from hemostat_lab.adapters import distil as module  # noqa: E402
from hemostat_lab.adapters.build import BuildOptions, build  # noqa: E402
from hemostat_lab.adapters.pair import CheckpointPair  # noqa: E402
from hemostat_lab.models import training  # noqa: E402
from hemostat_lab.models.activations import make_batches  # noqa: E402
from hemostat_lab.models.copies import Copy  # noqa: E402
from hemostat_lab.models.parts import Parts  # noqa: E402
from hemostat_lab.models.skeleton import CopyLinear, InputRounding, Inputs  # noqa: E402

VOCABULARY = 64
Pair = tuple[Copy, Copy]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """A random model, and the same with an error in its weights."""
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=64,
        initializer_range=0.3,
        tie_word_embeddings=True,
    )
    model = transformers.LlamaForCausalLM(config)
    paths = [tmp_path_factory.mktemp(name) for name in ("reference", "compressed")]
    model.save_pretrained(paths[0])
    with torch.no_grad():
        for linear in model.modules():
            if isinstance(linear, torch.nn.Linear) and linear is not model.lm_head:
                linear.weight += 0.15 * torch.randn_like(linear.weight)
    model.save_pretrained(paths[1])
    return paths


@pytest.fixture(scope="module")
def pair(folders: list[Path]) -> Pair:
    reference, compressed = (Copy.load(folder, dtype="float32") for folder in folders)
    return reference, compressed


def texts(count: int = 150, seed: int = 0, length: int = 12) -> list[Text]:
    rng = np.random.default_rng(seed)
    return [
        Text(*(rng.integers(0, VOCABULARY, size).astype(np.int32) for size in (3, int(rng.integers(4, length)))))
        for _ in range(count)
    ]


def plain_start(pair: Pair, rank: int = 2) -> dict[str, LowRank]:
    """Without any statistics: there is much to improve."""
    reference, compressed = pair
    return {
        name: low_rank((reference.linears[name].weight - linear.weight).detach().numpy(), rank)[0]
        for name, linear in compressed.linears.items()
    }


def mean_kl(pair: Pair, given: list[Text], layers: dict[str, LowRank]) -> float:
    """By hand, at the tokens of the outputs."""
    total, count = 0.0, 0
    for text in given:
        log_r, log_c = (
            torch.log_softmax(torch.from_numpy(copy.logits(text.ids, adapter)), dim=-1)[len(text.prompt) - 1 : -1]
            for copy, adapter in zip(pair, (None, layers), strict=True)
        )
        total += float((log_r.exp() * (log_r - log_c)).sum())
        count += len(text.output)
    return total / count


def distilled(pair: Pair, *arguments: Any, **keywords: Any) -> module.Distilled:
    return module.distil(*pair, *arguments, step_positions=32, **keywords)


def test_it_improves_the_fold_and_texts_that_it_has_not_seen(pair: Pair) -> None:
    start, seen = plain_start(pair), []
    before = {name: module.weight.clone() for name, module in pair[1].linears.items()}
    result = distilled(pair, start, texts(), rates=(3e-2,), progress=lambda *step: seen.append(step))
    assert result.improved
    assert result.kl < 0.9 * result.kl_start
    assert [trial.complete for trial in result.trials] == [True]
    assert {name: (layer.a.shape, layer.b.shape) for name, layer in result.layers.items()} == {
        name: (layer.a.shape, layer.b.shape) for name, layer in start.items()
    }
    unseen = texts(seed=1)
    assert mean_kl(pair, unseen, dict(result.layers)) < 0.95 * mean_kl(pair, unseen, start)
    assert seen[-1] == (training.DISTILLATION, result.tokens, result.tokens)
    assert [done for _, done, _ in seen] == sorted(done for _, done, _ in seen)
    report = result.report()
    assert report["trials"][0]["rate"] == 3e-2
    assert report["fold_tokens"] > 0
    assert report["cpu_seconds"] > 0.0
    assert "layers" not in report
    for name, linear in pair[1].linears.items():
        assert torch.equal(linear.weight, before[name]), "the model itself was changed"
        assert linear.factors is None


def test_the_figures_of_the_fold_are_those_of_the_models(pair: Pair) -> None:
    start = plain_start(pair)
    _, fold = training._split(texts())
    batches = make_batches([text.ids for text in fold], torch.device("cpu"), 32)
    with torch.no_grad(), module.TrainableAdapter(start, pair[1]).served(None):
        figures = training._fold_kl(*pair, fold, batches)
    served = {name: module._rounded(layer) for name, layer in start.items()}
    for text, (kl, tokens) in zip(fold, figures, strict=True):
        assert tokens == len(text.output)
        assert kl / tokens == pytest.approx(mean_kl(pair, [text], served), rel=1e-4)


def test_the_gradients_are_those_of_the_mean_divergence(pair: Pair) -> None:
    """A step of one entry, by hand."""
    given = texts(5)
    layers = {name: layer.for_training() for name, layer in plain_start(pair).items()}
    trainable = module.TrainableAdapter(layers, pair[1])
    run = training._Training(*pair, trainable, given, 0, 1000, lambda *step: None)
    factors = {name: tensor.requires_grad_(True) for name, tensor in trainable.start().items()}
    (batch,) = make_batches([text.ids for text in given], torch.device("cpu"), 1000)
    assert run._gradients(batch, factors) == sum(len(text.output) for text in given)
    name = "model.layers.0.mlp.down_proj"
    gradients = [factors[f"{name}|{side}"].grad.numpy() for side in ("a", "b")]
    for index, gradient in enumerate(gradients):
        place = np.unravel_index(int(np.abs(gradient).argmax()), gradient.shape)
        ends = []
        for step in (-1e-2, 1e-2):
            moved = [layers[name].a.copy(), layers[name].b.copy()]
            moved[index][place] += step
            ends.append(mean_kl(pair, given, layers | {name: LowRank(*moved)}))
        assert (ends[1] - ends[0]) / 2e-2 == pytest.approx(float(gradient[place]), rel=0.02)


def test_a_rate_that_is_too_high_leaves_the_start(pair: Pair) -> None:
    start = plain_start(pair)
    result = distilled(pair, start, texts(), rates=(30.0, 10.0))
    assert not result.improved
    assert result.layers is start
    assert result.kl == result.kl_start
    assert [trial.complete for trial in result.trials] == [False, False]
    assert all(trial.kl is None or trial.kl > result.kl_start for trial in result.trials)


def test_factors_that_are_no_longer_finite_leave_the_start(pair: Pair) -> None:
    start = plain_start(pair)
    result = distilled(pair, start, texts(20), rates=(1e30,))
    assert result.layers is start
    assert [trial.kl for trial in result.trials] == [None]
    json.dumps(result.report(), allow_nan=False)


def test_the_rate_that_the_fold_prefers_is_completed(pair: Pair) -> None:
    """0.1, which is tried first, improves the fold, too."""
    rates, seen = (0.1, 1e-2, 1e-4), []
    result = distilled(pair, plain_start(pair), texts(100), rates=rates, progress=lambda *step: seen.append(step))
    assert result.improved
    kls = {trial.rate: trial.kl for trial in result.trials}
    assert [trial.rate for trial in result.trials if trial.complete] == [1e-2]
    assert result.kl == kls[1e-2] < kls[0.1] < result.kl_start
    tokens = {trial.rate: trial.tokens for trial in result.trials}
    assert list(tokens) == list(rates)
    assert tokens[0.1] == tokens[1e-4] == pytest.approx(0.5 * tokens[1e-2], rel=0.1)
    assert seen[-1] == (training.DISTILLATION, result.tokens, result.tokens)
    assert [done for _, done, _ in seen] == sorted(done for _, done, _ in seen)


def test_a_rate_that_is_completed_is_as_if_it_were_alone(pair: Pair) -> None:
    alone, among = (distilled(pair, plain_start(pair), texts(20), rates=rates) for rates in ((1e-2,), (1e-2, 30.0)))
    assert alone.kl == among.kl
    assert [a.a.tobytes() for a in alone.layers.values()] == [a.a.tobytes() for a in among.layers.values()]


def test_an_exact_start_is_kept(pair: Pair) -> None:
    start = plain_start(pair, rank=16)
    result = distilled(pair, start, texts(20), rates=(1e-2,))
    assert result.kl_start < 1e-3
    assert result.kl <= result.kl_start


def test_twice_the_same_is_the_same(pair: Pair) -> None:
    one, two = (distilled(pair, plain_start(pair), texts(20), rates=(1e-2,)) for _ in range(2))
    assert [layer.a.tobytes() for layer in one.layers.values()] == [layer.a.tobytes() for layer in two.layers.values()]
    other = distilled(pair, plain_start(pair), texts(20), rates=(1e-2,), seed=1)
    assert one.kl != other.kl


def test_the_profile_of_the_distilled_adapter(pair: Pair, folders: list[Path]) -> None:
    """Another version with the same ranks; from kept parts the same again, without training."""
    checkpoints = CheckpointPair.open(*folders, dtype="float32")
    given, parts = texts(300, length=20), Parts(None)
    built = build(checkpoints, given, BuildOptions(rank=1, metric="diagonal"))
    result = module.distilled(checkpoints, built, given, parts, rates=(3e-2,))
    report = result.report["distilled"]
    assert report["improved"]
    assert result.report["version"] == result.profile.version != built.profile.version
    assert result.report["method"].startswith(f"distilled on {report['tokens']} tokens; start: training-free")
    assert result.profile.metadata["method"] == result.report["method"]
    assert {n: layer.rank for n, layer in result.layers.items()} == {n: layer.rank for n, layer in built.layers.items()}
    assert result.report["seconds"] > built.report["seconds"]
    seen: list[int] = []
    again = module.distilled(checkpoints, built, given, parts, progress=lambda stage, done, total: seen.append(done))
    assert again.profile == result.profile
    assert seen == []
    assert "CPU-seconds" in training.summary_line(report)


def test_too_few_texts_are_a_note(pair: Pair, folders: list[Path]) -> None:
    checkpoints = CheckpointPair.open(*folders, dtype="float32")
    given = texts(7, length=30)
    built = build(checkpoints, given, BuildOptions(rank=1, metric="diagonal"))
    result = module.distilled(checkpoints, built, given, Parts(None))
    assert result.profile == built.profile
    assert result.report["distilled"] is None
    assert result.report["notes"][-1].startswith("not distilled: 7 different prompts")


def test_the_fold_is_of_other_prompts() -> None:
    given = [text for text in texts(30) for _ in range(2)]
    learn, fold = training._split(given)
    assert len(learn) + len(fold) == len(given)
    assert not {text.key for text in learn} & {text.key for text in fold}
    assert len({text.key for text in fold}) == training.MIN_FOLD_TEXTS
    again = training._split(list(reversed(given)))
    assert {text.key for text in again[1]} == {text.key for text in fold}


def test_too_few_prompts(pair: Pair) -> None:
    with pytest.raises(AdaptError, match="7 different prompts: distillation needs 8"):
        distilled(pair, plain_start(pair), texts(7))


@pytest.mark.parametrize(
    ("gains", "improves"), [([1.0, 1.0, 0.9, 1.1], True), ([4.0, -3.0, 1.0, -1.5], False), ([-1.0, -1.0], False)]
)
def test_a_gain_within_its_error_is_none(gains: list[float], improves: bool) -> None:
    before = np.array([[10.0, 5.0]] * len(gains))
    after = before - np.array([[gain, 0.0] for gain in gains])
    assert training._improves(before, after) is improves


def test_not_a_number_is_no_improvement() -> None:
    assert not training._improves(np.ones((3, 2)), np.array([[np.nan, 1.0]] * 3))


@pytest.mark.parametrize(("rounding", "off"), [("int8", 0.1), ("fp8", 0.3), ("nvfp4", 1.2), ("mxfp4", 1.2)])
def test_the_gradient_passes_through_rounded_inputs(rounding: InputRounding, off: float) -> None:
    """Rounding has no gradient of its own, the layer must have one all the same."""
    layer = CopyLinear(6, 4, bias=False)
    layer.inputs = Inputs(rounding)
    layer.requires_grad_(False)
    x = torch.randn(3, 6, requires_grad=True)
    output = layer(x)
    with torch.inference_mode():
        assert torch.equal(layer(x.detach()), output)
    output.sum().backward()
    assert x.grad is not None
    torch.testing.assert_close(x.grad, layer.weight.sum(0).expand(3, 6), rtol=0.1, atol=off)


def test_memory_is_stated(pair: Pair, tmp_path: Path) -> None:
    start = plain_start(pair)
    numbers = sum(layer.a.size + layer.b.size for layer in start.values())
    models = sum(p.numel() * 4 for copy in pair for p in copy.model.parameters())
    trainable = module.TrainableAdapter(start, pair[1])
    assert training.memory_bytes(*pair, trainable, 1) == models + 20 * numbers
    assert training.memory_bytes(*pair, trainable, 2) == models + 36 * numbers
