"""Request slots of vLLM's model runner V2, as its logits processors see them. Needs vLLM."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from tests.support.engine_profiles import VOCAB_SIZE
from vllm.v1.worker.gpu.sample.logits_processor import LogitsContext

SLOTS = 8


def request_states() -> Any:
    """What the loader hands on of the model runner's RequestState; its device buffers need UVA, which a CPU lacks."""
    lengths = SimpleNamespace(np=np.zeros(SLOTS, dtype=np.int32))
    return SimpleNamespace(
        device=torch.device("cpu"),
        max_num_reqs=SLOTS,
        vocab_size=VOCAB_SIZE,
        all_token_ids=None,
        prompt_len=lengths,
        prefill_len=SimpleNamespace(np=np.zeros(SLOTS, dtype=np.int32)),
        total_len=None,
    )


def context(slots: list[int], rows_each: list[int], first_pos: list[int]) -> LogitsContext:
    """The batch's requests stand in `slots`, with so many rows each; the first row's input token is at `first_pos`."""
    local = [i for n in rows_each for i in range(n)]
    return LogitsContext(
        expanded_idx_mapping=torch.tensor(np.repeat(slots, rows_each), dtype=torch.int32),
        idx_mapping=torch.tensor(slots, dtype=torch.int32),
        idx_mapping_np=np.array(slots, dtype=np.int32),
        expanded_local_pos=torch.tensor(local, dtype=torch.int32),
        input_ids=torch.zeros(len(local), dtype=torch.int32),
        pos=torch.tensor(np.repeat(first_pos, rows_each) + np.array(local), dtype=torch.int64),
        seq_lens_upper_bound_np=np.array(first_pos, dtype=np.int32) + 1,
    )
