"""The addresses where relays find control processes: a Unix socket of this machine, or TCP, with TLS or on loopback
alone.
"""

from __future__ import annotations

import asyncio
import random
import socket
import ssl
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True, slots=True)
class Target:
    """One place to connect to. host: what the certificate has to name. path: of a Unix socket, in place of all else."""

    ip: str = ""
    port: int = 0
    host: str = ""
    path: str = ""

    def __str__(self) -> str:
        return self.path or f"{f'[{self.ip}]' if ':' in self.ip else self.ip}:{self.port}"


@dataclass(frozen=True, slots=True)
class ControlAddresses:
    """The addresses that a relay is given.

    path: the Unix socket of this machine's control process; else hosts: (host, port). token: the relay token. ca: PEM
    file of the authority that signs the control processes' certificates; None: no TLS. upstreams: the relay's engines.
    """

    path: str = ""
    hosts: Sequence[tuple[str, int]] = ()
    token: str = ""
    ca: str | None = None
    upstreams: Sequence[str] = ()

    @classmethod
    def from_json(cls, fields: dict[str, Any]) -> ControlAddresses:
        return cls(**fields | {"hosts": [(str(host), int(port)) for host, port in fields.get("hosts", ())]})

    def context(self) -> ssl.SSLContext | None:
        """Returns the TLS context; None: without TLS. Raises OSError, with a text that names the file, if it cannot be
        read or is no certificate.
        """
        return None if self.ca is None else client_context(Path(self.ca))

    async def targets(self) -> tuple[list[Target], list[str]]:
        """Returns all addresses of all names, as they are now, in random order; and which names are not known, and
        why."""
        if self.path:
            return [Target(path=self.path)], []
        result: dict[Target, None] = {}
        failures = []
        for host, port in self.hosts:
            try:
                infos = await asyncio.get_running_loop().getaddrinfo(host, port, type=socket.SOCK_STREAM)
            except OSError as error:
                failures.append(f"{host}: {error.strerror or error}")
                continue
            result |= {Target(str(info[4][0]), port, host): None for info in infos}
        return random.sample(list(result), len(result)), failures


async def connect(target: Target, protocol: Callable[[], asyncio.Protocol], context: ssl.SSLContext | None) -> None:
    """Connects to a control process. Raises OSError (TLS errors are some); the caller sets the time limit."""
    loop = asyncio.get_running_loop()
    if target.path:
        await loop.create_unix_connection(protocol, target.path)
    else:
        host = target.host if context is not None else None
        await loop.create_connection(protocol, target.ip, target.port, ssl=context, server_hostname=host)


def client_context(ca: Path) -> ssl.SSLContext:
    """Returns the TLS context of relays: the server's certificate has to be signed by this authority, and to name the
    host. Raises OSError.
    """
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    try:
        context.load_verify_locations(ca)
    except OSError as error:
        raise OSError(f"{ca}: {_reason(error, 'no certificate in PEM')}") from None
    return context


def server_context(cert: Path, key: Path) -> ssl.SSLContext:
    """Returns the TLS context of a control process. Raises OSError, with a text that names the files."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    try:
        # Without a password no question for one may stop the process.
        context.load_cert_chain(cert, key, password="")
    except OSError as error:
        raise OSError(f"{cert}, {key}: {_reason(error, 'not a certificate and its key in PEM')}") from None
    return context


def _reason(error: OSError, not_pem: str) -> str:
    return not_pem if isinstance(error, ssl.SSLError) else error.strerror or str(error)
