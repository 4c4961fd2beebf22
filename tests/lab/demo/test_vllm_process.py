"""Starting and stopping a server: with a quick stand-in for vLLM, and once with vLLM itself."""

from __future__ import annotations

import inspect
import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
import urllib.request
from pathlib import Path
from typing import Any

import pytest
from tests.support.paths import ROOT

from hemostat_lab.demo import vllm_server as vllm_process
from hemostat_lab.demo.vllm_server import VllmFailure, VllmServer

STAND_IN = """
import http.server, os, subprocess, sys
port = int(sys.argv[sys.argv.index("--port") + 1])
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
print("children", os.getpid(), child.pid, flush=True)
class Healthy(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200); self.send_header("content-length", "0"); self.end_headers()
    def log_message(self, *_): pass
http.server.HTTPServer(("127.0.0.1", port), Healthy).serve_forever()
"""


def stand_in(tmp_path: Path, code: str = STAND_IN) -> VllmServer:
    """A server whose program is this code; it gets the arguments of the real one."""
    (tmp_path / "stand_in.py").write_text(code)
    there = {"PYTHONPATH": os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")])}
    return VllmServer(tmp_path, "stand-in", tmp_path / "log", environment=there, module="stand_in")


def pids(log: Path) -> list[int]:
    line = next(line for line in log.read_text().splitlines() if line.startswith("children"))
    return [int(word) for word in line.split()[1:]]


def alive(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0]
    except FileNotFoundError:
        return False
    return state != "Z"


def gone(pid: int, within: float = 10.0) -> bool:
    end = time.monotonic() + within
    while alive(pid) and time.monotonic() < end:
        time.sleep(0.05)
    return not alive(pid)


@pytest.mark.usefixtures("_installed")
@pytest.mark.parametrize("narrow", [False, True])
def test_where_vllm_has_no_int4_kernels_a_dense_copy_is_served(
    narrow: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(vllm_process, "on_cpu", lambda: True)
    monkeypatch.setattr(vllm_process, "lacks_avx512", lambda: narrow)
    monkeypatch.setattr(vllm_process, "unpacked_copy", lambda folder, _: folder / "dense")
    (tmp_path / "config.json").write_text('{"quantization_config": {"format": "pack-quantized"}}')
    assert vllm_process.runnable(tmp_path) == (tmp_path / "dense" if narrow else tmp_path)
    assert vllm_process.dtype() == ("float32" if narrow else "bfloat16")
    server = stand_in(tmp_path, "import sys; print(sys.argv[1:])")
    server.start()
    while server.poll() is None:
        time.sleep(0.01)
    assert str(["--model", str(vllm_process.runnable(tmp_path))])[1:] in server.log.read_text()
    monkeypatch.setattr(vllm_process, "on_cpu", lambda: False)
    assert (vllm_process.runnable(tmp_path), vllm_process.dtype()) == (tmp_path, "bfloat16"), "a GPU's"
    monkeypatch.setattr(vllm_process, "on_cpu", lambda: True)
    (tmp_path / "config.json").write_text("{}")
    assert vllm_process.runnable(tmp_path) == tmp_path


@pytest.fixture
def _installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vllm_process, "installed", lambda: True)


@pytest.mark.usefixtures("_installed")
def test_stop_ends_the_servers_children_too(tmp_path: Path) -> None:
    server = stand_in(tmp_path)
    server.start()
    try:
        server.wait_ready(within=120)
        assert server.healthy()
        started = pids(server.log)
        assert all(alive(pid) for pid in started)
    finally:
        server.stop()
    assert all(gone(pid) for pid in started)
    assert server.poll() is not None
    server.stop()  # twice does no harm


@pytest.mark.usefixtures("_installed")
def test_a_server_that_ends_is_reported_with_the_end_of_its_log(tmp_path: Path) -> None:
    server = stand_in(tmp_path, "import sys; print('no such flag: --frobnicate'); sys.exit(3)")
    server.start()
    with pytest.raises(VllmFailure, match=r"(?s)ended with code 3.*no such flag: --frobnicate"):
        server.wait_ready(within=120)
    server.stop()


@pytest.mark.usefixtures("_installed")
def test_a_server_that_never_answers_is_a_failure(tmp_path: Path) -> None:
    server = stand_in(tmp_path, "import time; print('thinking', flush=True); time.sleep(600)")
    server.start()
    try:
        with pytest.raises(VllmFailure, match=r"not ready within 1 s"):
            server.wait_ready(within=1)
    finally:
        server.stop()
    assert server.poll() is not None


def test_the_server_ends_when_its_parent_is_killed(tmp_path: Path) -> None:
    (tmp_path / "stand_in.py").write_text(STAND_IN)
    script = tmp_path / "parent.py"
    script.write_text(
        "import sys, time; from pathlib import Path; from hemostat_lab.demo import vllm_server as vllm_process\n"
        "vllm_process.installed = lambda: True\n"
        "server = vllm_process.VllmServer(Path('.'), 'x', Path('log'), module='stand_in')\n"
        "server.start(); server.wait_ready(within=120); print('ready', flush=True); time.sleep(600)\n"
    )
    with subprocess.Popen([sys.executable, str(script)], cwd=tmp_path, stdout=subprocess.PIPE) as parent:
        assert parent.stdout is not None
        assert parent.stdout.readline() == b"ready\n"
        server, grandchild = pids(tmp_path / "log")
        parent.send_signal(signal.SIGKILL)
    assert gone(server)
    if alive(grandchild):  # vLLM ends its own children when it gets the signal; the stand-in does not
        os.kill(grandchild, signal.SIGKILL)


def test_without_vllm_the_error_says_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vllm_process, "installed", lambda: False)
    with pytest.raises(VllmFailure, match=r"pip install 'vllm<.*make setup"):
        VllmServer(tmp_path, "x", tmp_path / "log").start()


@pytest.mark.vllm
def test_the_compressed_model_answers(vllm_server: Any) -> None:
    body = {
        "model": vllm_server.model,
        "messages": [{"role": "user", "content": "What is the capital of France?"}],
        "max_tokens": 16,
        "temperature": 0,
    }
    request = urllib.request.Request(
        f"{vllm_server.url}/v1/chat/completions", json.dumps(body).encode(), {"content-type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=120) as response:
        answer = json.load(response)["choices"][0]["message"]["content"]
    print(answer)
    assert "Paris" in answer


@pytest.mark.vllm
def test_the_documented_commands_start_in_this_environment() -> None:
    """Also in that of `make demo`, whose vLLM is another distribution."""
    programs = set()
    for page in ("docs/operations.md", "docs/configuration.md"):
        text = (ROOT / page).read_text(encoding="utf-8").replace("\\\n", " ")
        result = {
            tuple(shlex.split(line)[: 2 if line.startswith("vllm") else 3])
            for block in re.findall(r"```sh\n(.*?)```", text, re.DOTALL)
            for line in map(str.strip, block.splitlines())
            if re.match(r"(vllm|python -m vllm\S*) ", line)
        }
        assert result, page
        programs |= result
    module = inspect.signature(VllmServer).parameters["module"].default
    started = ("-m", module)  # by every test with a real vLLM
    known = {"python": sys.executable, "vllm": str(Path(sys.executable).with_name("vllm"))}
    for name, *arguments in programs - {("python", *started)}:
        run = subprocess.run([known[name], *arguments, "--help"], capture_output=True, text=True, check=False)
        assert run.returncode == 0, run.stderr[-2000:]
        assert "--model" in run.stdout
