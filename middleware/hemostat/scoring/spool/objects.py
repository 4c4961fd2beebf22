"""Folders in an object store, such as `s3://bucket/spool`, by the file systems of Arrow.

An object is written by one request under its final name, so it is there as a whole or not at all.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath
from typing import Any

import pyarrow as pa
from pyarrow import fs

from hemostat.scoring.spool.keys import SpoolError

_SHOWN = re.compile(r"(?<=://)[^/@]*@|\?.*")
"""The parts of an address that may have a password, and its options."""


@dataclass(frozen=True, slots=True)
class ObjectPath:
    """A folder or an object. It has the parts of `Path` that segments need.

    shown: its address for people. size: the bytes of an object that `files` has listed.
    """

    store: Any
    path: PurePosixPath
    shown: str
    size: int = 0

    @property
    def name(self) -> str:
        return self.path.name

    @property
    def stem(self) -> str:
        return self.path.stem

    def __truediv__(self, name: str) -> ObjectPath:
        return ObjectPath(self.store, self.path / name, f"{self.shown}/{name}")

    def __str__(self) -> str:
        return self.shown

    def is_dir(self) -> bool:
        """Returns True if an object is in the folder. Raises OSError."""
        return bool(self.store.get_file_info(str(self.path)).type == fs.FileType.Directory)

    def exists(self) -> bool:
        """Returns True if the object is there, or any object of the folder. Raises OSError."""
        return bool(self.store.get_file_info(str(self.path)).type != fs.FileType.NotFound)

    def files(self) -> list[ObjectPath]:
        """Returns the objects of the folder. Raises OSError."""
        found = self.store.get_file_info(fs.FileSelector(str(self.path), allow_not_found=True))
        return [replace(self / info.base_name, size=info.size) for info in found if info.type is fs.FileType.File]

    def read(self) -> pa.Buffer:
        """Returns the content. Raises OSError."""
        with self.store.open_input_file(str(self.path)) as file:
            return file.read_buffer()

    def write(self, content: pa.Buffer) -> None:
        """Writes the content as a whole. Raises OSError."""
        with self.store.open_output_stream(str(self.path), buffer_size=0) as file:
            file.write(content)

    def unlink(self) -> None:
        """Removes the object. Raises FileNotFoundError if there is none, and OSError."""
        self.store.delete_file(str(self.path))


def location(text: str | Path | ObjectPath) -> Path | ObjectPath:
    """Returns a folder of this machine, or of an object store if the text is an address. Raises SpoolError."""
    if isinstance(text, ObjectPath):
        return text
    address = str(text)
    if "://" not in address:
        return Path(text)
    shown = _SHOWN.sub("", address).rstrip("/")
    try:
        store, path = fs.FileSystem.from_uri(address)
    except (pa.ArrowException, OSError, ValueError) as error:
        why = str(error).splitlines()[0].replace(address, shown)[:200]
        raise SpoolError(f"{shown} cannot be used: {why}; write it like s3://bucket/folder") from None
    return ObjectPath(store, PurePosixPath(path), shown)
