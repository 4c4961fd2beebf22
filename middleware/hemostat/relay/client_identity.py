"""The identity of a client, for all that is limited or compared by client."""

from __future__ import annotations

import hashlib
import socket
from typing import Final

from hemostat.openai.credentials import credential
from hemostat.relay.http.request import RequestHead

_MAPPED: Final = bytes(10) + b"\xff\xff"
"""An IPv4 client of a socket that listens on `::`."""
_FIELD: Final = b"authorization:"


def client_key(request: RequestHead, network: bytes) -> bytes:
    """Returns the client that sends a request: a digest of its credential, without one its network (see
    `client_network`).

    A client without a valid credential can send another one with each request; what has to hold against those goes by
    the network too. Other fields, such as X-Api-Key, name no client: vLLM does not check them.
    """
    return credential_digest(request) or network


def credential_digest(request: RequestHead) -> bytes:
    """Returns 16 bytes that stand for the credential in the Authorization field, the same for every spelling of it; b""
    without one. Of several fields the first counts, as it does for vLLM."""
    if request.authorization:
        for line in request.lines:
            if line[: len(_FIELD)].lower() == _FIELD:
                value = credential(line[len(_FIELD) :])
                return hashlib.blake2b(value, digest_size=16).digest() if value else b""
    return b""


def client_network(address: str) -> bytes:
    """Returns what a client with this address is known by: of IPv6 the /64, which one client commonly has.

    >>> client_network("2001:db8::1:2"), client_network("::ffff:10.0.0.1")
    (b'20010db800000000', b'10.0.0.1')
    """
    host = address.partition("%")[0]
    if ":" not in host:
        return host.encode()
    packed = socket.inet_pton(socket.AF_INET6, host)
    if packed[:12] == _MAPPED:
        return socket.inet_ntop(socket.AF_INET, packed[12:]).encode()
    return packed[:8].hex().encode()
