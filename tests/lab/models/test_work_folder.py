"""The folder from which an interrupted command continues."""

from __future__ import annotations

import os
import stat
from pathlib import Path

import pytest

from hemostat_lab.models.work_folder import WorkFolder, WorkFolderError

KEY = {"reference": "a", "--seed": 1}


def test_parts_are_kept_for_the_same_key_only(tmp_path: Path) -> None:
    folder = tmp_path / "work"
    with WorkFolder(folder, KEY, "doctor") as work:
        assert work.get("a") is None
        work.put("a", b"one")
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    assert all(stat.S_IMODE(file.stat().st_mode) == 0o600 for file in folder.iterdir())
    with WorkFolder(folder, KEY, "doctor") as work:
        assert work.get("a") == b"one"
        assert work.notes == []
    with WorkFolder(folder, KEY | {"--seed": 2}, "doctor") as work:
        assert work.get("a") is None
        assert "started over: --seed changed" in work.notes[0]


@pytest.mark.parametrize("harm", [lambda data: data[:-1], lambda data: data[:40] + b"?" + data[41:], lambda _: b""])
def test_damaged_part_counts_as_missing(tmp_path: Path, harm: object) -> None:
    with WorkFolder(tmp_path, KEY, "doctor") as work:
        work.put("a", b"0123456789")
        path = tmp_path / "a.part"
        path.write_bytes(harm(path.read_bytes()))  # type: ignore[operator]
        assert work.get("a") is None
        assert "a.part is damaged" in work.notes[0]
        work.put("a", b"again")
        assert work.get("a") == b"again"


def test_damaged_key_starts_over(tmp_path: Path) -> None:
    with WorkFolder(tmp_path, KEY, "doctor") as work:
        work.put("a", b"one")
    (tmp_path / "doctor-run.json").write_text("{")
    with WorkFolder(tmp_path, KEY, "doctor") as work:
        assert work.get("a") is None
        assert "is damaged" in work.notes[0]


def test_folder_with_other_files_is_not_used(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(WorkFolderError, match="contains other files"):
        WorkFolder(tmp_path, KEY, "doctor")
    assert (tmp_path / "thesis.tex").read_text() == "years of work"
    with pytest.raises(WorkFolderError, match="cannot be used"):
        WorkFolder(tmp_path / "thesis.tex" / "below", KEY, "doctor")


def test_folder_is_locked(tmp_path: Path) -> None:
    with WorkFolder(tmp_path, KEY, "doctor"), pytest.raises(WorkFolderError, match="another doctor is using"):
        WorkFolder(tmp_path, KEY, "doctor")
    WorkFolder(tmp_path, KEY, "doctor").__exit__(None, None, None)


def test_full_disk_is_one_line_of_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    with WorkFolder(tmp_path, KEY, "doctor") as work:
        monkeypatch.setattr(os, "fsync", full)
        with pytest.raises(WorkFolderError, match=r"a\.part cannot be written \(No space left on device\)"):
            work.put("a", b"one")
        assert work.get("a") is None


def test_remove(tmp_path: Path) -> None:
    with WorkFolder(tmp_path / "w", KEY, "doctor") as work:
        work.put("a", b"one")
        work.remove()
    assert not (tmp_path / "w").exists()


def test_dropped_part_is_missing(tmp_path: Path) -> None:
    with WorkFolder(tmp_path, KEY, "doctor") as work:
        work.put("a", b"one")
        work.drop("a")
        work.drop("b")
        assert work.get("a") is None
        assert work.notes == []


def test_files_that_end_like_a_part_are_not_deleted(tmp_path: Path) -> None:
    (tmp_path / "film.mkv.part").write_bytes(b"half of a download")
    with pytest.raises(WorkFolderError, match="contains other files"):
        WorkFolder(tmp_path, KEY, "doctor")
    (tmp_path / "film.mkv.part").unlink()
    with WorkFolder(tmp_path, KEY, "doctor") as work:
        work.put("a", b"one")
    (tmp_path / "setup.new").write_text("mine")
    with WorkFolder(tmp_path, KEY | {"--seed": 2}, "doctor") as work:
        assert work.get("a") is None
    assert (tmp_path / "setup.new").read_text() == "mine"
