"""Where the control process listens for relays: on this machine, and, where it is configured, on the network."""

from __future__ import annotations

import socket
from pathlib import Path
from typing import Any

from hemostat.config.schema import Settings
from hemostat.ipc.addresses import server_context
from hemostat.ipc.relay_listener import RelayListener, Security, listen_locally


def make_listener(given: dict[str, Any], settings: Settings) -> RelayListener:
    """given: `socket`, a path, and `control_fd`, an inherited listening socket or None. OSError."""
    sockets = [listen_locally(Path(given["socket"]))]
    if given.get("control_fd") is not None:
        sockets.append(socket.socket(fileno=given["control_fd"]))
    return RelayListener(sockets, security(settings))


def security(settings: Settings) -> Security | None:
    """Of relays by TCP, with the certificate as it is now in its file. None: there are none. OSError."""
    control = settings.control
    if control.listen is None or control.token is None:
        return None
    context = server_context(control.cert, control.key) if control.cert and control.key else None
    return Security(control.token.get_secret_value(), context, settings.upstream.addresses)
