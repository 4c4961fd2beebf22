"""Tiny checkpoints by real quantization tools, and the weights that each tool itself dequantizes them to.

Run in an environment of the tool, on a CPU: PYTHON tests/bench/formats/tools.py TOOL MODEL OUT. The tools and their
versions: docs/formats.md. `tests/lab/models/golden/tools.safetensors` holds the first 32 outputs of one layer of each.
"""
# mypy: ignore-errors

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

TOKENS = [torch.randint(0, 97, (1, 64), generator=torch.Generator().manual_seed(n)) for n in range(32)]


def gptqmodel(model: str, out: Path) -> None:
    os.cpu_count = lambda: 8  # its thread pools do not start on two cores
    from gptqmodel import BACKEND, GPTQModel, QuantizeConfig
    from gptqmodel.quantization import FORMAT, METHOD

    second = {"group_size": 32, "sym": False, "format": FORMAT.GPTQ_V2}
    cases = {
        "gptq": {"bits": 4, "group_size": 32},
        "gptq_asymmetric": {"bits": 4, "group_size": 32, "sym": False, "desc_act": False},
        "gptq_act_order": {"bits": 4, "desc_act": True, **second},
        "gptq_3_bits": {"bits": 3, "desc_act": False, **second},
        "gptq_2_bits": {"bits": 2, "desc_act": False, **second},
        "gptq_8_bits": {"bits": 8, "group_size": 64, "desc_act": False},
        "awq": {"bits": 4, "group_size": 32, "method": METHOD.AWQ, "format": FORMAT.GEMM},
    }
    texts = [{"input_ids": ids, "attention_mask": torch.ones_like(ids)} for ids in TOKENS]
    for name, config in cases.items():
        made = GPTQModel.load(model, QuantizeConfig(device="cpu", **config))
        made.quantize(texts, batch_size=1)
        made.save(str(out / name))
        backend = BACKEND.TORCH_AWQ if name == "awq" else BACKEND.TORCH
        # In float16, the type of the scales: in bfloat16 they would be rounded first.
        loaded = GPTQModel.load(str(out / name), device="cpu", dtype=torch.float16, backend=backend)
        layers = {n: m for n, m in loaded.model.named_modules() if hasattr(m, "qweight")}
        keep(out, name, {n: through(m) if name == "awq" else m.dequantize_weight().T for n, m in layers.items()})


def auto_round(model: str, out: Path) -> None:
    import transformers
    from auto_round import AutoRound

    cases = {"gptq": ({"bits": 4, "sym": True}, "auto_gptq"), "own_2_bits": ({"bits": 2, "sym": False}, "auto_round")}
    for name, (config, written) in cases.items():
        whole = transformers.AutoModelForCausalLM.from_pretrained(model, dtype=torch.bfloat16)
        tokenizer = transformers.AutoTokenizer.from_pretrained(model)
        made = AutoRound(whole, tokenizer, group_size=32, iters=0, disable_opt_rtn=True, device_map="cpu", **config)
        made.quantize_and_save(output_dir=str(out / name), format=written)
        folder = str(next((out / name).rglob("config.json")).parent)
        if name == "gptq":
            # Else transformers asks for another package; the tensors are read as they are.
            own = json.loads(Path(folder, "config.json").read_text())
            own["quantization_config"] |= {"quant_method": "auto-round", "packing_format": "auto_round:auto_gptq"}
            Path(folder, "config.json").write_text(json.dumps(own))
        loaded = transformers.AutoModelForCausalLM.from_pretrained(folder, device_map="cpu", dtype=torch.float16)
        layers = {n: m for n, m in loaded.named_modules() if hasattr(m, "qweight")}
        keep(out, name, {n: through(m) for n, m in layers.items()})


def modelopt(model: str, out: Path) -> None:
    import modelopt.torch.quantization as mtq
    import transformers
    from modelopt.torch.export import export_hf_checkpoint
    from modelopt.torch.quantization.qtensor import FP8QTensor, MXFP4QTensor, NVFP4QTensor

    cases = {
        "nvfp4": (mtq.NVFP4_DEFAULT_CFG, NVFP4QTensor, {-1: 16}),
        "mxfp4": (mtq.MXFP4_DEFAULT_CFG, MXFP4QTensor, {-1: 32}),
        "fp8": (mtq.FP8_DEFAULT_CFG, FP8QTensor, None),
        "fp8_channels": (mtq.FP8_PER_CHANNEL_PER_TOKEN_CFG, FP8QTensor, None),
        "fp8_blocks": (mtq.FP8_2D_BLOCKWISE_WEIGHT_ONLY_CFG, FP8QTensor, {-1: 128, -2: 128}),
    }
    for name, (config, kind, sizes) in cases.items():
        whole = transformers.AutoModelForCausalLM.from_pretrained(model, dtype=torch.bfloat16)
        with torch.inference_mode():
            made = mtq.quantize(whole, config, lambda model: [model(ids) for ids in TOKENS])
            export_hf_checkpoint(made, export_dir=str(out / name))
        stored, weights = load_file(out / name / "model.safetensors"), {}
        for module in sorted(key.removesuffix(".weight_scale") for key in stored if key.endswith(".weight_scale")):
            data, scale = stored[f"{module}.weight"], stored[f"{module}.weight_scale"]
            more = {"block_sizes": sizes} if sizes else {}
            if f"{module}.weight_scale_2" in stored:
                more["double_scale"] = stored[f"{module}.weight_scale_2"]
            scale = scale.reshape(len(scale), -1) if scale.ndim in (1, 4) else scale
            shape = torch.Size((len(data), data.shape[1] * (2 if data.dtype == torch.uint8 else 1)))
            weights[module] = kind(shape, torch.float32, data).dequantize(dtype=torch.float32, scale=scale, **more)
        keep(out, name, weights)


def llmcompressor(model: str, out: Path) -> None:
    import datasets
    import transformers
    from compressed_tensors.compressors import BaseCompressor
    from llmcompressor import oneshot
    from llmcompressor.modifiers.quantization import QuantizationModifier

    rows = [{"input_ids": ids[0].tolist(), "attention_mask": [1] * ids.shape[1]} for ids in TOKENS]
    texts = {"dataset": datasets.Dataset.from_list(rows), "num_calibration_samples": len(rows), "max_seq_length": 64}
    for name in ("NVFP4", "NVFP4A16", "MXFP4", "MXFP4A16", "FP8", "FP8_BLOCK", "FP8_DYNAMIC"):
        made = transformers.AutoModelForCausalLM.from_pretrained(model, dtype=torch.bfloat16)
        recipe = QuantizationModifier(targets="Linear", scheme=name, ignore=["lm_head"])
        oneshot(model=made, recipe=recipe, **(texts if name in ("NVFP4", "FP8") else {}))
        schemes = {n: m.quantization_scheme for n, m in made.named_modules() if hasattr(m, "quantization_scheme")}
        made.save_pretrained(out / name, save_compressed=True)
        stored, weights = load_file(out / name / "model.safetensors"), {}
        for module in sorted(key.removesuffix(".weight_scale") for key in stored if key.endswith(".weight_scale")):
            parts = {k.rpartition(".")[2]: v for k, v in stored.items() if k.rpartition(".")[0] == module}
            written = getattr(schemes[module].format, "value", schemes[module].format)
            compressor = BaseCompressor.get_value_from_registry(written)
            weights[module] = compressor.decompress(parts, schemes[module])["weight"]
        keep(out, name, weights)


def through(module: torch.nn.Module) -> torch.Tensor:
    """The weight of a layer, from its outputs for the unit vectors."""
    size = getattr(module, "in_features", None) or module.infeatures
    with torch.inference_mode():
        return module(torch.eye(size, dtype=torch.float16)).T


def keep(out: Path, name: str, weights: dict[str, torch.Tensor]) -> None:
    save_file({n: w.detach().clone().contiguous() for n, w in weights.items()}, out / f"{name}.safetensors")


if __name__ == "__main__":
    tool, source, folder = sys.argv[1:]
    Path(folder).mkdir(parents=True, exist_ok=True)
    {"gptqmodel": gptqmodel, "auto_round": auto_round, "modelopt": modelopt, "llmcompressor": llmcompressor}[tool](
        source, Path(folder)
    )
