"""The processes that a process has started."""

from __future__ import annotations

import os
from pathlib import Path


def children(command: str, parent: int | None = None) -> list[int]:
    """Ids of those whose command line contains `command`; parent: by default this process."""
    parent = parent or os.getpid()
    text = Path(f"/proc/{parent}/task/{parent}/children").read_text()
    return [pid for pid in map(int, text.split()) if command.encode() in _command_line(pid)]


def _command_line(pid: int) -> bytes:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes()
    except (FileNotFoundError, ProcessLookupError):  # it ended since
        return b""
