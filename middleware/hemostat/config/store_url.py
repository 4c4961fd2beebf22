"""Addresses of stores (`store.url`): which ones exist, whether one is valid, and how one is shown."""

from __future__ import annotations

from urllib.parse import SplitResult, parse_qsl, urlencode, urlsplit, urlunsplit

from hemostat_calibration.messages import shown_address

SERVER_SCHEMES = {"redis": "redis", "rediss": "rediss", "valkey": "redis", "valkeys": "rediss"}
"""Scheme of `store.url` -> scheme that the client library knows; rediss and valkeys are TLS."""
MISSING_EXTRA = "needs the client of Valkey and Redis: pip install 'hemostat[valkey]'"
DEFAULT_PREFIX = "hemostat:"
UNKNOWN_OPTION = "an option after the ? is not one that the client of Valkey and Redis knows; leave it out"
ESCAPES = "write it like redis://user:password@valkey:6379, with %2F %23 %3F %40 %25 for / # ? @ % in the password"


def split_store_url(url: str) -> SplitResult:
    """The parts of a store's address; ValueError where no store has such an address."""
    try:
        parts = urlsplit(url)
        port = parts.port
    except ValueError:  # its text has a part of the address
        raise ValueError(f"{shown_address(url)} is not an address; {ESCAPES}") from None
    if parts.scheme == "memory" or (parts.scheme == "sqlite" and not parts.netloc and parts.path not in ("", "/")):
        return parts
    if "@" in parts.path + parts.query + parts.fragment:
        raise ValueError(f"{shown_address(url)}: what is before the @ is not a user and a password; {ESCAPES}")
    if parts.scheme in SERVER_SCHEMES and parts.hostname and port != 0:
        if parts.path.strip("/") and not parts.path.strip("/").isdecimal():
            raise ValueError(f"{shown_address(url)}: the path after the host must be a database number")
        return parts
    raise ValueError(f"{shown_address(url)} is none of memory://, sqlite:///path and redis://host:6379")


def server_address(url: str) -> tuple[str, str]:
    """A server's address for the client library, and the prefix of Hemostat's keys; ValueError where it is invalid."""
    parts = split_store_url(url)
    query = dict(parse_qsl(parts.query))
    if query.keys() & {"password", "username"}:
        raise ValueError("write user and password before the host, like redis://user:password@host")
    prefix = query.pop("prefix", DEFAULT_PREFIX)
    return urlunsplit((SERVER_SCHEMES[parts.scheme], parts.netloc, parts.path, urlencode(query), "")), prefix


def check_server_url(url: str) -> None:
    """ValueError where the client library is missing, or cannot use the address of a server. Does not connect."""
    try:
        import redis  # noqa: PLC0415  an optional extra
    except ImportError:
        raise ValueError(MISSING_EXTRA) from None
    address, _ = server_address(url)
    try:
        redis.Redis.from_url(address).connection_pool.make_connection()
    except (ValueError, TypeError, redis.RedisError):  # their texts may have a part of the address
        raise ValueError(f"{shown_address(url)}: {UNKNOWN_OPTION}") from None
