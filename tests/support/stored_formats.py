"""Layers in the formats of quantization tools, written bit by bit from the formats' descriptions, and their weights.

Slow and simple on purpose: numbers become one large integer, and nothing is shared with the code that reads them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

OUTPUTS, INPUTS = 64, 128
E2M1 = np.array([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0])
Integers = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Layer:
    """quantization: of config.json. parts: the tensors by the last part of their names. weight: float32."""

    quantization: Mapping[str, Any]
    parts: Mapping[str, torch.Tensor]
    weight: torch.Tensor


def words(numbers: Integers, bits: int) -> list[int]:
    """32-bit words, signed, of numbers that follow one another from the lowest bit on."""
    whole = sum(int(number) << (bits * n) for n, number in enumerate(numbers))
    parts = [(whole >> (32 * n)) & 0xFFFFFFFF for n in range(len(numbers) * bits // 32)]
    return [word - (1 << 32) if word >> 31 else word for word in parts]


def gptq(
    bits: int = 4,
    group: int = 32,
    *,
    act_order: bool = False,
    symmetric: bool = True,
    version: int = 1,
    seed: int = 0,
    lowest_zero: int = 1,
) -> Layer:
    """lowest_zero: of the zero points; version 1 stores 0 with a borrow from the neighbour."""
    rng = np.random.default_rng(seed)
    size = INPUTS if group == -1 else group
    groups = INPUTS // size
    steps = rng.integers(0, 1 << bits, (INPUTS, OUTPUTS))
    zeros = np.full((groups, OUTPUTS), 1 << (bits - 1))
    if not symmetric:
        zeros = rng.integers(lowest_zero, 1 << bits, (groups, OUTPUTS))
    scales = torch.from_numpy(rng.uniform(-0.02, 0.02, (groups, OUTPUTS))).half()
    index = np.arange(INPUTS) // size
    if act_order:
        index = rng.permutation(index)
    qzeros = np.array([words(row, bits) for row in zeros])
    if version == 1:
        ones = np.array(words(np.ones(OUTPUTS, np.int64), bits))
        qzeros = (qzeros - ones + (1 << 31)) % (1 << 32) - (1 << 31)
        if bits == 3:
            qzeros = np.array([words((row - 1) % 8, bits) for row in zeros])
    parts = {
        "qweight": torch.tensor(np.array([words(column, bits) for column in steps.T]).T.copy(), dtype=torch.int32),
        "qzeros": torch.tensor(qzeros, dtype=torch.int32),
        "scales": scales,
        "g_idx": torch.tensor(index, dtype=torch.int32),
    }
    weight = (steps - zeros[index]).astype(np.float64) * scales.double().numpy()[index]
    config = {
        "quant_method": "gptq",
        "bits": bits,
        "group_size": group,
        "desc_act": act_order,
        "sym": symmetric,
        "checkpoint_format": "gptq" if version == 1 else "gptq_v2",
    }
    return Layer(config, parts, torch.from_numpy(weight.T.astype(np.float32)))


def awq(group: int = 32, seed: int = 0) -> Layer:
    rng = np.random.default_rng(seed)
    steps = rng.integers(0, 16, (INPUTS, OUTPUTS))
    zeros = rng.integers(0, 16, (INPUTS // group, OUTPUTS))
    scales = torch.from_numpy(rng.uniform(0.001, 0.02, zeros.shape)).half()

    def packed(numbers: Integers) -> torch.Tensor:
        ordered = numbers.reshape(len(numbers), -1, 8)[:, :, [0, 2, 4, 6, 1, 3, 5, 7]].reshape(numbers.shape)
        return torch.tensor([words(row, 4) for row in ordered], dtype=torch.int32)

    spread = [np.repeat(array, group, 0) for array in (zeros, scales.double().numpy())]
    weight = (steps - spread[0]).astype(np.float64) * spread[1]
    parts = {"qweight": packed(steps), "qzeros": packed(zeros), "scales": scales}
    config = {"quant_method": "awq", "bits": 4, "group_size": group, "zero_point": True, "version": "gemm"}
    return Layer(config, parts, torch.from_numpy(weight.T.astype(np.float32)))


def e4m3(rng: np.random.Generator, shape: tuple[int, ...]) -> torch.Tensor:
    return torch.from_numpy(rng.normal(0, 60, shape)).float().clamp(-448, 448).to(torch.float8_e4m3fn)


def fp8(kind: str, seed: int = 0, block: tuple[int, int] = (32, 48)) -> Layer:
    """kind: tensor, static, channel or block. block: the default leaves a remainder."""
    rng = np.random.default_rng(seed)
    numbers = e4m3(rng, (OUTPUTS, INPUTS))
    config: dict[str, Any] = {"quant_method": "fp8", "activation_scheme": "static" if kind == "static" else "dynamic"}
    shape = {"channel": (OUTPUTS, 1), "block": (-(-OUTPUTS // block[0]), -(-INPUTS // block[1]))}.get(kind, ())
    scale = torch.from_numpy(np.asarray(rng.uniform(0.001, 0.02, shape))).float()
    part = "weight_scale_inv" if kind == "block" else "weight_scale"
    parts = {"weight": numbers, part: scale}
    spread = scale.numpy()
    if kind == "block":
        config["weight_block_size"] = list(block)
        spread = np.repeat(np.repeat(spread, block[0], 0)[:OUTPUTS], block[1], 1)[:, :INPUTS]
    if kind == "static":
        parts["input_scale"] = torch.tensor(0.03)
    if kind == "channel":
        config["quant_method"] = "fbgemm_fp8"
    return Layer(config, parts, torch.from_numpy((numbers.float().numpy() * spread).astype(np.float32)))


def fp4(kind: str, spelling: str, seed: int = 0) -> Layer:
    """kind: nvfp4 or mxfp4. spelling: modelopt or compressed-tensors."""
    rng = np.random.default_rng(seed)
    codes = rng.integers(0, 16, (OUTPUTS, INPUTS))
    values = np.where(codes & 8, -1.0, 1.0) * E2M1[codes & 7]
    size = 16 if kind == "nvfp4" else 32
    packed = "weight" if spelling == "modelopt" else "weight_packed"
    parts = {packed: torch.from_numpy((codes[:, 0::2] | codes[:, 1::2] << 4).astype(np.uint8))}
    shape = (OUTPUTS, INPUTS // size)
    if kind == "mxfp4":
        exponents = rng.integers(110, 130, shape)
        parts["weight_scale"] = torch.from_numpy(exponents.astype(np.uint8))
        of_group = 2.0 ** (exponents - 127.0)
    else:
        scale = e4m3(rng, shape).float().abs().to(torch.float8_e4m3fn)
        whole = np.float32(rng.uniform(1e-4, 1e-3))
        parts["weight_scale"] = scale
        if spelling == "modelopt":
            parts |= {"weight_scale_2": torch.tensor(whole), "input_scale": torch.tensor(0.01)}
            of_group = scale.float().numpy() * whole
        else:
            parts["weight_global_scale"] = torch.tensor([1 / whole])
            of_group = scale.float().numpy() / np.float32(1 / whole)
    weight = values.astype(np.float32) * np.repeat(of_group.astype(np.float32), size, 1)
    if spelling == "modelopt":
        config: dict[str, Any] = {"quant_method": "modelopt", "quant_algo": kind.upper(), "ignore": ["lm_head"]}
    else:
        grouping = {"strategy": "tensor_group" if kind == "nvfp4" else "group", "group_size": size}
        scheme = {"targets": ["Linear"], "weights": {"num_bits": 4, "type": "float", "symmetric": True, **grouping}}
        config = {
            "quant_method": "compressed-tensors",
            "format": f"{kind}-pack-quantized",
            "config_groups": {"group_0": scheme},
            "ignore": ["lm_head"],
        }
    return Layer(config, parts, torch.from_numpy(weight))


LAYERS: Mapping[str, Callable[[int], Layer]] = {
    **{f"GPTQ, {bits} bits": lambda seed, bits=bits: gptq(bits, seed=seed) for bits in (2, 3, 4, 8)},
    "GPTQ, act-order": lambda seed: gptq(act_order=True, seed=seed),
    "GPTQ, one group": lambda seed: gptq(group=-1, seed=seed),
    "GPTQ, zero points of version 1": lambda seed: gptq(symmetric=False, seed=seed, lowest_zero=0),
    "GPTQ, zero points of version 2": lambda seed: gptq(symmetric=False, version=2, seed=seed, lowest_zero=0),
    "GPTQ, 3 bits, version 1": lambda seed: gptq(3, symmetric=False, seed=seed, lowest_zero=0),
    "GPTQ, 3 bits, version 2, act-order": lambda seed: gptq(
        3, symmetric=False, version=2, act_order=True, seed=seed, lowest_zero=0
    ),
    "AWQ": lambda seed: awq(seed=seed),
    "FP8, one scale": lambda seed: fp8("tensor", seed),
    "FP8, static inputs": lambda seed: fp8("static", seed),
    "FP8, channels": lambda seed: fp8("channel", seed),
    "FP8, blocks": lambda seed: fp8("block", seed),
    **{
        f"{kind.upper()}, {spelling}": lambda seed, kind=kind, spelling=spelling: fp4(kind, spelling, seed)
        for kind in ("nvfp4", "mxfp4")
        for spelling in ("modelopt", "compressed-tensors")
    },
}
"""Every format that is read, by a name for people; the argument is a seed."""
