"""A real Valkey for tests, on a port of its own, with its data in a folder of its own."""

from __future__ import annotations

import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

PROGRAM = shutil.which("valkey-server") or shutil.which("redis-server")


class Valkey:
    """`start`, `kill` (at once, as a crash), `start` again: what was written is there again (append-only file).

    password: of the default user; None asks for none.
    """

    def __init__(self, folder: Path, password: str | None = None, *, keeps: bool = True) -> None:
        self.folder, self.password, self._keeps = folder, password, keeps
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = int(probe.getsockname()[1])
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def url(self) -> str:
        return f"redis://{f':{self.password}@' if self.password else ''}127.0.0.1:{self.port}/0"

    def start(self) -> None:
        assert PROGRAM is not None
        options = ["--port", str(self.port), "--bind", "127.0.0.1", "--dir", str(self.folder), "--save", ""]
        options += ["--appendonly", "yes" if self._keeps else "no", "--appendfsync", "always"]
        options += ["--requirepass", self.password] if self.password else []
        with (self.folder / "log").open("ab") as log:
            self._process = subprocess.Popen([PROGRAM, *options], stdout=log, stderr=log)
        # Its first act is to write the append-only file through to the disk, which the other worker's images may hold.
        end = time.monotonic() + 120
        while time.monotonic() < end:
            try:
                with socket.create_connection(("127.0.0.1", self.port), 1) as probe:
                    probe.sendall(b"PING\r\n")
                    if probe.recv(64).startswith((b"+PONG", b"-NOAUTH")):
                        return
            except OSError:
                pass
            time.sleep(0.02)
        self.kill()
        raise AssertionError((self.folder / "log").read_text())

    def kill(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None

    def freeze(self) -> None:
        """It accepts connections and answers nothing, until `thaw`."""
        assert self._process is not None
        self._process.send_signal(signal.SIGSTOP)

    def thaw(self) -> None:
        assert self._process is not None
        self._process.send_signal(signal.SIGCONT)


@contextmanager
def running(folder: Path, password: str | None = None, *, keeps: bool = True) -> Iterator[Valkey]:
    """Skips the test where there is no server."""
    if PROGRAM is None:
        pytest.skip("no valkey-server here: apt-get install valkey-server")
    folder.mkdir(exist_ok=True)
    server = Valkey(folder, password, keeps=keeps)
    server.start()
    try:
        yield server
    finally:
        server.kill()
