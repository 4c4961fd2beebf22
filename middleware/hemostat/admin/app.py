"""The admin port's routes: health, metrics, the console, and the JSON API. FastAPI, in the control process.

Who may do what is in `access`.
"""

from __future__ import annotations

import asyncio
import contextlib
import math
import re
from collections.abc import AsyncIterator, Callable, Collection, Mapping
from importlib import resources
from typing import Annotated, Any, Literal, Protocol, TypeVar

import msgspec
from fastapi import Depends, FastAPI, HTTPException, Request, Response
from fastapi.responses import JSONResponse, PlainTextResponse, StreamingResponse
from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, generate_latest

from hemostat import __version__
from hemostat.admin.access import Tokens, authorize
from hemostat.admin.hardening import RETRY_AFTER, Harden
from hemostat.admin.history import History
from hemostat.admin.problems import OwnershipView
from hemostat.admin.status import Status
from hemostat.engines.api import engine_router, read_body
from hemostat.engines.registry import EngineRegistry
from hemostat.store.protocol import NotActiveError, NotKeptError
from hemostat_calibration.errors import HemostatError

MAX_PROFILE_BYTES = 256 * 1024 * 1024
MAX_SMALL_BYTES = 4096
MAX_WEBHOOK_BYTES = 64 * 1024
SCRIPT = "text/javascript; charset=utf-8"
TYPES = {"html": "text/html; charset=utf-8", "css": "text/css; charset=utf-8", "js": SCRIPT, "mjs": SCRIPT}
MODULES = (
    *(
        "alarm",
        "app",
        "canaries",
        "divergence",
        "engines",
        "events",
        "format",
        "gate",
        "kinds",
        "measurement",
        "overview",
    ),
    "parts",
)
ASSETS = {
    name: TYPES[name.rpartition(".")[2]]
    for name in (
        "index.html",
        "runbook.html",
        "console.css",
        *(f"{module}.js" for module in (*MODULES, "profiles")),
        "vendor/htm.mjs",
        "vendor/preact.mjs",
        "vendor/uPlot.iife.min.js",
        "vendor/uPlot.min.css",
    )
}
"""The console's files: nothing else is served."""
MAX_STREAMS = 32
STREAM_SECONDS = 2.0
"""The time between two states of the console's stream."""


class StatusView(Protocol):
    """The part of `hemostat.admin.status.StatusSource` that the routes use."""

    @property
    def ready(self) -> bool: ...

    def current(self) -> Status: ...


class ProfilesView(Protocol):
    """The part of the profiles that the routes use: what is shown, and what engines fetch."""

    def listing(self) -> dict[str, Any]: ...

    def resolve(self, version: str) -> str: ...

    def describe(self, version: str) -> dict[str, Any] | None: ...

    def profile_bytes(self, version: str) -> bytes | None: ...


class Actions(Protocol):
    """The part of `hemostat.control.operator_actions.OperatorActions` that the routes use. Every method may raise
    HemostatError. If it is a NotKeptError, the action applies although it is not stored.
    """

    async def import_profile(self, data: bytes) -> str: ...

    async def promote(self, version: str, kind: str | None) -> None: ...

    async def pin(self, version: str | None, kind: str | None) -> None: ...

    async def rollback(self, reason: str, kind: str | None) -> None: ...

    async def release(self, kind: str | None) -> None: ...

    async def set_mode(self, mode: str) -> None: ...

    async def drain(self, engine: str, *, ends: bool) -> None: ...

    async def rebase(self, kind: str | None) -> dict[str, Any]: ...

    async def accept_canaries(self) -> dict[str, Any]: ...

    async def begin_gate(
        self, candidate: str, expect: str, margin: float | None, kind_margin: float | None, *, waive_cycles: bool
    ) -> dict[str, Any]: ...

    async def end_gate(self) -> dict[str, Any]: ...


class GateView(Protocol):
    """The part of `hemostat.gate.live.keeper.ShadowGate` that the routes use."""

    def report(self) -> dict[str, Any]: ...


class AdminBackend(Protocol):
    """The parts that the admin port shows and operates."""

    @property
    def registry(self) -> CollectorRegistry: ...

    @property
    def history(self) -> History: ...

    @property
    def engines(self) -> EngineRegistry: ...

    @property
    def status(self) -> StatusView: ...

    @property
    def profiles(self) -> ProfilesView: ...

    @property
    def actions(self) -> Actions: ...

    @property
    def ownership(self) -> OwnershipView: ...

    @property
    def gate(self) -> GateView: ...


class CalibrationRequest(msgspec.Struct, forbid_unknown_fields=True):
    """The body of POST /api/v1/calibration."""

    mode: Literal["off", "observe", "auto"]


VERSION_DIGITS = re.compile(r"[0-9a-f]{8,32}")
"""A version, or the first digits of one."""
Version = Annotated[str, msgspec.Meta(pattern=rf"^{VERSION_DIGITS.pattern}\Z")]
Kind = Annotated[str, msgspec.Meta(max_length=256)]


class PromoteRequest(msgspec.Struct, forbid_unknown_fields=True):
    """The body of POST /api/v1/profiles/promote. kind: of traffic; null or left out: all, here and below."""

    version: Version
    kind: Kind | None = None


class PinRequest(msgspec.Struct, forbid_unknown_fields=True):
    """The body of POST /api/v1/profiles/pin; a null version unpins."""

    version: Version | None
    kind: Kind | None = None


class KindRequest(msgspec.Struct, forbid_unknown_fields=True):
    """The body of POST /api/v1/profiles/rollback and /release, if any."""

    kind: Kind | None = None


class DrainRequest(msgspec.Struct, forbid_unknown_fields=True):
    """The body of POST /api/v1/engines/drain and /undrain. engine: host:port, as the status names it."""

    engine: Annotated[str, msgspec.Meta(max_length=300)]


MAX_TRACED = 64
Nonce = Annotated[str, msgspec.Meta(max_length=64)]


class TraceRequest(msgspec.Struct, forbid_unknown_fields=True):
    """The body of POST /api/v1/engines/trace. nonces: of requests that were sent. new: the number of further ones."""

    nonces: Annotated[list[Nonce], msgspec.Meta(max_length=MAX_TRACED)] = []
    new: Annotated[int, msgspec.Meta(ge=0, le=MAX_TRACED)] = 0


Margin = Annotated[float, msgspec.Meta(gt=0.0, lt=1.0)]


class GateRequest(msgspec.Struct, forbid_unknown_fields=True):
    """The body of POST /api/v1/gate. margin, kind_margin: null or left out: the defaults."""

    candidate: Annotated[str, msgspec.Meta(max_length=600)]
    expect: Literal["same", "other"]
    margin: Margin | None = None
    kind_margin: Margin | None = None
    waive_cycles: bool = False


class RebaseRequest(msgspec.Struct, forbid_unknown_fields=True):
    """Body of POST /api/v1/alarm/rebase, if any: the kind learns a new baseline; without a kind all do."""

    kind: Annotated[str, msgspec.Meta(max_length=256)] | None = None


T = TypeVar("T")


def create_app(
    backend: AdminBackend,
    tokens: Tokens,
    now: Callable[[], float],
    *,
    names: Collection[str] | None = None,
) -> FastAPI:
    """Returns the application with all routes. Setting `app.state.closing` ends the streams; `app.state.tokens` may be
    replaced.

    now: monotonic seconds. names: host names that the port answers to, in addition to addresses and localhost; None:
    any.
    """
    streams = 0
    state, state_at = b"", -math.inf

    def current_state() -> bytes:
        """Returns the encoded state, which all streams share."""
        nonlocal state, state_at
        if now() - state_at >= STREAM_SECONDS / 2:
            state_at = now()
            state = msgspec.json.encode({"status": backend.status.current(), "profiles": backend.profiles.listing()})
        return state

    closing = asyncio.Event()
    no_pages: dict[str, Any] = {"docs_url": None, "redoc_url": None, "openapi_url": None}
    app = FastAPI(title="Hemostat", version=__version__, dependencies=[Depends(authorize)], **no_pages)
    app.state.closing = closing
    app.state.tokens = tokens

    @app.exception_handler(HemostatError)
    async def refused(_: Request, error: HemostatError) -> JSONResponse:
        code = {NotKeptError: 507, NotActiveError: 503}.get(type(error), 400)
        return JSONResponse({"detail": str(error)}, code, {"retry-after": RETRY_AFTER} if code == 503 else None)

    app.add_middleware(Harden, names=names, closing=closing)

    @app.get("/livez", response_class=PlainTextResponse)
    async def livez() -> str:
        """Answers as long as the process is alive."""
        return "ok\n"

    @app.get("/readyz")
    async def readyz() -> PlainTextResponse:
        """Answers 200 if a relay accepts requests, or if this control process waits for its store (`standby`,
        `reading`), and 503 if no relay accepts requests. Neither depends on vLLM or the reference."""
        if not backend.ownership.knows:
            return PlainTextResponse(f"{backend.ownership.state}\n")  # relays have another one, or go on without
        return (
            PlainTextResponse("ok\n") if backend.status.ready else PlainTextResponse("no relay takes requests\n", 503)
        )

    @app.get("/metrics")
    async def metrics() -> Response:
        """Returns the metrics for Prometheus."""
        return Response(generate_latest(backend.registry), media_type=CONTENT_TYPE_LATEST)

    @app.get("/")
    async def console() -> Response:
        """Returns the page of the console."""
        return _asset("index.html")

    @app.get("/runbook")
    async def runbook() -> Response:
        """Returns the runbook, which alerts link to."""
        return _asset("runbook.html")

    @app.get("/console/{name:path}")
    async def asset(name: str) -> Response:
        """Returns the console's scripts and styles."""
        if name not in ASSETS:
            raise HTTPException(404, "no such file")
        return _asset(name)

    @app.get("/api/v1/history")
    async def history(after: float = 0.0) -> dict[str, Any]:
        """Returns the columns of the console's charts, newer than `after` (Unix seconds)."""
        return backend.history.report(after)

    @app.get("/api/v1/stream")
    async def stream(request: Request) -> Response:
        """Returns server-sent events: every 2 seconds the status and the profiles. There are at most 32 streams at a
        time.
        """
        nonlocal streams
        if streams >= MAX_STREAMS:
            raise HTTPException(503, f"{MAX_STREAMS} streams are open already; poll /api/v1/status")
        streams += 1

        async def events() -> AsyncIterator[bytes]:
            nonlocal streams
            try:
                yield b"retry: 2000\n\n"
                while not (closing.is_set() or await request.is_disconnected()):
                    yield b"event: state\ndata: %b\n\n" % current_state()
                    with contextlib.suppress(TimeoutError):
                        async with asyncio.timeout(STREAM_SECONDS):
                            await closing.wait()
            finally:
                streams -= 1

        return StreamingResponse(events(), media_type="text/event-stream")

    @app.get("/api/v1/status")
    async def status() -> Response:
        """Returns the whole state; `state` in it lists what is wrong now, worst first."""
        return Response(msgspec.json.encode(backend.status.current()), media_type="application/json")

    @app.get("/api/v1/profiles")
    async def profiles() -> dict[str, Any]:
        """Profiles, what serves each kind of traffic, and the events."""
        return backend.profiles.listing()

    @app.get("/api/v1/profiles/{version}")
    async def profile(version: str) -> dict[str, Any]:
        """Returns one profile with its evidence; the first 8 digits of the version are enough."""
        profiles = backend.profiles
        description = profiles.describe(profiles.resolve(version)) if VERSION_DIGITS.fullmatch(version) else None
        if description is None:
            raise HTTPException(404, "no such profile; GET /api/v1/profiles lists them")
        return description

    @app.post("/api/v1/profiles")
    async def import_profile(request: Request) -> dict[str, str]:
        """Import a profile (the file's bytes). It has to be proven like any other."""
        return {"version": await backend.actions.import_profile(await read_body(request, MAX_PROFILE_BYTES))}

    @app.post("/api/v1/profiles/promote")
    async def promote(request: Request) -> dict[str, Any]:
        """Serve a profile without statistical proof; it is watched and rolled back like any other. Body:
        `{"version": "…", "kind": "…"}`; here and below all kinds without `kind`."""
        wanted = await _read(request, PromoteRequest, '{"version": "<8 to 32 hex digits>"}, and "kind" if meant')
        await backend.actions.promote(backend.profiles.resolve(wanted.version), wanted.kind)
        return backend.profiles.listing()

    @app.post("/api/v1/profiles/pin")
    async def pin(request: Request) -> dict[str, Any]:
        """Serve a profile whatever is measured; `null` in place of the version unpins it. Body:
        `{"version": "…", "kind": "…"}`."""
        expected = '{"version": "<8 to 32 hex digits>"}, or null to unpin, and "kind" if meant'
        wanted = await _read(request, PinRequest, expected)
        version = None if wanted.version is None else backend.profiles.resolve(wanted.version)
        await backend.actions.pin(version, wanted.kind)
        return backend.profiles.listing()

    @app.post("/api/v1/profiles/rollback")
    async def rollback(request: Request) -> dict[str, Any]:
        """Serve no profile until another one is promoted. Body: none, or `{"kind": "…"}`."""
        wanted = await _read(request, KindRequest, 'nothing, or {"kind": "..."}', KindRequest())
        await backend.actions.rollback("asked for by the operator", wanted.kind)
        return backend.profiles.listing()

    @app.post("/api/v1/profiles/release")
    async def release(request: Request) -> dict[str, Any]:
        """End the hold of a kind at identity after an outcome was harmed. Body: none, or `{"kind": "…"}`."""
        wanted = await _read(request, KindRequest, 'nothing, or {"kind": "..."}', KindRequest())
        await backend.actions.release(wanted.kind)
        return backend.profiles.listing()

    @app.post("/api/v1/calibration")
    async def calibration(request: Request) -> dict[str, Any]:
        """Set the mode at once; it holds until the configuration file names another one. Body: `{"mode": "off"}`,
        `"observe"` or `"auto"`."""
        wanted = await _read(request, CalibrationRequest, '{"mode": "off"}, "observe" or "auto"')
        await backend.actions.set_mode(wanted.mode)
        return {"mode": wanted.mode}

    @app.post("/api/v1/alarm/rebase")
    async def rebase(request: Request) -> dict[str, Any]:
        """Accepts the present state of a kind, or of all kinds, as the alarm's new baseline. Body: none, or
        `{"kind": "…"}`."""
        wanted = await _read(request, RebaseRequest, '{"kind": "chat text sampled"}', RebaseRequest())
        return await backend.actions.rebase(wanted.kind)

    @app.post("/api/v1/canaries/accept")
    async def accept_canaries(request: Request) -> dict[str, Any]:
        """Accept what the engines compute now: a new set of canaries is taken from them. Body: none."""
        await read_body(request, MAX_SMALL_BYTES)
        return await backend.actions.accept_canaries()

    def shown_gate() -> dict[str, Any]:
        """Returns the gate. A process that does not know what is stored knows of none, and says so: an error would end
        the analysis of a canary controller that asks any of several processes."""
        report = backend.gate.report()
        if not backend.ownership.knows:
            report["why"] = f"this control process is not active: {backend.ownership.why}"
        return report

    @app.get("/api/v1/gate")
    async def gate() -> dict[str, Any]:
        """Returns the live gate: its state (`none`, `running`, `pass`, `fail`, `undecided`), and all that led to it."""
        return shown_gate()

    @app.post("/api/v1/gate")
    async def begin_gate(request: Request) -> dict[str, Any]:
        """Begins a live gate. Body: `{"candidate": "http://…", "expect": "other"}`; optional: `margin`, `kind_margin`,
        and `waive_cycles` for a verdict about traffic like in the hours that were seen."""
        expected = (
            '{"candidate": "http://host:port", "expect": "same" or "other"}, and margins between 0 and 1 if meant'
        )
        wanted = await _read(request, GateRequest, expected)
        return await backend.actions.begin_gate(
            wanted.candidate, wanted.expect, wanted.margin, wanted.kind_margin, waive_cycles=wanted.waive_cycles
        )

    @app.delete("/api/v1/gate")
    async def end_gate(request: Request) -> dict[str, Any]:
        """Ends the live gate, and forgets its evidence. Body: none."""
        await read_body(request, MAX_SMALL_BYTES)
        return await backend.actions.end_gate()

    @app.post("/api/v1/gate/confirm-promotion")
    async def confirm_promotion(request: Request) -> PlainTextResponse:
        """Answers 200 if the live gate has passed, else 409: a webhook for Flagger, which waits until it is 200. Body:
        any."""
        await read_body(request, MAX_WEBHOOK_BYTES)
        return _webhook(shown_gate(), "pass")

    @app.post("/api/v1/gate/rollback")
    async def roll_back(request: Request) -> PlainTextResponse:
        """Answers 200 if the live gate has failed, else 409: a webhook for Flagger, which rolls back at 200. Body:
        any."""
        await read_body(request, MAX_WEBHOOK_BYTES)
        return _webhook(shown_gate(), "fail")

    @app.post("/api/v1/engines/drain")
    async def drain(request: Request) -> Response:
        """Send an engine no new requests. Body: `{"engine": "host:port"}`."""
        wanted = await _read(request, DrainRequest, '{"engine": "host:port"}')
        await backend.actions.drain(wanted.engine, ends=False)
        return await status()

    @app.post("/api/v1/engines/undrain")
    async def undrain(request: Request) -> Response:
        """Send a drained engine requests again. Body: `{"engine": "host:port"}`."""
        wanted = await _read(request, DrainRequest, '{"engine": "host:port"}')
        await backend.actions.drain(wanted.engine, ends=True)
        return await status()

    @app.post("/api/v1/engines/trace")
    async def trace(request: Request) -> dict[str, Any]:
        """Says which engine has answered requests that carried these nonces, and signs `vllm_xargs` for further ones.
        Body: `{"nonces": ["..."], "new": 10}`."""
        backend.ownership.require_active()
        wanted = await _read(request, TraceRequest, f'{{"nonces": [...], "new": 0 to {MAX_TRACED}}}')
        traced: dict[str, Any] = msgspec.to_builtins(backend.engines.trace(wanted.nonces, wanted.new))
        return traced

    async def active() -> None:
        backend.ownership.require_active()

    router = engine_router(backend.engines.reports, backend.profiles.profile_bytes, now)
    app.include_router(router, dependencies=[Depends(active)])
    return app


def _webhook(gate: Mapping[str, Any], wanted: str) -> PlainTextResponse:
    """Returns 200 if the gate is in the wanted state, else 409; with one line."""
    line = f"{gate['state']}: {gate['why']}" if gate["why"] else str(gate["state"])
    return PlainTextResponse(f"{line}\n", 200 if gate["state"] == wanted else 409)


async def _read(request: Request, kind: type[T], expected: str, default: T | None = None) -> T:
    """Returns the body as `kind`, `default` where it is empty and may be; 422 names what is expected.

    Not a typed parameter of the routes: FastAPI would read the whole body before it checks the token.
    """
    body = await read_body(request, MAX_SMALL_BYTES)
    if not body and default is not None:
        return default
    try:
        return msgspec.json.decode(body, type=kind)
    except msgspec.DecodeError as error:
        raise HTTPException(422, f"send {expected}: {error}") from None


def _asset(name: str) -> Response:
    path = resources.files("hemostat.admin.console").joinpath(*name.split("/"))
    return Response(path.read_bytes(), media_type=ASSETS[name])
