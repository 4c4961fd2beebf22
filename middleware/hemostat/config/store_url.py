"""Addresses of stores (`store.url`): which ones exist, whether one is valid, and how one is shown."""

from __future__ import annotations

from urllib.parse import SplitResult, parse_qsl, urlencode, urlsplit, urlunsplit

SERVER_SCHEMES = {"redis": "redis", "rediss": "rediss", "valkey": "redis", "valkeys": "rediss"}
"""Scheme of `store.url` -> scheme that the client library knows; rediss and valkeys are TLS."""
MISSING_EXTRA = "needs the client of Valkey and Redis: pip install 'hemostat[valkey]'"
DEFAULT_PREFIX = "hemostat:"


def without_password(url: str) -> str:
    """The address of a store as it may be shown."""
    parts = urlsplit(url)
    user, at, host = parts.netloc.rpartition("@")
    _, colon, password = user.partition(":")
    return url.replace(f"{colon}{password}{at}{host}", f":***@{host}", 1) if password else url


def split_store_url(url: str) -> SplitResult:
    """The parts of a store's address; ValueError where no store has such an address."""
    try:
        parts = urlsplit(url)
        port = parts.port
    except ValueError as error:
        raise ValueError(f"not an address ({error}); write it like redis://valkey:6379") from None
    if parts.scheme == "memory" or (parts.scheme == "sqlite" and not parts.netloc and parts.path not in ("", "/")):
        return parts
    if parts.scheme in SERVER_SCHEMES and parts.hostname and port != 0:
        if parts.path.strip("/") and not parts.path.strip("/").isdecimal():
            raise ValueError(f"{without_password(url)}: the path after the host must be a database number")
        return parts
    raise ValueError(f"{without_password(url)!r} is none of memory://, sqlite:///path and redis://host:6379")


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
    except (ValueError, TypeError, redis.RedisError) as error:
        raise ValueError(f"{without_password(url)}: {error}") from None
