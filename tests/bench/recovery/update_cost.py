"""What taking in tokens costs the contextual learner at the width of a large model, on one core, and what it holds.

A process of its own, since numpy's threads are counted once: at its start.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

WIDTH, FEATURES, ANCHORS, VOCABULARY = 4096, 512, 4608, 8192
"""The anchors show all of the hidden state, as the learner asks; the vocabulary plays no part in taking in."""
RECORD_TOKENS = 100
RECORDS_AT_ONCE = 32
BATCHES = 12
RECENT_TOKENS = 8192


def update_cost() -> dict[str, Any]:
    """Milliseconds per 100 tokens, amortized over batches of records, and the state's bytes after half and all."""
    root = Path(__file__).resolve().parents[3]
    one_core = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1")
    command = [sys.executable, "-m", "tests.bench.recovery.update_cost"]
    done = subprocess.run(command, cwd=root, env=os.environ | one_core, check=True, capture_output=True, text=True)
    result: dict[str, Any] = json.loads(done.stdout)
    return result


def main() -> None:
    import numpy as np

    from hemostat_calibration.learning.contextual.learner import ContextualLearner, ContextualState
    from hemostat_calibration.records import Candidates, Features, TokenRecord

    random = np.random.default_rng(1)
    weight = random.normal(size=(VOCABULARY, WIDTH)).astype(np.float32)
    family = ContextualLearner(
        weight, np.arange(ANCHORS, dtype=np.int32), features=FEATURES, recent_tokens=RECENT_TOKENS
    )
    ids = np.zeros((RECORD_TOKENS, 1), np.int32)
    unknown = np.full(RECORD_TOKENS, np.nan)
    candidates = Candidates(ids, unknown[:, None])

    def record(number: int) -> TokenRecord:
        return TokenRecord(
            vocab_size=VOCABULARY,
            prompt_key=number.to_bytes(16, "little"),
            output_ids=ids[:, 0],
            compressed=candidates,
            reference_at=unknown[:, None],
            reference=candidates,
            compressed_emitted=unknown,
            reference_emitted=unknown,
            features=Features(family.digest, random.normal(size=(RECORD_TOKENS, ANCHORS)).astype(np.float32)),
            reference_hidden=random.normal(size=(RECORD_TOKENS, WIDTH)).astype(np.float32),
        )

    def held(state: ContextualState) -> int:
        sums = sum(fold.cross.nbytes + fold.target.nbytes for fold in state.folds)
        rows = [*state.recent, *(r for fold in state.folds for r in fold.waiting)]
        # A row that waits is one of the recent ones, too.
        arrays = {id(a): a for r in rows for a in (r.features, r.hidden) if a is not None}
        return sums + sum(a.nbytes for a in arrays.values())

    state = family.init("bench", VOCABULARY)
    spent: list[float] = []
    sizes: list[int] = []
    for batch in range(BATCHES):
        records = [record(batch * RECORDS_AT_ONCE + i) for i in range(RECORDS_AT_ONCE)]
        began = time.process_time()
        state = family.update(state, records)
        spent.append(time.process_time() - began)
        sizes.append(held(state))
    warm = BATCHES // 3
    tokens = (BATCHES - warm) * RECORDS_AT_ONCE * RECORD_TOKENS
    print(
        json.dumps(
            {
                "width": WIDTH,
                "features": FEATURES,
                "anchors": ANCHORS,
                "tokens": tokens,
                "ms_per_100_tokens": 1e5 * sum(spent[warm:]) / tokens,
                "state_bytes": sizes[-1],
                "state_bytes_half_way": sizes[BATCHES // 2],
                "recent_tokens": RECENT_TOKENS,
            }
        )
    )


if __name__ == "__main__":
    main()
