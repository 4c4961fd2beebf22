"""The folder of finished parts, from which an interrupted command continues."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

from hemostat.report.written_files import write_atomically
from hemostat_calibration.errors import HemostatError

_SUFFIX = ".part"
_DIGEST = hashlib.sha256().digest_size


class WorkFolderError(HemostatError):
    """The folder cannot be used, or a part cannot be read or written; the text is one line with the correction."""


class WorkFolder:
    """A folder for one set of models, prompts and options (`key`); parts of another key are deleted.

    Only the owner may read it: token ids can be decoded to text. Every file begins with its SHA-256; a damaged file
    counts as missing. `notes` lists what was deleted or is damaged, and why.
    """

    def __init__(self, folder: Path, key: Mapping[str, Any], program: str, option: str = "--work") -> None:
        """program: who uses it; part of the name of the file with the key. option: what names the folder, for errors.

        Raises WorkFolderError when the folder is unusable, contains other files, or is in use.
        """
        self.folder = folder
        self._key_file = folder / f"{program}-run.json"
        self._option = option
        self.notes: list[str] = []
        try:
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            self._lock = os.open(folder, os.O_RDONLY)
        except OSError as error:
            raise WorkFolderError(
                f"{self._option}: {folder} cannot be used ({error.strerror}); name another folder"
            ) from None
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            os.close(self._lock)
            raise WorkFolderError(
                f"{self._option}: another {program} is using {folder}; wait for it or name another folder"
            ) from None
        try:
            self._open(json.loads(json.dumps(dict(key))))
        except BaseException:
            os.close(self._lock)
            raise

    def __enter__(self) -> WorkFolder:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        os.close(self._lock)

    def get(self, name: str) -> bytes | None:
        """The data stored under `name`; None if it is missing or damaged."""
        path = self.folder / f"{name}{_SUFFIX}"
        try:
            data = path.read_bytes()
        except FileNotFoundError:
            return None
        except OSError as error:
            raise WorkFolderError(f"{self._option}: {path} cannot be read ({error.strerror})") from None
        if hashlib.sha256(data[_DIGEST:]).digest() != data[:_DIGEST]:
            self.notes.append(f"{path.name} is damaged: its part is computed again")
            return None
        return data[_DIGEST:]

    def put(self, name: str, data: bytes) -> None:
        """Store atomically. Raises WorkFolderError when the file cannot be written."""
        path = self.folder / f"{name}{_SUFFIX}"
        try:
            write_atomically(path, hashlib.sha256(data).digest() + data)
        except OSError as error:
            raise WorkFolderError(
                f"{self._option}: {path} cannot be written ({error.strerror}); free some space"
            ) from None

    def drop(self, name: str) -> None:
        """Delete a part that is not needed any more, if there is one."""
        with contextlib.suppress(FileNotFoundError):
            (self.folder / f"{name}{_SUFFIX}").unlink()

    def remove(self) -> None:
        """Delete the folder; for use when the work is complete."""
        shutil.rmtree(self.folder, ignore_errors=True)

    def _open(self, key: dict[str, Any]) -> None:
        path = self._key_file
        stored: Any = None
        with contextlib.suppress(OSError, ValueError):
            stored = json.loads(path.read_text(encoding="utf-8"))
        if stored == key:
            return
        names = {file.name for file in self.folder.iterdir()}
        if path.name not in names and names - {f"{path.name}.new"}:
            # Files that end like a part may be of another program (a download, for example).
            raise WorkFolderError(f"{self._option}: {self.folder} contains other files; name an empty or a new folder")
        if isinstance(stored, dict):
            changed = sorted(name for name in key.keys() | stored.keys() if key.get(name) != stored.get(name))
            self.notes.append(f"started over: {', '.join(changed)} changed since {self.folder} was written")
        elif path.exists():
            self.notes.append(f"started over: {path.name} is damaged")
        for name in names:
            if name.endswith((_SUFFIX, f"{_SUFFIX}.new")):
                (self.folder / name).unlink(missing_ok=True)
        write_atomically(path, json.dumps(key, indent=2).encode())
