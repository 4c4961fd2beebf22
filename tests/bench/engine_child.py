"""A child process with one vLLM engine, for benchmarks that compare engines in paired bursts.

`--processor-time` is for machines on which other programs run, too: each engine has one core and so one thread, and a
step counts with the processor time of its process, in which the waits for that core are not. It counts all threads of
the process, also those that a step does not wait for.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from hemostat_lab.demo.vllm_server import quiet_environment, with_parent

PROCESSOR_TIME = "--processor-time"


def add_option(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(PROCESSOR_TIME, action="store_true", help="one core, and processor time: for a busy machine")


def use_one_core() -> None:
    """Binds this process and the children that it starts from now on to the last of its cores."""
    os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})


def step_seconds(engine: Any, *, processor_time: bool) -> list[float]:
    """Returns the seconds of every step until all requests of a vLLM engine are finished."""
    clock = time.process_time if processor_time else time.perf_counter
    seconds = []
    while engine.has_unfinished_requests():
        started = clock()
        engine.step()
        seconds.append(clock() - started)
    return seconds


class EngineChild:
    """`script` with `arguments`, which answers one JSON line for each on its input; it works only while it is asked."""

    def __init__(self, script: Path, arguments: Sequence[str], environment: Mapping[str, str], log: Path) -> None:
        self.log = log
        with log.open("wb") as file:
            self._process = subprocess.Popen(
                with_parent([sys.executable, str(script), *arguments]),
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=file,
                env=os.environ | quiet_environment() | {"VLLM_ENABLE_V1_MULTIPROCESSING": "0"} | dict(environment),
            )

    def ask(self, question: dict[str, Any]) -> dict[str, Any]:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps(question).encode() + b"\n")
        self._process.stdin.flush()
        line = self._process.stdout.readline()
        if not line:
            raise SystemExit(f"an engine ended: see {self.log}\n{self.log.read_text(errors='replace')[-2000:]}")
        answer: dict[str, Any] = json.loads(line)
        return answer

    def stop(self) -> None:
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe is not None:
                pipe.close()
        try:
            self._process.wait(30)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
