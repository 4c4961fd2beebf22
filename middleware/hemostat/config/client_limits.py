"""The section `client_limits` of the configuration."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from hemostat.config.fields import Section


class ClientLimits(Section):
    """What one client may ask of each relay process; beyond it requests get status 429. Off by default. They count
    requests other than GET and HEAD."""

    key: Literal["authorization", "address"] = "authorization"
    """What a client is: the credential in its Authorization header (without one: its address), or its address."""
    requests_per_second: float | None = Field(default=None, gt=0, le=1_000_000)
    burst: int = Field(default=10, ge=1, le=1_000_000)
    """Requests that may come at once, where fewer came before."""
    concurrent: int | None = Field(default=None, ge=1, le=1_000_000)
    """Requests in progress."""
