"""The service manager: sockets that systemd passes on, and notifications to it (sd_listen_fds(3), sd_notify(3))."""

from __future__ import annotations

import contextlib
import os
import socket
from collections.abc import MutableMapping

from hemostat.config.errors import ConfigError

FIRST_FD = 3
"""The number of the first passed socket, from which on they are consecutive (SD_LISTEN_FDS_START)."""
DATA, ADMIN, CONTROL = NAMES = "data", "admin", "control"
_VARIABLES = ("LISTEN_PID", "LISTEN_FDS", "LISTEN_FDNAMES")


def passed_sockets(environment: MutableMapping[str, str], pid: int) -> dict[str, list[socket.socket]]:
    """Returns the sockets that systemd has opened for this process, by their name in NAMES (FileDescriptorName=).

    A single one may have any name, and is the data port's. The variables are removed, as they are for this process
    only. ConfigError says which unit is to be corrected.
    """
    values = {name: environment.pop(name, "") for name in _VARIABLES}
    if values["LISTEN_PID"] != str(pid) or not values["LISTEN_FDS"].isdecimal():
        return {}
    count = int(values["LISTEN_FDS"])
    names = values["LISTEN_FDNAMES"].split(":") if values["LISTEN_FDNAMES"] else [""] * count
    if count == 1 and names[0] not in NAMES:
        names = [DATA]
    result: dict[str, list[socket.socket]] = {}
    try:
        for fd, name in zip(range(FIRST_FD, FIRST_FD + count), names, strict=False):
            if name not in NAMES:
                raise ConfigError(
                    f"systemd: a socket is named {name!r}; set FileDescriptorName=data, admin or control in its unit"
                )
            if name in result:
                raise ConfigError(f"systemd: two sockets are named {name}; list one ListenStream= for each name")
            result[name] = [_listening(fd, name)]
    except ConfigError:
        for sockets in result.values():
            sockets[0].close()
        raise
    return result


def _listening(fd: int, name: str) -> socket.socket:
    try:
        sock = socket.socket(fileno=fd)
    except OSError as error:
        raise ConfigError(f"systemd: {name} is not a socket ({error.strerror}); use a .socket unit") from None
    listens = sock.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN)
    if not listens or sock.type != socket.SOCK_STREAM or sock.family not in {socket.AF_INET, socket.AF_INET6}:
        sock.close()
        raise ConfigError(f"systemd: {name} is not a listening TCP socket; use ListenStream= with a port")
    sock.set_inheritable(False)
    return sock


def notify(state: str) -> None:
    """Tells the service manager, if there is one; for example `READY=1`."""
    address = os.environ.get("NOTIFY_SOCKET", "")
    if address[:1] not in {"/", "@"}:
        return
    with contextlib.suppress(OSError), socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
        sock.sendto(state.encode(), address.replace("@", "\0", 1) if address[0] == "@" else address)
