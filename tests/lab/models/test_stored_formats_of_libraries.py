"""What we read is, to the last bit, what the formats' own libraries, transformers' and vLLM's code dequantize."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("compressed_tensors")
pytest.importorskip("transformers")

from safetensors import safe_open  # noqa: E402
from safetensors.torch import save_file  # noqa: E402
from tests.support.stored_formats import LAYERS, Layer, fp4, fp8, gptq  # noqa: E402

from hemostat_lab.demo import vllm_server  # noqa: E402
from hemostat_lab.models.checkpoint import Checkpoint  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning", "ignore::FutureWarning")

NAME = "model.layers.0.mlp.up_proj"


def read(layer: Layer, folder: Path) -> Any:
    save_file({f"{NAME}.{part}": tensor for part, tensor in layer.parts.items()}, folder / "a.safetensors")
    config = {"model_type": "llama", "quantization_config": dict(layer.quantization)}
    (folder / "config.json").write_text(json.dumps(config))
    return Checkpoint(folder, "COMPRESSED").weight(NAME)


with safe_open(Path(__file__).parent / "golden" / "tools.safetensors", "pt") as golden:
    MADE_BY_TOOLS = {json.loads(text)["made_by"]: (number, text) for number, text in golden.metadata().items()}


@pytest.mark.parametrize("made_by", sorted(MADE_BY_TOOLS))
def test_as_the_tool_that_wrote_it(made_by: str, tmp_path: Path) -> None:
    """The first outputs of a layer as real tools wrote it, and the digest of the weights that they dequantize it to
    (`tests/bench/formats/tools.py`). The sum with 0 makes every zero positive."""
    number, text = MADE_BY_TOOLS[made_by]
    known = json.loads(text)
    with safe_open(Path(__file__).parent / "golden" / "tools.safetensors", "pt") as file:
        parts = {n.partition(".")[2]: file.get_tensor(n) for n in file.keys() if n.startswith(f"{number}.")}  # noqa: SIM118
    weight = read(Layer(known["quantization"], parts, torch.empty(0)), tmp_path)
    same = (weight.to(getattr(torch, known["dtype"])) + 0.0).view(torch.uint8).numpy().tobytes()
    assert hashlib.sha256(same).hexdigest() == known["sha256"]


def by_compressed_tensors(layer: Layer) -> Any:
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.quantization import QuantizationConfig

    known = {k: v for k, v in layer.quantization.items() if k in QuantizationConfig.model_fields}
    scheme = QuantizationConfig.model_validate(known).config_groups["group_0"]
    compressor = BaseCompressor.get_value_from_registry(str(layer.quantization["format"]))
    return compressor.decompress(dict(layer.parts), scheme)["weight"]


def by_transformers_fp8(layer: Layer) -> Any:
    from transformers.integrations.finegrained_fp8 import Fp8Dequantize

    scale = layer.parts.get("weight_scale_inv", layer.parts.get("weight_scale"))
    assert scale is not None
    return Fp8Dequantize(None)._dequantize_one(layer.parts["weight"], scale, torch.float32)


def by_transformers_mxfp4(layer: Layer) -> Any:
    """Of GPT-OSS, whose experts are stored as blocks of bytes."""
    from transformers.integrations.mxfp4 import _convert_moe_packed_tensors

    scales = layer.parts["weight_scale"]
    blocks = layer.parts["weight"].reshape(1, *scales.shape, 16)
    return _convert_moe_packed_tensors(blocks, scales[None], dtype=torch.float32)[0].T


OF_LIBRARIES: Mapping[str, tuple[Layer, Callable[[Layer], Any]]] = {
    "NVFP4, compressed-tensors": (fp4("nvfp4", "compressed-tensors"), by_compressed_tensors),
    "MXFP4, compressed-tensors": (fp4("mxfp4", "compressed-tensors"), by_compressed_tensors),
    "MXFP4, transformers": (fp4("mxfp4", "modelopt"), by_transformers_mxfp4),
    "FP8, one scale, transformers": (fp8("tensor"), by_transformers_fp8),
    "FP8, channels, transformers": (fp8("channel"), by_transformers_fp8),
    "FP8, blocks, transformers": (fp8("block", block=(32, 64)), by_transformers_fp8),
}


@pytest.mark.parametrize("name", OF_LIBRARIES)
def test_as_the_library_dequantizes(name: str, tmp_path: Path) -> None:
    layer, oracle = OF_LIBRARIES[name]
    expected = oracle(layer)
    weight = read(layer, tmp_path)
    assert weight.dtype == torch.float32
    assert torch.equal(weight.to(expected.dtype), expected)


def by_vllm_gptq(layer: Layer) -> Any:
    from vllm.model_executor.layers.quantization.utils.quant_utils import unpack_quantized_values_into_int32
    from vllm.scalar_type import scalar_types

    kind = {4: scalar_types.uint4b8, 8: scalar_types.uint8b128}[layer.quantization["bits"]]
    steps = unpack_quantized_values_into_int32(layer.parts["qweight"], kind, 0) - kind.bias
    size = layer.quantization["group_size"]
    return (steps * layer.parts["scales"].float().repeat_interleave(size, 0)).T


def by_vllm_awq(layer: Layer) -> Any:
    """vLLM turns the tensors into GPTQ's layout when it loads them."""
    from vllm.model_executor.layers.quantization.auto_awq import _convert_awq_to_standard_format
    from vllm.model_executor.layers.quantization.utils.quant_utils import unpack_quantized_values_into_int32
    from vllm.scalar_type import scalar_types

    converted: Any = SimpleNamespace(**{k: torch.nn.Parameter(v, False) for k, v in layer.parts.items()})
    _convert_awq_to_standard_format(converted, "qweight", "qzeros", 4)
    steps = unpack_quantized_values_into_int32(converted.qweight.data, scalar_types.uint4, 0)
    zeros = unpack_quantized_values_into_int32(converted.qzeros.data, scalar_types.uint4, 0).T
    size = layer.quantization["group_size"]
    return ((steps - zeros.repeat_interleave(size, 0)) * layer.parts["scales"].float().repeat_interleave(size, 0)).T


def by_vllm_fp8(layer: Layer) -> Any:
    from vllm.model_executor.layers.quantization.utils.quant_utils import GroupShape, scaled_dequantize

    block = layer.quantization.get("weight_block_size")
    scale = layer.parts["weight_scale_inv" if block else "weight_scale"]
    return scaled_dequantize(layer.parts["weight"], scale, GroupShape(*block) if block else None)


def by_vllm_nvfp4(layer: Layer) -> Any:
    from vllm.model_executor.layers.quantization.utils.nvfp4_emulation_utils import dequantize_to_dtype

    parts = layer.parts
    return dequantize_to_dtype(
        parts["weight"], parts["weight_scale"], parts["weight_scale_2"], torch.float32, swizzle=False
    )


@pytest.mark.vllm
@pytest.mark.skipif(not vllm_server.installed(), reason="vLLM is not installed")
def test_as_vllm_dequantizes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One test: importing vLLM takes longer than all of them."""
    from vllm.model_executor import parameter

    for name, value in (("get_tensor_model_parallel_rank", 0), ("get_tensor_model_parallel_world_size", 1)):
        monkeypatch.setattr(parameter, name, lambda value=value: value)
    oracles = {
        "GPTQ, 4 bits": by_vllm_gptq,
        "GPTQ, 8 bits": by_vllm_gptq,
        "AWQ": by_vllm_awq,
        "FP8, one scale": by_vllm_fp8,
        "NVFP4, modelopt": by_vllm_nvfp4,
    }
    layers = {name: (LAYERS[name](7), oracle) for name, oracle in oracles.items()}
    layers["GPTQ, 8 bits in groups of 64"] = gptq(8, 64), by_vllm_gptq
    layers["FP8, blocks"] = fp8("block", block=(32, 64)), by_vllm_fp8
    layers["FP8, channels"] = fp8("channel"), by_vllm_fp8
    for n, (name, (layer, oracle)) in enumerate(layers.items()):
        folder = tmp_path / str(n)
        folder.mkdir()
        assert torch.equal(read(layer, folder), oracle(layer).contiguous()), name


@pytest.mark.vllm
@pytest.mark.skipif(not vllm_server.installed(), reason="vLLM is not installed")
def test_what_vllms_cpu_build_serves_and_refuses() -> None:
    """The lines of docs/lab/formats.md, by its own code."""
    from vllm.model_executor.kernels import linear
    from vllm.model_executor.layers.quantization.auto_gptq import AutoGPTQConfig
    from vllm.scalar_type import scalar_types

    def kernel(kind: Any, zero_points: bool) -> str:
        shape = (576, 576)
        config = linear.MPLinearLayerConfig(shape, shape, kind, torch.bfloat16, 64, zero_points)
        return str(linear.choose_mp_linear_kernel(config).__name__)

    def gptq_config(**changed: Any) -> Any:
        return AutoGPTQConfig.from_config({**gptq().quantization, **changed})

    gptq_config()
    assert kernel(scalar_types.uint4b8, False) == "CPUWNA16LinearKernel"
    assert kernel(scalar_types.uint4, True) == "CPUWNA16LinearKernel"
    with pytest.raises(ValueError, match="Unsupported quantization config: bits=4, sym=False"):
        gptq_config(sym=False)
    with pytest.raises(ValueError, match="Unsupported quantization config: bits=3, sym=True"):
        gptq_config(bits=3)
    with pytest.raises(ValueError, match=r"activation ordering \(desc_act=True\) is no longer supported"):
        gptq_config(desc_act=True)
    for kind, start in (
        ("WNA16", lambda: kernel(scalar_types.uint8b128, False)),
        ("NVFP4", linear.init_nvfp4_linear_kernel),
        ("MXFP4", linear.init_mxfp4_linear_kernel),
    ):
        with pytest.raises(ValueError, match=f"Failed to find a kernel that can implement the {kind} linear layer"):
            start()


@pytest.mark.vllm
@pytest.mark.skipif(not vllm_server.installed(), reason="vLLM is not installed")
def test_with_lora_vllms_cpu_build_has_no_kernel_for_experts() -> None:
    """Why adapters leave experts out: with LoRA, vLLM chooses a kernel in Triton, whatever the platform, and then ends
    at the first request (`tests/lab/compression/test_in_vllm.py`)."""
    from vllm.model_executor.layers.fused_moe.oracle.unquantized import select_unquantized_moe_backend
    from vllm.platforms import current_platform
    from vllm.triton_utils import HAS_TRITON

    config: Any = SimpleNamespace(is_lora_enabled=True, intermediate_size_per_partition=128)
    backend, kernel = select_unquantized_moe_backend(config)
    assert current_platform.is_cpu()
    assert not HAS_TRITON
    assert backend.name == "TRITON"
    assert kernel is not None
    assert kernel.supports_lora()
    assert not kernel._supports_current_device()
