"""Quantizes a checkpoint by GPTQ or AWQ with llmcompressor. Runs in an environment of its own, which has no Hemostat:
llmcompressor wants other versions of transformers and compressed-tensors than vLLM.

usage: llmcompressor_script.py METHOD REFERENCE OUT TEXTS.json GROUP_SIZE  (texts: token ids, a list of lists)
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
from datasets import Dataset
from llmcompressor import oneshot
from llmcompressor.modifiers.gptq import GPTQModifier
from llmcompressor.modifiers.quantization import QuantizationModifier
from llmcompressor.modifiers.transform.awq import AWQModifier
from llmcompressor.pipelines.cache import IntermediatesCache
from transformers import AutoModelForCausalLM, AutoTokenizer

AWQ_GRID = 10


if not torch.cuda.is_available():
    # AWQ pins memory for a GPU, which raises without one.
    IntermediatesCache.pin_memory = lambda self, batch_index, input_names=None: None


def main(method: str, reference: str, out: str, texts: str, group_size: str) -> None:
    ids = json.loads(Path(texts).read_text(encoding="utf-8"))
    longest = max(map(len, ids))
    data = Dataset.from_dict({"input_ids": ids, "attention_mask": [[1] * len(one) for one in ids]})
    model = AutoModelForCausalLM.from_pretrained(reference, dtype=torch.bfloat16)
    weights = QuantizationArgs(num_bits=4, type="int", symmetric=True, strategy="group", group_size=int(group_size))
    groups = {"group_0": QuantizationScheme(targets=["Linear"], weights=weights)}
    recipe = {
        "gptq": [GPTQModifier(config_groups=groups, ignore=["lm_head"])],
        "awq": [AWQModifier(n_grid=AWQ_GRID), QuantizationModifier(config_groups=groups, ignore=["lm_head"])],
    }[method]
    oneshot(
        model=model,
        dataset=data,
        recipe=recipe,
        max_seq_length=longest,
        num_calibration_samples=len(ids),
        shuffle_calibration_samples=False,
    )
    model.save_pretrained(out, save_compressed=True)
    AutoTokenizer.from_pretrained(reference).save_pretrained(out)


if __name__ == "__main__":
    main(*sys.argv[1:])
