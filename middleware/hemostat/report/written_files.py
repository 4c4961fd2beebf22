"""Files that a command writes: whole or not at all, and no file that holds something else is replaced."""

from __future__ import annotations

import os
from pathlib import Path

_READ_BYTES = 64 * 1024
"""In the beginning of a file, which has its marker."""


def other_content(path: Path, marker: bytes) -> str:
    """Returns why `path` is not replaced, with the correction; "" if it may be replaced. It may be if there is
    nothing, an empty file, or no regular file (/dev/stdout), or if the file begins like the files that the command
    writes, which all have `marker`."""
    try:
        if not path.is_file():
            return ""
        with path.open("rb") as file:
            beginning = file.read(_READ_BYTES)
    except OSError as error:
        return f"{path} exists and cannot be read ({error.strerror}); name another file"
    if not beginning or marker in beginning:
        return ""
    return f"{path} exists and was not written by this command; name another file"


def write_atomically(path: Path, data: bytes) -> None:
    """The file is complete or as it was; only the owner may read it. OSError."""
    new = path.with_name(path.name + ".new")
    descriptor = os.open(new, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    with os.fdopen(descriptor, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    new.replace(path)
