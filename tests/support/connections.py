"""The TCP connections of this machine, as the kernel lists them: which process has accepted which."""

from __future__ import annotations

import os
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

_ESTABLISHED = "01"
_NOT_ACCEPTED = "0"


def established(port: int) -> dict[int, str]:
    """The established connections to this port of 127.0.0.1: the client's port -> the inode of the server's end.

    The inode of a connection that waits in the queue of the listening socket is "0".
    """
    result = {}
    for line in Path("/proc/net/tcp").read_text().splitlines()[1:]:
        fields = line.split()
        if fields[1].endswith(f":{port:04X}") and fields[3] == _ESTABLISHED:
            result[int(fields[2].rpartition(":")[2], 16)] = fields[9]
    return result


def waiting(port: int) -> int:
    """The number of connections to this port that no process has accepted."""
    return sum(inode == _NOT_ACCEPTED for inode in established(port).values())


def sockets(pid: int) -> set[str]:
    """The inodes of the sockets that a process has open; none if it has ended."""
    result = set()
    with suppress(OSError):
        for descriptor in Path(f"/proc/{pid}/fd").iterdir():
            with suppress(OSError):
                result.add(os.readlink(descriptor).removeprefix("socket:[").removesuffix("]"))
    return result


def accepted_by(port: int, client_port: int, pids: Iterable[int]) -> int:
    """The process, of these, that has accepted the connection between these ports; 0 if it is none of them."""
    inode = established(port).get(client_port, _NOT_ACCEPTED)
    return next((pid for pid in pids if inode in sockets(pid)), 0)
