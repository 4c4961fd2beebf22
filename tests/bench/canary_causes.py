"""Which cause is found for faults in a real vLLM: `make bench-canaries ARGS="--only cause"`.

vLLM's CPU build with SmolLM2-135M as W4A16, prompts in chunks of 512 tokens, blocks of 32, a text of 576 tokens. Six
faults, ten times each (`FAULTS`), by `tests.support.engine_faults`: in a server that runs, a fault is switched on,
measured and switched off. Each kind is measured in three processes, an FP8 cache, which is a flag, in one each, and one
engine of two in two pairs. What was measured is kept in build/bench/canaries/causes/, and not measured again.

A verdict is right, unknown or wrong.
"""

from __future__ import annotations

import asyncio
import json
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from tests.bench.forked_vllm import ForkedVllm, Imported
from tests.support.paths import ROOT
from tests.support.running_vllm import FAULTS_ARGUMENTS, FAULTS_ENVIRONMENT

from hemostat.canaries.prompts import load
from hemostat.canaries.variants import VariantClient
from hemostat.reference.server import VllmServer
from hemostat_calibration import state_codec
from hemostat_calibration.canaries import TOLERANCE_NATS, Canary
from hemostat_calibration.canary_cause import Cause, CauseBaseline, Measured, Verdict, of_engines
from hemostat_lab.demo.checkpoints import cached_checkpoints
from hemostat_lab.demo.vllm_server import LOGITS_PROCESSOR, dtype

WORK = ROOT / "build" / "bench" / "canaries" / "causes"
NAME = "m"
TEXT = 576
"""Tokens: two pieces behind the end of the first chunk."""
ARGUMENTS = (
    *("--enforce-eager", "--dtype", dtype(), "--max-model-len", "2048", "--block-size", "32"),
    *("--max-num-batched-tokens", "512", "--logits-processors", LOGITS_PROCESSOR),
    *FAULTS_ARGUMENTS,
)


@dataclass(frozen=True, slots=True)
class Case:
    """One fault. fault: for `Faults.inject`; None: none. server: cases with the same one are measured in one process.
    arguments: of that server, where the fault is one of its flags. engines: of how many one has the fault."""

    expected: Cause
    server: int
    fault: tuple[str, dict[str, Any]] | None = None
    arguments: tuple[str, ...] = ()
    engines: int = 1


def _weights() -> Iterator[Case]:
    names = ("down_proj", "gate_up_proj", "qkv_proj", "o_proj", "down_proj")
    for n, (layer, name) in enumerate(zip((3, 9, 15, 21, 27), names, strict=True)):
        yield Case(Cause.WEIGHTS, n % 3, ("weights", {"layer": layer, "name": name, "scale": 1.02}))
        yield Case(Cause.WEIGHTS, n % 3, ("weights", {"layer": layer + 1, "name": name, "noise": 0.03}))


def _kv_casts() -> Iterator[Case]:
    for number, flag in ((10, "fp8"), (11, "fp8_e5m2"), (12, "fp8"), (13, "fp8_e5m2")):
        yield Case(Cause.KV_CACHE, number, None, ("--kv-cache-dtype", flag))
    casts = ({}, {"dtype": "e5m2"}, {"parts": "k"}, {"parts": "v"}, {"first": 15}, {"dtype": "e5m2", "last": 9})
    for n, arguments in enumerate(casts):
        yield Case(Cause.KV_CACHE, n % 3, ("kv_cast", arguments))


def _prefixes() -> Iterator[Case]:
    for n, how in enumerate(("other", "zero", "noise") * 3 + ("other",)):
        yield Case(Cause.PREFIX_CACHE, n % 3, ("stale_prefix", {"block": n, "how": how}))


def _batches() -> Iterator[Case]:
    for n, layer in enumerate((1, 4, 7, 10, 13, 16, 19, 22, 25, 28)):
        name, rows = ("down_proj", "qkv_proj")[n % 2], ("all", "later")[n // 2 % 2]
        yield Case(Cause.BATCH, n % 3, ("batch", {"layer": layer, "name": name, "rows": rows}))


def _chunks() -> Iterator[Case]:
    for n, layer in enumerate((2, 5, 8, 11, 14, 17, 20, 23, 26, 29)):
        more = {"name": ("down_proj", "qkv_proj")[n % 2], "rows": ("first", "all")[n // 2 % 2], "cached": n % 3 > 0}
        yield Case(Cause.CHUNK_BOUNDARY, n % 3, ("chunk", {"layer": layer} | more))


def _one_of_two() -> Iterator[Case]:
    for n, case in enumerate([*_weights()][:5] + [*_kv_casts()][4:9]):
        yield Case(Cause.ONE_ENGINE, 20 + n % 2, case.fault, engines=2)


FAULTS: dict[str, tuple[Case, ...]] = {
    "none": tuple(Case(Cause.NONE, n) for n in (0, 1, 2, 20, 21)),
    "weights of a layer": tuple(_weights()),
    "KV cast": tuple(_kv_casts()),
    "stale prefix block": tuple(_prefixes()),
    "batch-dependent kernel": tuple(_batches()),
    "chunk boundary": tuple(_chunks()),
    "one engine of two": tuple(_one_of_two()),
}


class Engine:
    """A vLLM that runs."""

    def __init__(self, url: str) -> None:
        self.url = url

    def call(self, use: Any) -> Any:
        async def run() -> Any:
            server = VllmServer(self.url, timeout=300.0)
            try:
                return await use(server)
            finally:
                await server.close()

        return asyncio.run(run())

    def inject(self, fault: tuple[str, dict[str, Any]] | None) -> None:
        body = {"method": "inject", "args": [json.dumps(fault or [])]}
        self.call(lambda server: server.post("/collective_rpc", body, dict[str, Any]))

    def measure(self, baseline: CauseBaseline) -> Measured:
        result: Measured = self.call(lambda server: VariantClient(server, NAME, _at_once).measure(baseline.text))
        return result

    def baseline(self) -> CauseBaseline:
        async def take(server: VllmServer) -> CauseBaseline | None:
            texts = [await server.tokenize(NAME, prompt.prompt, special=True) for prompt in load().prompts]
            canaries = [Canary("", np.array(ids[:-1], np.int32), np.array(ids[-1:], np.int32)) for ids in texts]
            return await VariantClient(server, NAME, _at_once).baseline(canaries, TEXT + 2)

        result: CauseBaseline = self.call(take)
        return result


async def _at_once() -> None:
    """A gate that is open."""


@contextmanager
def engine(imported: Imported, log: str, arguments: Sequence[str] = ()) -> Iterator[Engine]:
    """Started now."""
    checkpoint = cached_checkpoints("w4a16", lambda line: print(line, file=sys.stderr)).compressed
    more = [*ARGUMENTS, *arguments]
    process = ForkedVllm(imported, checkpoint, NAME, WORK / f"{log}.log", more, FAULTS_ENVIRONMENT)
    process.start()
    try:
        process.wait_ready(600.0)
        yield Engine(process.url)
    finally:
        process.stop()


def _kept(path: Path, kind: type[Any], make: Any) -> Any:
    if not path.exists():
        path.write_bytes(state_codec.encode(make(), 1))
    return state_codec.decode(kind, path.read_bytes(), 1)


def _paths(fault: str, number: int, case: Case) -> list[Path]:
    """Of the engines that a case measures. Of two, the second one has the fault; the first one is measured once."""
    name = fault.replace(" ", "-")
    return [*([WORK / f"{name}-server-{case.server}.json"] * (case.engines - 1)), WORK / f"{name}-{number}.json"]


def _missing() -> list[tuple[str, int, Case]]:
    """The cases that were not measured, each fault in turn."""
    every = [(n, fault, case) for fault, cases in FAULTS.items() for n, case in enumerate(cases)]
    return [
        (fault, n, case)
        for n, fault, case in sorted(every, key=lambda row: row[0])
        if not all(path.exists() for path in _paths(fault, n, case))
    ]


def measure(out_of_time: Callable[[], bool]) -> None:
    """What is not there yet."""
    WORK.mkdir(parents=True, exist_ok=True)
    begun, missing, imported = time.monotonic(), _missing(), Imported()
    taken = WORK / "baseline.json"
    for number in dict.fromkeys(case.server for _, _, case in missing):
        here = [(fault, n, case) for fault, n, case in missing if case.server == number]
        with ExitStack() as stack:
            count = max(case.engines for _, _, case in here)
            starts = [engine(imported, f"{number}-{n}", here[0][2].arguments) for n in range(count)]
            engines = [stack.enter_context(start) for start in starts]
            print(f"{time.monotonic() - begun:.0f} s: server {number} is up", file=sys.stderr, flush=True)
            baseline: CauseBaseline = _kept(taken, CauseBaseline, engines[0].baseline)
            for fault, n, case in here:
                for which in range(case.engines):
                    if out_of_time():
                        return
                    engines[which].inject(case.fault if which == case.engines - 1 else None)
                    path = _paths(fault, n, case)[which]
                    measured = _kept(path, Measured, lambda: engines[which].measure(baseline))  # noqa: B023
                    said = baseline.explain(measured, TOLERANCE_NATS).text
                    print(f"{time.monotonic() - begun:.0f} s: {fault} {n}: {said}", file=sys.stderr, flush=True)


def verdicts() -> dict[str, list[tuple[Case, Verdict]]]:
    """Of what is there."""
    baseline = state_codec.decode(CauseBaseline, (WORK / "baseline.json").read_bytes(), 1)
    result = dict[str, list[tuple[Case, Verdict]]]()
    for fault, cases in FAULTS.items():
        result[fault] = []
        for n, case in enumerate(cases):
            paths = _paths(fault, n, case)
            if all(path.exists() for path in paths):
                found = [state_codec.decode(Measured, path.read_bytes(), 1) for path in paths]
                said = {
                    f"engine {which + 1}": baseline.explain(measured, TOLERANCE_NATS)
                    for which, measured in enumerate(found)
                }
                result[fault].append((case, of_engines(said)))
    return result


def report(out_of_time: Callable[[], bool]) -> dict[str, Any]:
    """The benchmark's row."""
    measure(out_of_time)
    rows: dict[str, Any] = {"missing": len(_missing())}
    for fault, found in verdicts().items():
        count = Counter(
            "right" if verdict.cause is case.expected else "unknown" if verdict.cause is Cause.UNKNOWN else "wrong"
            for case, verdict in found
        )
        rows[fault] = {name: count[name] for name in ("right", "unknown", "wrong")} | {
            "said": found[0][1].text if found else ""
        }
    faults = [row for name, row in rows.items() if name not in {"none", "missing"}]
    rows["all"] = {name: sum(row[name] for row in faults) for name in ("right", "unknown", "wrong")}
    return rows


if __name__ == "__main__":
    ends = time.monotonic() + float(sys.argv[1])
    for name, row in report(lambda: time.monotonic() >= ends).items():
        print(name, json.dumps(row))
