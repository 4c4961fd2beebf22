"""The texts of the benchmarks of compression: written by the reference, on topics that are learned from or held out."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from tests.bench.recovery.prompts import Prompt

from hemostat.doctor.checkpoints import generate
from hemostat.doctor.kl_meter import Text


def first_by_topic(prompts: Sequence[Prompt], held_out: bool) -> list[Prompt]:
    """The first prompt of each topic."""
    first: dict[str, Prompt] = {}
    for prompt in prompts:
        if prompt.heldout == held_out:
            first.setdefault(prompt.topic, prompt)
    return list(first.values())


def written_texts(model: Any, tokenizer: Any, prompts: Sequence[Prompt], tokens: int, seed: int) -> list[Text]:
    """Written by the model, sampled at temperature 1."""
    ids = [
        np.array(
            tokenizer.apply_chat_template(
                [{"role": "user", "content": prompt.text}], add_generation_prompt=True, return_dict=False
            ),
            np.int32,
        )
        for prompt in prompts
    ]
    uniforms = [np.random.default_rng([seed, n]).random(tokens) for n in range(len(ids))]
    with torch.inference_mode():
        outputs = generate(model, ids, [tokens] * len(ids), uniforms, frozenset({int(tokenizer.eos_token_id)}))
    return [Text(prompt, output) for prompt, output in zip(ids, outputs, strict=True)]
