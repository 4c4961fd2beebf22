"""What a plan may hold is what vLLM has kernels for, by its own tables; and a plan of 4-bit floats is carried out."""

from __future__ import annotations

from typing import Any, get_args

import pytest

pytest.importorskip("torch")

from tests.support.adapter_models import random_texts, save, tiny_model

from hemostat_lab.compression.calibrated import CALIBRATIONS, planned
from hemostat_lab.compression.checkpoint_writer import compress_with
from hemostat_lab.compression.frame import Source
from hemostat_lab.compression.plan import LayerPlan, Plan, encode_plan, read_plan, stored_bytes
from hemostat_lab.demo import vllm_server
from hemostat_lab.doctor.options import Target
from hemostat_lab.doctor.prescription.candidates import candidates
from hemostat_lab.models.checkpoint import Checkpoint
from hemostat_lab.models.checkpoint_folders import CompressError


def kinds(target: Target) -> set[tuple[str, int]]:
    return {(plan.kind, plan.bits) for plan in candidates(target, 512) if plan.bits < 16}


@pytest.mark.vllm
@pytest.mark.slow  # importing vLLM
@pytest.mark.skipif(not vllm_server.installed(), reason="vLLM is not installed")
def test_every_candidate_has_a_kernel_in_vllms_tables() -> None:
    from vllm.model_executor.kernels import linear
    from vllm.model_executor.kernels.linear.mixed_precision import cpu, triton_w4a16, xpu
    from vllm.model_executor.layers.quantization.utils import marlin_utils
    from vllm.platforms import PlatformEnum
    from vllm.scalar_type import scalar_types

    int4, int8 = scalar_types.uint4b8, scalar_types.uint8b128
    of_family: dict[str, tuple[Any, str, Any]] = {
        "vllm-amd": (PlatformEnum.ROCM, "TritonW4A16LinearKernel", triton_w4a16.TRITON_W4A16_SUPPORTED_QUANT_TYPES),
        "vllm-intel": (PlatformEnum.XPU, "XPUwNa16LinearKernel", xpu._XPUWNA16_SUPPORTED_QUANT_TYPES),
        "vllm-cpu": (PlatformEnum.CPU, "CPUWNA16LinearKernel", cpu._CPUWNA16_SUPPORTED_QUANT_TYPES),
    }
    for target, (platform, kernel, types) in of_family.items():
        assert kernel in {listed.__name__ for listed in linear._POSSIBLE_KERNELS[platform]}
        assert int4 in types
        assert int8 not in types
        assert kinds(target) == {("int", 4)}  # type: ignore[arg-type]
    cuda = PlatformEnum.CUDA
    tables = {"": linear._POSSIBLE_KERNELS, "NvFp4": linear._POSSIBLE_NVFP4_KERNELS}
    tables["MxFp4"] = linear._POSSIBLE_MXFP4_KERNELS
    for infix, table in tables.items():
        assert f"Marlin{infix}LinearKernel" in {listed.__name__ for listed in table[cuda]}
    assert PlatformEnum.CPU not in linear._POSSIBLE_NVFP4_KERNELS
    assert kinds("vllm") == {("int", 4), ("int", 8), ("nvfp4", 4), ("mxfp4", 4)}
    groups = {plan.group_size or -1 for target in get_args(Target)[:4] for plan in candidates(target, 512)}
    assert groups - {16} <= set(marlin_utils.MARLIN_SUPPORTED_GROUP_SIZES)
    assert set(triton_w4a16.TRITON_W4A16_SUPPORTED_GROUP_SIZES) >= {-1, 32, 64, 128}


def test_a_plan_of_4_bit_floats_is_carried_out(tmp_path: Any) -> None:
    source = save(tiny_model(num_hidden_layers=1), tmp_path / "source")
    opened = Source.open(source)
    floats = {True: LayerPlan(4, 16, kind="nvfp4"), False: LayerPlan(4, 32, kind="mxfp4")}
    layers = {name: floats["self_attn" in name] for name in opened.shapes}
    size = sum(stored_bytes(*shape, layers[name]) for name, shape in opened.shapes.items())
    path = tmp_path / "plan.json"
    path.write_text(encode_plan(Plan(opened.checkpoint.digest(), layers, size, {})))
    method, notes = planned(read_plan(path), opened, CALIBRATIONS["gptq"])
    assert notes == []
    compress_with(source, tmp_path / "out", method, [text.ids for text in random_texts(4)])
    checkpoint = Checkpoint(tmp_path / "out", "COMPRESSED")
    # Beside what is counted, NVFP4 has 4 bytes for each layer.
    assert sum(map(checkpoint.stored_bytes, checkpoint.quantized)) == size + 4 * 4
    path.write_text(path.read_text().replace('"group_size": 16', '"group_size": 32', 1))
    with pytest.raises(CompressError, match="kind is nvfp4: it has 4 bits, group_size 16 and no sparsity"):
        read_plan(path)
