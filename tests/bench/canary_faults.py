"""Measures which faults of engines are found, and by what: `make bench-canaries ARGS="--only faults"`.

vLLM's CPU build with SmolLM2-135M as W4A16 and Hemostat's plugin. Ten faults, five times each at places that are drawn
once. What is measured is kept in build/bench/canaries/faults/, and not measured again: with --minutes it can be run in
pieces. Each fault in turn has its first case, so that a piece has some of all.

Faults of the worker are switched on and off in one server (`tests.support.engine_faults`). The others are properties of
a server: another default temperature, another chat template, a tokenizer without one of its merges, which is drawn from
those that the prompts use. Each is a server of its own.

Two faults of the list are not here: another kernel of adapters of rank 16, and one of two engines behind a router.

A case is found if two replays in a row show it: of the set with decoded answers, of the sequences behind a cached
prefix, or of the texts as clients send them. What `prompt_logprobs` alone find is measured, too. For the endless token
0, eight streams or more are in progress meanwhile.
"""

from __future__ import annotations

import asyncio
import json
import random
import sys
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from tests.support.paths import ROOT
from tests.support.running_vllm import (
    FAULTS_ARGUMENTS,
    FAULTS_ENVIRONMENT,
    VLLM_ARGUMENTS,
    RunningVllm,
    running_vllm,
)
from tokenizers import Tokenizer

from hemostat.canaries import client as client_module
from hemostat.canaries.client import CanaryClient
from hemostat.canaries.prompts import Prompts, load
from hemostat.reference.server import VllmServer
from hemostat_calibration import state_codec
from hemostat_calibration.canaries import TOLERANCE_NATS, CanarySet
from hemostat_calibration.canary_prefix import prefix_sequences
from hemostat_lab.demo.checkpoints import Checkpoints, cached_checkpoints

WORK = ROOT / "build" / "bench" / "canaries" / "faults"
PLACES = 5
SEQUENCES, ANSWER_TOKENS = 24, 20
"""The numbers of sequences, and of tokens of an answer: fewer than in service, so that a case takes a minute."""
LAYERS, HEADS = 30, 9
STREAMS = 8
SCHEMA = 1
Fault = tuple[str, dict[str, Any]]
ARGUMENTS = [argument for argument in VLLM_ARGUMENTS if argument != "--no-enable-prefix-caching"]


@dataclass(frozen=True, slots=True)
class Case:
    """A fault at a place. fault: for `Faults.inject`. arguments: of a server of its own. merge: the number of the
    tokenizer's merge that is removed, among those that the prompts use. streams: requests in progress meanwhile."""

    fault: Fault | None = None
    arguments: tuple[str, ...] = ()
    merge: int | None = None
    streams: int = 0


@dataclass(frozen=True, slots=True)
class Found:
    """The result of a case: what two replays in a row have found. seconds: of both. detail: of the second one."""

    decoded: bool
    prefix: bool
    texts: bool
    prompt_logprobs: bool
    seconds: float
    detail: str


@dataclass(frozen=True, slots=True)
class Sets:
    """The sets of the healthy server. prefilled: the same sequences by `prompt_logprobs`."""

    decoded: CanarySet
    prefilled: CanarySet
    prefix: CanarySet


def cases() -> dict[str, list[Case]]:
    """Returns the cases by fault; the first ones have no fault."""
    rng = random.Random(46)
    layers = [rng.sample(range(LAYERS), PLACES) for _ in range(4)]
    linear = rng.choices(("down_proj", "gate_up_proj", "qkv_proj", "o_proj"), k=PLACES)
    heads = [rng.randrange(HEADS) for _ in range(2 * PLACES)]
    how = ("other", "zero", "noise", "other", "zero")
    templates = [
        f"{{% for m in messages %}}[{sign}{{{{ m.role }}}}] {{{{ m.content }}}}\n{{% endfor %}}[{sign}assistant]"
        for sign in "#$%&*"
    ]
    return {
        "none": [Case() for _ in range(PLACES)],
        "weights of a layer times 1.02": [
            Case(("weights", {"layer": layer, "name": name, "scale": 1.02}))
            for layer, name in zip(layers[0], linear, strict=True)
        ],
        "o_proj of one head zeroed": [
            Case(("head", {"layer": layer, "head": head}))
            for layer, head in zip(layers[1], heads[:PLACES], strict=True)
        ],
        "FP8 KV cache": [
            Case(("kv_cast", more)) for more in ({}, {"dtype": "e5m2"}, {"parts": "k"}, {"parts": "v"}, {"first": 15})
        ],
        "prefix block overwritten": [Case(("stale_prefix", {"block": n, "how": how[n]})) for n in range(PLACES)],
        "decoding alone scaled": [
            Case(("decoding", {"layer": layer, "name": "o_proj", "scale": 1.2})) for layer in layers[2]
        ],
        "NaN in one head": [
            Case(("head", {"layer": layer, "head": head, "value": None}))
            for layer, head in zip(layers[3], heads[PLACES:], strict=True)
        ],
        "endless token 0 under eight streams": [Case(("token_zero", {}), streams=STREAMS + n) for n in range(PLACES)],
        "default temperature changed": [
            Case(arguments=("--override-generation-config", json.dumps({"temperature": value})))
            for value in (0.2, 0.5, 0.6, 0.7, 1.5)
        ],
        "chat template replaced": [Case(arguments=("--chat-template", template)) for template in templates],
        "a tokenizer's merge removed": [Case(merge=n) for n in rng.sample(range(40), PLACES)],
    }


def prompts() -> Prompts:
    every = load()
    return replace(every, prompts=every.prompts[:SEQUENCES])


def without_merge(checkpoint: Path, number: int, folder: Path) -> Path:
    """Returns a copy of a checkpoint whose tokenizer lacks one of the merges that the prompts use."""
    tokenizer = json.loads((checkpoint / "tokenizer.json").read_text())
    encoder = Tokenizer.from_file(str(checkpoint / "tokenizer.json"))
    tokens = {token for prompt in prompts().prompts for token in encoder.encode(prompt.prompt).tokens}
    merges = tokenizer["model"]["merges"]
    made = ["".join(each.split(" ") if isinstance(each, str) else each) for each in merges]
    used = [n for n, token in enumerate(made) if token in tokens]
    del merges[used[number % len(used)]]
    folder.mkdir()
    for file in checkpoint.iterdir():
        if file.name != "tokenizer.json":
            (folder / file.name).symlink_to(file.resolve())
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    return folder


@asynccontextmanager
async def clients(server: RunningVllm) -> AsyncIterator[tuple[VllmServer, CanaryClient, CanaryClient]]:
    """The server, and clients of it with and without what the plugin acts on."""
    vllm = VllmServer(server.url, timeout=300.0)
    try:
        signed = CanaryClient(vllm, server.model, sign=server.admin.signed)
        yield vllm, signed, CanaryClient(vllm, server.model)
    finally:
        await vllm.close()


async def take(server: RunningVllm) -> Sets:
    async with clients(server) as (_, signed, plain):
        decoded = await signed.take(prompts())
        if not decoded.decoded:
            raise RuntimeError("the plugin decodes no given tokens")
        prefilled = await plain.baseline(decoded.canaries, decoded.origin, decoded=False)
        sequences = prefix_sequences(decoded.canaries, 0, decoded.origin.max_model_len)
        return Sets(decoded, prefilled, await signed.baseline(sequences, decoded.origin, decoded=True))


@asynccontextmanager
async def streaming(vllm: VllmServer, model: str, streams: int) -> AsyncIterator[None]:
    """Keeps so many streams in progress."""

    async def stream(number: int) -> None:
        while True:
            body = {"model": model, "prompt": f"Story {number}:", "max_tokens": 400, "ignore_eos": True}
            await vllm.post("/v1/completions", body, dict[str, Any])

    tasks = [asyncio.create_task(stream(number)) for number in range(streams)]
    try:
        yield
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def measure(server: RunningVllm, sets: Sets, case: Case) -> Found:
    async with clients(server) as (vllm, signed, plain), streaming(vllm, server.model, case.streams):
        begun = time.monotonic()
        decoded, changed = await signed.compare(sets.decoded, TOLERANCE_NATS)
        prefix = (await signed.compare(sets.prefix, TOLERANCE_NATS))[1]
        assert sets.decoded.texts is not None
        texts = (await signed.texts().compare(sets.decoded.texts))[1]
        seconds = time.monotonic() - begun
        alone = (await plain.compare(sets.prefilled, TOLERANCE_NATS))[1]
        return Found(changed, prefix, texts, alone, seconds, decoded.summary)


@contextmanager
def running(case: Case | None) -> Iterator[RunningVllm]:
    """case: one that has a server of its own."""
    made = cached_checkpoints("w4a16", lambda line: print(line, file=sys.stderr))
    arguments = [*ARGUMENTS, *FAULTS_ARGUMENTS, *(() if case is None else case.arguments)]
    with TemporaryDirectory() as folder:
        checkpoint = made.compressed
        if case is not None and case.merge is not None:
            checkpoint = without_merge(checkpoint, case.merge, Path(folder) / "model")
        with running_vllm(Checkpoints(made.reference, checkpoint), Path(folder), arguments, FAULTS_ENVIRONMENT) as vllm:
            yield vllm


def _path(fault: str, number: int) -> Path:
    return WORK / f"{fault.replace(' ', '-')}-{number}.json"


def missing() -> list[tuple[str, int, Case]]:
    """The cases that were not measured: the first one of each fault comes first."""
    every = [(n, fault, case) for fault, each in cases().items() for n, case in enumerate(each)]
    left = [
        (fault, n, case) for n, fault, case in sorted(every, key=lambda row: row[0]) if not _path(fault, n).exists()
    ]
    return [row for row in left if not _own_server(row[2])] + [row for row in left if _own_server(row[2])]


def _own_server(case: Case) -> bool:
    return bool(case.arguments) or case.merge is not None


def _keep(fault: str, number: int, found: Found) -> None:
    _path(fault, number).write_bytes(state_codec.encode(found, SCHEMA))
    print(f"{fault} {number}: {found}", file=sys.stderr, flush=True)


def measure_missing(out_of_time: Callable[[], bool]) -> None:
    WORK.mkdir(parents=True, exist_ok=True)
    client_module.ANSWER_TOKENS = ANSWER_TOKENS
    taken, left = WORK / "sets.json", missing()
    injected = [row for row in left if not _own_server(row[2])]
    if (injected or not taken.exists()) and not out_of_time():
        with running(None) as server:
            if not taken.exists():
                taken.write_bytes(state_codec.encode(asyncio.run(take(server)), SCHEMA))
            sets = state_codec.decode(Sets, taken.read_bytes(), SCHEMA)
            for fault, number, case in injected:
                if out_of_time():
                    return
                inject(server, case.fault)
                _keep(fault, number, asyncio.run(measure(server, sets, case)))
    for fault, number, case in left:
        if _own_server(case) and not out_of_time():
            sets = state_codec.decode(Sets, taken.read_bytes(), SCHEMA)
            with running(case) as server:
                _keep(fault, number, asyncio.run(measure(server, sets, case)))


def inject(server: RunningVllm, fault: Fault | None) -> None:
    async def run() -> None:
        vllm = VllmServer(server.url, timeout=300.0)
        try:
            body = {"method": "inject", "args": [json.dumps(fault or [])]}
            await vllm.post("/collective_rpc", body, dict[str, Any])
        finally:
            await vllm.close()

    asyncio.run(run())


def report(out_of_time: Callable[[], bool]) -> dict[str, Any]:
    """The benchmark's row: by fault, the number of cases that each way has found."""
    measure_missing(out_of_time)
    rows: dict[str, Any] = {"missing": len(missing())}
    for fault, each in cases().items():
        paths = [_path(fault, n) for n in range(len(each))]
        found = [state_codec.decode(Found, path.read_bytes(), SCHEMA) for path in paths if path.exists()]
        ways = ("decoded", "prefix", "texts", "prompt_logprobs")
        rows[fault] = {
            "measured": len(found),
            "found": sum(case.decoded or case.prefix or case.texts for case in found),
            **{way: sum(getattr(case, way) for case in found) for way in ways},
            "seconds": max((round(case.seconds) for case in found), default=0),
        }
    return rows


if __name__ == "__main__":
    ends = time.monotonic() + 60.0 * float(sys.argv[1])
    for name, row in report(lambda: time.monotonic() >= ends).items():
        print(name, json.dumps(row))
