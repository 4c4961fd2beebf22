"""What both scripts do around their recipes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer

from llmcompressor import oneshot


def apply(recipe: list[Any], reference: str, out: str, texts: str, *, packed: bool) -> None:
    """Apply the recipe to the checkpoint `reference`, calibrated on the token ids of the file `texts`, and write
    `out`."""
    ids = json.loads(Path(texts).read_text(encoding="utf-8"))
    data = Dataset.from_dict({"input_ids": ids, "attention_mask": [[1] * len(token_id) for token_id in ids]})
    model = AutoModelForCausalLM.from_pretrained(reference, dtype=torch.bfloat16)
    oneshot(
        model=model,
        dataset=data,
        recipe=recipe,
        max_seq_length=max(map(len, ids)),
        num_calibration_samples=len(ids),
        shuffle_calibration_samples=False,
    )
    model.save_pretrained(out, save_compressed=packed)
    AutoTokenizer.from_pretrained(reference).save_pretrained(out)
