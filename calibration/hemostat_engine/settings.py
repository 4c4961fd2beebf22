"""The settings of the plugin, from the environment of vLLM's processes."""

from __future__ import annotations

import os
import urllib.parse
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from hemostat_calibration.errors import InvalidArgumentError
from hemostat_calibration.messages import shown_address

DNS_PREFIX = "dns+"
"""The prefix of an address in HEMOSTAT_ADMIN_URL which says that every IP address of the host name is an admin port (a
headless Service).
"""


@dataclass(frozen=True, slots=True)
class Settings:
    """The sources of profiles. With neither source every request gets identity.

    admin_url: the address of the admin port, or several separated by commas; `dns+http://name:port`
    stands for every IP address of the name. engine_token: the admin port's `admin.engine_token`.
    """

    admin_url: str | None = None
    engine_token: str | None = None
    profile_dir: Path | None = None

    @classmethod
    def from_environment(cls, environment: Mapping[str, str] = os.environ) -> Settings:
        """Returns the settings from HEMOSTAT_ADMIN_URL, HEMOSTAT_ENGINE_TOKEN and HEMOSTAT_PROFILE_DIR. Raises
        InvalidArgumentError."""
        value = environment.get("HEMOSTAT_ADMIN_URL") or ""
        parts = [value] if "@" in value else value.split(",")  # a password, which is refused, may hold commas
        urls = [part.strip().rstrip("/") for part in parts if part.strip()]
        for url in urls:
            split_admin_url(url)
        folder = environment.get("HEMOSTAT_PROFILE_DIR") or None
        return cls(
            ",".join(urls) or None, environment.get("HEMOSTAT_ENGINE_TOKEN") or None, Path(folder) if folder else None
        )


def split_admin_url(url: str) -> urllib.parse.SplitResult:
    """Returns the parts of one address, without `dns+`. Raises InvalidArgumentError when it is not an HTTP address."""
    try:
        parts = urllib.parse.urlsplit(url.removeprefix(DNS_PREFIX))
        # A password has no place in it: HEMOSTAT_ENGINE_TOKEN is sent.
        invalid = parts.scheme not in ("http", "https") or not parts.hostname or parts.port == 0 or "@" in url
    except ValueError:
        invalid = True
    if invalid:
        raise InvalidArgumentError(f"HEMOSTAT_ADMIN_URL is {shown_address(url)}: it must be like http://127.0.0.1:9091")
    if url.startswith(DNS_PREFIX) and parts.scheme != "http":
        raise InvalidArgumentError(
            f"HEMOSTAT_ADMIN_URL is {shown_address(url)}: IP addresses have no certificate; use {DNS_PREFIX}http"
        )
    return parts
