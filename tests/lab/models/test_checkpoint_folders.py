"""Folders of checkpoints that are written by processes that are killed, or by two at the same time."""

from __future__ import annotations

import fcntl
import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from hemostat_lab.models.checkpoint_folders import MANIFEST, FolderTakenError, build_folder, is_complete


def write(folder: Path) -> None:
    (folder / "model.safetensors").write_bytes(b"weights")


KILLED = """
import os, pathlib, signal, sys
from hemostat_lab.models.checkpoint_folders import build_folder
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


@pytest.mark.parametrize("overwrite", [False, True])
def test_what_another_process_writes_there_meanwhile_stays(tmp_path: Path, overwrite: bool) -> None:
    out = tmp_path / "out"
    if overwrite:
        build_folder(out, {"a": 1}, write, lambda _: None)

    def write_for_hours(folder: Path) -> None:
        write(folder)
        out.mkdir(exist_ok=True)
        (out / "thesis").write_text("years of work")

    with pytest.raises(FolderTakenError, match="holds thesis, which Hemostat did not write there"):
        build_folder(out, {"a": 2}, write_for_hours, lambda _: None, overwrite=overwrite)
    assert (out / "thesis").read_text() == "years of work"


@pytest.mark.parametrize("there", ["nothing", "empty", "result"])
def test_a_link_to_a_folder_stays_a_link(tmp_path: Path, there: str) -> None:
    """To a larger disk, for example."""
    disk, out = tmp_path / "disk", tmp_path / "out"
    out.symlink_to(disk)
    if there == "empty":
        disk.mkdir()
    if there == "result":
        build_folder(disk, {"a": 1}, write, lambda _: None)
    build_folder(out, {"a": 2}, write, lambda _: None, overwrite=True)
    assert out.readlink() == disk
    assert json.loads((disk / MANIFEST).read_text())["made_from"] == {"a": 2}


def test_where_the_last_step_fails_the_earlier_result_is_there_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    build_folder(out, {"a": 1}, write, lambda _: None)
    rename = Path.rename

    def fail(path: Path, target: Path) -> Path:
        if path.name == "new":
            raise OSError("disk is gone")
        return rename(path, target)

    monkeypatch.setattr(Path, "rename", fail)
    with pytest.raises(OSError, match="disk is gone"):
        build_folder(out, {"a": 2}, write, lambda _: None, overwrite=True)
    assert is_complete(out)


@pytest.mark.parametrize("made_from", [[1], "text", None])
def test_a_damaged_manifest_is_refused_in_words(tmp_path: Path, made_from: Any) -> None:
    (tmp_path / MANIFEST).write_text(json.dumps({"made_from": made_from, "files": {"model.safetensors": ""}}))
    with pytest.raises(FolderTakenError, match="made from something else"):
        build_folder(tmp_path, {"a": 1}, write, lambda _: None)
