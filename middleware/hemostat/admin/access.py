"""The access rules of the admin port: one table of who may request which route, and the check of the tokens.

A route that is not in the table is refused, so that a new one has to be put there.
"""

from __future__ import annotations

import hmac
from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum, auto

from fastapi import HTTPException, Request
from pydantic import SecretStr

from hemostat.config.operation import Admin


class Access(Enum):
    OPEN = auto()
    """The route only reads, so that nobody needs a token. The port is on loopback by default."""
    METRICS = auto()
    """The route is OPEN, or ADMIN if `admin.metrics_need_token` is set."""
    ADMIN = auto()
    """The route changes state and needs `admin.token`."""
    ENGINE = auto()
    """The route is called by the plugin in vLLM. It needs `admin.engine_token`, or `admin.token` if there is none."""


ACCESS: Mapping[tuple[str, str], Access] = {
    ("GET", "/livez"): Access.OPEN,
    ("GET", "/readyz"): Access.OPEN,
    ("GET", "/metrics"): Access.METRICS,
    ("GET", "/"): Access.OPEN,
    ("GET", "/runbook"): Access.OPEN,
    ("GET", "/console/{name:path}"): Access.OPEN,
    ("GET", "/api/v1/history"): Access.OPEN,
    ("GET", "/api/v1/stream"): Access.OPEN,
    ("GET", "/api/v1/status"): Access.OPEN,
    ("GET", "/api/v1/profiles"): Access.OPEN,
    ("GET", "/api/v1/profiles/{version}"): Access.OPEN,
    ("POST", "/api/v1/profiles"): Access.ADMIN,
    ("POST", "/api/v1/profiles/promote"): Access.ADMIN,
    ("POST", "/api/v1/profiles/pin"): Access.ADMIN,
    ("POST", "/api/v1/profiles/rollback"): Access.ADMIN,
    ("POST", "/api/v1/profiles/release"): Access.ADMIN,
    ("POST", "/api/v1/calibration"): Access.ADMIN,
    ("POST", "/api/v1/alarm/rebase"): Access.ADMIN,
    ("POST", "/api/v1/canaries/accept"): Access.ADMIN,
    ("GET", "/api/v1/gate"): Access.OPEN,
    ("POST", "/api/v1/gate"): Access.ADMIN,
    ("DELETE", "/api/v1/gate"): Access.ADMIN,
    ("POST", "/api/v1/gate/confirm-promotion"): Access.OPEN,
    ("POST", "/api/v1/gate/rollback"): Access.OPEN,
    ("POST", "/api/v1/engines/drain"): Access.ADMIN,
    ("POST", "/api/v1/engines/undrain"): Access.ADMIN,
    ("POST", "/api/v1/engines/trace"): Access.ADMIN,
    ("POST", "/api/v1/engine/report"): Access.ENGINE,
    ("GET", "/api/v1/engine/profiles/{version}"): Access.ENGINE,
    ("POST", "/api/v1/engine/tap"): Access.ENGINE,
    ("POST", "/api/v1/engine/answers"): Access.ENGINE,
}


@dataclass(frozen=True, slots=True)
class Tokens:
    """The tokens of the admin port. A token is None if it is not set. metrics_need_token: see `Access.METRICS`."""

    admin: str | None = None
    engine: str | None = None
    metrics_need_token: bool = False

    @classmethod
    def of(cls, settings: Admin) -> Tokens:
        return cls(_plain(settings.token), _plain(settings.engine_token), settings.metrics_need_token)

    def check(self, access: Access, authorization: str) -> None:
        """Raises HTTPException 401 or 403, which names the setting, unless the Authorization field allows the
        request."""
        if access is Access.OPEN or (access is Access.METRICS and not self.metrics_need_token):
            return
        name, expected = "admin.token", self.admin
        if access is Access.ENGINE and self.engine is not None:
            name, expected = "admin.engine_token", self.engine
        if expected is None:
            name = "admin.engine_token" if access is Access.ENGINE else name
            variable = f"HEMOSTAT_{name.replace('.', '__').upper()}"
            raise HTTPException(403, f"set {name} ({variable}) to use this; it is not set")
        scheme, _, given = authorization.partition(" ")
        if scheme.lower() != "bearer" or not hmac.compare_digest(given.strip().encode(), expected.encode()):
            kind = "admin" if expected is self.admin else "engine"
            raise HTTPException(401, f"send the {kind} token as `Authorization: Bearer <{name}>`")


def _plain(secret: SecretStr | None) -> str | None:
    return None if secret is None else secret.get_secret_value()


async def authorize(request: Request) -> None:
    """Checks the access; it is a dependency of every route, and runs before the body is read."""
    access = ACCESS.get((request.method, request.scope["route"].path))
    if access is None:
        raise HTTPException(403, "this route is not in the table of who may request it")
    tokens: Tokens = request.app.state.tokens
    tokens.check(access, request.headers.get("authorization", ""))
