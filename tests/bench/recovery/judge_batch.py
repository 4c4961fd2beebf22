"""Measures if the copies that judge adapters would gain by taking several requests in one pass.

    python -m tests.bench.recovery.judge_batch

measures on one core, with the demo's compressed model: the model's hidden states of requests one at a time and
together, and the whole answer to a request, of which the hidden states are a part.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from statistics import median

import numpy as np
import torch

from hemostat.adapters.live import judge_messages
from hemostat_calibration.profiles.profile import IDENTITY
from hemostat_lab.adapters.judge_process import Copies
from hemostat_lab.demo.checkpoints import cached_checkpoints
from hemostat_lab.models.copies import Copy

BATCH, PROMPT, OUTPUT = 4, 70, 50
ROUNDS = 9


def seconds(work: Callable[[], object]) -> float:
    """Returns the processor seconds of this process."""
    began = time.process_time()
    work()
    return time.process_time() - began


def main() -> None:
    torch.set_num_threads(1)
    checkpoints = cached_checkpoints("w4a16")
    embedding_size = 576
    vocabulary = 49152
    copies = Copies(
        judge_messages.Start(str(checkpoints.compressed), str(checkpoints.reference), vocabulary, embedding_size, "cpu")
    )
    body = Copy.load(checkpoints.compressed).model.model
    rng = np.random.default_rng(0)
    ids = torch.tensor(rng.integers(0, vocabulary, (BATCH, PROMPT + OUTPUT)))
    hidden = rng.normal(0, 1, (OUTPUT, embedding_size)).astype("<f4").tobytes()
    requests = [
        judge_messages.Judge(
            n,
            row[:PROMPT].numpy().astype("<i4").tobytes(),
            row[PROMPT:].numpy().astype("<i4").tobytes(),
            [IDENTITY],
            hidden,
        )
        for n, row in enumerate(ids)
    ]
    rounds = []
    with torch.inference_mode():
        for _ in range(ROUNDS):
            single = seconds(lambda: [body(input_ids=row[None], use_cache=False) for row in ids])
            together = seconds(lambda: body(input_ids=ids, use_cache=False))
            whole = seconds(lambda: [copies.judge(request) for request in requests])
            rounds.append((single / together, single / whole))
    gains, shares = zip(*rounds, strict=True)
    gain, share = median(gains), median(shares)
    print(f"{BATCH} requests of {PROMPT} + {OUTPUT} tokens, one core, {ROUNDS} rounds")
    print(f"hidden states one at a time, × those together: {gain:.2f} [{min(gains):.2f}, {max(gains):.2f}]")
    print(f"part of a request's time that is hidden states: {share:.2f} [{min(shares):.2f}, {max(shares):.2f}]")
    print(f"so requests together would take × {1 - share + share / gain:.2f}")


if __name__ == "__main__":
    main()
