"""The admin port: health, metrics, the console, and the JSON API. FastAPI, in the control process.

Reading needs no token (the port is on loopback by default); whatever changes state does, and so do the engine's calls.
"""

from __future__ import annotations

import asyncio
import contextlib
import hmac
import math
from collections.abc import AsyncIterator, Callable, Collection
from importlib import resources
from typing import Annotated, Any, Literal, Protocol, TypeVar

import msgspec
from fastapi import Depends, FastAPI, HTTPException, Request, Response
from fastapi.responses import JSONResponse, PlainTextResponse, StreamingResponse
from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, generate_latest

from hemostat import __version__
from hemostat.admin.hardening import Harden
from hemostat.admin.history import History
from hemostat.engines.api import engine_router, read_body
from hemostat.engines.registry import EngineRegistry
from hemostat_calibration.errors import HemostatError
from hemostat_calibration.profiles.profile import VERSION_PATTERN

MAX_PROFILE_BYTES = 256 * 1024 * 1024
MAX_SMALL_BYTES = 4096
ASSETS = {
    "index.html": "text/html; charset=utf-8",
    "console.css": "text/css; charset=utf-8",
    "console.js": "text/javascript; charset=utf-8",
    "runbook.html": "text/html; charset=utf-8",
    "vendor/uPlot.iife.min.js": "text/javascript; charset=utf-8",
    "vendor/uPlot.min.css": "text/css; charset=utf-8",
}
"""The console's files: nothing else is served."""
STREAMS_AT_MOST = 32
STREAM_EVERY = 2.0
"""Seconds between two states of the console's stream."""


class Governed(Protocol):
    """What the admin port shows and steers; the control process implements it."""

    registry: CollectorRegistry
    history: History
    engines: EngineRegistry

    @property
    def ready(self) -> bool: ...

    def status(self) -> dict[str, Any]: ...

    def profiles(self) -> dict[str, Any]: ...

    def profile(self, version: str) -> dict[str, Any] | None: ...

    def profile_bytes(self, version: str) -> bytes | None: ...

    async def import_profile(self, data: bytes, scope: str) -> str: ...

    async def promote(self, version: str, scope: str) -> None: ...

    async def pin(self, version: str | None) -> None: ...

    async def rollback(self, reason: str, scope: str | None) -> None: ...

    async def set_mode(self, mode: str) -> None: ...

    async def rebase(self, route: str) -> None: ...


class CalibrationRequest(msgspec.Struct, forbid_unknown_fields=True):
    """Body of POST /api/v1/calibration."""

    mode: Literal["off", "observe", "auto"]


Version = Annotated[str, msgspec.Meta(pattern=f"^{VERSION_PATTERN.pattern}$")]
Scope = Annotated[str, msgspec.Meta(max_length=256)]


class PromoteRequest(msgspec.Struct, forbid_unknown_fields=True):
    """Body of POST /api/v1/profiles/promote; scope "" is all."""

    version: Version
    scope: Scope = ""


class PinRequest(msgspec.Struct, forbid_unknown_fields=True):
    """Body of POST /api/v1/profiles/pin; null unpins."""

    version: Version | None


class RollbackRequest(msgspec.Struct, forbid_unknown_fields=True):
    """Body of POST /api/v1/profiles/rollback, if any; without a scope everything is taken back."""

    scope: Scope | None = None


class RebaseRequest(msgspec.Struct, forbid_unknown_fields=True):
    """Body of POST /api/v1/alarm/rebase: what the route is from now on is its new baseline."""

    route: Annotated[str, msgspec.Meta(max_length=256)]


T = TypeVar("T")


def create_app(
    control: Governed,
    token: str | None,
    now: Callable[[], float],
    *,
    metrics_need_token: bool = False,
    names: Collection[str] | None = None,
) -> FastAPI:
    """`token` None: everything that would change state answers 403 and says what to set.

    names: that the port answers to, beside addresses and localhost; None: to all. `app.state.closing` ends the streams.
    """
    streams = 0
    told, told_at = b"", -math.inf

    def state() -> bytes:
        """Computed once for all streams."""
        nonlocal told, told_at
        if now() - told_at >= STREAM_EVERY / 2:
            told_at = now()
            told = msgspec.json.encode({"status": control.status(), "profiles": control.profiles()})
        return told

    async def require_token(request: Request) -> None:
        if token is None:
            raise HTTPException(403, "set admin.token (HEMOSTAT_ADMIN__TOKEN) to use this; it is not set")
        scheme, _, given = request.headers.get("authorization", "").partition(" ")
        if scheme.lower() != "bearer" or not hmac.compare_digest(given.strip().encode(), token.encode()):
            raise HTTPException(401, "send the admin token as `Authorization: Bearer <admin.token>`")

    closing = asyncio.Event()
    app = FastAPI(title="Hemostat", version=__version__, docs_url=None, redoc_url=None, openapi_url=None)
    app.state.closing = closing
    guarded = [Depends(require_token)]

    @app.exception_handler(HemostatError)
    async def refused(_: Request, error: HemostatError) -> JSONResponse:
        return JSONResponse({"detail": str(error)}, 400)

    app.add_middleware(Harden, names=names)

    @app.get("/livez", response_class=PlainTextResponse)
    async def livez() -> str:
        return "ok\n"

    @app.get("/readyz")
    async def readyz() -> PlainTextResponse:
        return PlainTextResponse("ok\n") if control.ready else PlainTextResponse("no relay takes requests\n", 503)

    @app.get("/metrics", dependencies=guarded if metrics_need_token else [])
    async def metrics() -> Response:
        return Response(generate_latest(control.registry), media_type=CONTENT_TYPE_LATEST)

    @app.get("/")
    async def console() -> Response:
        return _asset("index.html")

    @app.get("/runbook")
    async def runbook() -> Response:
        return _asset("runbook.html")

    @app.get("/console/{name:path}")
    async def asset(name: str) -> Response:
        if name not in ASSETS:
            raise HTTPException(404, "no such file")
        return _asset(name)

    @app.get("/api/v1/history")
    async def history(after: float = 0.0) -> dict[str, list[float | None]]:
        return control.history.report(after)

    @app.get("/api/v1/stream")
    async def stream(request: Request) -> Response:
        nonlocal streams
        if streams >= STREAMS_AT_MOST:
            raise HTTPException(503, f"{STREAMS_AT_MOST} streams are open already; poll /api/v1/status")
        streams += 1

        async def events() -> AsyncIterator[bytes]:
            nonlocal streams
            try:
                yield b"retry: 2000\n\n"
                while not (closing.is_set() or await request.is_disconnected()):
                    yield b"event: state\ndata: %b\n\n" % state()
                    with contextlib.suppress(TimeoutError):
                        await asyncio.wait_for(closing.wait(), STREAM_EVERY)
            finally:
                streams -= 1

        return StreamingResponse(events(), media_type="text/event-stream")

    @app.get("/api/v1/status")
    async def status() -> dict[str, Any]:
        return control.status()

    @app.get("/api/v1/profiles")
    async def profiles() -> dict[str, Any]:
        return control.profiles()

    @app.get("/api/v1/profiles/{version}")
    async def profile(version: str) -> dict[str, Any]:
        found = control.profile(version) if VERSION_PATTERN.fullmatch(version) else None
        if found is None:
            raise HTTPException(404, "no such profile; GET /api/v1/profiles lists them")
        return found

    @app.post("/api/v1/profiles", dependencies=guarded)
    async def import_profile(request: Request) -> dict[str, str]:
        scope = request.query_params.get("scope", "")
        return {"version": await control.import_profile(await read_body(request, MAX_PROFILE_BYTES), scope)}

    @app.post("/api/v1/profiles/promote", dependencies=guarded)
    async def promote(request: Request) -> dict[str, Any]:
        wanted = await _read(request, PromoteRequest, '{"version": "<32 hex digits>"}, and "scope" if meant')
        await control.promote(wanted.version, wanted.scope)
        return control.profiles()

    @app.post("/api/v1/profiles/pin", dependencies=guarded)
    async def pin(request: Request) -> dict[str, Any]:
        wanted = await _read(request, PinRequest, '{"version": "<32 hex digits>"}, or null to unpin')
        await control.pin(wanted.version)
        return control.profiles()

    @app.post("/api/v1/profiles/rollback", dependencies=guarded)
    async def rollback(request: Request) -> dict[str, Any]:
        wanted = await _read(request, RollbackRequest, 'nothing, or {"scope": "..."}', RollbackRequest())
        await control.rollback("asked for by the operator", wanted.scope)
        return control.profiles()

    @app.post("/api/v1/calibration", dependencies=guarded)
    async def calibration(request: Request) -> dict[str, Any]:
        wanted = await _read(request, CalibrationRequest, '{"mode": "off"}, "observe" or "auto"')
        await control.set_mode(wanted.mode)
        return {"mode": wanted.mode}

    @app.post("/api/v1/alarm/rebase", dependencies=guarded)
    async def rebase(request: Request) -> dict[str, Any]:
        wanted = await _read(request, RebaseRequest, '{"route": "/v1/chat/completions"}')
        await control.rebase(wanted.route)
        alarm: dict[str, Any] = control.status()["alarm"]
        return alarm

    app.include_router(engine_router(control.engines, control.profile_bytes, now, require_token))
    return app


async def _read(request: Request, kind: type[T], said: str, nothing: T | None = None) -> T:
    """The body as `kind`, `nothing` where it is empty and may be; 422 says what to send.

    Not a typed parameter of the routes: FastAPI would read the whole body before it asks for the token.
    """
    body = await read_body(request, MAX_SMALL_BYTES)
    if not body and nothing is not None:
        return nothing
    try:
        return msgspec.json.decode(body, type=kind)
    except msgspec.DecodeError as error:
        raise HTTPException(422, f"send {said}: {error}") from None


def _asset(name: str) -> Response:
    path = resources.files("hemostat.admin.console").joinpath(*name.split("/"))
    return Response(path.read_bytes(), media_type=ASSETS[name])
