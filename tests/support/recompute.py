"""The figures of a demo run, computed again from nothing but its records and its checkpoints, at full vocabulary.

Independent on purpose: transformers and torch, none of Hemostat's own mathematics.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoModelForCausalLM

from hemostat_lab.demo import vllm_server as vllm_process


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
    total_variation: np.ndarray
    """Between reference and compressed, exact."""
    temperature: float
    unit: tuple[str, str]
    """Conversation and kind: the first record of each counts in figures with intervals."""


def observations(records: list[Recomputed]) -> list[Recomputed]:
    """The first record of each unit, in order."""
    first: dict[tuple[str, str], Recomputed] = {}
    for record in records:
        first.setdefault(record.unit, record)
    return list(first.values())


def logprobs(model: torch.nn.Module, prompt: list[int], output: list[int]) -> torch.Tensor:
    """float64 [T, V]: of the distribution that each output token was drawn from."""
    with torch.inference_mode():
        logits = model(torch.tensor([prompt + output])).logits[0]
    return torch.log_softmax(logits[len(prompt) - 1 : -1].double(), dim=-1)


def load(folder: Path) -> torch.nn.Module:
    """A checkpoint as transformers loads it; packed weights become dense ones."""
    model: torch.nn.Module = AutoModelForCausalLM.from_pretrained(folder, dtype=vllm_process.dtype()).eval()
    with torch.inference_mode():
        model(torch.tensor([[0]]))  # transformers unpacks them in the first pass
    return model


def recompute(folder: Path, top_k: int) -> list[Recomputed]:
    """From DIR of `--keep DIR`."""
    reference, compressed = (load(folder / name) for name in ("reference", "compressed"))
    lines = (folder / "records.jsonl").read_text().splitlines()
    return [recomputed(json.loads(line), reference, compressed, top_k) for line in lines]


def recomputed(
    record: Mapping[str, Any], reference: torch.nn.Module, served: torch.nn.Module, top_k: int
) -> Recomputed:
    """From one line of records. served: the compressed model, with the adapter where the record has one."""
    r, c = (logprobs(model, record["prompt_token_ids"], record["output_token_ids"]) for model in (reference, served))
    return Recomputed(
        exact=(r.exp() * (r - c)).sum(-1).numpy(),
        reported=np.array(record["kl_nats"]),
        compressed_top=c.exp().topk(top_k).values.sum(-1).numpy(),
        covered=np.array(record["covered_mass"]),
        total_variation=(0.5 * (r.exp() - c.exp()).abs().sum(-1)).numpy(),
        temperature=record["temperature"],
        unit=(record["conversation"], record["kind"]),
    )
