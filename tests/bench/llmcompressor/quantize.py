"""Quantizes a checkpoint.

usage: quantize.py REFERENCE OUT TEXTS.json METHOD GROUP_SIZE [AWQ_GRID]
(texts: token ids, a list of lists; METHOD: rtn, gptq, awq, for W4A16, or smoothquant, for W8A8; AWQ_GRID: points that
AWQ tries, llmcompressor's own number by default)
"""

from __future__ import annotations

import sys
from typing import Any

import torch
from calibration import apply  # of this folder
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme

from llmcompressor.modifiers.gptq import GPTQModifier
from llmcompressor.modifiers.quantization import QuantizationModifier
from llmcompressor.modifiers.transform.awq import AWQModifier
from llmcompressor.modifiers.transform.smoothquant import SmoothQuantModifier
from llmcompressor.pipelines.cache import IntermediatesCache

SMOOTHING_STRENGTH = 0.8
"""As in llmcompressor's own examples."""
HEAD = ["lm_head"]

if not torch.cuda.is_available():
    # AWQ pins memory for a GPU, which raises without one.
    IntermediatesCache.pin_memory = lambda self, batch_index, input_names=None: None


def main(reference: str, out: str, texts: str, method: str, group_size: str, awq_grid: str = "") -> None:
    weights = QuantizationArgs(num_bits=4, type="int", symmetric=True, strategy="group", group_size=int(group_size))
    groups = {"group_0": QuantizationScheme(targets=["Linear"], weights=weights)}
    grid = {"n_grid": int(awq_grid)} if awq_grid else {}
    recipes: dict[str, list[Any]] = {
        "rtn": [QuantizationModifier(config_groups=groups, ignore=HEAD)],
        "gptq": [GPTQModifier(config_groups=groups, ignore=HEAD)],
        "awq": [AWQModifier(**grid), QuantizationModifier(config_groups=groups, ignore=HEAD)],
        "smoothquant": [
            SmoothQuantModifier(smoothing_strength=SMOOTHING_STRENGTH),
            GPTQModifier(targets="Linear", scheme="W8A8", ignore=HEAD),
        ],
    }
    apply(recipes[method], reference, out, texts, packed=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
