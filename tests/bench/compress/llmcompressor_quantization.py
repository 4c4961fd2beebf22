"""Quantizes a checkpoint with llmcompressor. Runs in an environment of its own, which has no Hemostat.

usage: llmcompressor_quantization.py REFERENCE OUT TEXTS.json METHOD GROUP_SIZE
(texts: token ids, a list of lists; METHOD: rtn, gptq, awq, for W4A16, or smoothquant, for W8A8)
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
from datasets import Dataset
from llmcompressor import oneshot
from llmcompressor.modifiers.gptq import GPTQModifier
from llmcompressor.modifiers.quantization import QuantizationModifier
from llmcompressor.modifiers.transform.awq import AWQModifier
from llmcompressor.modifiers.transform.smoothquant import SmoothQuantModifier
from llmcompressor.pipelines.cache import IntermediatesCache
from transformers import AutoModelForCausalLM, AutoTokenizer

SMOOTHING_STRENGTH = 0.8
"""As in llmcompressor's own examples."""
HEAD = ["lm_head"]

if not torch.cuda.is_available():
    # AWQ pins memory for a GPU, which raises without one.
    IntermediatesCache.pin_memory = lambda self, batch_index, input_names=None: None


def main(reference: str, out: str, texts: str, method: str, group_size: str) -> None:
    ids = json.loads(Path(texts).read_text(encoding="utf-8"))
    data = Dataset.from_dict({"input_ids": ids, "attention_mask": [[1] * len(one) for one in ids]})
    model = AutoModelForCausalLM.from_pretrained(reference, dtype=torch.bfloat16)
    weights = QuantizationArgs(num_bits=4, type="int", symmetric=True, strategy="group", group_size=int(group_size))
    groups = {"group_0": QuantizationScheme(targets=["Linear"], weights=weights)}
    recipes: dict[str, list[Any]] = {
        "rtn": [QuantizationModifier(config_groups=groups, ignore=HEAD)],
        "gptq": [GPTQModifier(config_groups=groups, ignore=HEAD)],
        "awq": [AWQModifier(), QuantizationModifier(config_groups=groups, ignore=HEAD)],
        "smoothquant": [
            SmoothQuantModifier(smoothing_strength=SMOOTHING_STRENGTH),
            GPTQModifier(targets="Linear", scheme="W8A8", ignore=HEAD),
        ],
    }
    oneshot(
        model=model,
        dataset=data,
        recipe=recipes[method],
        max_seq_length=max(map(len, ids)),
        num_calibration_samples=len(ids),
        shuffle_calibration_samples=False,
    )
    model.save_pretrained(out, save_compressed=True)
    AutoTokenizer.from_pretrained(reference).save_pretrained(out)


if __name__ == "__main__":
    main(*sys.argv[1:])
