"""The three routes that the engine plugin calls on the admin port; all of them need the admin token.

Reports are JSON, taps msgpack (they carry float16 arrays), profiles safetensors.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

from fastapi import APIRouter, Depends, HTTPException, Request, Response

from hemostat.engines.registry import EngineRegistry, InvalidEngineMessage, decode_report, decode_tap
from hemostat_calibration.profiles.profile import VERSION_PATTERN

REPORT_BYTES_AT_MOST = 64 * 1024
TAP_BYTES_AT_MOST = 16 * 1024 * 1024
BODY_WITHIN = 60.0
"""Seconds."""


def engine_router(
    registry: EngineRegistry,
    load_profile: Callable[[str], bytes | None],
    now: Callable[[], float],
    require_token: Callable[..., Any],
) -> APIRouter:
    """Routes under /api/v1/engine. `now` is monotonic seconds; `require_token` is a FastAPI dependency that refuses."""
    router = APIRouter(prefix="/api/v1/engine", dependencies=[Depends(require_token)])

    @router.post("/report")
    async def report(request: Request) -> dict[str, Any]:
        body = await read_body(request, REPORT_BYTES_AT_MOST)
        try:
            hold = registry.report(decode_report(body), now())
            return {"hold": hold, "leads": registry.leads, "replica": registry.replica}
        except InvalidEngineMessage as error:
            raise HTTPException(400, str(error)) from None

    @router.get("/profiles/{version}")
    async def profile(version: str) -> Response:
        data = load_profile(version) if VERSION_PATTERN.fullmatch(version) else None
        if data is None:
            raise HTTPException(404, "no such profile")
        return Response(data, media_type="application/octet-stream")

    @router.post("/tap", status_code=204)
    async def tap(request: Request) -> None:
        body = await read_body(request, TAP_BYTES_AT_MOST)
        try:
            registry.tap(decode_tap(body), now())
        except InvalidEngineMessage as error:
            raise HTTPException(400, str(error)) from None

    return router


async def read_body(request: Request, limit: int) -> bytes:
    """The request's body; 413 when it is longer than `limit` bytes, 408 when it is not there within BODY_WITHIN."""
    body = bytearray()
    try:
        async with asyncio.timeout(BODY_WITHIN):
            async for chunk in request.stream():
                body += chunk
                if len(body) > limit:
                    raise HTTPException(413, f"body of more than {limit} bytes")
    except TimeoutError:
        raise HTTPException(408, f"the body took more than {BODY_WITHIN:g} s") from None
    return bytes(body)
