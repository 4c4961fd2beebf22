"""What clients may send, how long it may take, and how much of a relay they may use."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

RESERVED_DESCRIPTORS: Final = 64
"""Open files that are neither clients' nor upstream connections: the event loop, the control process, logs."""


@dataclass(frozen=True, slots=True)
class Limits:
    """Sizes in bytes, times in seconds."""

    head_bytes: int = 64 * 1024
    header_count: int = 128
    body_bytes: int = 256 * 1024 * 1024
    buffered_body_bytes: int = 1024 * 1024
    """A body up to this size is complete before an upstream connection is used for it; a longer one is streamed."""
    buffered_bytes: int = 128 * 1024 * 1024
    """Of all requests that a relay keeps at a time."""
    body_bytes_per_second: int = 1024
    """Of an incomplete body, on average over `body_seconds`."""
    connections: int = 16_384
    """Of all clients of a relay."""
    connections_per_client: int = 8_192
    """Of one address, or of one /64 network of IPv6."""
    head_seconds: float = 30.0
    """From the first byte of a head to its last."""
    body_seconds: float = 20.0
    """From one measurement of an incomplete body's rate to the next."""
    send_seconds: float = 60.0
    """In which a client that has a response to read takes no byte of it."""
    idle_seconds: float = 75.0
    """Between two requests of one connection."""


def share_descriptors(descriptors: int, clients: int, upstream: int) -> tuple[int, int]:
    """How many connections of clients and to the upstream fit into the limit of open files.

    The upstream's share is reserved, so that clients cannot use it up: all that is asked for, up to a half.

    >>> share_descriptors(1_048_576, 16_384, 512), share_descriptors(256, 16_384, 512)
    ((16384, 512), (96, 96))
    """
    free = max(2, descriptors - RESERVED_DESCRIPTORS)
    upstream = min(upstream, free // 2)
    return min(clients, free - upstream), upstream
