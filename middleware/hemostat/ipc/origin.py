"""The address of an engine, and the engines behind one name: relays send requests there, the control process probes."""

from __future__ import annotations

import asyncio
import logging
import socket
from dataclasses import dataclass, replace
from urllib.parse import urlsplit

from hemostat_calibration.messages import shown_address

DNS = "dns+"
"""The prefix of an address whose name stands for several engines, one for each of its addresses."""


@dataclass(frozen=True, slots=True)
class Origin:
    """One engine. `host` is what it is called in Host and in its certificate, `address` is where it is connected to."""

    host: str
    port: int
    tls: bool
    authority: bytes
    """The value of the field Host: the host, with the port unless it is the scheme's default."""
    address: str

    @property
    def name(self) -> str:
        """The address and port, by which metrics and operators name the engine."""
        return _joined(self.address, self.port)

    def at(self, address: str) -> Origin:
        """Returns the same server at this address."""
        return replace(self, address=address)


def parse_origin(url: str) -> Origin:
    """Returns the origin that `url` names. Raises ValueError unless `url` is http(s)://host[:port] without a path or
    query."""
    parts = urlsplit(url)
    if parts.scheme not in {"http", "https"} or not parts.hostname or parts.path not in {"", "/"} or parts.query:
        raise ValueError(f"upstream_url: {shown_address(url)} is not of the form http://host:port or https://host:port")
    tls = parts.scheme == "https"
    port = parts.port or (443 if tls else 80)
    host = f"[{parts.hostname}]" if ":" in parts.hostname else parts.hostname
    authority = host if port == (443 if tls else 80) else f"{host}:{port}"
    return Origin(parts.hostname, port, tls, authority.encode("ascii"), parts.hostname)


class Lookup:
    """Looks the name of `origin` up. The log says once that this fails, until it succeeds again."""

    def __init__(self, origin: Origin, log: logging.Logger) -> None:
        self.origin = origin
        self._log = log
        self._failed = False

    async def addresses(self) -> list[Origin] | None:
        """Returns one origin for each address of the name, in the order of addresses.

        Returns None if the look-up fails: what the last one had stays in use.
        """
        origin = self.origin
        try:
            found = await asyncio.get_running_loop().getaddrinfo(origin.host, origin.port, type=socket.SOCK_STREAM)
        except OSError as error:
            if not self._failed:
                self._log.warning("%s cannot be resolved: %s", origin.host, error.strerror or error)
            self._failed = True
            return None
        self._failed = False
        return [origin.at(address) for address in sorted({str(entry[4][0]) for entry in found})]


def _joined(host: str, port: int) -> str:
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
