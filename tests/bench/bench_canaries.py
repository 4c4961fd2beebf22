"""What canaries find on a real vLLM, and what not: `make bench-canaries`, a table and build/bench/canaries.json.

vLLM with SmolLM2-135M-Instruct on this machine. A set is taken by `hemostat.canaries.client`; then servers with a
change are started, each as often as --restarts says, and replay it: all 50 sequences in the first restarts, and the 20
shortest ones, those that adapters are asked, in all; a replay that exceeds is repeated in the first five. Replays are
kept in build/bench/canaries/, and those that are there are not made again: with --minutes it can be run in pieces.

restart     the same server, started again: has to be equal
loaded      the same server, --null replays: in turns idle, and beside each other and clients that keep LOAD requests in
            progress: has to be equal. 10,000 replays are resampled from them, sequence by sequence, against baselines
            that are resampled, too
kv fp8      --kv-cache-dtype fp8
layer 1.02  the scales of one linear layer of 210, a down_proj in the middle, times 1.02
checkpoint  the uncompressed model under the same name
texts       W4A16 by GPTQ, of other calibration texts than those of its base
attention   another path of the attention (VLLM_CPU_ATTN_SPLIT_KV=0), which computes the same in a prefill
float32     --dtype float32, of the uncompressed model, whose base is bfloat16
outlier     three engines, one of which is further from the uncompressed model: its divergence times a factor, in the
            same direction (log-probabilities c + (√factor − 1) (c − r) of the real c and r). Computed, of `checkpoint`

cause       which cause is said for six faults: `tests/bench/canary_causes.py`
faults      which of ten faults are found, and by what: `tests/bench/canary_faults.py`

--simulate needs no vLLM: engines whose replays differ by noise with heavy tails (Student's t, 3 degrees of freedom), of
the size that kernels of GPUs have, and changes that shift each token's log-probability by ± a size. Beside the test, an
oracle that knows the noise and the shift of each token: the likelihood ratio of normal noise, with a threshold of the
same false-alarm probability, from its null runs.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import random
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.torch import load_file, save_file

ROOT = Path(__file__).resolve().parents[2]
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))

from tests.bench import canary_causes, canary_faults  # noqa: E402
from tests.bench.forked_vllm import ForkedVllm, Imported  # noqa: E402

from hemostat.canaries.client import CanaryClient  # noqa: E402
from hemostat.canaries.prompts import load  # noqa: E402
from hemostat.reference.server import VllmServer  # noqa: E402
from hemostat_calibration.arrays import Floats  # noqa: E402
from hemostat_calibration.canaries import (  # noqa: E402
    REPLAYS,
    Canary,
    CanarySet,
    Comparison,
    Origin,
    shortest,
)
from hemostat_lab.demo import prompts as demo_prompts  # noqa: E402
from hemostat_lab.demo.checkpoints import cached_checkpoints  # noqa: E402
from hemostat_lab.demo.vllm_server import dtype  # noqa: E402

BUILD = ROOT / "build" / "bench"
WORK = BUILD / "canaries"
NAME = "m"
LOAD = 4
AT_ONCE = 8
"""Replays between two changes of the load; beside clients, also of each other."""
IDLE_EVERY = 4
"""Of so many changes, one is to an idle engine."""
RESAMPLED = 10_000
SCALED = "model.layers.15.mlp.down_proj.weight_scale"
WHOLE = "w4a16"
"""The base whose set is taken."""
WITH_ALL = 2
"""Restarts in which all 50 sequences are replayed; the 20 shortest ones in all."""
REPEATED = 5
"""Restarts in which a replay that exceeds is repeated."""
TEXTS = ("a", "b")
"""Halves of the demo's prompts that GPTQ calibrates on."""


@dataclass(frozen=True, slots=True)
class Server:
    """A vLLM. base: whose set it replays; "" of one whose set is taken."""

    checkpoint: str
    base: str = ""
    arguments: tuple[str, ...] = ()
    environment: dict[str, str] = field(default_factory=dict)
    changed: bool = True


BASES = {
    "w4a16": Server("w4a16"),
    "gptq": Server("gptq a"),
    "uncompressed": Server("reference"),
}
SERVERS = {
    "restart": Server("w4a16", "w4a16", changed=False),
    "kv fp8": Server("w4a16", "w4a16", ("--kv-cache-dtype", "fp8")),
    "layer 1.02": Server("scaled", "w4a16"),
    "checkpoint": Server("reference", "w4a16"),
    "attention": Server("w4a16", "w4a16", environment={"VLLM_CPU_ATTN_SPLIT_KV": "0"}, changed=False),
    "texts": Server("gptq b", "gptq"),
    "float32": Server("reference", "uncompressed", ("--dtype", "float32")),
}
ROWS = [*SERVERS, "loaded", "outlier", "cause", "faults"]


def checkpoint(name: str) -> Path:
    """Made where it is not there."""
    made = cached_checkpoints("w4a16", lambda line: print(line, file=sys.stderr))
    if name in ("w4a16", "reference"):
        return made.compressed if name == "w4a16" else made.reference
    folder = WORK / name.replace(" ", "-")
    if folder.exists():
        return folder
    if name == "scaled":
        folder.mkdir(parents=True)
        for file in made.compressed.iterdir():
            (folder / file.name).write_bytes(file.read_bytes())
        tensors = load_file(folder / "model.safetensors")
        tensors[SCALED] = (tensors[SCALED].float() * 1.02).to(tensors[SCALED].dtype)
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        return folder
    half = TEXTS.index(name[-1])
    lines = [
        json.dumps({"messages": [{"role": message.role, "content": message.content} for message in prompt.messages]})
        for prompt in demo_prompts.load()[half::2]
    ]
    (WORK / f"texts-{half}.jsonl").write_text("\n".join(lines))
    command = [sys.executable, "-m", "hemostat", "compress", str(made.reference), str(folder), "--scheme", "w4a16"]
    more = ["--calibrate", "gptq", "--tokens", "3000", "--max-new-tokens", "24"]
    subprocess.run([*command, *more, "--prompts", str(WORK / f"texts-{half}.jsonl")], check=True)
    return folder


@cache
def imported() -> Imported:
    return Imported()


@contextmanager
def running(name: str, server: Server) -> Iterator[str]:
    """The URL of a vLLM that was started now."""
    arguments = ["--enforce-eager", "--max-model-len", "2048", *server.arguments]
    if "--dtype" not in arguments:
        arguments += ["--dtype", dtype()]
    log = WORK / f"{name.replace(' ', '-')}.log"
    process = ForkedVllm(imported(), checkpoint(server.checkpoint), NAME, log, arguments, server.environment)
    begun = time.monotonic()
    process.start()
    try:
        process.wait_ready(600.0)
        print(f"{name}: ready after {time.monotonic() - begun:.0f} s", file=sys.stderr, flush=True)
        yield process.url
    finally:
        process.stop()
        print(f"{name}: ended after {time.monotonic() - begun:.0f} s", file=sys.stderr, flush=True)


@asynccontextmanager
async def client_of(url: str) -> AsyncIterator[CanaryClient]:
    server = VllmServer(url, timeout=300.0)
    try:
        yield CanaryClient(server, NAME)
    finally:
        await server.close()


async def take(url: str) -> CanarySet:
    async with client_of(url) as client:
        return await client.take(load())


async def baseline(url: str, canaries: Sequence[Canary]) -> CanarySet:
    async with client_of(url) as client:
        return await client.baseline(canaries, await client.origin(), decoded=False)


async def one_or_two(url: str, taken: CanarySet, repeat: bool) -> list[Floats]:
    """One replay, and with `repeat` a second one where the first exceeds, as `hemostat canaries replay` does."""
    async with client_of(url) as client:
        first = await client.replay(taken)
        twice = repeat and taken.compare(first).changed
        return [first, await client.replay(taken)] if twice else [first]


async def replays(url: str, taken: CanarySet, count: int, idle: bool) -> list[Floats]:
    """One after the other, or all at once beside LOAD requests of clients."""
    server, rng = VllmServer(url, timeout=300.0), random.Random(0)
    words = " ".join(prompt.prompt for prompt in load().prompts).split()

    async def clients() -> None:
        while True:
            body = {"model": NAME, "prompt": " ".join(rng.sample(words, rng.randint(5, 60))), "temperature": 1.0}
            await server.post("/v1/completions", body | {"max_tokens": rng.randint(4, 48)}, dict[str, Any])

    tasks = [asyncio.create_task(clients()) for _ in range(0 if idle else LOAD)]
    try:
        if idle:
            return [await CanaryClient(server, NAME).replay(taken) for _ in range(count)]
        return await asyncio.gather(*[CanaryClient(server, NAME).replay(taken) for _ in range(count)])
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await server.close()


def base_set(name: str) -> CanarySet:
    """Of the first one all sequences, of the others its shortest ones: an answer is a text like another."""
    path = WORK / f"{name}.json"
    if not path.exists():
        first = None if name == WHOLE else shortest(base_set(WHOLE).canaries)
        with running(name, BASES[name]) as url:
            taken = asyncio.run(take(url) if first is None else baseline(url, first))
        path.write_bytes(taken.to_bytes())
    return CanarySet.from_bytes(path.read_bytes())


def of_shortest(taken: CanarySet, replay: Floats) -> Floats:
    """The part of a replay of all sequences that is of the shortest ones."""
    ends = np.cumsum([canary.scored for canary in taken.canaries])
    parts = {id(canary): replay[end - canary.scored : end] for canary, end in zip(taken.canaries, ends, strict=True)}
    return np.concatenate([parts[id(canary)] for canary in shortest(taken.canaries)])


def short_set(taken: CanarySet) -> CanarySet:
    values = np.stack([of_shortest(taken, replay) for replay in taken.baseline])
    return CanarySet(shortest(taken.canaries), values, taken.origin)


def measure(name: str, restarts: int, out_of_time: Callable[[], bool]) -> dict[str, Any]:
    """Start the server as often, less those whose replays are there."""
    server, folder = SERVERS[name], WORK / name.replace(" ", "-")
    taken, verdicts, of_all = base_set(server.base), [], []
    short = short_set(taken)
    folder.mkdir(exist_ok=True)
    for number in range(restarts):
        path = folder / f"{number}.npy"
        asked = taken if number < WITH_ALL and server.base == WHOLE else short
        if not path.exists():
            if out_of_time():
                break
            with running(name, server) as url:
                np.save(path, np.stack(asyncio.run(one_or_two(url, asked, number < REPEATED))))
        replayed = np.load(path)
        if asked is taken:
            of_all.append([taken.compare(replay) for replay in replayed])
            replayed = [of_shortest(taken, replay) for replay in replayed]
        verdicts.append([short.compare(replay) for replay in replayed])
    return {
        "has_to_change": server.changed,
        **_of_restarts(verdicts),
        "all_sequences": _of_restarts(of_all),
    }


def _of_restarts(verdicts: list[list[Comparison]]) -> dict[str, Any]:
    """How many exceed at the first replay, and of those that were replayed twice how many at both."""
    return {
        "restarts": len(verdicts),
        "first_exceeds": sum(replays[0].changed for replays in verdicts),
        "repeated": sum(len(replays) > 1 for replays in verdicts),
        "changed": sum(len(replays) > 1 and all(replay.changed for replay in replays) for replays in verdicts),
        **_figures([verdict for replays in verdicts for verdict in replays]),
    }


def _figures(verdicts: list[Comparison]) -> dict[str, Any]:
    if not verdicts:
        return {}
    votes, nats = [verdict.votes for verdict in verdicts], [verdict.nats for verdict in verdicts]
    return {"votes": [min(votes), max(votes)], "needed": verdicts[0].needed, "nats": [min(nats), max(nats)]}


def null(count: int, out_of_time: Callable[[], bool]) -> dict[str, Any]:
    """Replays of the unchanged server, idle and beside clients, and what is resampled from them."""
    taken, path = short_set(base_set(WHOLE)), WORK / "loaded.npy"
    replayed = list(np.load(path)) if path.exists() else []
    if len(replayed) < count and not out_of_time():
        with running("loaded", BASES[WHOLE]) as url:
            while len(replayed) < count and not out_of_time():
                idle = len(replayed) // AT_ONCE % IDLE_EVERY == 0
                replayed += asyncio.run(replays(url, taken, min(AT_ONCE, count - len(replayed)), idle))
                np.save(path, np.stack(replayed))
    verdicts = [taken.compare(replay) for replay in replayed[:count]]
    return {
        "replays": len(verdicts),
        "to_the_last_bit": sum(bool((replay == taken.baseline[0]).all()) for replay in replayed[:count]),
        "changed": sum(verdict.changed for verdict in verdicts),
        **_figures(verdicts),
        "resampled": resampled(taken, np.stack(replayed[:count])) if replayed else {},
    }


def resampled(taken: CanarySet, replayed: Floats) -> dict[str, Any]:
    """Each sequence of a replay, and of the baseline's replays, is drawn by itself from the real ones. Tolerance 0: the
    noise alone decides."""
    rng, lengths = np.random.default_rng(0), [canary.scored for canary in taken.canaries]
    changed, votes = 0, []
    for begin in range(0, RESAMPLED, 100):
        of = [rng.integers(0, len(replayed), (REPLAYS, len(lengths))) for _ in range(2)]
        baseline = np.stack([_drawn(replayed, of[0][n], lengths) for n in range(REPLAYS)])
        drawn = CanarySet(taken.canaries, baseline, taken.origin)
        for _ in range(min(100, RESAMPLED - begin)):
            verdict = drawn.compare(_drawn(replayed, rng.integers(0, len(replayed), len(lengths)), lengths), 0.0)
            votes.append(verdict.votes)
            changed += verdict.changed
    return {"replays": RESAMPLED, "changed": changed, "most_votes": max(votes)}


def _drawn(replayed: Floats, which: np.ndarray[Any, Any], lengths: list[int]) -> Floats:
    ends = np.cumsum(lengths)
    return np.concatenate(
        [replayed[n, end - length : end] for n, length, end in zip(which, lengths, ends, strict=True)]
    )


def outlier() -> list[dict[str, Any]]:
    """By factor of the divergence: who is named, and the median distance of the one that differs."""
    taken, reference = base_set(WHOLE), np.load(WORK / "checkpoint" / "0.npy")[0]
    compressed = taken.baseline[0]
    rows = []
    for factor in (1.0, 1.05, 1.1, 1.2, 1.5):
        further = compressed + (factor**0.5 - 1.0) * (compressed - reference)
        comparisons = taken.compare_engines({"a": compressed, "b": further, "c": compressed})
        named = [name for name, comparison in comparisons.items() if comparison.changed]
        rows.append({"factor": factor, "named": named, "votes": comparisons["b"].votes, "nats": comparisons["b"].nats})
    return rows


def simulate(runs: int) -> list[dict[str, Any]]:
    """Simulated engines: by noise and shift, nats a token, how many of the replays exceed, and the oracle's."""
    lengths = [54, 60, 72, 80] * 12 + [570, 915]
    canaries = tuple(Canary("", np.zeros(n - 8, np.int32), np.zeros(8, np.int32)) for n in lengths)
    size, rng, rows = sum(canary.scored for canary in canaries), np.random.default_rng(0), []
    for noise in (0.005, 0.02):

        def replay(noise: float = noise) -> Floats:
            jitter: Floats = rng.standard_t(3, size) * (noise / np.sqrt(3.0))
            return jitter

        signs = rng.choice([-1.0, 1.0], size)
        null_scores = [float(signs @ replay()) for _ in range(runs)]
        # The oracle's threshold: as many standard deviations as the false-alarm probability asks of normal noise.
        threshold = 4.73 * float(np.std(null_scores))
        for times in (0.0, 0.1, 0.25, 0.5, 0.75, 1.0, 1.5, 2.0, 3.0):
            shift, ours, oracle = times * noise, 0, 0
            count = runs if times else max(runs, RESAMPLED)
            for n in range(count):
                if n % 20 == 0:
                    taken = CanarySet(canaries, np.stack([replay() for _ in range(REPLAYS)]), Origin(""))
                now = replay() + shift * signs
                ours += taken.compare(now, 0.0).changed
                oracle += float(signs @ now) > threshold
            shares = {"found": ours / count, "oracle": oracle / count}
            rows.append({"noise": noise, "shift": shift, "runs": count, **shares})
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description="what canaries find on a real vLLM")
    parser.add_argument("--only", action="append", choices=ROWS, help="this row only")
    parser.add_argument("--restarts", type=int, default=20, help="of each server (20)")
    parser.add_argument("--null", type=int, default=200, help="replays of the unchanged server (200)")
    parser.add_argument("--simulate", type=int, metavar="RUNS", help="the simulation alone, so many replays a row")
    parser.add_argument("--minutes", type=float, default=1e9, help="begin nothing later; what is there is kept")
    arguments = parser.parse_args()
    ends = time.monotonic() + 60.0 * arguments.minutes

    def out_of_time() -> bool:
        return time.monotonic() >= ends

    WORK.mkdir(parents=True, exist_ok=True)
    path = BUILD / "canaries.json"
    report = json.loads(path.read_text()) if path.exists() else {}
    if arguments.simulate:
        report["simulated"] = simulate(arguments.simulate)
        for row in report["simulated"]:
            text = "noise {noise:.3f}, shift {shift:.4f}, {runs} replays: {found:.2%}, the oracle {oracle:.2%}"
            print(text.format(**row))
    else:
        for name in arguments.only or ROWS:
            row: Any
            if name == "outlier":
                row = outlier()
            elif name == "cause":
                row = canary_causes.report(out_of_time)
            elif name == "faults":
                row = canary_faults.report(out_of_time)
            elif name == "loaded":
                row = null(arguments.null, out_of_time)
            else:
                row = measure(name, arguments.restarts, out_of_time)
            report[name] = row
            print(f"{name:12} {json.dumps(row)}", flush=True)
    path.write_text(json.dumps(report, indent=1))


if __name__ == "__main__":
    with contextlib.suppress(KeyboardInterrupt):
        main()
