"""The address of a client behind proxies: `X-Forwarded-For`, read from the hops that are trusted only.

The field is a list to which each hop adds the address that it was called from. Everything to the left of what a trusted
hop has written may be invented.
"""

from __future__ import annotations

import re
import socket
from collections.abc import Iterator, Sequence
from ipaddress import IPv4Network, ip_network
from typing import Final

from hemostat.relay.http.fields import drop_fields, split_fields
from hemostat.relay.http.request import RequestHead

MAX_HOPS: Final = 32
"""The largest number of hops that are looked at."""
_NAMES: Final = frozenset((b"x-forwarded-for",))
_MAPPED: Final = bytes(10) + b"\xff\xff"
"""The beginning of an IPv4 address that is written as one of IPv6."""
_hop: Final = re.compile(
    rb"[ \t]*(?:\[([0-9A-Fa-f:.]+)\](?::[0-9]{1,5})?|([0-9.]+)(?::[0-9]{1,5})?|([0-9A-Fa-f:.]+))[ \t]*"
).fullmatch
"""An address, perhaps with the port of the connection."""


class TrustedProxies:
    """The networks of the proxies that may say who the client is; a network is `10.0.0.0/8` or `2001:db8::/32`."""

    def __init__(self, networks: Sequence[str]) -> None:
        self._networks = []
        for network in map(ip_network, networks):
            mapped = isinstance(network, IPv4Network)
            first = _MAPPED + network.network_address.packed if mapped else network.network_address.packed
            bits = 128 - network.prefixlen - (96 if mapped else 0)
            self._networks.append((int.from_bytes(first) >> bits, bits))

    def name_client(self, peer: str, request: RequestHead) -> str:
        """Returns the client's address, and makes it the request's only `X-Forwarded-For`. peer: the address of the
        connection.

        Starting from the peer, it is the first address that is not trusted, or the last one that can be read.
        """
        client = _packed(peer.partition("%")[0])
        if client is None:
            return peer
        for hop in _hops(request.received):
            if not self._trusts(client):
                break
            match = _hop(hop)
            address = None if match is None else _packed((match[1] or match[2] or match[3]).decode("ascii"))
            if address is None:
                break
            client = address
        shown = _shown(client)
        line = b"X-Forwarded-For: " + shown.encode("ascii")
        request.drop(_NAMES)
        request.lines.append(line)
        request.received = [*drop_fields(request.received, -1, _NAMES)[0], line]
        return shown

    def _trusts(self, address: bytes) -> bool:
        number = int.from_bytes(address)
        return any(number >> bits == first for first, bits in self._networks)


def _hops(lines: list[bytes]) -> Iterator[bytes]:
    """Yields what the hops have added, the nearest first. More than MAX_HOPS end with one that is not an address."""
    values = [value for name, value in split_fields(lines) if name.lower() in _NAMES]
    return reversed(b",".join(values).rsplit(b",", MAX_HOPS)) if values else iter(())


def _packed(address: str) -> bytes | None:
    """Returns 16 bytes, of IPv4 as a mapped address; None if it is not an address."""
    try:
        if ":" in address:
            return socket.inet_pton(socket.AF_INET6, address)
        return _MAPPED + socket.inet_pton(socket.AF_INET, address)
    except OSError:
        return None


def _shown(address: bytes) -> str:
    if address[:12] == _MAPPED:
        return socket.inet_ntop(socket.AF_INET, address[12:])
    return socket.inet_ntop(socket.AF_INET6, address)
