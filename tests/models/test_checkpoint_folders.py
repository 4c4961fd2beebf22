"""Folders of checkpoints that are written by processes that are killed, or by two at the same time."""

from __future__ import annotations

import fcntl
import os
import signal
import subprocess
import sys
from pathlib import Path

from hemostat.models.checkpoint_folders import build_folder, is_complete


def write(folder: Path) -> None:
    (folder / "model.safetensors").write_bytes(b"weights")


KILLED = """
import os, pathlib, signal, sys
from hemostat.models.checkpoint_folders import build_folder
write = lambda folder: ((folder / "model.safetensors").write_bytes(b""), os.kill(os.getpid(), signal.SIGKILL))
build_folder(pathlib.Path(sys.argv[1]), {"a": 1}, write, print)
"""


def test_what_a_killed_process_left_is_deleted_by_the_next_one(tmp_path: Path) -> None:
    (tmp_path / ".out.of-the-user").mkdir()
    killed = subprocess.run([sys.executable, "-c", KILLED, tmp_path / "out"], check=False)
    assert killed.returncode == -signal.SIGKILL
    assert len(list(tmp_path.iterdir())) == 2, "its unfinished folder, as large as a checkpoint"
    build_folder(tmp_path / "out", {"a": 1}, write, lambda _: None)
    assert {path.name for path in tmp_path.iterdir()} == {"out", ".out.of-the-user"}
    assert is_complete(tmp_path / "out")


def test_waiting_for_another_process_is_said(tmp_path: Path) -> None:
    """A compression can take hours, in which another one with a destination in the same folder waits."""
    lines: list[str] = []
    held = os.open(tmp_path, os.O_RDONLY)
    fcntl.flock(held, fcntl.LOCK_EX)

    def progress(line: str) -> None:
        lines.append(line)
        if "waiting" in line:
            os.close(held)

    build_folder(tmp_path / "out", {"a": 1}, write, progress)
    assert lines == [f"waiting for another process that writes a checkpoint in {tmp_path}", "out: written"]
