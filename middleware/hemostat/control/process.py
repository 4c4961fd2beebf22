"""The control process: owns the shadow queue, the reference, the statistics, the calibrator, the store, the admin port.

`python -m hemostat.control.process` prints `{"loaded": true}`, reads a line of JSON with its settings from standard
input, and prints `{"listening": true}` once it listens to relays, or waits for the store. Further lines change what it
was given while it runs, see `follow`. When it dies, the relays go on as a plain proxy and the supervisor starts it
again.
"""

from __future__ import annotations

import asyncio
import fcntl
import json
import logging
import os
import socket
import sys
import time
from collections.abc import Collection
from pathlib import Path
from typing import Any

import msgspec
from fastapi import FastAPI

from hemostat import logs
from hemostat.admin.access import Tokens
from hemostat.admin.app import create_app
from hemostat.admin.configuration import ConfigurationReport
from hemostat.admin.server import AdminServer
from hemostat.config.schema import Settings
from hemostat.control.composition import Control
from hemostat.control.ownership import Superseded
from hemostat.ipc.addresses import server_context
from hemostat.ipc.liveness import beat
from hemostat.ipc.relay_listener import RelayListener, Security, listen_locally
from hemostat.ipc.supervised import run_supervised, stop_event, tell_supervisor
from hemostat_calibration.errors import HemostatError
from hemostat_calibration.messages import in_words


def make_listener(given: dict[str, Any], settings: Settings) -> RelayListener:
    """Returns the listener for relays. Raises HemostatError.

    given: has `socket`, a path, and `control_fd`, an inherited listening socket or None.
    """
    sockets = [listen_locally(Path(given["socket"]))]
    if given.get("control_fd") is not None:
        sockets.append(socket.socket(fileno=given["control_fd"]))
    try:
        return RelayListener(sockets, security(settings))
    except OSError as error:
        raise HemostatError(f"control.cert: {in_words(error)}; it has to fit control.key") from None


def security(settings: Settings) -> Security | None:
    """Returns the security of relays that connect by TCP, with the certificate as it is now in its file. Returns None
    if no relays do. Raises OSError.
    """
    control = settings.control
    if control.listen is None or control.token is None:
        return None
    context = server_context(control.cert, control.key) if control.cert and control.key else None
    return Security(control.token.get_secret_value(), context, settings.upstream.addresses)


log = logging.getLogger("hemostat.control")

EXIT_CODE_SUPERSEDED = 3
"""The exit code of a process that ends because another process has written to the store that it owned."""
LOCK_SECONDS = 15.0
"""The longest time that a former control process may take to end."""
ANSWER_SECONDS = 1.0
"""The seconds that a process that stops waits for what operators were promised to be stored."""
LOOPS_SECONDS = 3.0
"""The seconds that its loops, and the answers of its admin port, may take to end. With what `Control.close` may take,
all of it is over before the supervisor kills the process (STOP_SECONDS)."""


async def run(given: dict[str, Any], lines: asyncio.StreamReader) -> None:
    """Runs the control process until SIGTERM. given: the first line."""
    stop = stop_event()
    settings = Settings.model_validate(given["settings"])
    logs.set_up(settings.log.level, settings.log.format)
    lock = await lock_alone(Path(given["lock"]))
    relays = make_listener(given, settings)
    admin, listener = settings.admin, socket.socket(fileno=given["admin_fd"])
    relays.start()
    control = Control(settings, given["data_port"], passive=given.get("passive", False))
    control.configuration.report = msgspec.convert(given["configuration"], ConfigurationReport)

    def admit_relays() -> None:
        if control.ownership.active:
            relays.admit = control.link.serve
        else:
            relays.dismiss()

    control.ownership.on_move = admit_relays
    app = create_app(control, Tokens.of(admin), time.monotonic, names=admin.names)
    server = AdminServer(app, listener)
    serving, stopping = asyncio.create_task(server.run()), asyncio.create_task(stop.wait())
    loops = [asyncio.create_task(loop) for loop in (own(control), follow(lines, control, app, relays))]
    settled = asyncio.create_task(control.ownership.settled.wait())
    done, _ = await asyncio.wait({settled, stopping, serving, *loops}, return_when=asyncio.FIRST_COMPLETED)
    if done == {settled}:
        tell_supervisor({"listening": True})
        loops.append(asyncio.create_task(beat()))
        done, _ = await asyncio.wait({stopping, serving, *loops}, return_when=asyncio.FIRST_COMPLETED)
    server.stop()
    # First of all, so that no relay waits for a process that stops.
    control.ownership.on_move = lambda: None
    await relays.close()
    await answer_operators(control)
    await ended([serving, settled, *loops], but=serving)
    await control.close()
    os.close(lock)
    for task in done - {stopping, settled}:
        task.result()
        raise RuntimeError("a loop ended by itself: that is a bug, and the supervisor starts this process again")


async def answer_operators(control: Control) -> None:
    """Answers the operators who wait for the store: with what was done, or that it is not known."""
    writer = control.ownership.writer
    if control.ownership.active:
        await writer.wait_until_written(ANSWER_SECONDS)
    writer.stop_waiting()


async def ended(tasks: Collection[asyncio.Task[Any]], but: asyncio.Task[Any]) -> None:
    """Cancels all of them but one that ends by itself, and waits; not for good, since what is known has to be
    stored."""
    for task in tasks:
        if task is not but:
            task.cancel()
    _, left = await asyncio.wait(tasks, timeout=LOOPS_SECONDS)
    for task in left:
        log.error("stopping: %s did not end within %g s: that is a bug", task.get_name(), LOOPS_SECONDS)


async def own(control: Control) -> None:
    """Waits for the store, then does what its owner does, until cancelled. Raises Superseded if another process has
    written to the store."""
    await control.start()
    control.policy.begin()
    loops = [asyncio.create_task(loop) for loop in control.loops()]
    try:
        done, _ = await asyncio.wait(loops, return_when=asyncio.FIRST_COMPLETED)
        for loop in done:
            loop.result()
    finally:
        for loop in loops:
            loop.cancel()
        await asyncio.gather(*loops, return_exceptions=True)


async def lock_alone(path: Path) -> int:
    """Waits until no other control process of this folder lives, since one alone may use the store.

    Returns the file descriptor that holds the lock; it is released with the process. Raises HemostatError after
    LOCK_SECONDS.
    """
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    except OSError as error:
        raise HemostatError(f"run_dir: cannot open {path} ({in_words(error)}); name a folder of its own") from None
    end = time.monotonic() + LOCK_SECONDS
    while True:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if time.monotonic() > end:
                raise HemostatError(f"control: another process still holds {path}; end it, or set run_dir") from None
            await asyncio.sleep(0.02)
        else:
            return descriptor


async def follow(lines: asyncio.StreamReader, control: Control, app: FastAPI, relays: RelayListener) -> None:
    """Applies what the supervisor sends, until cancelled."""
    while line := await lines.readline():
        message = json.loads(line)
        if "settings" in message:
            settings = Settings.model_validate(message["settings"])
            logs.set_up(settings.log.level, settings.log.format)
            app.state.tokens = Tokens.of(settings.admin)
            control.apply(settings)
            try:
                relays.security = security(settings)
            except OSError as error:
                log.error("the certificate for relays stays as it was: %s", error)
        if "configuration" in message:
            control.configuration.report = msgspec.convert(message["configuration"], ConfigurationReport)
    await asyncio.Event().wait()  # the supervisor has ended; the kernel sends SIGTERM


def main() -> int:
    try:
        run_supervised(run)
    except Superseded as error:
        log.error("%s; it begins anew", error)
        return EXIT_CODE_SUPERSEDED
    except HemostatError as error:
        log.error("%s", error)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
