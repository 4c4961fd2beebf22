"""What it takes the control process to find the cluster of a prompt."""

from __future__ import annotations

import time
from collections.abc import Iterator

import numpy as np
from tests.bench.guard import Row

from hemostat_calibration.statistics.templates import TemplateTable

NAME = "template_cost"
TAKES = "5 seconds on one core"
TEST_LIVES = 0
"""It measures time."""

BATCH, BATCHES = 100, 20
MAX_MICROSECONDS = 50.0


def rows(lives: int, seed: int) -> Iterator[Row]:
    for tokens in (64, 512, 4096):
        prompts = np.random.default_rng([seed, 34, tokens]).integers(0, 50_000, (BATCH * BATCHES, tokens), np.int32)
        table, best = TemplateTable(b"key"), np.inf
        for batch in prompts.reshape(BATCHES, BATCH, tokens):
            began = time.thread_time()
            for prompt in batch:
                table.assign(prompt, prompt[:4].tobytes())
            best = min(best, (time.thread_time() - began) / BATCH * 1e6)
        yield Row(
            f"a prompt of {tokens} tokens, of no known cluster: processor time, best of {BATCHES}",
            f"{best:.0f} µs",
            f"<= {MAX_MICROSECONDS:g} µs",
            best <= MAX_MICROSECONDS,
        )
