"""The control process: owns the shadow queue, the reference, the statistics, the calibrator, the store, the admin port.

`python -m hemostat.control.process` reads its settings as JSON from standard input and prints `{"admin_port": n}` on
standard output once it listens. When it dies, the relays go on as a plain proxy and the supervisor starts it again.
"""

from __future__ import annotations

import asyncio
import json
import signal
import sys
import time
from pathlib import Path

from hemostat import logs
from hemostat.admin.app import create_app
from hemostat.admin.server import AdminServer, bind
from hemostat.config.schema import Settings
from hemostat.control.composition import Control
from hemostat.ipc.process import die_with_parent
from hemostat_calibration.errors import HemostatError


async def run(settings: Settings, socket_path: Path, data_port: int) -> None:
    """Until SIGTERM."""
    stop = asyncio.Event()
    for sig in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(sig, stop.set)
    admin = settings.admin
    listener = bind(admin.host, admin.port)
    control = Control(settings, socket_path, data_port)
    await control.start(settings.calibration.force)
    control.policy.publish()
    token = admin.token.get_secret_value() if admin.token else None
    app = create_app(control, token, time.monotonic, metrics_need_token=admin.metrics_need_token, names=admin.names)
    server = AdminServer(app, listener)
    serving = asyncio.create_task(server.run())
    loops = [asyncio.create_task(loop) for loop in control.loops()]
    stopping = asyncio.create_task(stop.wait())
    print(json.dumps({"admin_port": listener.getsockname()[1]}), flush=True)  # noqa: T201  the supervisor reads it
    done, _ = await asyncio.wait({stopping, serving, *loops}, return_when=asyncio.FIRST_COMPLETED)
    server.stop()
    for loop in loops:
        loop.cancel()
    await asyncio.gather(serving, *loops, return_exceptions=True)
    await control.close()
    for task in done - {stopping}:
        task.result()
        raise RuntimeError("a loop ended by itself: that is a bug, and the supervisor starts this process again")


def main() -> int:
    given = json.load(sys.stdin)
    die_with_parent(given["parent"])
    settings = Settings.model_validate(given["settings"])
    logs.set_up(settings.log.level, settings.log.format)
    try:
        asyncio.run(run(settings, Path(given["socket"]), given["data_port"]))
    except HemostatError as error:
        print(f"hemostat: {error}", file=sys.stderr)  # noqa: T201
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
