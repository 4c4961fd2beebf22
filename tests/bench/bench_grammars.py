"""What it costs vLLM to hand out which ids a grammar allows: part of `make bench-engine`, build/bench/grammars.json.

One vLLM engine (V1, in process, no HTTP server, one thread for its kernels) with the plugin decodes bursts of W4A16
SmolLM2 on the CPU: every row under a JSON schema, every row tapped, as at a shadow rate of 100 %. No profile is held,
so that a tap consists of the sets alone.

The plugin is timed where vLLM calls it, and where it packs and sends the sets; the engine's thread is timed on the same
steps. All in processor time, which other programs hardly change; for the same reason the sets are sent every
`STEPS_PER_FLUSH` steps, as the plugin's own thread does on an idle machine, and not by the clock. The ratio is what
vLLM loses on one core. Beside other cores it is at most that: the engine waits for that thread only while it computes.
The interval is a bootstrap's over bursts.

And what is done to the sets alone, without vLLM: processor time per token, all of it and on the engine's thread.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import json
import os
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any

import numpy as np
import numpy.typing as npt

from hemostat.engines.messages import MAX_POSITIONS
from hemostat_lab.demo.checkpoints import cached_checkpoints
from hemostat_lab.demo.vllm_server import LOGITS_PROCESSOR, dtype, runnable

ROOT = Path(__file__).resolve().parents[2]
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))

from tests.bench.engine_child import EngineChild  # noqa: E402  the root is no package
from tests.support.engine_admin import TOKEN, EngineAdmin, accept_unsigned_keys  # noqa: E402  the root is no package

PATH = ROOT / "build" / "bench" / "grammars.json"
ITEM = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 12},
        "kind": {"enum": ["fact", "opinion"]},
        "sure": {"type": "boolean"},
    },
    "required": ["name", "kind", "sure"],
    "additionalProperties": False,
}
SCHEMA = {"type": "array", "items": ITEM, "minItems": 50}
SENT_WITHIN = 60.0
STEPS_PER_FLUSH = 5
"""In 0.25 s, at 48 ms a step."""
BOOTSTRAP = 10_000


class Plugin:
    """The one in this process. steps: seconds of processor time, of each call by vLLM."""

    def __init__(self) -> None:
        from hemostat_engine.agent import Agent
        from hemostat_engine.masks import GrammarMasks
        from hemostat_engine.processor import LogitsProcessor

        self.steps: list[float] = []
        self._agents: list[Agent] = []

        def start(agent: Agent) -> None:
            """Without threads: `flush` does what they do with taps."""
            self._agents.append(agent)

        Agent.start = start  # type: ignore[assignment,method-assign]
        for owner, name in ((LogitsProcessor, "update_state"), (LogitsProcessor, "apply"), (GrammarMasks, "note")):
            setattr(owner, name, self._timed(getattr(owner, name)))

    def flush(self) -> float:
        """Pack and send what waits; seconds of processor time."""
        began = time.thread_time()
        for agent in self._agents:
            agent._spawn = lambda run: run()
            if not agent._peers.all:
                agent._peers.refresh(time.monotonic())
            agent._send_taps(time.monotonic())
        return time.thread_time() - began

    def _timed(self, function: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(function)
        def timed(*arguments: Any, **named: Any) -> Any:
            began = time.thread_time()
            try:
                return function(*arguments, **named)
            finally:
                self.steps.append(time.thread_time() - began)

        return timed


def serve_bursts(model: str, batch: int, answers: IO[str]) -> None:
    """The child: bursts that are asked for on stdin, one JSON line each."""
    from vllm import LLM, SamplingParams
    from vllm.sampling_params import StructuredOutputsParams

    plugin = Plugin()
    llm = LLM(
        model=str(runnable(Path(model))),
        enforce_eager=True,
        dtype=dtype(),
        max_model_len=2048,
        max_num_seqs=batch,
        enable_prefix_caching=False,
        logits_processors=[LOGITS_PROCESSOR],
    )
    engine = llm.llm_engine
    accept_unsigned_keys()
    for line in sys.stdin:
        question = json.loads(line)
        for i, nonce in enumerate(question["nonces"]):
            engine.add_request(
                nonce,
                {"prompt_token_ids": [1, 504 + i, 2837, 282, 4649, 314]},
                SamplingParams(
                    temperature=0,
                    max_tokens=question["tokens"],
                    structured_outputs=StructuredOutputsParams(json=json.dumps(SCHEMA)),
                    extra_args={"hemostat_tap": nonce},
                ),
            )
        waiting = set(question["nonces"])  # for their grammar, then for their prompt
        while waiting:
            waiting -= {output.request_id for output in engine.step()}
        plugin.steps.clear()
        plugin.flush()
        said = {"tokens": 0, "engine": 0.0, "sending": 0.0}
        for number in itertools.count(1):
            began = time.thread_time()
            said["tokens"] += len(engine.step())
            said["engine"] += time.thread_time() - began
            ended = not engine.has_unfinished_requests()
            if ended or number % STEPS_PER_FLUSH == 0:
                said["sending"] += plugin.flush()
            if ended:
                break
        said["plugin"] = sum(plugin.steps)
        said["engine"] -= said["plugin"]
        answers.write(json.dumps(said) + "\n")
        answers.flush()


def measure(arguments: argparse.Namespace, model: Path, folder: Path) -> npt.NDArray[np.float64]:
    """Seconds of processor time a token, float64 [bursts, 3]: of the engine's thread without the plugin, of the plugin
    on it, and of packing and sending."""
    admin = EngineAdmin()
    result = np.zeros((arguments.bursts, 3))
    engine = EngineChild(
        Path(__file__).resolve(),
        ["--child", str(model), "--batch", str(arguments.batch)],
        {
            **{"HEMOSTAT_ADMIN_URL": admin.url, "HEMOSTAT_ENGINE_TOKEN": TOKEN},
            **{"OMP_NUM_THREADS": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind"},
        },
        folder / "vllm.log",
    )
    try:
        for number in range(-arguments.warmups, arguments.bursts):
            print(f"\rburst {number + 1} of {arguments.bursts}   ", end="", file=sys.stderr, flush=True)
            nonces = [f"{number + arguments.warmups}-{i}" for i in range(arguments.batch)]
            answer = engine.ask({"nonces": nonces, "tokens": arguments.tokens})
            until_sent(admin, nonces, arguments.tokens)
            if number >= 0:
                result[number] = [answer[name] / answer["tokens"] for name in ("engine", "plugin", "sending")]
    finally:
        engine.stop()
        admin.close()
    return result


def until_sent(admin: EngineAdmin, nonces: list[str], tokens: int) -> None:
    """The sets of so many positions have come, else nothing is measured."""
    give_up = time.monotonic() + SENT_WITHIN
    for nonce in nonces:
        sent = 0
        while sent < tokens:
            with admin.lock:
                tap = admin.registry.taps.take(nonce, MAX_POSITIONS)
            if tap is None:
                if time.monotonic() > give_up:
                    raise SystemExit(f"the sets of {nonce} did not come")
                time.sleep(0.05)
                continue
            if not all(run.sets for run in tap.runs):
                raise SystemExit(f"{nonce} was not restricted at every position")
            sent += sum(run.tokens for run in tap.runs)


def share(spent: npt.NDArray[np.float64]) -> dict[str, Any]:
    """spent: see `measure`. What the plugin adds, as a part of a token's processor time without it, and 95 % by
    bootstrap over bursts. Tokens/s are 1 / (1 + share) of those without."""
    drawn = spent[np.random.default_rng(1).integers(0, len(spent), (BOOTSTRAP, len(spent)))].mean(axis=1)
    shares = drawn[:, 1:].sum(axis=1) / drawn[:, 0]
    without, thread, elsewhere = spent.mean(axis=0)
    return {
        "share": float((thread + elsewhere) / without),
        "ci95": [float(end) for end in np.quantile(shares, [0.025, 0.975])],
        "microseconds_per_token": {
            **{"without": 1e6 * float(without), "on_the_engines_thread": 1e6 * float(thread)},
            "packing_and_sending": 1e6 * float(elsewhere),
        },
    }


def alone(vocab_size: int, batch: int, steps: int = 48) -> dict[str, float]:
    """Microseconds of processor time per restricted token, beyond those of a tap without sets; medians. And bytes that
    are sent. Half of the sets allow few ids, half most."""
    import torch

    from hemostat_engine.library import Counters
    from hemostat_engine.masks import GrammarMasks, Step
    from hemostat_engine.taps import Reading, TappedRow, Taps
    from hemostat_engine.taps import Step as Tapped

    rng = np.random.default_rng(1)
    width = -(-vocab_size // 32)
    few, most = np.zeros((12, width), np.int32), np.full((12, width), -1, np.int32)
    few[:, rng.integers(0, width, 5)] = rng.integers(1, 1 << 30, (12, 5))
    most[:, rng.integers(0, width, width // 4)] = rng.integers(-(1 << 31), (1 << 31) - 1, (12, width // 4))
    pool, names = np.concatenate([few, most])[rng.permutation(24)], [str(i) for i in range(batch)]
    empty = torch.empty(0, batch)
    reading = Reading((), empty, empty.bool(), None, torch.empty(batch, 0, dtype=torch.float16))

    def run(*, restricted: bool) -> tuple[float, float, int]:
        masks, taps, engine, sent = GrammarMasks(watched=True), Taps(Counters()), 0.0, 0
        started = time.process_time()
        for t in range(steps):
            step = Step(names, names, pool[(t // 2 + np.arange(batch)) % 24], batch)
            began = time.process_time()
            masks.begin()
            if restricted:
                masks.note(lambda step=step: step)  # type: ignore[misc]
            result = masks.of(range(batch), taps.has_room)
            rows = [TappedRow(i, name, None, t, mask=result.index[i]) for i, name in enumerate(names)]
            taps.push(Tapped(reading, rows=rows, masks=result.words))
            engine += time.process_time() - began
            if t % 6 == 5:  # about as often as the agent does at 24 steps a second
                sent += sum(len(run.get("sets", b"")) for run in taps.drain(steps, 8 << 20))
        return time.process_time() - started, engine, sent

    def medians(*, restricted: bool) -> npt.NDArray[np.float64]:
        runs = [run(restricted=restricted) for _ in range(11)]
        result: npt.NDArray[np.float64] = np.median(np.array(runs[2:], np.float64), axis=0) / (batch * steps)
        return result

    total, engine, sent = (medians(restricted=True) - medians(restricted=False)).tolist()
    return {
        "vocab_size": vocab_size,
        "batch": batch,
        "microseconds": 1e6 * total,
        "on_the_engines_thread": 1e6 * engine,
        "bytes": sent,
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=48, help="of each row in a burst")
    parser.add_argument("--bursts", type=int, default=16)
    parser.add_argument("--warmups", type=int, default=2, help="bursts that do not count")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        # vLLM writes to stdout what it likes: answers get a descriptor of their own.
        answers = os.fdopen(os.dup(1), "w")
        os.dup2(2, 1)
        serve_bursts(arguments.child, arguments.batch, answers)
        return 0
    checkpoint = cached_checkpoints("w4a16", lambda text: print(text, file=sys.stderr)).compressed
    load_before = os.getloadavg()[0]
    with tempfile.TemporaryDirectory(prefix="hemostat-bench-") as folder:
        spent = measure(arguments, checkpoint, Path(folder))
    result = {
        **share(spent),
        "alone": [alone(49_152, arguments.batch), alone(151_936, 256)],
        "settings": {name: getattr(arguments, name) for name in ("batch", "tokens", "bursts")}
        | {"cores": os.cpu_count(), "load_before": load_before},
    }
    PATH.parent.mkdir(parents=True, exist_ok=True)
    PATH.write_text(json.dumps(result, indent=2) + "\n")
    print(f"\n{json.dumps(result, indent=2)}\nwritten to {PATH.relative_to(ROOT)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
