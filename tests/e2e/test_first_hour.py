"""The README's steps in front of a user's own vLLM, from an empty environment to the first interval: `--slow -s` prints
how long each takes."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import textwrap
import time
import venv
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
from tests.support.paths import ROOT
from tests.support.waiting import HANG_SECONDS

from hemostat_lab.demo import vllm_server as vllm_process
from hemostat_lab.demo.checkpoints import Checkpoints
from hemostat_lab.demo.vllm_server import VllmServer, free_port

pytestmark = [pytest.mark.vllm, pytest.mark.slow, pytest.mark.timeout(1800)]

SECONDS = 600.0
"""Within so long a new user sees a figure with its interval."""
STARTED = ("--enforce-eager", "--dtype", vllm_process.dtype(), "--max-model-len", "2048")
"""How a vLLM may have been started that knows nothing of Hemostat."""


def steps() -> tuple[str, str, str]:
    """The shell blocks: install, serve, send requests."""
    text = (ROOT / "README.md").read_text().partition("\n## In front of your own vLLM\n")[2].partition("\n## ")[0]
    install, serve, send = re.findall(r"^ *```sh\n(.*?)^ *```", text, re.MULTILINE | re.DOTALL)
    return textwrap.dedent(install), textwrap.dedent(serve), textwrap.dedent(send)


def replaced(block: str, **names: str) -> str:
    """The block with this machine's addresses, folders and names in place of the README's; each must be there."""
    for before, after in names.items():
        assert before in block
        block = block.replace(before, after)
    return block


class Shell:
    """Runs the blocks in an empty environment, outside of the repository."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        venv.create(folder / "venv", with_pip=True)
        self.data, self.admin = free_port(), free_port()
        kept = {name: value for name, value in os.environ.items() if not name.startswith(("HEMOSTAT_", "PYTHON"))}
        self._environment = kept | {
            "PATH": f"{folder / 'venv' / 'bin'}:/usr/bin:/bin",
            "HEMOSTAT_LISTEN__PORT": str(self.data),
            "HEMOSTAT_ADMIN__PORT": str(self.admin),
            "NO_PROXY": "127.0.0.1",
            "OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 2) // 2)),
        }

    def run(self, block: str, folder: Path | None = None) -> None:
        command = ["bash", "-euo", "pipefail", "-c", block]
        subprocess.run(command, cwd=folder or self.folder, env=self._environment, check=True)

    @contextmanager
    def background(self, block: str) -> Iterator[Path]:
        """Its log."""
        log = self.folder / "log"
        with log.open("w") as file:
            process = subprocess.Popen(
                ["bash", "-c", f"exec {block}"], cwd=self.folder, env=self._environment, stdout=file, stderr=file
            )
        try:
            while "admin port" not in log.read_text():
                assert process.poll() is None, log.read_text()
                time.sleep(0.1)
            yield log
        finally:
            process.terminate()
            process.wait(HANG_SECONDS)

    def status(self) -> Any:
        return httpx.get(f"http://127.0.0.1:{self.admin}/api/v1/status", timeout=20, trust_env=False).json()


def interval(status: Any) -> tuple[float, float] | None:
    """Of the divergence, once there is one that says more than the figure's range."""
    figure = status["raw"]["kl_nats"]
    low, high = figure["ci95_seen"]
    return (low, high) if low is not None and high is not None and high < figure["cap"] else None


def until(condition: Any, log: Path) -> Any:
    give_up = time.monotonic() + 5 * HANG_SECONDS
    while not (value := condition()):
        assert time.monotonic() < give_up, log.read_text()
        time.sleep(0.5)
    return value


def test_from_an_empty_environment_to_the_first_interval(checkpoints: Checkpoints, tmp_path: Path) -> None:
    install, serve, send = steps()
    vllm = VllmServer(checkpoints.compressed, "smollm2-w4a16", tmp_path / "vllm.log", STARTED)
    try:
        vllm.start()
        vllm.wait_ready(600.0)
        began = last = time.monotonic()

        def took(what: str) -> None:
            nonlocal last
            now = time.monotonic()
            print(f"{now - last:6.1f} s  {what}", flush=True)
            last = now

        shell = Shell(tmp_path)
        took("an empty environment")
        shell.run(install, folder=ROOT)
        took(install.strip())
        names = {"http://127.0.0.1:8000": vllm.url, "/models/my-model": str(checkpoints.reference)}
        with shell.background(replaced(serve, **names)) as log:
            took(serve.strip())
            shell.run(replaced(send, **{"127.0.0.1:8080": f"127.0.0.1:{shell.data}", "my-model-W4A16": vllm.model}))
            took("64 requests")
            low, high = until(lambda: interval(shell.status()), log)
            took(f"the first interval: a KL divergence of {low:.3f} to {high:.3f} nats")
            total = time.monotonic() - began
            print(f"{total:6.1f} s  in all")
            assert total < SECONDS

            # To calibrate: vLLM anew, with the lines that `serve` has printed.
            exported, started = re.findall(r"^  (export|vllm serve …) (.+)$", log.read_text(), re.MULTILINE)
            variables = dict(assignment.partition("=")[::2] for assignment in shlex.split(exported[1]))
            vllm.stop()
            vllm = VllmServer(
                checkpoints.compressed, vllm.model, tmp_path / "again.log", [*STARTED, *shlex.split(started[1])],
                variables, vllm.port,
            )  # fmt: skip
            vllm.start()
            vllm.wait_ready(600.0)
            until(lambda: shell.status()["engines"]["live"], log)
    finally:
        vllm.stop()
