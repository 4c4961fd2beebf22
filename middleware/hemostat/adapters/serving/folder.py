"""The shared folder from which engines without Hemostat's general plugin load adapters: one subfolder for each version.

A version's subfolder is complete or absent: it is written under another name and renamed.
"""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Collection, Mapping
from pathlib import Path

from hemostat_calibration.profiles.profile import VERSION_PATTERN

MAX_VERSIONS = 8
"""Subfolders that stay; the oldest that are not in use are removed."""
_TEMPORARY = ".hemostat-"


def write(folder: Path, version: str, files: Mapping[str, bytes], in_use: Collection[str]) -> None:
    """Write a version's files and remove what is too old. OSError."""
    target, made = folder / version, folder / f"{_TEMPORARY}{version}"
    if not _has(target, files):
        for path in (made, target):  # what an earlier process left half-written, or another one changed
            if path.exists():
                shutil.rmtree(path)
        made.mkdir(parents=True)
        made.chmod(0o755)  # vLLM may run as another user
        for name, data in files.items():
            with (made / name).open("wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
        made.rename(target)
    _remove_old(folder, {version, *in_use}, set(files))


def _has(target: Path, files: Mapping[str, bytes]) -> bool:
    try:
        return all((target / name).read_bytes() == data for name, data in files.items())
    except OSError:
        return False


def _remove_old(folder: Path, keep: Collection[str], names: set[str]) -> None:
    """names: the files of a version; a subfolder that holds others was not written here and stays."""
    with contextlib.suppress(OSError):  # another middleware may remove the same ones
        result = [path for path in folder.iterdir() if VERSION_PATTERN.fullmatch(path.name)]
        result.sort(key=lambda path: path.stat().st_mtime, reverse=True)
        for path in result[MAX_VERSIONS:]:
            if path.name not in keep and {file.name for file in path.iterdir()} <= names:
                shutil.rmtree(path, ignore_errors=True)
