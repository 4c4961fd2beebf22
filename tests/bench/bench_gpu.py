"""What only a GPU can tell: `HEMOSTAT_VLLM=vllm make bench-gpu`, one file to send back: build/bench/gpu.json.

On a machine with a CUDA GPU and nothing else on it. HEMOSTAT_VLLM makes `make` install vLLM's CUDA build in .venv, in
place of the CPU build. After that, and after the demo's checkpoints have been made (their weights come with a package),
it takes at most ten minutes. Nobody has run it yet. Each step is a process with a time limit; one that fails or runs
out of time leaves the end of its output in the file, and the next one runs. The file has names of GPUs, versions,
results of tests, and paths of the machine where a test failed.

versions      GPUs, vLLM, torch, and which model runner vLLM chooses
plugin        the plugin's tests on a real server (profiles, taps, failures), with model runner V2
answers       tokens that the plugin hands out, against those of the response
adapters      adapters by version, slots, isolation of rows
speculation   ngram drafts with the plugin (V2 takes both): a profile is applied to drafted tokens, taps have every one
parallel      tensor parallelism of two: profiles, taps, sets and adapters are the same on both ranks (two GPUs)
lora cost     tokens/s without --enable-lora, and with it: no row, half of the rows, all rows with an adapter
formats       FP8 of `hemostat compress`, served, against our own copy of it
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
BUILD = ROOT / "build" / "bench"
MAX_SECONDS = 600.0
STOP_SECONDS = 30.0
"""For a step that ran out of time to stop its servers, whose memory the next one needs."""
TAIL = 4000
"""Characters of a step's output that are kept."""
VERSIONS = """
import json, torch, vllm
from hemostat_lab.demo.checkpoints import cached_checkpoints
from vllm.engine.arg_utils import EngineArgs
config = EngineArgs(model=str(cached_checkpoints("w4a16").compressed), max_model_len=2048).create_engine_config()
gpus = [torch.cuda.get_device_name(n) for n in range(torch.cuda.device_count())]
runner = "v2" if config.use_v2_model_runner else "v1"
print(json.dumps({"vllm": vllm.__version__, "torch": torch.__version__, "gpus": gpus, "runner": runner}))
"""


@dataclass(frozen=True, slots=True)
class Step:
    """command: of python. seconds: its limit. gpus: how many it needs."""

    name: str
    command: Sequence[str]
    seconds: float
    gpus: int = 1


def pytest(*arguments: str) -> list[str]:
    return ["-m", "pytest", "-q", "-n", "0", "-p", "no:cacheprovider", "-rA", "--tb=short", *arguments]


STEPS = (
    Step("versions", ["-c", VERSIONS], 90),
    Step("plugin", pytest("tests/engine/test_real_vllm.py"), 150),
    Step("answers", pytest("tests/engine/test_real_answers.py"), 90),
    Step("adapters", pytest("tests/engine/test_real_adapters.py"), 120),
    Step("speculation", pytest("--slow", "tests/engine/test_real_speculation_v2.py"), 120),
    Step("parallel", pytest("--slow", "tests/engine/test_real_ranks.py"), 120, gpus=2),
    Step("lora cost", ["tests/bench/bench_adapters.py", "--starts", "1", "--rounds", "4", "--ranks", "16"], 150),
    Step("formats", pytest("--slow", "-k", "fp8", "tests/lab/compression/test_in_vllm.py"), 120),
)
"""In the order of what is known least."""


def run(steps: Sequence[Step], gpus: int, budget: float = MAX_SECONDS) -> dict[str, Any]:
    """What each step said, by its name. gpus: of this machine. budget: seconds of all together."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # in the background of a shell; steps would ignore it, too
        signal.signal(signal.SIGINT, signal.default_int_handler)
    began = time.monotonic()
    results: dict[str, Any] = {}
    for step in steps:
        left = budget - (time.monotonic() - began)
        if step.gpus > gpus or left < 1.0:
            why = f"needs {step.gpus} GPUs" if step.gpus > gpus else "no time left"
            results[step.name] = {"outcome": f"not run: {why}"}
        else:
            results[step.name] = _outcome(step, min(step.seconds, left))
        print(f"{step.name}: {results[step.name]['outcome']}", flush=True)
    return results


def _outcome(step: Step, seconds: float) -> Mapping[str, Any]:
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    began = time.monotonic()
    command = [sys.executable, *step.command]
    with subprocess.Popen(
        command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    ) as process:
        try:
            output, _ = process.communicate(timeout=seconds)
            outcome = "passed" if process.returncode == 0 else f"failed ({process.returncode})"
        except subprocess.TimeoutExpired:
            outcome = f"not finished within {seconds:.0f} s"
            process.send_signal(signal.SIGINT)
            try:
                output, _ = process.communicate(timeout=STOP_SECONDS)
            except subprocess.TimeoutExpired:
                process.kill()
                output, _ = process.communicate()
    text = output.decode(errors="replace")
    return {"outcome": outcome, "seconds": round(time.monotonic() - began, 1), "output": text[-TAIL:]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="steps whose name has this in it")
    given = parser.parse_args()
    import torch

    from hemostat_lab.demo.checkpoints import cached_checkpoints

    gpus = torch.cuda.device_count()
    if not gpus:
        raise SystemExit("bench-gpu: torch sees no GPU here; on a machine with one: HEMOSTAT_VLLM=vllm make bench-gpu")
    print("the demo's checkpoints are made, or checked", flush=True)
    cached_checkpoints("w4a16", print)
    results = run([step for step in STEPS if given.only in step.name], gpus)
    BUILD.mkdir(parents=True, exist_ok=True)
    path = BUILD / "gpu.json"
    path.write_text(json.dumps({"steps": results}, indent=1) + "\n")
    print(f"\nthe file to send back: {path}")


if __name__ == "__main__":
    main()
