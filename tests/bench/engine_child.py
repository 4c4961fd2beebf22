"""A child process with one vLLM engine, for benchmarks that compare engines in paired bursts."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from hemostat_lab.demo.vllm_server import quiet_environment, with_parent


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
