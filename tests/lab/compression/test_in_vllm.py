"""A real vLLM loads what is written, and computes what our own copy of the checkpoint computes."""

from __future__ import annotations

import json
import shutil
import urllib.error
import urllib.request
from pathlib import Path

import numpy as np
import pytest
import tokenizers
import transformers
from safetensors.torch import save_file
from tests.support.adapter_models import VOCABULARY, random_texts, save, tiny_model

from hemostat_lab.compression.calibrated import CALIBRATIONS, Calibrated, planned
from hemostat_lab.compression.checkpoint_writer import BuildEnvironment, compress_with
from hemostat_lab.compression.formats import WeightFormat
from hemostat_lab.compression.frame import Method, Source
from hemostat_lab.compression.methods import without_texts
from hemostat_lab.compression.plan import LayerPlan, Plan, stored_bytes
from hemostat_lab.demo import vllm_server
from hemostat_lab.models.copies import Copy, Floats

pytestmark = [
    pytest.mark.vllm,
    pytest.mark.slow,  # a server for each format
    pytest.mark.timeout(900),
    pytest.mark.skipif(not vllm_server.installed(), reason="vLLM is not installed"),
]

FORMATS = {
    "w4a16, groups of 32": WeightFormat(4, 32),
    "w4a16, groups of 64": WeightFormat(4, 64),
    "w4a16, channels": WeightFormat(4),
    "w4a16_gptq": WeightFormat(4, 64, layout="gptq"),
    "w4a16_awq": WeightFormat(4, 64, layout="awq"),
    "w8a8": WeightFormat(8, inputs="int8"),
    "fp8": WeightFormat(8, None, "float", "fp8"),
}
MIXED = "4 bits in groups of three sizes, and dense layers"
WIDTHS = {"hidden_size": 576, "intermediate_size": 1536, "num_attention_heads": 9, "num_key_value_heads": 3}
"""Of SmolLM2-135M."""
HEAD = 32_768
"""Tokens of the vocabulary. vLLM 0.32's int4 kernel uses AMX without asking Linux for it, and dies by SIGILL unless
oneDNN has: it does for a dense layer of more than 1 MiB, such as the head of every real model."""
TOLERANCE = 0.05
"""Mean difference of logprobs in nats: both compute in bfloat16, in another order."""


def method(name: str, source: Source) -> Method:
    if name == "fp8":
        return without_texts(FORMATS[name])
    if name in FORMATS:
        calibration = CALIBRATIONS["smooth" if name == "w8a8" else "gptq"]
        return Calibrated(dict.fromkeys(source.shapes, FORMATS[name]), calibration)

    def chosen(layer: str) -> LayerPlan:
        if "layers.1" in layer:
            return LayerPlan(16) if "gate_proj" in layer or "up_proj" in layer else LayerPlan(4, 64)
        return LayerPlan(4, 32) if "self_attn" in layer else LayerPlan(4, 128 if "down_proj" in layer else 64)

    layers = {layer: chosen(layer) for layer in source.shapes}
    size = sum(stored_bytes(*shape, layers[layer]) for layer, shape in source.shapes.items())
    result, notes = planned(Plan(source.checkpoint.digest(), layers, size, {}), source, CALIBRATIONS["gptq"])
    assert notes == [], "everything is packed, or 16 bits"
    return result


def small_source(folder: Path, **changed: object) -> Path:
    """A random model with a tokenizer."""
    import torch

    widths = WIDTHS | {"num_hidden_layers": 2, "vocab_size": HEAD, "initializer_range": 0.04} | changed
    source = save(tiny_model(**widths).to(torch.bfloat16), folder)
    return with_tokenizer(source)


def with_tokenizer(source: Path) -> Path:
    words = tokenizers.models.WordLevel({str(n): n for n in range(VOCABULARY)}, unk_token="0")
    transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizers.Tokenizer(words)).save_pretrained(source)
    return source


def prompt_logprobs(checkpoint: Path, ids: list[int], log: Path, *more: str) -> Floats:
    """Of the tokens after the first one, by a vLLM that serves the checkpoint. VllmFailure where it does not."""
    arguments = ["--enforce-eager", "--dtype", "bfloat16", "--max-model-len", "128", *more]
    server = vllm_server.VllmServer(checkpoint, "tiny", log, arguments)
    try:
        server.start()
        server.wait_ready(800.0)
        body = {"model": "tiny", "prompt": ids, "max_tokens": 1, "prompt_logprobs": 0}
        request = urllib.request.Request(
            f"{server.url}/v1/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
        )
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        with opener.open(request, timeout=300) as answer:
            rows = json.loads(answer.read())["choices"][0]["prompt_logprobs"]
    finally:
        server.stop()
    return np.array([rows[n][str(ids[n])]["logprob"] for n in range(1, len(ids))])


@pytest.mark.parametrize("name", [*FORMATS, MIXED])
def test_vllm_computes_what_our_copy_computes(name: str, tmp_path: Path) -> None:
    source = small_source(tmp_path / "source")
    out = tmp_path / "out"
    texts = [text.ids for text in random_texts(8)]
    compress_with(
        source, out, method(name, Source.open(source)), texts, environment=BuildEnvironment(tmp_path / "work")
    )
    ids = np.concatenate(texts)[:100].tolist()
    theirs = prompt_logprobs(out, ids, tmp_path / "vllm.log")
    ours, dense = (Copy.load(folder).logprobs(ids) for folder in (out, source))
    # Where inputs are rounded at run time, a difference of one bit in bfloat16 may be rounded to another value.
    rounded_inputs = name in FORMATS and FORMATS[name].inputs != "exact"
    assert float(np.abs(theirs - ours).mean()) < (0.08 if rounded_inputs else TOLERANCE)
    assert float(np.abs(theirs - ours).mean()) < (0.8 if rounded_inputs else 0.5) * float(np.abs(dense - ours).mean())


def fp8_checkpoint(source: Path, out: Path, kind: str) -> None:
    """As other tools write E4M3. kind: `static`: a scale of the weight and one of the inputs; `modelopt`: the same in
    ModelOpt's spelling; `block`: a scale of each 128 by 128 weights."""
    import torch

    opened = Source.open(source)
    weights = {name: opened.checkpoint.tensor(f"{name}.weight").float() for name in opened.shapes}
    scale = max(weight.abs().max() for weight in weights.values()) / torch.finfo(torch.float8_e4m3fn).max
    state = {name: opened.checkpoint.tensor(name) for name in opened.checkpoint.names}
    for name, weight in weights.items():
        state[f"{name}.weight"] = (weight / scale).to(torch.float8_e4m3fn)
        if kind == "block":
            state[f"{name}.weight_scale_inv"] = scale.repeat(*(-(-width // 128) for width in weight.shape))
        else:
            state |= {f"{name}.weight_scale": scale.clone(), f"{name}.input_scale": torch.tensor(0.02)}
    shutil.copytree(source, out)
    save_file(state, out / "model.safetensors", {"format": "pt"})
    quantization: dict[str, object] = {"quant_method": "fp8", "activation_scheme": "static"}
    if kind == "block":
        quantization |= {"activation_scheme": "dynamic", "weight_block_size": [128, 128]}
    if kind == "modelopt":
        quantization = {"quant_method": "modelopt", "quant_algo": "FP8", "ignore": ["lm_head"]}
    config = json.loads((out / "config.json").read_text())
    (out / "config.json").write_text(json.dumps(config | {"quantization_config": quantization}))


BLOCK_WIDTHS = {"hidden_size": 512, "num_attention_heads": 8, "num_key_value_heads": 4}
"""Multiples of 128."""
without_amx = pytest.mark.skipif(
    "amx_tile" in Path("/proc/cpuinfo").read_text(), reason="with AMX vLLM has other kernels for 8 bits"
)
OTHERS_FP8 = {
    "static": "_C::static_scaled_fp8_quant() expected at most 0 argument(s) but received 4",
    "modelopt": "'_OpNamespace' '_C' object has no attribute 'silu_and_mul_quant'",
    "block": "CPUFp8BlockScaledMMKernel requires AMX tile support",
}
"""vLLM's lines: with `modelopt` it starts, and ends at the first request."""


@without_amx
@pytest.mark.parametrize("kind", OTHERS_FP8)
def test_without_amx_vllms_cpu_build_refuses_others_fp8(kind: str, tmp_path: Path) -> None:
    source, log = small_source(tmp_path / "source", num_hidden_layers=1, **BLOCK_WIDTHS), tmp_path / "vllm.log"
    fp8_checkpoint(source, tmp_path / "out", kind)
    assert Copy.load(tmp_path / "out").logprobs([1, 2, 3]).shape == (2,), "we read it"
    with pytest.raises((vllm_server.VllmFailure, OSError)):
        prompt_logprobs(tmp_path / "out", [1, 2, 3], log)
    assert OTHERS_FP8[kind] in log.read_text()


REFUSED = {
    "nvfp4": (WeightFormat(4, 16, "nvfp4"), {}, "MarlinNvFp4LinearKernel is not supported: Marlin FP4 not available"),
    "mxfp4": (WeightFormat(4, 32, "mxfp4"), {}, "Failed to find a kernel that can implement the MXFP4 linear layer"),
    "w8a16": (WeightFormat(8, 64), {}, "Failed to find a kernel that can implement the WNA16 linear layer"),
    "w8a16_gptq": (WeightFormat(8, 64, layout="gptq"), {}, "Marlin does not support weight_bits = uint8b128"),
    "act-order": (
        WeightFormat(4, 64, layout="gptq"), {"desc_act": True},
        "GPTQ group activation ordering (desc_act=True) is no longer supported",
    ),
    "asymmetric": (
        WeightFormat(4, 64, layout="gptq"), {"sym": False}, "Unsupported quantization config: bits=4, sym=False"
    ),
}  # fmt: skip
"""What is written, members of its configuration that are changed, and vLLM's line."""


@pytest.mark.parametrize("name", REFUSED)
def test_vllms_cpu_build_refuses(name: str, tmp_path: Path) -> None:
    weight_format, changed, line = REFUSED[name]
    source = small_source(tmp_path / "source", num_hidden_layers=1)
    out, log = tmp_path / "out", tmp_path / "vllm.log"
    compress_with(source, out, without_texts(weight_format))
    config = json.loads((out / "config.json").read_text())
    config["quantization_config"] |= changed
    (out / "config.json").write_text(json.dumps(config))
    assert Copy.load(out).logprobs([1, 2, 3]).shape == (2,), "we read it"
    with pytest.raises(vllm_server.VllmFailure):
        prompt_logprobs(out, [1, 2, 3], log)
    assert line in log.read_text()


@without_amx
def test_vllms_cpu_build_serves_no_w8a8_with_lora(tmp_path: Path) -> None:
    """oneDNN keeps the weights, and LoRA asks on which device they are. With AMX another kernel does not."""
    source, log = small_source(tmp_path / "source", num_hidden_layers=1), tmp_path / "vllm.log"
    compress_with(source, tmp_path / "out", without_texts(FORMATS["w8a8"]))
    with pytest.raises(vllm_server.VllmFailure):
        prompt_logprobs(tmp_path / "out", [1, 2, 3], log, "--enable-lora")
    assert "'NoneType' object has no attribute 'device'" in log.read_text()


MOE = {"hidden_size": 256, "num_hidden_layers": 1, "intermediate_size": 256, "moe_intermediate_size": 128}
MOE |= {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 64, "num_experts": 6, "num_experts_per_tok": 2}


@pytest.mark.parametrize("arguments", [[], ["--lora-target-modules", "q_proj", "k_proj", "v_proj", "o_proj"]])
def test_vllms_cpu_build_serves_no_mixture_of_experts_with_lora(arguments: list[str], tmp_path: Path) -> None:
    """Also where no adapter is loaded, and none may be on experts."""
    import torch

    config = transformers.Qwen3MoeConfig(**MOE, vocab_size=HEAD, max_position_embeddings=256)
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    source, log = with_tokenizer(save(model, tmp_path / "source")), tmp_path / "vllm.log"
    assert len(prompt_logprobs(source, [1, 2, 3], log)) == 2
    with pytest.raises((urllib.error.HTTPError, OSError)):
        prompt_logprobs(source, [1, 2, 3], log, "--enable-lora", *arguments)
    assert "module 'triton.language' has no attribute 'bfloat16'" in log.read_text()
