"""AWQ's format for GEMM, as AutoAWQ, GPTQModel and AutoRound write it.

`qweight` int32 [inputs, outputs / 8] and `qzeros` int32 [groups, outputs / 8] hold 4-bit integers, eight outputs in a
word in the order `ORDER`; `scales` are [groups, outputs]. A weight is scale · (q - zero).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from hemostat.checkpoints.errors import AdaptError
from hemostat_lab.models.skeleton import EXACT, Inputs
from hemostat_lab.models.stored_formats.integers import pack_rows, unpack_rows
from hemostat_lab.models.stored_formats.stored_layer import StoredLayer, member

BITS = 4
PER_WORD = 8
ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
"""The output, of eight, that is in the n-th lowest 4 bits of a word."""


@dataclass(frozen=True, slots=True)
class Awq:
    """group_size: -1: one group of all inputs. zero_point: whether `qzeros` are stored; otherwise they are 8."""

    group_size: int
    zero_point: bool
    parts = frozenset({"qweight", "qzeros", "scales"})
    marks = frozenset({"qweight"})

    @classmethod
    def of(cls, quantization: Mapping[str, Any], where: str) -> Awq:
        """AdaptError. where: how errors name the `quantization_config`."""
        written = str(member(quantization, "version", "format", "checkpoint_format") or "gemm").lower()
        bits, size = member(quantization, "bits", "w_bit"), member(quantization, "group_size", "q_group_size")
        if written != "gemm" or bits != BITS:
            raise AdaptError(f"{where} has {bits} bits in AWQ's format {written}: supported are 4 bits in gemm")
        if not isinstance(size, int) or (size < 1 and size != -1):
            raise AdaptError(f"{where} has the group_size {size}: it must be a positive integer, or -1")
        return cls(size, bool(quantization.get("zero_point", True)))

    def weight(self, layer: StoredLayer) -> torch.Tensor:
        words = layer.tensor("qweight", (torch.int32,), (None, None))
        inputs, outputs = len(words), words.shape[1] * PER_WORD
        size = inputs if self.group_size == -1 else self.group_size
        groups = layer.check_groups("qweight", inputs, size)
        scales = layer.scales("scales", (groups, outputs))
        zeros: torch.Tensor = torch.tensor(1 << (BITS - 1))
        if self.zero_point:
            packed = layer.tensor("qzeros", (torch.int32,), (groups, outputs // PER_WORD))
            zeros = unpack_outputs(packed).repeat_interleave(size, 0)
        return ((unpack_outputs(words) - zeros) * scales.repeat_interleave(size, 0)).T.contiguous()

    def inputs(self, layer: StoredLayer) -> Inputs:
        return EXACT


def unpack_outputs(words: torch.Tensor) -> torch.Tensor:
    """Int32 [rows, 8 n] of words int32 [rows, n]."""
    numbers = unpack_rows(words.reshape(1, -1), BITS).T.reshape(*words.shape, PER_WORD)
    unpacked = torch.empty_like(numbers)
    unpacked[..., list(ORDER)] = numbers
    return unpacked.flatten(1)


def pack_outputs(numbers: torch.Tensor) -> torch.Tensor:
    """The inverse of `unpack_outputs`."""
    ordered = numbers.unflatten(1, (-1, PER_WORD))[..., list(ORDER)]
    return pack_rows(ordered.reshape(-1, PER_WORD).T, BITS).reshape(ordered.shape[:2])
