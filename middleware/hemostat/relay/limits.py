"""The limits of what clients may send, how long it may take, and how much of a relay they may use."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from hemostat.relay.forwarded_for import TrustedProxies

RESERVED_DESCRIPTORS: Final = 64
"""The number of open files that are neither clients' nor upstream connections: the event loop, the control process,
logs."""
MAX_READ_AHEAD_BYTES: Final = 64 * 1024
"""The largest number of bytes that are taken from a client beyond the request in progress, or while that waits for an
upstream connection.
"""


@dataclass(frozen=True, slots=True)
class Limits:
    """The limits of a relay. Sizes are in bytes, times in seconds."""

    head_bytes: int = 64 * 1024
    header_count: int = 128
    body_bytes: int = 256 * 1024 * 1024
    buffered_body_bytes: int = 1024 * 1024
    """A body up to this size is complete before an upstream connection is used for it; a longer one is streamed."""
    buffered_bytes: int = 128 * 1024 * 1024
    """The largest size of all requests together that a relay keeps at a time."""
    body_bytes_per_second: int = 1024
    """The least rate of an incomplete body, on average over `body_seconds`."""
    connections: int = 16_384
    """The largest number of connections of all clients of a relay. Beyond it, the relay closes connections that wait
    for a complete request: the one that has waited longest, of the address that has most of them. If there is none, a
    new connection gets 503. It is no setting: each relay process has this limit of its own, so more `workers` accept
    more, and `ulimit -n` lowers it: to half of it, or to what `upstream.max_connections` leaves."""
    connections_per_client: int = 8_192
    """The largest number of connections of one address, or of one /64 network of IPv6."""
    head_seconds: float = 30.0
    """The longest time from the first byte of a head to its last."""
    body_seconds: float = 20.0
    """The time from one measurement of an incomplete body's rate to the next."""
    send_seconds: float = 60.0
    """The longest time in which a client that has a response to read takes no byte of it."""
    idle_seconds: float = 75.0
    """The longest time between two requests of one connection."""
    adapter_routes: bool = False
    """It is True if clients may load and unload adapters at the upstream."""
    trusted_proxies: TrustedProxies | None = None
    """The proxies whose `X-Forwarded-For` says who the client is. With None the field is neither read nor written."""


def share_descriptors(descriptors: int, clients: int, upstream: int) -> tuple[int, int]:
    """Returns how many connections of clients, and how many to the upstream, fit into the limit of open files.

    The upstream's share is reserved, so that clients cannot use it up: all that is asked for, up to a half.

    >>> share_descriptors(1_048_576, 16_384, 512), share_descriptors(256, 16_384, 512)
    ((16384, 512), (96, 96))
    """
    free = max(2, descriptors - RESERVED_DESCRIPTORS)
    upstream = min(upstream, free // 2)
    return min(clients, free - upstream), upstream
