"""Files that a command writes where the user says: one that holds something else is not replaced."""

from __future__ import annotations

from pathlib import Path

_READ_BYTES = 64 * 1024
"""In the beginning of a file, which has its marker."""


def other_content(path: Path, marker: bytes) -> str:
    """Why `path` is not replaced, with the correction; "" where it may be: nothing is there, an empty file, no regular
    file (/dev/stdout), or one that begins like those that the command writes, which all have `marker`."""
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
