"""The routes that the engine plugin calls on the admin port; who may is in `hemostat.admin.access`.

Reports are JSON, taps and answers msgpack (they carry arrays), profiles safetensors.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import msgspec
from fastapi import APIRouter, HTTPException, Request, Response
from starlette.requests import ClientDisconnect

from hemostat.engines.messages import InvalidEngineMessage, decode_answers, decode_report, decode_tap
from hemostat.engines.reports import PluginReports
from hemostat_calibration.profiles.profile import VERSION_PATTERN

MAX_REPORT_BYTES = 64 * 1024
MAX_TAP_BYTES = 16 * 1024 * 1024
BODY_SECONDS = 60.0
"""The longest time in which a request's body has to arrive."""


def engine_router(
    reports: PluginReports,
    load_profile: Callable[[str], bytes | None],
    now: Callable[[], float],
) -> APIRouter:
    """Returns the routes under /api/v1/engine. `now` returns monotonic seconds."""
    router = APIRouter(prefix="/api/v1/engine")

    def own_requests() -> dict[str, Any]:
        """Returns how the requests of this middleware are recognized."""
        return {"nonce_prefix": reports.nonce_prefix, "secrets": reports.secrets.for_engines(now())}

    def passive() -> dict[str, Any]:
        """Returns what the plugin samples itself; nothing where relays do."""
        told = reports.passive.told()
        return {} if told is None else {"passive": msgspec.to_builtins(told)}

    @router.post("/report")
    async def report(request: Request) -> dict[str, Any]:
        """Takes what the engine holds and has counted (JSON), and answers with the versions that it should hold, and
        the secrets of requests that it acts on.
        """
        body = await read_body(request, MAX_REPORT_BYTES)
        try:
            versions = reports.update(decode_report(body), now())
            return {"hold": versions, **own_requests()}
        except InvalidEngineMessage as error:
            raise HTTPException(400, str(error)) from None

    @router.get("/profiles/{version}")
    async def profile(version: str) -> Response:
        """Returns the profile's file."""
        data = load_profile(version) if VERSION_PATTERN.fullmatch(version) else None
        if data is None:
            raise HTTPException(404, "no such profile")
        return Response(data, media_type="application/octet-stream")

    @router.post("/tap", status_code=204)
    async def tap(request: Request) -> None:
        """Takes features and masks of sampled requests (msgpack)."""
        body = await read_body(request, MAX_TAP_BYTES)
        try:
            reports.taps.update(decode_tap(body), now())
        except InvalidEngineMessage as error:
            raise HTTPException(400, str(error)) from None

    @router.post("/answers")
    async def answers(request: Request) -> dict[str, Any]:
        """Takes tokens and log-probabilities of sampled answers (msgpack); without any, it asks for the secrets and
        the policy."""
        body = await read_body(request, MAX_TAP_BYTES)
        try:
            reports.update_answers(decode_answers(body), now())
        except InvalidEngineMessage as error:
            raise HTTPException(400, str(error)) from None
        return own_requests() | passive()

    return router


async def read_body(request: Request, limit: int) -> bytes:
    """Returns the request's body; 413 when it is longer than `limit` bytes, 408 when it does not arrive within
    BODY_SECONDS or the client leaves before its end."""
    body = bytearray()
    try:
        async with asyncio.timeout(BODY_SECONDS):
            async for chunk in request.stream():
                body += chunk
                if len(body) > limit:
                    raise HTTPException(413, f"body of more than {limit} bytes")
    except TimeoutError:
        raise HTTPException(408, f"the body took more than {BODY_SECONDS:g} s") from None
    except ClientDisconnect:
        raise HTTPException(408, "the client disconnected before the end of the body") from None
    return bytes(body)
