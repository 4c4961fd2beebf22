"""Hemostat's logits processor, as vLLM loads it; each rank writes down what it returned, in order."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path
from typing import Any

import torch
from vllm.distributed import parallel_state

from hemostat_engine.processor import LogitsProcessor as Processor

FOLDER = "RANKS_FOLDER"
"""The variable that names where: a file `rank0`, `rank1` of each rank, a line for each step."""


class LogitsProcessor(Processor):
    def apply(self, logits: torch.Tensor, ctx: Any = None) -> torch.Tensor:
        result = super().apply(logits, ctx)
        rank = parallel_state.get_tp_group().rank_in_group
        with Path(os.environ[FOLDER], f"rank{rank}").open("a") as file:
            file.write(f"{result.shape[0]} {hashlib.sha256(result.float().numpy().tobytes()).hexdigest()}\n")
        return result
