"""A client's connection, as its exchanges see it."""

from __future__ import annotations

import asyncio
from typing import Protocol

from hemostat.relay.shares import Holding
from hemostat.relay.tunnel import Tunnel


class ClientSide(Protocol):
    """The part of `client_connection.ClientConnection` that exchanges use."""

    transport: asyncio.Transport
    address: str
    """The address of the present request's client."""
    holding: Holding
    """The memory and the places that the relay holds for this connection."""

    @property
    def write_paused(self) -> bool:
        """It is True if the client does not read: then nothing more is to be taken from the upstream."""

    @property
    def last_request(self) -> bool:
        """It is True if no request can follow the present one."""

    def pause_reading(self) -> None:
        """Takes nothing more from the client for now."""

    def resume_reading(self) -> None: ...

    def tunnel_opened(self, tunnel: Tunnel) -> None:
        """Is told that the protocol has been switched: from here on, bytes pass through the tunnel."""

    def exchange_ended(self, *, keep_alive: bool) -> None:
        """Is told that the response has been written. keep_alive: the next request may follow."""

    def exchange_broken(self, *, reset: bool) -> None:
        """Closes at once, since the response cannot be completed. reset: by a reset, since a close would look like its
        end."""
