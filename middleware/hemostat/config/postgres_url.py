"""Addresses of PostgreSQL stores (`store.url: postgresql://…`): what libpq makes of one, and whether it is valid."""

from __future__ import annotations

import re

from hemostat_calibration.messages import shown_address

SCHEMES = ("postgresql", "postgres")
MISSING_EXTRA = "needs the client of PostgreSQL: pip install 'hemostat[postgres]'"
ESCAPES = (
    "write it like postgresql://user:password@host:5432/database, with %2F %3F %40 %25 for / ? @ % in the password"
)
_AUTHORITY = re.compile(r"[a-z]+://([^/?]*)(.*)", re.DOTALL)
_PORTS = re.compile(r"(\d{1,5})?(,(\d{1,5})?)*")


def postgres_parameters(url: str) -> dict[str, str]:
    """libpq's parameters. ValueError where the client library is missing, or the address is invalid; its text has no
    part of a password. Does not connect."""
    try:
        from psycopg import Error  # noqa: PLC0415  an optional extra
        from psycopg.conninfo import conninfo_to_dict  # noqa: PLC0415
    except ImportError:
        raise ValueError(MISSING_EXTRA) from None
    found = _AUTHORITY.fullmatch(url)
    try:
        given = {name: str(value) for name, value in conninfo_to_dict(url).items()}
    except (Error, ValueError):  # their texts may have a part of the address
        raise ValueError(f"{shown_address(url)} is not an address or has an unknown option; {ESCAPES}") from None
    if found is None or "@" in found[2] or found[1].count("@") > 1 or not _PORTS.fullmatch(given.get("port", "")):
        raise ValueError(f"{shown_address(url)}: what is before the @ is not a user and a password; {ESCAPES}")
    return given
