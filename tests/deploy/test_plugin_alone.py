"""The README's way to measure behind a gateway: from an environment with vLLM alone to the first interval."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
from tests.support.environments import vllm_environment
from tests.support.paths import ROOT

from hemostat_lab.demo.checkpoints import Checkpoints
from hemostat_lab.demo.vllm_server import dtype, free_port, quiet_environment, runnable

pytestmark = [pytest.mark.vllm, pytest.mark.slow, pytest.mark.timeout(1200)]

REQUESTS = 64
SECONDS = 500.0
"""The longest time of one step, on a machine where other processes run."""


@contextmanager
def running(command: list[str], log: Path, environment: dict[str, str]) -> Iterator[subprocess.Popen[bytes]]:
    own = {name: value for name, value in os.environ.items() if not name.startswith(("HEMOSTAT_", "PYTHONPATH"))}
    with log.open("wb") as file:
        process = subprocess.Popen(
            command, stdout=file, stderr=file, cwd=log.parent, env=own | environment, start_new_session=True
        )
    try:
        yield process
    finally:
        process.terminate()
        try:
            process.wait(30)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def until(what: str, seen: Any, process: subprocess.Popen[bytes], log: Path) -> Any:
    """Returns what `seen` returns once it is not None."""
    ends = time.monotonic() + SECONDS
    while (found := seen()) is None:
        assert process.poll() is None, log.read_text()[-3000:]
        assert time.monotonic() < ends, f"{what}: {log.read_text()[-3000:]}"
        time.sleep(0.25)
    return found


def answers(url: str) -> bool | None:
    try:
        return httpx.get(url, timeout=5).is_success or None
    except httpx.TransportError:
        return None


def test_two_commands_and_a_restart_of_vllm_lead_to_the_first_interval(
    wheelhouse: Path, checkpoints: Checkpoints, tmp_path: Path
) -> None:
    section = (ROOT / "README.md").read_text().partition("## Behind a gateway")[2]
    install, command = re.findall(r"```sh\n(.*)\n(.*)\n```", section)[0]
    assert install.startswith("pip install ./calibration '.[transformers]'  ")
    environment = vllm_environment(tmp_path / "venv")
    port, admin = free_port(), free_port()
    python, url = str(environment.python), f"http://127.0.0.1:{port}"
    serve = [python, "-m", "vllm.entrypoints.openai.api_server", "--model", str(runnable(checkpoints.compressed))]
    serve += ["--served-model-name", "served", "--port", str(port), "--host", "127.0.0.1", "--enforce-eager"]
    serve += ["--dtype", dtype(), "--max-model-len", "1024"]
    own = {**quiet_environment(), "XDG_STATE_HOME": str(tmp_path)}
    began = time.monotonic()
    with running(serve, tmp_path / "vllm", own) as vllm:
        until("vLLM", lambda: answers(f"{url}/health"), vllm, tmp_path / "vllm")
        # What the first command installs, from wheels.
        wheels = [str(next(wheelhouse.glob(f"{name}-*.whl"))) for name in ("hemostat", "hemostat_vllm")]
        environment.install("--no-index", "--no-deps", *wheels)
        ready = time.monotonic()
        words = command.split()
        words[0:1] = [python, "-m", "hemostat"]
        words[words.index("http://127.0.0.1:8000")] = url
        words[words.index("/models/my-model")] = str(checkpoints.reference)
        log = tmp_path / "control"
        with running([*words, "--admin-port", str(admin)], log, own) as process:
            exported = until(
                "the variables",
                lambda: re.search(r"^  export (\S+)=(\S+) (\S+)=(\S+)$", log.read_text(), re.M),
                process,
                log,
            )
            until("the admin port", lambda: answers(f"http://127.0.0.1:{admin}/livez"), process, log)
            vllm.terminate()
            vllm.wait(60)
            variables = {exported[1]: exported[2], exported[3]: exported[4]}
            with running(serve, tmp_path / "again", own | variables) as again:
                until("vLLM", lambda: answers(f"{url}/health"), again, tmp_path / "again")

                def status() -> dict[str, Any]:
                    result: dict[str, Any] = httpx.get(f"http://127.0.0.1:{admin}/api/v1/status", timeout=30).json()
                    return result

                def measuring() -> bool | None:
                    now = status()
                    return (now["reference"]["state"] == "ready" and now["passive"]["servers"] > 0) or None

                until("the plugin and the reference", measuring, process, log)
                time.sleep(5.0)  # the plugin asks for its policy every two seconds

                def ask(n: int) -> None:
                    body = {"model": "served", "prompt": f"{n} things to know about", "max_tokens": 16}
                    httpx.post(f"{url}/v1/completions", json=body, timeout=300).raise_for_status()

                with ThreadPoolExecutor(4) as pool:
                    list(pool.map(ask, range(REQUESTS)))

                def interval() -> bool | None:
                    known = {step["step"]: step["known"] for step in status()["progress"]}
                    return known["interval"] or None

                until("the interval", interval, process, log)
                print(f"{time.monotonic() - ready:.0f} s from the first command, {ready - began:.0f} s before it")
                assert status()["requests"]["scored"] >= 50
                check = [python, "-m", "hemostat", "check", *words[4:], "--set", f"admin.port={admin}"]
                said = subprocess.run(
                    [*check, "--set", f"admin.engine_token={exported[4]}"],
                    env=own | {"PATH": os.environ["PATH"]},
                    capture_output=True,
                    text=True,
                    check=False,
                )
                assert said.returncode == 0, said.stdout + said.stderr
                assert re.search(r"^ok +plugin alone +1 process of vLLM's API server reports", said.stdout, re.M)
