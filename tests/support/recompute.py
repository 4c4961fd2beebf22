"""The figures of a demo run, computed again from nothing but its records and its checkpoints, at full vocabulary.

Independent on purpose: transformers and torch, none of Hemostat's own mathematics.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from transformers import AutoModelForCausalLM

from hemostat.models import vllm_server as vllm_process


@dataclass(frozen=True)
class Recomputed:
    """A request's tokens, arrays [T], nats."""

    exact: np.ndarray
    """KL(reference‖compressed) over the whole vocabulary."""
    reported: np.ndarray
    compressed_top: np.ndarray
    """The compressed model's mass on its top K ids."""
    covered: np.ndarray
    """The same as reported."""
    temperature: float
    unit: tuple[str, str]
    """Conversation and kind: the first record of each counts in figures with intervals."""


def observations(found: list[Recomputed]) -> list[Recomputed]:
    """The first record of each unit, in order."""
    first: dict[tuple[str, str], Recomputed] = {}
    for one in found:
        first.setdefault(one.unit, one)
    return list(first.values())


def logprobs(model: torch.nn.Module, prompt: list[int], output: list[int]) -> torch.Tensor:
    """float64 [T, V]: of the distribution that each output token was drawn from."""
    with torch.inference_mode():
        logits = model(torch.tensor([prompt + output])).logits[0]
    return torch.log_softmax(logits[len(prompt) - 1 : -1].double(), dim=-1)


def recompute(folder: Path, top_k: int) -> list[Recomputed]:
    """From DIR of `--keep DIR`."""
    models = [
        AutoModelForCausalLM.from_pretrained(folder / name, dtype=vllm_process.dtype()).eval()
        for name in ("reference", "compressed")
    ]
    found = []
    for line in (folder / "records.jsonl").read_text().splitlines():
        record = json.loads(line)
        r, c = (logprobs(model, record["prompt_token_ids"], record["output_token_ids"]) for model in models)
        found.append(
            Recomputed(
                exact=(r.exp() * (r - c)).sum(-1).numpy(),
                reported=np.array(record["kl_nats"]),
                compressed_top=c.exp().topk(top_k).values.sum(-1).numpy(),
                covered=np.array(record["covered_mass"]),
                temperature=record["temperature"],
                unit=(record["conversation"], record["kind"]),
            )
        )
    return found
