"""Addresses of stores (`store.url`): which ones exist, and whether one is valid."""

from __future__ import annotations

from urllib.parse import SplitResult, urlsplit

from hemostat.config.postgres_url import SCHEMES, postgres_parameters
from hemostat_calibration.messages import shown_address


def split_store_url(url: str) -> SplitResult:
    """The parts of a store's address; ValueError where no store has such an address."""
    try:
        parts = urlsplit(url)
    except ValueError:  # its text has a part of the address
        raise ValueError(f"{shown_address(url)} is not an address") from None
    if parts.scheme == "memory" or (parts.scheme == "sqlite" and not parts.netloc and parts.path not in ("", "/")):
        return parts
    if parts.scheme in SCHEMES:
        postgres_parameters(url)
        return parts
    raise ValueError(f"{shown_address(url)} is none of memory://, sqlite:///path and postgresql://host/database")
