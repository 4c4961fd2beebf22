"""The bytes of an adapter spent on more bits or smaller groups instead: dense copies of checkpoints that are rounded as
`hemostat compress` rounds, offline, since vLLM has no kernels for 5 and 6 bits."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from tests.bench.recovery.log import say
from transformers import AutoModelForCausalLM, AutoTokenizer

from hemostat_lab.compression.rounding import rounded

SCALE_BITS = 16


@dataclass(frozen=True, slots=True)
class Rounding:
    """Symmetric integers, a bfloat16 scale for each group of inputs."""

    bits: int
    group_size: int

    @property
    def bits_per_weight(self) -> float:
        return self.bits + SCALE_BITS / self.group_size

    @property
    def label(self) -> str:
        return f"{self.bits} bits, groups of {self.group_size}"


BASE = Rounding(4, 64)
OTHERS = (Rounding(4, 32), Rounding(5, 64), Rounding(6, 64))


def more_bytes(other: Rounding) -> float:
    """Of the quantized layers, as a part of those of w4a16."""
    return other.bits_per_weight / BASE.bits_per_weight - 1.0


def rounded_checkpoint(reference: Path, build: Path, rounding: Mapping[str, Rounding] | Rounding, name: str) -> Path:
    """A folder with a dense bfloat16 copy; made once. rounding: for all linear layers but the head, or by layer."""
    folder = build / f"checkpoint-{name}".replace(" ", "-").replace(",", "")
    if folder.exists():
        return folder
    say(f"{name}: rounding {reference.name}")
    model = AutoModelForCausalLM.from_pretrained(reference, dtype=torch.bfloat16)
    head = model.get_output_embeddings()
    with torch.no_grad():
        for layer, module in model.named_modules():
            if isinstance(module, torch.nn.Linear) and module is not head:
                chosen = rounding if isinstance(rounding, Rounding) else rounding.get(layer, BASE)
                module.weight.copy_(rounded(layer, module.weight, chosen.bits, chosen.group_size))
    partial = folder.with_name(folder.name + ".part")
    shutil.rmtree(partial, ignore_errors=True)
    model.save_pretrained(partial)
    AutoTokenizer.from_pretrained(reference).save_pretrained(partial)
    partial.rename(folder)
    return folder
