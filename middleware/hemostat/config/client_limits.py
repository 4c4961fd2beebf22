"""The section `client_limits` of the configuration."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from hemostat.config.fields import Section


class ClientLimits(Section):
    """Limits for each client of each relay process. Beyond them, requests get 429 with `Retry-After`. There are no
    limits by default. Requests other than GET and HEAD count."""

    key: Literal["authorization", "address"] = "authorization"
    """The attribute that names a client. With authorization it is the credential in the Authorization header, and the
    address of a client that sends none. With address it is the IP address (IPv6: the /64 network)."""
    requests_per_second: float | None = Field(default=None, gt=0, le=1_000_000)
    """The sustained rate of requests. none means no limit."""
    burst: int = Field(default=10, ge=1, le=1_000_000)
    """The number of requests that may come at once, before `requests_per_second` applies."""
    concurrent: int | None = Field(default=None, ge=1, le=1_000_000)
    """The largest number of requests in progress. none means no limit."""
