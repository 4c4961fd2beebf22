"""Mixtures of experts: read as they are stored, compressed, adapted, and compared by `hemostat doctor`."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from tests.support.adapter_models import random_texts
from tests.support.doctor import TinyPair, report_of, write_tokenizer
from tests.support.slow import slow_unless

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
pytest.importorskip("compressed_tensors")

from safetensors.torch import load_file, save_file  # noqa: E402
from tests.support.tiny_models import MIXTURES, VOCAB, tiny_model  # noqa: E402

from hemostat.checkpoints.errors import AdaptError  # noqa: E402
from hemostat_lab.adapters.build import BuildOptions, build, judged  # noqa: E402
from hemostat_lab.adapters.pair import CheckpointPair  # noqa: E402
from hemostat_lab.compression.calibrated import Calibrated, Calibration  # noqa: E402
from hemostat_lab.compression.checkpoint_writer import compress, compress_with  # noqa: E402
from hemostat_lab.compression.formats import WeightFormat  # noqa: E402
from hemostat_lab.compression.frame import Source  # noqa: E402
from hemostat_lab.doctor.causes.routing import routing_report  # noqa: E402
from hemostat_lab.models.checkpoint import Checkpoint  # noqa: E402
from hemostat_lab.models.copies import Copy  # noqa: E402
from hemostat_lab.models.experts import Experts, is_expert, routers  # noqa: E402
from hemostat_lab.models.skeleton import Skeleton  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning", "ignore::FutureWarning")

IDS = np.random.default_rng(1).integers(2, VOCAB, 60)


@pytest.fixture(scope="module", params=slow_unless({"qwen2_moe"}, list(MIXTURES)))
def architecture(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def source(architecture: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp(architecture) / "reference"
    tiny_model(architecture).save_pretrained(folder)
    write_tokenizer(folder)
    return folder


@pytest.mark.parametrize("name", MIXTURES)
def test_each_expert_is_read_as_it_is_stored_and_computes_the_same(name: str, tmp_path: Path) -> None:
    model = tiny_model(name)
    model.save_pretrained(tmp_path)
    copy = Copy.load(tmp_path)
    with torch.inference_mode():
        expected = model(input_ids=torch.from_numpy(IDS)[None]).logits[0].numpy()
    np.testing.assert_allclose(copy.logits(IDS), expected, rtol=1e-5, atol=1e-5)
    assert set(copy.skeleton.places) == Checkpoint(tmp_path, "x").names
    assert sum(map(is_expert, copy.linears)) == 2 * 6 * 3
    assert len(routers(copy.model)) == 2


def test_compressed_experts_are_packed_and_routers_stay_dense(architecture: str, source: Path, tmp_path: Path) -> None:
    compress(source, tmp_path / "out", "w4a16")
    config = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    written = Checkpoint(tmp_path / "out", "x")
    assert sum(map(is_expert, written.quantized)) == 2 * 6 * 3
    skeleton = Source.open(source).skeleton
    assert set(routers(skeleton.model)) <= set(config["ignore"])
    assert ("model.layers.0.mlp.shared_expert_gate" in config["ignore"]) == (architecture == "qwen2_moe")
    # As transformers computes with the same weights, stored dense.
    weights = load_file(source / "model.safetensors")
    weights |= {f"{name}.weight": written.weight(name) for name in written.quantized}
    shutil.copytree(source, tmp_path / "dense")
    save_file(weights, tmp_path / "dense" / "model.safetensors", {"format": "pt"})
    dense = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "dense").eval()
    with torch.inference_mode():
        expected = dense(input_ids=torch.from_numpy(IDS)[None]).logits[0].numpy()
    np.testing.assert_allclose(Copy.load(tmp_path / "out").logits(IDS), expected, rtol=1e-4, atol=1e-4)


def test_error_compensation_leaves_what_no_text_reached_rounded_to_nearest(
    architecture: str, source: Path, tmp_path: Path
) -> None:
    """One short text reaches two experts a token; the others have no second moments."""
    shapes = Source.open(source).shapes
    method = Calibrated(dict.fromkeys(shapes, WeightFormat(4, 32)), Calibration("gptq", None, True))
    compress_with(source, tmp_path / "out", method, [IDS[:3]])
    compress_with(source, tmp_path / "nearest", method, [IDS])
    few, many = (Checkpoint(tmp_path / name, "x") for name in ("out", "nearest"))
    differ = {name for name in shapes if not torch.equal(few.weight(name), many.weight(name))}
    assert any(map(is_expert, differ))
    assert all(bool(few.weight(name).isfinite().all()) for name in shapes)


def test_adapters_correct_attention_and_shared_parts(architecture: str, source: Path, tmp_path: Path) -> None:
    compress(source, tmp_path / "out", "w4a16")
    pair = CheckpointPair.open(source, tmp_path / "out")
    texts = random_texts(12, seed=3)
    built = build(pair, texts, BuildOptions(rank=16))
    assert not any(map(is_expert, built.layers))
    (note,) = built.report["notes"]
    assert note.startswith(f"{2 * 6 * 3} layers of experts that a router chooses are not corrected; vLLM's CPU build")
    assert {"q_proj", "o_proj"} <= {name.rpartition(".")[2] for name in built.layers}
    assert any("shared_expert." in name for name in built.layers) == (architecture == "qwen2_moe")
    _, distances = judged(pair, built, random_texts(4, seed=4))
    assert distances.after.kl.mean() < distances.before.kl.mean()


@pytest.fixture(scope="module")
def rerouted(architecture: str, source: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The report of a pair whose routers differ, and nothing else."""
    pair = TinyPair.in_folder(tmp_path_factory.mktemp(f"{architecture}-doctor"))
    for folder in (pair.reference, pair.compressed):
        shutil.copytree(source, folder)
    weights = load_file(pair.compressed / "model.safetensors")
    for name in weights:
        if name.endswith((".mlp.gate.weight", ".block_sparse_moe.gate.weight")):
            weights[name] = weights[name] + 0.1 * torch.randn(weights[name].shape, generator=torch.manual_seed(2))
    save_file(weights, pair.compressed / "model.safetensors", {"format": "pt"})
    return report_of(pair.options(layer_tokens=24), pair.prompts.parent)


def test_the_doctor_reports_what_other_choices_of_experts_cost(rerouted: dict[str, Any]) -> None:
    routing = rerouted["routing"]
    assert routing["mean_kld"] > 0.0
    # Only routers differ: with the reference's choices it is the reference.
    assert routing["won_nats"] == pytest.approx(routing["mean_kld"], rel=1e-3)
    assert len(routing["layers"]) == 2
    for row in routing["layers"]:
        assert (row["experts"], row["per_token"]) == (6, 2)
        assert 0.0 < row["same"] < 1.0
        assert row["same"] <= row["shared"] < 1.0
        for model in ("reference", "compressed"):
            assert sum(row["loads"][model]) == pytest.approx(1.0)
            unreached = [n for n, load in enumerate(row["loads"][model]) if load == 0.0]
            assert row["unreached"][model] == {"experts": len(unreached), "first": unreached}
    (text,) = [
        finding["text"]
        for finding in rerouted["findings"]
        if finding["unit"] == "nats" and finding["topic"] == "routing"
    ]
    assert "chooses the same 2 of 6 experts" in text


def test_models_that_have_not_as_many_experts_have_no_routing_to_compare() -> None:
    def model(experts: int) -> Any:
        stored = SimpleNamespace(gate_up_proj=torch.zeros(experts, 4, 4), down_proj=torch.zeros(experts, 4, 2))
        return torch.nn.Sequential(Experts(stored, ("gate_proj", "up_proj", "down_proj")))

    pair: Any = SimpleNamespace(reference_model=model(4), compressed_model=model(3))
    assert routing_report(pair, []) == {"layers": []}


def test_experts_of_another_form_are_refused_in_one_line() -> None:
    config = transformers.GptOssConfig(
        num_hidden_layers=1, num_local_experts=4, hidden_size=64, intermediate_size=64, num_attention_heads=4,
        num_key_value_heads=2, head_dim=16, vocab_size=VOCAB,
    )  # fmt: skip
    with pytest.raises(AdaptError, match=r"^X: the experts of gpt_oss have biases, no gate, or transposed"):
        Skeleton(config, torch.float32, torch.device("cpu"), "X")
