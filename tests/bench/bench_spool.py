"""Measures what a spool costs and keeps: `make bench-spool` prints a table and writes build/bench/spool.json.

    rate     captures of 128 tokens that are scored later in a second of CPU time, and the same on the live path, both
             by a reference that costs nothing, in one process
    append   bytes of a segment for each token, at K = 20, without and with what the plugin reports of one profile;
             CPU time that the control process's event loop takes for a capture, the one of its segments, and both; the
             same where no plugin hands out the tokens, so that the capture has the JSON of the response
    outage   a reference that is down for 12 hours at 20 sampled requests a second, on a simulated clock: nothing is
             lost, and memory does not grow

`--only` runs one part. The exit status is 1 where a row does not hold.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path

import msgspec
import numpy as np

ROOT = Path(__file__).resolve().parents[2]
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))

from tests.bench.load import INFO, MODEL, TOKENS, VOCABULARY, answers  # noqa: E402  the root is no package
from tests.bench.load.control import StoredReference, made  # noqa: E402
from tests.bench.rows import Row, publish, timed_rows  # noqa: E402
from tests.support.memory import resident_mib  # noqa: E402

from hemostat.engines.taps import TapResult  # noqa: E402
from hemostat.ipc.messages import Capture  # noqa: E402
from hemostat.metrics.reasons import Outcome  # noqa: E402
from hemostat.reference.monitor import ReferenceState  # noqa: E402
from hemostat.scoring.offline.evidence import TOGETHER, Evidenced  # noqa: E402
from hemostat.scoring.offline.stages import OfflineModels, offline_stages  # noqa: E402
from hemostat.scoring.score_rows import score_rows, scored_rows  # noqa: E402
from hemostat.scoring.spool.columns import SCHEMA_VERSION, VERSION_KEY, to_rows  # noqa: E402
from hemostat.scoring.spool.keys import SpoolKey  # noqa: E402
from hemostat.scoring.spool.segments import read_segment, segments  # noqa: E402
from hemostat.scoring.spool.spool import SEGMENT_BYTES, Spool  # noqa: E402
from hemostat.scoring.spool.spooled import Spooled  # noqa: E402

RESULT = ROOT / "build" / "bench" / "spool.json"
PROMPT = 200
FIRST_SEGMENTS = 120
"""The seconds after which two segments have been written."""
MIN_RATIO, MAX_TOKEN_BYTES, MAX_APPEND_MS, MAX_GROWN_MIB = 5.0, 300.0, 0.05, 64.0
OUTAGE_SECONDS, OUTAGE_RATE = 12 * 3600, 20
BATCH = 128
"""The number of captures that wait at a time: fewer than the shadow queue takes."""
ROUNDS = 3


def captures(count: int, tokens: int = TOKENS) -> Iterator[Capture]:
    """Yields captures with prompts of their own."""
    generator, one = np.random.default_rng(1), answers().capture
    width = one.top_k + 1
    for number in range(count):
        prompt = generator.integers(0, VOCABULARY, PROMPT, dtype=np.int32)
        yield msgspec.structs.replace(
            one,
            request_id=str(number),
            prompt_token_ids=prompt.tobytes(),
            output_token_ids=one.output_token_ids[: 4 * tokens],
            candidate_ids=one.candidate_ids[: 4 * tokens * width],
            candidate_logprobs=one.candidate_logprobs[: 4 * tokens * width],
            emitted_logprobs=one.emitted_logprobs[: 4 * tokens],
            conversation=prompt[:4].tobytes(),
        )


async def live_rate(count: int) -> float:
    """Returns the captures that the control process's pipeline scores in a second of CPU time."""
    control = made(0.0)
    await control.start()
    control.monitor.state, control.monitor.detail = ReferenceState.READY, "stored scores"
    control.monitor.on_change()
    scorer, pipeline = control.pipeline.scorer, control.pipeline
    assert scorer is not None
    worker = asyncio.create_task(scorer.run(2))
    waiting, began = list(captures(count)), time.process_time()
    for at in range(0, count, BATCH):
        for capture in waiting[at : at + BATCH]:
            pipeline.offer(capture)
        while pipeline.pending:
            await asyncio.sleep(0)
    spent = time.process_time() - began
    worker.cancel()
    await asyncio.gather(worker, return_exceptions=True)
    assert pipeline.endings.scored_captures == count, pipeline.endings.by_reason(Outcome.DROPPED)
    await control.close()
    return count / spent


async def later_rate(count: int) -> float:
    """Returns the captures that are scored later in a second of CPU time."""
    reference = StoredReference(answers())
    models = OfflineModels(reference)  # type: ignore[arg-type]
    models.set_pair(MODEL, INFO)
    stages, spent = offline_stages(models), 0.0
    left = captures(count)
    for _ in range(0, count, BATCH):
        rows = to_rows([Spooled(c, 1.7e9) for c, _ in zip(left, range(BATCH), strict=False)])
        began = time.process_time()
        scored = await score_rows(rows, stages)
        spent += time.process_time() - began
        assert scored["unscored"].null_count == len(scored)
    return count / spent


async def report_rate(count: int) -> float:
    """Returns the captures whose figures a report computes in a second of CPU time, from rows that were scored."""
    reference = StoredReference(answers())
    models = OfflineModels(reference)  # type: ignore[arg-type]
    models.set_pair(MODEL, INFO)
    scored = await score_rows(
        to_rows([Spooled(each, 1.7e9 + at) for at, each in enumerate(captures(count))]), offline_stages(models)
    )
    evidence = Evidenced(24.0)
    began = time.process_time()
    rows = scored_rows(scored)
    while together := list(islice(rows, TOGETHER)):
        await evidence.update(together)
    spent = time.process_time() - began
    assert evidence.report()["scored"] == count
    return count / spent


def rate(count: int) -> Iterator[Row]:
    """Yields the rates, and their ratio. The live path also computes the figures; later, the report does."""
    later, live = asyncio.run(later_rate(count)), asyncio.run(live_rate(min(count, 2_000)))
    report = asyncio.run(report_rate(min(count, 2_000)))
    yield Row("captures whose figures a report computes", report, "per CPU second", True)
    yield Row("captures scored later", later, "per CPU second", True)
    yield Row("captures scored at once", live, "per CPU second", True)
    yield Row("ratio", later / live, f">= {MIN_RATIO:.0f}", later / live >= MIN_RATIO)


def varied(count: int) -> Iterator[Capture]:
    """Yields captures whose ids and log-probabilities are all drawn, so that nothing compresses by repetition."""
    generator = np.random.default_rng(2)
    for capture in captures(count):
        shape = TOKENS, capture.top_k + 1
        ids = generator.integers(0, VOCABULARY, shape, dtype=np.int32)
        logprobs = -np.sort(generator.exponential(5.0, shape).astype("<f4"), axis=1)
        yield msgspec.structs.replace(
            capture,
            output_token_ids=ids[:, 0].tobytes(),
            candidate_ids=ids.tobytes(),
            candidate_logprobs=logprobs.tobytes(),
            emitted_logprobs=logprobs[:, 0].tobytes(),
        )


class World:
    """A spool on a simulated clock. Above half of its limit it would admit fewer captures."""

    def __init__(self, folder: Path, max_bytes: int = 1 << 40) -> None:
        self.now, self.key = 0.0, SpoolKey(os.urandom(32))
        self.spool = Spool(
            folder,
            self.key,
            journals=folder,
            max_bytes=max_bytes,
            max_age=1e9,
            clock=lambda: self.now,
            wall=lambda: 1.7e9 + self.now,
            draw=lambda: 0.5,
        )


def as_responses(given: Iterable[Capture]) -> Iterator[Capture]:
    """Yields the captures as they come where no plugin hands out the tokens: with the JSON of the response."""
    for capture in given:
        width, top = capture.top_k + 1, capture.top_k
        ids = np.frombuffer(capture.candidate_ids, "<i4").reshape(-1, width)[:, :top].tolist()
        logprobs = np.frombuffer(capture.candidate_logprobs, "<f4").reshape(-1, width)[:, :top].tolist()
        content = []
        for row in zip(ids, logprobs, strict=True):
            tops = [
                {"token": f"token_id:{at}", "logprob": value, "bytes": [32, 97]} for at, value in zip(*row, strict=True)
            ]
            content.append(tops[0] | {"top_logprobs": tops})
        empty = dict.fromkeys(("candidate_ids", "candidate_logprobs", "emitted_logprobs"), b"")
        yield msgspec.structs.replace(capture, logprobs=[msgspec.json.encode({"content": content})], **empty)


def tap(number: int) -> TapResult:
    """Returns what the plugin reports of a capture where one profile was measured."""
    values = np.random.default_rng(number).normal(0.0, 0.1, TOKENS)
    return TapResult("boot", "b" * 32, False, {"b" * 32: values}, None, [])


def spent(given: Sequence[Capture], taps: Sequence[TapResult | None] | None = None) -> tuple[float, float, int]:
    """Returns the CPU seconds of the event loop, the ones of the segments, each of which is made as soon as its journal
    is full, and the bytes of the segments. Each of them is the least of `ROUNDS`: other processes of the machine only
    add to it. taps: of each capture; None: there are none."""
    loops, threads, size, taps = [], [], 0, taps or [None] * len(given)
    for _ in range(ROUNDS):
        loop = thread = 0.0
        with tempfile.TemporaryDirectory() as name:
            spool = World(Path(name)).spool
            for at in range(0, len(given), BATCH):
                began = time.process_time()
                for capture, reported in zip(given[at : at + BATCH], taps[at : at + BATCH], strict=True):
                    assert spool.update(capture, reported) is None
                loop += time.process_time() - began
                full = sum(path.stat().st_size for path in Path(name).glob("*.journal")) >= SEGMENT_BYTES
                began = time.process_time()
                if full or at + BATCH >= len(given):
                    spool.close()
                thread += time.process_time() - began
            assert spool.lost == spool.left == 0
            size = sum(path.stat().st_size for path in segments(Path(name)))
        loops.append(loop)
        threads.append(thread)
    return min(loops), min(threads), size


def append(count: int) -> Iterator[Row]:
    """Yields the CPU time of a capture, and the bytes of a token."""
    loop, thread, size = spent(list(varied(count)))
    total = 1e3 * (loop + thread) / count
    yield Row("append, event loop", 1e3 * loop / count, "ms a capture", True)
    yield Row("segment, in a thread", 1e3 * thread / count, "ms a capture", True)
    yield Row("both", total, f"<= {MAX_APPEND_MS} ms", total <= MAX_APPEND_MS)
    each = size / (count * TOKENS)
    yield Row("bytes a token", each, f"<= {MAX_TOKEN_BYTES:.0f}", each <= MAX_TOKEN_BYTES)
    count //= 10
    _, _, size = spent(list(varied(count)), [tap(number) for number in range(count)])
    yield Row("bytes a token, with taps", size / (count * TOKENS), "bytes", True)
    loop, thread, _ = spent(list(as_responses(captures(count))))
    yield Row("append of a response's JSON, event loop", 1e3 * loop / count, "ms a capture", True)
    yield Row("segment of it, in a thread", 1e3 * thread / count, "ms a capture", True)


async def keep(folder: Path, seconds: int, per_second: int, tokens: int) -> tuple[int, int, float]:
    """Returns how many captures came while the reference was down, how many segments have, and the MiB that memory has
    grown by since the first segments: what writes them is loaded with the first one."""
    world, first = World(folder), 0.0
    given = list(captures(per_second, tokens))
    for second in range(seconds):
        world.now = float(second)
        for number, capture in enumerate(given):
            one = msgspec.structs.replace(capture, request_id=f"{second}-{number}")
            assert world.spool.update(one, None) is None
        await world.spool._sync()
        await world.spool._tidy()
        if second == FIRST_SEGMENTS:
            first = resident_mib(os.getpid())
    world.spool.close()
    grown = resident_mib(os.getpid()) - first
    kept = set[str]()
    for path in segments(folder):
        kept.update(read_segment(path, world.key, {VERSION_KEY: SCHEMA_VERSION})["request_id"].to_pylist())
    return seconds * per_second, len(kept), grown


def outage(seconds: int) -> Iterator[Row]:
    """Yields what is kept, and by how much memory grows."""
    with tempfile.TemporaryDirectory() as name:
        came, kept, grown = asyncio.run(keep(Path(name), seconds, OUTAGE_RATE, 2))
    yield Row("captures kept", float(kept), f"of {came}", kept == came)
    yield Row("memory grown", grown, f"<= {MAX_GROWN_MIB:.0f} MiB", grown <= MAX_GROWN_MIB)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=("rate", "append", "outage"), action="append", default=[])
    parser.add_argument("--captures", type=int, default=100_000)
    parser.add_argument("--hours", type=float, default=12.0)
    options = parser.parse_args()
    parts = {
        "rate": lambda: rate(options.captures),
        "append": lambda: append(min(options.captures, 5_000)),
        "outage": lambda: outage(round(3600 * options.hours)),
    }
    names = [name for name in parts if not options.only or name in options.only]
    rows = [row for name in names for row in timed_rows(name, parts[name]())[0]]
    return publish(RESULT, names, rows, ("measured", "limit"), {})


if __name__ == "__main__":
    sys.exit(main())
