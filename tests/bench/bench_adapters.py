"""What adapters cost vLLM's decoding on a CPU: the second part of `make bench-engine`; build/bench/adapters.json.

Engines (V1, in process, no HTTP server) decode the same batch of W4A16 SmolLM2: one without --enable-lora, and for each
rank two with it, one with vLLM's own operations and one with Hemostat's grouped product. One of them works at a time;
the others sleep in a read. A round is one burst of decoding steps in each arm, in random order; ratios to the engine
without --enable-lora are taken round by round. The adapters are random, of all linear layers: what they cost does not
depend on what they say.

none   no row of the batch has an adapter     some   half of the rows     all   every row

As in `bench_engine.py`, two processes differ by a percent or so for as long as they live, so engines are started anew
(`--starts`), and the bootstrap draws starts first, then rounds within them. `fastest_quarter` is the same with the
fastest quarter of each burst's steps, for machines on which other programs take the cores now and then.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import sys
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace
from typing import IO, Any

import numpy as np
import numpy.typing as npt

from hemostat_calibration.profiles.peft import peft_files
from hemostat_lab.demo.checkpoints import cached_checkpoints
from hemostat_lab.demo.vllm_server import dtype, runnable

ROOT = Path(__file__).resolve().parents[2]
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))

from tests.bench.engine_child import (  # noqa: E402  the root is no package
    PROCESSOR_TIME,
    EngineChild,
    add_option,
    step_seconds,
    use_one_core,
)
from tests.support.adapter_profiles import LAYERS, SHAPES, smollm_adapter  # noqa: E402  the root is no package

BUILD = ROOT / "build" / "bench"
PLAIN, VLLM, GROUPED = "without --enable-lora", "vLLM's operations", "grouped product"
ROWS = ("none", "some", "all")
BOOTSTRAP = 10_000


class Engine(EngineChild):
    """Bursts of decoding steps."""

    def __init__(
        self,
        model: Path,
        log: Path,
        batch: int,
        rank: int = 0,
        adapter: str = "",
        grouped: bool = False,
        *,
        processor_time: bool = False,
    ):
        environment: dict[str, str] = {}
        if rank:
            environment |= {"HEMOSTAT_ADAPTERS": "1", "HEMOSTAT_ADAPTERS_CPU_PRODUCT": "1" if grouped else "0"}
        arguments = ["--child", str(model), "--batch", str(batch), "--ranks", str(rank), "--adapter", adapter]
        arguments += [PROCESSOR_TIME] if processor_time else []
        super().__init__(Path(__file__).resolve(), arguments, environment, log)

    def ready(self) -> None:
        """Wait until it has started, and check that it runs with the operations that it is measured for."""
        self.ask({})

    def burst(self, steps: int, adapted: int) -> list[float]:
        """Seconds of every decoding step, with the adapter in the first `adapted` rows."""
        seconds: list[float] = self.ask({"steps": steps, "adapted": adapted})["seconds"]
        return seconds


def serve_bursts(model: str, batch: int, rank: int, adapter: str, processor_time: bool, answers: IO[str]) -> None:
    """The child: bursts that are asked for on stdin, one JSON line each."""
    from vllm import LLM, SamplingParams
    from vllm.lora.request import LoRARequest

    from hemostat_engine.adapters.state import state

    lora = {"enable_lora": True, "max_lora_rank": max(rank, 1), "max_loras": 2} if rank else {}
    llm = LLM(
        model=str(runnable(Path(model))),
        enforce_eager=True,
        dtype=dtype(),
        max_model_len=2048,
        max_num_seqs=max(batch, 2),
        enable_prefix_caching=False,
        **lora,
    )
    if rank:
        wanted = os.environ["HEMOSTAT_ADAPTERS_CPU_PRODUCT"] == "1"
        assert state.grouped == wanted, "the general plugin is not the one that is measured"
    engine = llm.llm_engine
    admitted = 0
    for line in sys.stdin:
        question = json.loads(line)
        if not question:
            answers.write("{}\n")
            answers.flush()
            continue
        request = LoRARequest(Path(adapter).name, 1, adapter) if adapter else None
        for i in range(batch):
            admitted += 1
            engine.add_request(
                str(admitted),
                {"prompt_token_ids": [1, 504 + i, 2837, 282, 4649, 314]},
                SamplingParams(temperature=0, max_tokens=question["steps"] + 1, ignore_eos=True),
                lora_request=request if i < question["adapted"] else None,
            )
        engine.step()  # the prompts
        seconds = step_seconds(engine, processor_time=processor_time)
        if question["adapted"]:
            assert state.report()["adapters"] == [Path(adapter).name], "the adapter is not loaded"
        json.dump({"seconds": seconds}, answers)
        answers.write("\n")
        answers.flush()


def measure(arguments: argparse.Namespace, model: Path, folder: Path) -> dict[int, npt.NDArray[np.float64]]:
    """By rank: seconds of every decoding step, float64 [starts, rounds, arms, steps]; the arms are those of `names`."""
    order = random.Random(1)
    adapted = (0, arguments.batch // 2, arguments.batch)
    arms, processor_time = names(ours=arguments.ours), arguments.processor_time
    result = {
        rank: np.zeros((arguments.starts, arguments.rounds, len(arms), arguments.steps)) for rank in arguments.ranks
    }
    for start in range(arguments.starts):
        plain = Engine(model, folder / f"plain-{start}.log", arguments.batch, processor_time=processor_time)
        try:
            for rank in arguments.ranks:
                adapter = folder_of(rank, folder)
                logs = {g: folder / f"{rank}-{g}-{start}.log" for g in ((True,) if arguments.ours else (False, True))}
                loaded = {
                    VLLM if not g else GROUPED: Engine(
                        model, log, arguments.batch, rank, str(adapter), g, processor_time=processor_time
                    )
                    for g, log in logs.items()
                }
                engines = {PLAIN: plain, **loaded}
                try:
                    for engine in engines.values():
                        engine.ready()
                    for number in range(-arguments.warmups, arguments.rounds):
                        progress(f"start {start + 1}, rank {rank}, round {number + 1} of {arguments.rounds}")
                        for arm in order.sample(range(len(arms)), len(arms)):
                            which, rows = arms[arm]
                            seconds = engines[which].burst(arguments.steps, adapted[ROWS.index(rows)])
                            if number >= 0:
                                result[rank][start, number, arm] = seconds
                finally:
                    for engine in loaded.values():
                        engine.stop()
        finally:
            plain.stop()
    return result


def names(*, ours: bool = False) -> list[tuple[str, str]]:
    """Returns (engine, rows) of every arm; the first is the one that the others are compared with. ours: without vLLM's
    operations."""
    operations = (GROUPED,) if ours else (VLLM, GROUPED)
    return [(PLAIN, "none"), *((which, rows) for which in operations for rows in ROWS)]


def folder_of(rank: int, parent: Path) -> Path:
    """The PEFT folder of a random adapter."""
    profile = smollm_adapter(rank, seed=rank)
    folder = parent / profile.version
    if not folder.exists():
        folder.mkdir()
        for name, data in peft_files(profile, "").items():
            (folder / name).write_bytes(data)
    return folder


def ratio(quotients: npt.NDArray[np.float64]) -> dict[str, Any]:
    """Median over rounds and a 95 % bootstrap interval; quotients: [starts, rounds]."""
    starts, rounds = quotients.shape
    rng = np.random.default_rng(1)
    drawn = rng.integers(0, starts, (BOOTSTRAP, starts, 1))
    medians = np.median(quotients[drawn, rng.integers(0, rounds, (BOOTSTRAP, starts, rounds))], axis=(1, 2))
    return {
        "ratio": float(np.median(quotients)),
        "ci95": [float(bound) for bound in np.quantile(medians, [0.025, 0.975])],
        "by_start": [float(value) for value in np.median(quotients, axis=1)],
    }


def compare(
    seconds: npt.NDArray[np.float64], rank: int, batch: int, steps: int, *, ours: bool = False
) -> list[dict[str, Any]]:
    """A row for each arm: tokens/s relative to the engine without --enable-lora, in the same rounds."""
    rates = batch / seconds.mean(axis=-1)
    fastest = batch / np.sort(seconds, axis=-1)[..., : max(1, steps // 4)].mean(axis=-1)
    return [
        {
            "rank": rank,
            "operations": which,
            "rows": rows,
            "tokens_per_second": float(np.median(rates[..., arm])),
            **ratio(rates[..., arm] / rates[..., 0]),
            "fastest_quarter": ratio(fastest[..., arm] / fastest[..., 0]),
        }
        for arm, (which, rows) in enumerate(names(ours=ours))
        if arm
    ]


def operations_alone(ranks: list[int], batch: int) -> list[dict[str, Any]]:
    """Milliseconds of processor time of the LoRA operations of one decoding step, all layers, on one thread; the lower
    quartile. Processor time, so that other programs on the machine count less."""
    import torch
    from vllm.lora.punica_wrapper.punica_cpu import PunicaWrapperCPU

    from hemostat_engine.adapters import punica

    class Grouped(PunicaWrapperCPU):  # type: ignore[misc]
        pass

    punica.install(Grouped)
    torch.set_num_threads(1)
    fused = [("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"), ("self_attn.o_proj",)]
    fused += [("mlp.gate_proj", "mlp.up_proj"), ("mlp.down_proj",)]
    result = []
    for rank in ranks:
        layers = []
        for names_of in fused * LAYERS:
            inputs, outputs = SHAPES[names_of[0]][0], tuple(SHAPES[name][1] for name in names_of)
            a = tuple(torch.randn(2, 1, rank, inputs).bfloat16() for _ in outputs)
            b = tuple(torch.randn(2, 1, size, rank).bfloat16() for size in outputs)
            x, y = torch.randn(batch, inputs).bfloat16(), torch.zeros(batch, sum(outputs)).bfloat16()
            layers.append((y, x, a, b, 1.0, outputs))
        for rows, every in (("none", 0), ("some", 2), ("all", 1)):
            ids = tuple(int(every > 0 and i % every == 0) for i in range(batch))
            mapping = SimpleNamespace(index_mapping=ids, prompt_mapping=ids, is_prefill=True)
            for which, wrapper_class in ((VLLM, PunicaWrapperCPU), (GROUPED, Grouped)):
                wrapper = wrapper_class(64, 64, "cpu")
                wrapper.update_metadata(mapping, [1, None], 3, 100)
                spent = []
                with torch.inference_mode():
                    for _ in range(7 if which == VLLM else 25):
                        started = time.process_time()
                        for layer in layers:
                            wrapper.add_lora_linear(*layer)
                        spent.append(time.process_time() - started)
                ms = 1e3 * sorted(spent)[len(spent) // 4]
                result.append({"rank": rank, "rows": rows, "operations": which, "cpu_ms": ms})
                print(f"{rank:4}  {which:18}{rows:6}{ms:9.2f} ms", flush=True)
    return result


def progress(text: str) -> None:
    print(f"\r{text}   ", end="", file=sys.stderr, flush=True)


def table(result: dict[str, Any]) -> str:
    def cell(compared: dict[str, Any]) -> str:
        low, high = compared["ci95"]
        return f"{compared['ratio']:.3f} ({low:.3f} to {high:.3f})"

    lines = [
        f"{'rank':>4}  {'operations':18}{'rows':6}{'tokens/s':>9}  {'x without --enable-lora (95 %)':31}fastest quarter"
    ]
    lines += [
        f"{row['rank']:4}  {row['operations']:18}{row['rows']:6}{row['tokens_per_second']:9.1f}  {cell(row):31}"
        f"{cell(row['fastest_quarter'])}"
        for row in result["rows"]
    ]
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 16, 64])
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--steps", type=int, default=16, help="decoding steps of a burst")
    parser.add_argument("--rounds", type=int, default=8, help="of each start and rank")
    parser.add_argument("--warmups", type=int, default=1, help="rounds that do not count")
    parser.add_argument("--starts", type=int, default=2, help="times that the engines are started")
    parser.add_argument(
        "--ours", action="store_true", help="without vLLM's own operations, which take most of the time"
    )
    parser.add_argument("--alone", action="store_true", help="only the operations, without an engine: a minute")
    add_option(parser)
    parser.add_argument("--child", help=argparse.SUPPRESS)
    parser.add_argument("--adapter", default="", help=argparse.SUPPRESS)
    arguments, others = parser.parse_known_args()
    if others:
        # `make bench-engine ARGS=…` gives both of its parts the same ones.
        print(f"not of this part: {' '.join(others)}", file=sys.stderr)
    if arguments.child:
        # vLLM writes to stdout what it likes: answers get a descriptor of their own.
        answers = os.fdopen(os.dup(1), "w")
        os.dup2(2, 1)
        serve_bursts(
            arguments.child,
            arguments.batch,
            arguments.ranks[0],
            arguments.adapter,
            arguments.processor_time,
            answers,
        )
        return 0
    if arguments.alone:
        operations_alone(arguments.ranks, arguments.batch)
        return 0
    checkpoint = cached_checkpoints("w4a16", lambda text: print(text, file=sys.stderr)).compressed
    if arguments.processor_time:
        use_one_core()
    load_before = os.getloadavg()[0]
    with tempfile.TemporaryDirectory(prefix="hemostat-bench-") as folder:
        seconds = measure(arguments, checkpoint, Path(folder))
    result = {
        "rows": [
            row
            for rank in arguments.ranks
            for row in compare(seconds[rank], rank, arguments.batch, arguments.steps, ours=arguments.ours)
        ],
        "dtype": dtype(),
        "batch": arguments.batch,
        "settings": {name: getattr(arguments, name) for name in ("steps", "rounds", "starts", "processor_time")}
        | {"cores": os.cpu_count(), "load_before": load_before},
    }
    BUILD.mkdir(parents=True, exist_ok=True)
    path = BUILD / "adapters.json"
    path.write_text(json.dumps(result, indent=2) + "\n")
    print(file=sys.stderr)
    print(table(result))
    print(f"written to {path.relative_to(ROOT)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
