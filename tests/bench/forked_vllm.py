"""vLLM servers that start in a few seconds: each one is forked from a process that has imported vLLM before.

Everything but the imports of Python is done anew in each of them: weights are read and packed, caches are made. Most of
the start of a small model is imports, three times: of the server, of its engine and of its worker, which vLLM's CPU
build starts with `spawn`; here they are forked, too. On Linux. One thread a server: threads do not survive a fork.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path

from hemostat.ipc.supervised import die_with_parent
from hemostat_lab.demo.vllm_server import STOP_SECONDS, VllmServer, quiet_environment, runnable, with_parent

ONE_THREAD = {"OMP_NUM_THREADS": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind"}


class ForkedVllm(VllmServer):
    """One server. Its parent is `Imported`, which outlasts it."""

    def __init__(
        self,
        imported: Imported,
        model: Path,
        served_name: str,
        log: Path,
        arguments: Sequence[str] = (),
        environment: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(model, served_name, log, arguments, environment)
        self._imported = imported
        self._more = dict(environment or {})
        self._pid = 0

    def start(self) -> None:
        module = self._command.index("vllm.entrypoints.openai.api_server")
        arguments = [*self._command[module + 1 :], "--model", str(runnable(self._checkpoint))]
        self._pid = self._imported.fork(arguments, self._more, self.log)

    def poll(self) -> int | None:
        """-1 where it has ended."""
        try:
            os.kill(self._pid, 0)
        except ProcessLookupError:
            return -1
        return None

    def stop(self) -> None:
        if not self._pid:
            return
        with suppress(ProcessLookupError):
            os.kill(self._pid, signal.SIGTERM)
        ends = time.monotonic() + STOP_SECONDS
        while self.poll() is None and time.monotonic() < ends:
            time.sleep(0.05)
        with suppress(ProcessLookupError):
            os.killpg(self._pid, signal.SIGKILL)


class Imported:
    """The process that has imported vLLM. It ends when its parent ends."""

    def __init__(self) -> None:
        self._process = subprocess.Popen(
            with_parent([sys.executable, __file__]),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=os.environ | quiet_environment() | ONE_THREAD,
            text=True,
        )

    def fork(self, arguments: Sequence[str], environment: Mapping[str, str], log: Path) -> int:
        """Process id of a server."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        asked = {"arguments": list(arguments), "environment": dict(environment), "log": str(log)}
        self._process.stdin.write(json.dumps(asked) + "\n")
        self._process.stdin.flush()
        return int(self._process.stdout.readline())


def _serve() -> None:
    """Fork a server for each line of standard input."""
    out, sys.stdout = sys.stdout, sys.stderr
    from vllm.entrypoints.launchers.api_server.entry import main
    from vllm.utils import system_utils

    # What vLLM's CPU platform asks for is `spawn`.
    system_utils.envs.environment_variables["VLLM_WORKER_MULTIPROC_METHOD"] = lambda: "fork"
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # who has ended leaves nothing
    for line in sys.stdin:
        asked, parent = json.loads(line), os.getpid()
        if pid := os.fork():
            print(pid, file=out, flush=True)
            continue
        die_with_parent(parent)
        os.setsid()
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        with open(asked["log"], "wb") as log, open(os.devnull, "rb") as nothing:
            os.dup2(nothing.fileno(), 0)
            os.dup2(log.fileno(), 1)
            os.dup2(log.fileno(), 2)
        os.environ.update(asked["environment"])
        sys.argv = ["vllm", *asked["arguments"]]
        main()
        return


if __name__ == "__main__":
    _serve()
