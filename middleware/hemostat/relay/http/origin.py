"""The address of the upstream server."""

from __future__ import annotations

from dataclasses import dataclass
from urllib.parse import urlsplit


@dataclass(frozen=True, slots=True)
class Origin:
    """The upstream server."""

    host: str
    port: int
    tls: bool
    authority: bytes
    """The value of the field Host: the host, with the port unless it is the scheme's default."""


def parse_origin(url: str) -> Origin:
    """ValueError unless `url` is http(s)://host[:port] without a path or query."""
    parts = urlsplit(url)
    if parts.scheme not in {"http", "https"} or not parts.hostname or parts.path not in {"", "/"} or parts.query:
        raise ValueError(f"upstream_url: {url!r} is not of the form http://host:port or https://host:port")
    tls = parts.scheme == "https"
    port = parts.port or (443 if tls else 80)
    host = f"[{parts.hostname}]" if ":" in parts.hostname else parts.hostname
    authority = host if port == (443 if tls else 80) else f"{host}:{port}"
    return Origin(parts.hostname, port, tls, authority.encode("ascii"))
