"""Addresses of stores (`store.url`): which ones exist, and whether one is valid."""

from __future__ import annotations

import re
from urllib.parse import SplitResult, urlsplit

from hemostat.config.packages import install_command
from hemostat_calibration.messages import shown_address

POSTGRES = ("postgresql", "postgres")
ESCAPES = "write it like postgresql://user:password@host:5432/name, with %2F %3F %40 %25 for / ? @ % in the password"
_AUTHORITY = re.compile(r"[a-z]+://([^/?]*)(.*)", re.DOTALL)
_PORTS = re.compile(r"(\d{1,5})?(,(\d{1,5})?)*")


def split_store_url(url: str) -> SplitResult:
    """Returns the parts of a store's address. Raises ValueError if no store has such an address."""
    if url.partition("://")[0] in POSTGRES:
        postgres_parameters(url)
    try:
        parts = urlsplit(url)
    except ValueError:  # its text has a part of the address
        raise ValueError(f"{shown_address(url)} is not an address") from None
    if parts.scheme in ("memory", *POSTGRES):
        return parts
    if parts.scheme == "sqlite" and not parts.netloc and parts.path not in ("", "/"):
        return parts
    raise ValueError(f"{shown_address(url)} is none of memory://, sqlite:///path and postgresql://host/database")


def postgres_parameters(url: str) -> dict[str, str]:
    """Returns the parameters of libpq that the address gives; it does not connect. Raises ValueError if the client
    library is missing or the address is invalid; the error's text has no part of a password.
    """
    try:
        from psycopg import Error  # noqa: PLC0415  an optional extra
        from psycopg.conninfo import conninfo_to_dict  # noqa: PLC0415
    except ImportError:
        raise ValueError(f"needs the client of PostgreSQL: {install_command('postgres')}") from None
    match = _AUTHORITY.fullmatch(url)
    try:
        given = {name: str(value) for name, value in conninfo_to_dict(url).items()}
    except (Error, ValueError):  # their texts may have a part of the address
        raise ValueError(f"{shown_address(url)} is not an address, or has an unknown option; {ESCAPES}") from None
    if match is None or "@" in match[2] or match[1].count("@") > 1 or not _PORTS.fullmatch(given.get("port", "")):
        raise ValueError(f"{shown_address(url)}: what is before the @ is not a user and a password; {ESCAPES}")
    return given
