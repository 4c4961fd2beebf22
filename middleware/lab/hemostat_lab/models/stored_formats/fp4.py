"""E2M1 numbers, two in a byte, in groups: NVFP4 and MXFP4.

NVFP4: groups of 16, each with an E4M3 scale, and one float32 scale of the tensor. MXFP4 (OCP Microscaling 1.0): groups
of 32, each with a power of two (E8M0: the exponent plus 127; 255 is not a number).
"""

from __future__ import annotations

import torch

from hemostat_lab.models.stored_formats.stored_layer import StoredLayer

E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
"""By the lowest three bits; the fourth is the sign."""
NVFP4_GROUP = 16
MXFP4_GROUP = 32
E8M0_BIAS = 127
E8M0_NAN = 255


def unpack_e2m1(data: torch.Tensor) -> torch.Tensor:
    """Float32 [rows, 2 n] of bytes [rows, n]: the lower four bits first.

    >>> unpack_e2m1(torch.tensor([[0x2F]], dtype=torch.uint8)).tolist()
    [[-6.0, 1.0]]
    """
    values = torch.tensor([*E2M1, *(-value for value in E2M1)])
    both = torch.stack([data & 15, data >> 4], dim=-1).flatten(-2)
    return values[both.long()]


def pack_e2m1(numbers: torch.Tensor) -> torch.Tensor:
    """The inverse of `unpack_e2m1`, of numbers [rows, 2 n] that are E2M1's; a zero is stored without a sign."""
    index = torch.searchsorted(torch.tensor(E2M1), numbers.abs()).to(torch.uint8)
    codes = (index + 8 * (numbers < 0)).to(torch.uint8)
    return codes[:, 0::2] | (codes[:, 1::2] << 4)


def e8m0(data: torch.Tensor) -> torch.Tensor:
    """Float32 powers of two of bytes; exact, also the smallest, 2^-127."""
    exponents = data.to(torch.int32) - E8M0_BIAS
    return torch.ldexp(torch.ones_like(exponents, dtype=torch.float32), exponents)


def nvfp4_weight(layer: StoredLayer, part: str, tensor_scale: torch.Tensor, *, divides: bool) -> torch.Tensor:
    """Float32 [outputs, inputs] of the bytes in `part`, the scales of groups in `weight_scale`, and that of the tensor,
    which multiplies the scales of groups, or `divides` them."""
    numbers = unpack_e2m1(layer.tensor(part, (torch.uint8,), (None, None)))
    outputs, inputs = numbers.shape
    groups = layer.check_groups(part, inputs, NVFP4_GROUP)
    scale = layer.tensor("weight_scale", (torch.float8_e4m3fn,), (outputs, groups)).float()
    if not bool(scale.isfinite().all()):
        layer.refuse("weight_scale", "holds scales that are not finite", "copy the checkpoint again")
    of_group = scale / tensor_scale if divides else scale * tensor_scale
    return numbers * of_group.repeat_interleave(NVFP4_GROUP, 1)


def mxfp4_weight(layer: StoredLayer, part: str) -> torch.Tensor:
    """Float32 [outputs, inputs] of the bytes in `part` and the exponents in `weight_scale`."""
    numbers = unpack_e2m1(layer.tensor(part, (torch.uint8,), (None, None)))
    outputs, inputs = numbers.shape
    groups = layer.check_groups(part, inputs, MXFP4_GROUP)
    exponents = layer.tensor("weight_scale", (torch.uint8, torch.float8_e8m0fnu), (outputs, groups)).view(torch.uint8)
    if bool((exponents == E8M0_NAN).any()):
        layer.refuse("weight_scale", "holds 255, which is not a number in E8M0", "copy the checkpoint again")
    return numbers * e8m0(exponents).repeat_interleave(MXFP4_GROUP, 1)
