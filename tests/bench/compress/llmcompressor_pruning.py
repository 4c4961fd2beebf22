"""Prunes a checkpoint by SparseGPT or Wanda with llmcompressor. Runs in an environment of its own, without Hemostat.

usage: llmcompressor_pruning.py REFERENCE OUT TEXTS.json METHOD SPARSITY PATTERN
(texts: token ids, a list of lists; METHOD: sparsegpt or wanda; PATTERN: unstructured or 2:4)
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
from datasets import Dataset
from llmcompressor import oneshot
from llmcompressor.modifiers.pruning.sparsegpt import SparseGPTModifier
from llmcompressor.modifiers.pruning.wanda import WandaPruningModifier
from transformers import AutoModelForCausalLM, AutoTokenizer


def main(reference: str, out: str, texts: str, method: str, sparsity: str, pattern: str) -> None:
    ids = json.loads(Path(texts).read_text(encoding="utf-8"))
    data = Dataset.from_dict({"input_ids": ids, "attention_mask": [[1] * len(one) for one in ids]})
    model = AutoModelForCausalLM.from_pretrained(reference, dtype=torch.bfloat16)
    modifier = {"sparsegpt": SparseGPTModifier, "wanda": WandaPruningModifier}[method]
    structure = "0:0" if pattern == "unstructured" else pattern
    oneshot(
        model=model,
        dataset=data,
        recipe=[modifier(sparsity=float(sparsity), mask_structure=structure, ignore=["re:.*lm_head"])],
        max_seq_length=max(map(len, ids)),
        num_calibration_samples=len(ids),
        shuffle_calibration_samples=False,
    )
    # Dense, as ours are: vLLM does not load sparse formats any more.
    model.save_pretrained(out, save_compressed=False)
    AutoTokenizer.from_pretrained(reference).save_pretrained(out)


if __name__ == "__main__":
    main(*sys.argv[1:])
