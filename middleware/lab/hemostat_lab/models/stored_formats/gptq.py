"""GPTQ's own format, as AutoGPTQ, GPTQModel and AutoRound write it.

`qweight` int32 [inputs · bits / 32, outputs] and `qzeros` int32 [groups, outputs · bits / 32] are packed integers,
`scales` are [groups, outputs], and `g_idx` int32 [inputs] says the group of each input: with act-order (`desc_act`) in
no order. A weight is scale · (q - zero).

Version 1 (`checkpoint_format: gptq`) stores zero points less by one. Of 2, 4 and 8 bits, whole words are subtracted, so
that a 0 borrows from its neighbour; of 3 bits each number for itself. Version 2 (`gptq_v2`) stores them as they are.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from hemostat.checkpoints.errors import AdaptError
from hemostat_lab.models.skeleton import EXACT, Inputs
from hemostat_lab.models.stored_formats.integers import WORD_BITS, pack_rows, signed, unpack_rows
from hemostat_lab.models.stored_formats.stored_layer import StoredLayer, member

BITS = (2, 3, 4, 8)
VERSIONS = {"gptq": 1, "gptq_v2": 2}
"""By `checkpoint_format`."""


@dataclass(frozen=True, slots=True)
class GptqLayer:
    """Of one layer. group_size: -1: one group of all inputs. symmetric: every zero point is 2^(bits - 1)."""

    bits: int
    group_size: int
    act_order: bool
    symmetric: bool


@dataclass(frozen=True, slots=True)
class Gptq:
    """base: of all layers but those whose names an expression of `changed` matches, which have other members of the
    configuration. version: of the zero points."""

    base: Mapping[str, Any]
    version: int
    where: str
    changed: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    parts = frozenset({"qweight", "qzeros", "scales", "g_idx"})
    marks = frozenset({"qweight"})

    @classmethod
    def of(cls, quantization: Mapping[str, Any], where: str) -> Gptq:
        """AdaptError. where: how errors name the `quantization_config`."""
        written = str(member(quantization, "checkpoint_format", "format") or "gptq")
        if written not in VERSIONS:
            raise AdaptError(
                f"{where} has the checkpoint_format {written}, which is not supported: use {' or '.join(VERSIONS)}"
            )
        changed = {
            pattern.removeprefix("+:"): values
            for pattern, values in (quantization.get("dynamic") or {}).items()
            if not pattern.startswith("-:")
        }
        result = cls(quantization, VERSIONS[written], where, changed)
        result._layer({})
        for pattern, values in changed.items():
            try:
                re.compile(pattern)
            except re.error as error:
                raise AdaptError(
                    f"{where} names layers by {pattern!r}, which is no regular expression ({error}): correct it"
                ) from None
            result._layer(values)
        return result

    def _layer(self, changed: Mapping[str, Any]) -> GptqLayer:
        values = {**self.base, **changed}
        try:
            bits, group_size = int(values["bits"]), int(values["group_size"])
        except (KeyError, TypeError, ValueError):
            raise AdaptError(f"{self.where} does not say bits and group_size as integers; copy it again") from None
        if bits not in BITS or (group_size < 1 and group_size != -1):
            raise AdaptError(
                f"{self.where} has bits {bits} and group_size {group_size}: supported are "
                f"{', '.join(map(str, BITS))} bits, and a positive size or -1"
            )
        return GptqLayer(bits, group_size, bool(values.get("desc_act")), bool(values.get("sym", True)))

    def layer(self, name: str) -> GptqLayer:
        return self._layer(next((v for p, v in self.changed.items() if re.match(p, name)), {}))

    def weight(self, layer: StoredLayer) -> torch.Tensor:
        known = self.layer(layer.name)
        words = layer.tensor("qweight", (torch.int32,), (None, None))
        outputs = words.shape[1]
        if len(words) * WORD_BITS % known.bits:
            layer.refuse("qweight", f"has {len(words)} rows of 32 bits, which are not whole numbers of {known.bits}")
        steps = unpack_rows(words, known.bits)
        inputs = len(steps)
        size = inputs if known.group_size == -1 else known.group_size
        groups = layer.check_groups("qweight", inputs, size)
        scales = layer.scales("scales", (groups, outputs))
        zeros = self._zeros(layer, known, groups, outputs)
        index = self._index(layer, known, inputs, groups, size)
        return ((steps - zeros[index]) * scales[index]).T.contiguous()

    def _zeros(self, layer: StoredLayer, known: GptqLayer, groups: int, outputs: int) -> torch.Tensor:
        """Int32 [groups, outputs]."""
        if outputs * known.bits % WORD_BITS:
            layer.refuse("qweight", f"has {outputs} outputs, which {known.bits} bits do not pack into whole words")
        words = layer.tensor("qzeros", (torch.int32,), (groups, outputs * known.bits // WORD_BITS)).T
        if self.version == 1:
            words = one_more(words, known.bits)
        zeros = unpack_rows(words, known.bits).T
        middle = 1 << (known.bits - 1)
        if known.symmetric and not bool((zeros == middle).all()):
            other = next(int(zero) for zero in zeros.flatten() if zero != middle)
            layer.refuse(
                "qzeros",
                f"holds the zero point {other}, and symmetric weights of {known.bits} bits have {middle}",
                f"sym, or checkpoint_format ({'gptq_v2' if self.version == 2 else 'gptq'}), of its quantization_config "
                "is wrong: correct it",
            )
        return zeros

    def _index(self, layer: StoredLayer, known: GptqLayer, inputs: int, groups: int, size: int) -> torch.Tensor:
        if "g_idx" not in layer.parts and not (known.act_order and groups > 1):
            return torch.arange(inputs) // size
        index = layer.tensor("g_idx", (torch.int32, torch.int64), (inputs,)).long()
        if int(index.min()) < 0 or int(index.max()) >= groups:
            layer.refuse("g_idx", f"names groups from {int(index.min())} to {int(index.max())} of {groups}")
        return index

    def inputs(self, layer: StoredLayer) -> Inputs:
        return EXACT


def one_more(words: torch.Tensor, bits: int) -> torch.Tensor:
    """Words int32 [n, columns] whose packed numbers are each one more: from version 1 to version 2."""
    return _added(words, bits, 1)


def one_less(words: torch.Tensor, bits: int) -> torch.Tensor:
    """The inverse of `one_more`."""
    return _added(words, bits, -1)


def _added(words: torch.Tensor, bits: int, sign: int) -> torch.Tensor:
    if bits == 3:
        return pack_rows((unpack_rows(words, bits) + sign) & 7, bits)
    ones = pack_rows(torch.ones(len(words) * WORD_BITS // bits, 1, dtype=torch.int32), bits)
    return signed(words.to(torch.int64) + sign * (ones.to(torch.int64) & 0xFFFFFFFF))
