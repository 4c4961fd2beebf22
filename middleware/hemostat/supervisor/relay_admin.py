"""The admin port of `hemostat relay`: health, and the counters of this machine's relays.

`python -m hemostat.supervisor.relay_admin` is started in place of a control process, and reads the same lines from its
standard input (`hemostat.control.process`). Relays send it their figures by a Unix socket, as to the control process.
When it dies, the relays continue, and it is started again.
"""

from __future__ import annotations

import asyncio
import json
import logging
import socket
import sys
from pathlib import Path
from typing import Any

from fastapi import Depends, FastAPI, Response
from fastapi.responses import PlainTextResponse
from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, generate_latest

from hemostat import logs
from hemostat.admin.access import Tokens, authorize
from hemostat.admin.hardening import Harden
from hemostat.admin.server import AdminServer
from hemostat.config.schema import Settings
from hemostat.ipc import relay_samples
from hemostat.ipc.control_end import RelayLink
from hemostat.ipc.liveness import beat
from hemostat.ipc.relay_listener import RelayListener, listen_locally
from hemostat.ipc.supervised import run_supervised, stop_event, tell_supervisor
from hemostat.metrics.collector import HemostatCollector
from hemostat.supervisor.child import EXIT_CODE_EXPLAINED
from hemostat_calibration.errors import HemostatError

log = logging.getLogger("hemostat.serve")


def create_app(link: RelayLink, settings: Settings) -> FastAPI:
    app = FastAPI(dependencies=[Depends(authorize)], docs_url=None, redoc_url=None, openapi_url=None)
    app.state.closing = asyncio.Event()
    app.state.tokens = Tokens.of(settings.admin)
    app.add_middleware(Harden, names=settings.admin.names, closing=app.state.closing)
    registry = CollectorRegistry()
    registry.register(HemostatCollector([link.samples, lambda: relay_samples.samples(link.total())]))

    @app.get("/livez", response_class=PlainTextResponse)
    async def livez() -> str:
        return "ok\n"

    @app.get("/readyz")
    async def readyz() -> PlainTextResponse:
        return PlainTextResponse("ok\n") if link.ready else PlainTextResponse("no relay takes requests\n", 503)

    @app.get("/metrics")
    async def metrics() -> Response:
        return Response(generate_latest(registry), media_type=CONTENT_TYPE_LATEST)

    return app


async def run(given: dict[str, Any], lines: asyncio.StreamReader) -> None:
    """Serves the admin port until SIGTERM. given: the first line."""
    stop = stop_event()
    settings = Settings.model_validate(given["settings"])
    logs.set_up(settings.log.level, settings.log.format)
    logging.getLogger("hemostat.control").setLevel(logging.WARNING)  # no line for each relay: they write their own
    link = RelayLink()
    relays = RelayListener([listen_locally(Path(given["socket"]))])
    relays.admit = link.serve
    relays.start()
    app = create_app(link, settings)
    server = AdminServer(app, socket.socket(fileno=given["admin_fd"]))
    tasks = [
        asyncio.create_task(coroutine) for coroutine in (stop.wait(), server.run(), link.run(), follow(lines, app))
    ]
    tell_supervisor({"listening": True})
    tasks.append(asyncio.create_task(beat()))
    done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
    server.stop()
    await asyncio.wait(tasks[1:2])
    for task in tasks:
        task.cancel()
    await relays.close()
    for task in done:
        task.result()


async def follow(lines: asyncio.StreamReader, app: FastAPI) -> None:
    """Applies what the supervisor sends, until cancelled."""
    while line := await lines.readline():
        message = json.loads(line)
        if "settings" in message:
            settings = Settings.model_validate(message["settings"])
            logs.set_up(settings.log.level, settings.log.format)
            app.state.tokens = Tokens.of(settings.admin)
    await asyncio.Event().wait()  # the supervisor has ended; the kernel sends SIGTERM


def main() -> int:
    try:
        run_supervised(run)
    except HemostatError as error:
        log.error("%s", error)
        return EXIT_CODE_EXPLAINED
    return 0


if __name__ == "__main__":
    sys.exit(main())
