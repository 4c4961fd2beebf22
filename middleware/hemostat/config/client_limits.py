"""The section `client_limits` of the configuration."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from hemostat.config.fields import Section


class ClientLimits(Section):
    """What one client may ask of each relay process; beyond it requests get 429 with `Retry-After`. Off by default.
    Requests other than GET and HEAD count."""

    key: Literal["authorization", "address"] = "authorization"
    """What names a client. authorization: the credential in its Authorization header, without one its address. address:
    its IP address (IPv6: its /64 network)."""
    requests_per_second: float | None = Field(default=None, gt=0, le=1_000_000)
    """Sustained rate. none: no limit."""
    burst: int = Field(default=10, ge=1, le=1_000_000)
    """Requests that may come at once, before `requests_per_second` applies."""
    concurrent: int | None = Field(default=None, ge=1, le=1_000_000)
    """Requests in progress. none: no limit."""
