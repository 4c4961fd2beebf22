"""What taking in tokens costs the contextual learner at the width of a large model, on one core, and what it holds.

    python -m tests.bench.recovery.update_cost --beside FOLDER --rounds 5

compares it with the revision whose tree is in FOLDER, in alternating processes.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import statistics
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tests.bench import beside

if TYPE_CHECKING:
    from hemostat_calibration.learning.contextual.learner import ContextualLearner, ContextualState
    from hemostat_calibration.records import TokenRecord

MODULE = "tests.bench.recovery.update_cost"
WIDTH, FEATURES, ANCHORS, VOCABULARY = 4096, 512, 4608, 8192
"""The anchors show all of the hidden state, as the learner asks; the vocabulary plays no part in taking in."""
RECORD_TOKENS = 100
RECORDS_AT_ONCE = 32
BATCHES = 12
RECENT_TOKENS = 8192
CANDIDATES = 20
HANDED_OVER = 128
"""The number of records that are handed over on the event loop, four at a time."""
TIMES = {
    "ms_per_100_tokens": "update, of batches of records",
    "process_ms": "the learner's process, from the message to the sums",
    "products_ms": "… of which the products alone (numpy)",
    "loop_ms": "the control process's event loop, which hands records over",
    "control_ms": "all threads of the control process",
}


def update_cost() -> dict[str, Any]:
    """Milliseconds per 100 tokens, amortized over batches of records, and the state's bytes after half and all."""
    return beside.measured(MODULE)


def made_records(family: ContextualLearner) -> Iterator[TokenRecord]:
    """Yields records of random features and hidden states; their other parts are all alike."""
    import numpy as np

    from hemostat_calibration.records import Candidates, Features, TokenRecord

    random = np.random.default_rng(1)
    ids = np.tile(np.arange(CANDIDATES, dtype=np.int32), (RECORD_TOKENS, 1))
    logprobs = np.full(ids.shape, -3.0)
    candidates = Candidates(ids, logprobs)
    for number in range(1 << 30):
        yield TokenRecord(
            vocab_size=VOCABULARY,
            prompt_key=number.to_bytes(16, "little"),
            output_ids=ids[:, 0].copy(),
            compressed=candidates,
            reference_at=logprobs,
            reference=candidates,
            compressed_emitted=logprobs[:, 0],
            reference_emitted=logprobs[:, 0],
            # Engines report features as float16.
            features=Features(
                family.digest, random.normal(size=(RECORD_TOKENS, ANCHORS)).astype(np.float16).astype(np.float32)
            ),
            reference_hidden=random.normal(size=(RECORD_TOKENS, WIDTH)).astype(np.float32),
        )


def held(state: ContextualState) -> int:
    """Bytes of the sums and of the rows."""
    sums = sum(fold.cross.nbytes + fold.target.nbytes for fold in state.folds)
    rows = [*state.recent, *(r for fold in state.folds for r in fold.waiting)]
    # A row that waits is one of the recent ones, too.
    arrays = {id(a): a for r in rows for a in (r.features, r.hidden) if a is not None}
    return sums + sum(a.nbytes for a in arrays.values())


def in_batches(family: ContextualLearner) -> dict[str, float]:
    records = made_records(family)
    state = family.init("bench", VOCABULARY)
    spent: list[float] = []
    sizes: list[int] = []
    for _ in range(BATCHES):
        batch = [next(records) for _ in range(RECORDS_AT_ONCE)]
        began = time.process_time()
        state = family.update(state, batch)
        spent.append(time.process_time() - began)
        sizes.append(held(state))
    warm = BATCHES // 3
    tokens = (BATCHES - warm) * RECORDS_AT_ONCE * RECORD_TOKENS
    return {
        "tokens": tokens,
        "ms_per_100_tokens": 1e5 * sum(spent[warm:]) / tokens,
        "state_bytes": sizes[-1],
        "state_bytes_half_way": sizes[BATCHES // 2],
    }


def in_the_process(family: ContextualLearner) -> dict[str, float]:
    """Returns the cost in the learner's process: one record after the other, out of messages."""
    import numpy as np

    from hemostat.learner import learner_messages as messages

    records = made_records(family)
    state = family.init("bench", VOCABULARY)
    spent: list[float] = []
    for _ in range(BATCHES):
        rows = [messages.to_row(next(records)) for _ in range(RECORDS_AT_ONCE)]
        body = messages.REQUESTS.encode(messages.Learn(rows))
        began = time.process_time()
        request = messages.REQUESTS.decode(body)
        assert isinstance(request, messages.Learn)
        for row in request.rows:
            state = family.update(state, [messages.from_row(row, VOCABULARY)])
        spent.append(time.process_time() - began)
    warm = BATCHES // 3
    tokens = (BATCHES - warm) * RECORDS_AT_ONCE * RECORD_TOKENS
    random = np.random.default_rng(1)
    z, h = (random.normal(size=(1024, n)).astype(np.float32) for n in (ANCHORS, WIDTH))
    x = np.ascontiguousarray(np.column_stack([z[:, :FEATURES], np.ones(len(z), np.float32)]).T)
    products = []
    for _ in range(8):
        began = time.process_time()
        x @ z, x @ h
        products.append(time.process_time() - began)
    return {
        "process_ms": 1e5 * sum(spent[warm:]) / tokens,
        "products_ms": 1e5 * statistics.median(products) / len(z),
    }


async def handed_over(family: ContextualLearner) -> dict[str, float]:
    """The control process's end, with a process that only reads."""
    from hemostat.config.schema import Calibration
    from hemostat.ipc.supervisor import Supervisor
    from hemostat.learner.client import BACKOFF, Learner, LearnerState, LearningTarget

    class Refusing:
        def accepts(self, family: str, tokens: int) -> bool:
            return False

        def propose(self, *given: Any) -> bool:
            return False

        def set_probe(self, *given: Any, restored: bool) -> None: ...

    learner = Learner(Calibration(), Refusing())
    learner._process = Supervisor("tests.bench.recovery.update_sink", learner, BACKOFF)
    records = made_records(family)
    made = [next(records) for _ in range(8)]
    learner.set_target(LearningTarget("m", VOCABULARY, Path(), WIDTH))
    running = asyncio.create_task(learner.run())
    while learner.state is not LearnerState.LEARNING:
        await asyncio.sleep(0.01)

    async def hand_over(number: int) -> None:
        until = learner.status()["tokens"] + number * RECORD_TOKENS
        for first in range(0, number, 4):
            for n in range(first, first + 4):
                learner.update(made[n % len(made)])
            while learner.status()["tokens"] < until - (number - first - 4) * RECORD_TOKENS:
                await asyncio.sleep(0.001)

    await hand_over(16)
    thread, process = time.thread_time(), time.process_time()
    await hand_over(HANDED_OVER)
    spent = time.thread_time() - thread, time.process_time() - process
    running.cancel()
    await asyncio.gather(running, return_exceptions=True)
    assert not learner.dropped, learner.dropped
    tokens = HANDED_OVER * RECORD_TOKENS
    return {"loop_ms": 1e5 * spent[0] / tokens, "control_ms": 1e5 * spent[1] / tokens}


def told() -> None:
    import numpy as np
    import uvloop

    from hemostat_calibration.learning.contextual.learner import ContextualLearner

    weight = np.random.default_rng(1).normal(size=(VOCABULARY, WIDTH)).astype(np.float32)
    family = ContextualLearner(
        weight, np.arange(ANCHORS, dtype=np.int32), features=FEATURES, recent_tokens=RECENT_TOKENS
    )
    said = {"width": WIDTH, "features": FEATURES, "anchors": ANCHORS, "recent_tokens": RECENT_TOKENS}
    over = uvloop.run(handed_over(family))
    print(json.dumps(said | in_batches(family) | in_the_process(family) | over))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--beside", type=Path, help="the tree of another revision")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument(beside.CHILD, action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        told()
    elif options.beside is not None:
        beside.compared(MODULE, options.beside, options.rounds, TIMES, "ms for 100 tokens")
    else:
        print(json.dumps(update_cost(), indent=1))


if __name__ == "__main__":
    main()
