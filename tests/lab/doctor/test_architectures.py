"""`compress` and `doctor` on tiny random models of other architectures than Llama's."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tests.support.doctor import TinyPair, report_of, write_tokenizer

from hemostat_calibration.errors import HemostatError
from hemostat_lab.compression.checkpoint_writer import compress
from hemostat_lab.doctor import run
from hemostat_lab.doctor.options import DoctorError
from hemostat_lab.doctor.pair import encode
from hemostat_lab.doctor.prompts import load

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
pytest.importorskip("compressed_tensors")

from tests.support.slow import slow_unless  # noqa: E402
from tests.support.tiny_models import tiny_model  # noqa: E402

from hemostat_lab.doctor.checkpoints import CheckpointPair  # noqa: E402
from hemostat_lab.models.checkpoint import Checkpoint  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning", "ignore::FutureWarning")

ARCHITECTURES = ("gemma2", "gemma3", "mamba", "falcon_mamba", "mamba2")
DENSE_LAYERS = {"mamba": ("dt_proj",), "falcon_mamba": ("dt_proj",)}
"""Linear layers whose weight the model's code uses without calling them."""


@pytest.fixture(scope="module", params=slow_unless({"gemma2", "falcon_mamba"}, ARCHITECTURES))
def architecture(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def tiny(architecture: str, tmp_path_factory: pytest.TempPathFactory) -> TinyPair:
    """The compressed model is W4A16."""
    pair = TinyPair.in_folder(tmp_path_factory.mktemp(architecture))
    tiny_model(architecture).save_pretrained(pair.reference)
    write_tokenizer(pair.reference)
    compress(pair.reference, pair.compressed, "w4a16")
    return pair


def plain_models(tiny: TinyPair) -> tuple[Any, Any]:
    """The reference, and the same with the weights that the compressed checkpoint stores."""
    models = [transformers.AutoModelForCausalLM.from_pretrained(tiny.reference).eval() for _ in range(2)]
    stored = Checkpoint(tiny.compressed, "COMPRESSED")
    for name, module in models[1].named_modules():
        if stored.is_quantized(name):
            module.weight.data.copy_(stored.weight(name))
    return models[0], models[1]


def logprobs(model: Any, prompt: list[int], output: list[int]) -> Any:
    """float64 [T, V], in one plain call."""
    with torch.inference_mode():
        logits = model(torch.tensor([[*prompt, *output]]), use_cache=False).logits[0].double()
    return torch.log_softmax(logits[len(prompt) - 1 : -1], -1).numpy()


def test_every_other_linear_layer_is_packed(architecture: str, tiny: TinyPair) -> None:
    from safetensors.torch import load_file

    reference, compressed = (load_file(f / "model.safetensors") for f in (tiny.reference, tiny.compressed))
    packed = {name.removesuffix("_packed") for name in compressed if name.endswith("_packed")}
    left = reference.keys() & compressed.keys()
    assert packed == reference.keys() - left
    assert all(torch.equal(reference[name], compressed[name]) for name in left)
    dense = DENSE_LAYERS.get(architecture, ())
    assert {n for n in packed if n.endswith("_proj.weight")} == packed
    assert {name for name in left if name.endswith("_proj.weight")} == {
        name for name in reference if name.endswith(tuple(f"{layer}.weight" for layer in dense))
    }  # fmt: skip
    ignored = json.loads((tiny.compressed / "config.json").read_text())["quantization_config"]["ignore"]
    assert {name.rpartition(".")[2] for name in ignored} == {"lm_head", *dense}


def test_figures_and_generated_texts(tiny: TinyPair) -> None:
    """A text is that of its prompt alone; a figure is that of one plain call of each model."""
    pair = CheckpointPair(tiny.options())
    jobs = encode(pair, load(tiny.prompts, None), tiny.options())
    scored = pair.score(jobs, 0, False)
    models = plain_models(tiny)
    for job, text in zip(jobs, scored, strict=True):
        assert pair.score([job], 0, False)[0].output.tolist() == text.output.tolist()
        r, c = (logprobs(model, job.prompt.tolist(), text.output.tolist()) for model in models)
        np.testing.assert_allclose(text.figures["kl_rc"], (np.exp(r) * (r - c)).sum(1), rtol=1e-3, atol=1e-5)
        assert text.figures["same_top"].tolist() == (r.argmax(1) == c.argmax(1)).tolist()
        assert text.figures["floor_kl"].max() < 1e-6
    assert np.concatenate([text.figures["kl_rc"] for text in scored]).mean() > 1e-4


def test_report(tiny: TinyPair, tmp_path: Path) -> None:
    report = report_of(tiny.options(), tmp_path)
    restored = {row["name"]: row["won_nats"] for row in report["layers"]["restored"]}
    assert {"layer 0", "layer 1"} <= restored.keys()
    distances = report["layers"]["distances"]
    assert all(row[key] > 1e-4 for row in distances for key in ("accumulated", "alone"))


@pytest.mark.parametrize("architecture", ["mamba"], indirect=True)
def test_a_damaged_checkpoint_is_one_line(tiny: TinyPair, tmp_path: Path) -> None:
    """Truncated, encrypted (random bytes), or without a tensor: transformers would use random weights for that."""
    from safetensors.torch import load_file, save_file

    weights = (tiny.reference / "model.safetensors").read_bytes()
    state = load_file(tiny.reference / "model.safetensors")
    missing = sorted(name for name in state if name.endswith("out_proj.weight"))[0]
    del state[missing]
    for content, message in (
        (weights[:-100], r"REFERENCE: \S+ cannot be loaded: SafetensorError: .*"),
        (np.random.default_rng(0).bytes(4096), r"REFERENCE: \S+ cannot be loaded: SafetensorError: .*"),
        (None, rf"REFERENCE: \S+: there is no tensor {missing}; copy the checkpoint again"),
    ):
        folder = tmp_path / "damaged"
        tiny_folder = {path.name: path.read_bytes() for path in tiny.reference.iterdir()}
        folder.mkdir(exist_ok=True)
        for name, data in tiny_folder.items():
            (folder / name).write_bytes(data)
        if content is None:
            save_file(state, folder / "model.safetensors", {"format": "pt"})
        else:
            (folder / "model.safetensors").write_bytes(content)
        with pytest.raises(DoctorError, match=message) as raised:
            run(replace(tiny.options(), reference=str(folder)))
        assert "\n" not in str(raised.value)


def test_encoder_decoder_models_are_refused(tmp_path: Path) -> None:
    """transformers would load BART's decoder alone as a causal model."""
    config = transformers.BartConfig(
        vocab_size=320, d_model=32, encoder_layers=1, decoder_layers=1, encoder_ffn_dim=32, decoder_ffn_dim=32,
        encoder_attention_heads=2, decoder_attention_heads=2, max_position_embeddings=64,
    )  # fmt: skip
    folder = tmp_path / "bart"
    transformers.BartForConditionalGeneration(config).save_pretrained(folder)
    write_tokenizer(folder)
    pair = TinyPair.in_folder(tmp_path)
    refusal = "bart is an encoder-decoder architecture; only decoder-only language models are supported"
    with pytest.raises(DoctorError, match=f"^REFERENCE: .*{refusal}$"):
        run(replace(pair.options(), reference=str(folder), compressed=str(folder)))
    with pytest.raises(HemostatError, match=refusal):
        compress(folder, tmp_path / "out", "w4a16")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("architecture", ["gemma3"], indirect=True)
def test_base_models_get_the_contents_of_hemostats_own_prompts(tiny: TinyPair, tmp_path: Path) -> None:
    """Without a chat template. Messages in a user's file are an error that names the line."""
    pair = TinyPair(tmp_path / "reference", tmp_path / "compressed", tiny.prompts)
    for source, folder in ((tiny.reference, pair.reference), (tiny.compressed, pair.compressed)):
        shutil.copytree(source, folder)
        (folder / "chat_template.jinja").unlink()
    opened = CheckpointPair(pair.options(prompts=None))
    (prompt,) = load(None, 1)
    assert prompt.messages is not None
    tokenizer = transformers.AutoTokenizer.from_pretrained(pair.reference)
    assert opened.tokenize(prompt) == tokenizer.encode(prompt.messages[0]["content"])
    assert [note for note in opened.notes if "chat template" in note] == opened.notes
    with pytest.raises(
        DoctorError, match=r"jsonl:2: neither model has a chat template; give prompt instead of messages"
    ):
        encode(CheckpointPair(pair.options()), load(tiny.prompts, None), pair.options())


def test_a_model_without_a_state_has_no_noise_floor(tmp_path: Path) -> None:
    """GPT has no KV cache, so it cannot read a text in two pieces: the report is made without it."""
    pair = TinyPair.in_folder(tmp_path)
    vocabulary = write_tokenizer(pair.reference, pair.compressed)
    torch.manual_seed(0)
    config = transformers.OpenAIGPTConfig(vocab_size=vocabulary, n_positions=64, n_embd=32, n_layer=2, n_head=2)
    model = transformers.OpenAIGPTLMHeadModel(config)
    model.save_pretrained(pair.reference)
    with torch.no_grad():
        for weights in model.transformer.h[1].parameters():
            weights.add_(torch.randn_like(weights), alpha=0.01)
    model.save_pretrained(pair.compressed)
    pair.prompts.write_text('{"prompt": "two", "completion": " spaces and a def"}\n' * 3)
    report = report_of(pair.options(), tmp_path)
    assert report["layers"]["noise_floor"] is None
    assert not any("noise floor" in row["name"] for row in report["divergence"])
    assert {row["name"] for row in report["layers"]["restored"] if row["kind"] == "layer"} == {"layer 1"}
