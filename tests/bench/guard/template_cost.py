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
LONG_FRAME = 512
"""Tokens that all prompts begin with, from which on a second block of them is hashed."""


def rows(lives: int, seed: int) -> Iterator[Row]:
    for tokens, frame in ((64, 0), (512, 0), (4096, 0), (512, 200), (1512, 1000)):
        prompts = np.random.default_rng([seed, 34, tokens]).integers(0, 50_000, (BATCH * BATCHES, tokens), np.int32)
        prompts[:, :frame] = prompts[0, :frame]
        table, best = TemplateTable(b"key"), np.inf
        for batch in prompts.reshape(BATCHES, BATCH, tokens):
            began = time.thread_time()
            for prompt in batch:
                table.assign(prompt, prompt[-4:].tobytes())
            best = min(best, (time.thread_time() - began) / BATCH * 1e6)
        behind = f", {frame} of them a system prompt" if frame else ""
        limited = frame < LONG_FRAME
        yield Row(
            f"a prompt of {tokens} tokens{behind}, of no known cluster: processor time, best of {BATCHES}",
            f"{best:.0f} µs",
            f"<= {MAX_MICROSECONDS:g} µs" if limited else "reported: more for a system prompt of 512 tokens and more",
            best <= MAX_MICROSECONDS or not limited,
        )
