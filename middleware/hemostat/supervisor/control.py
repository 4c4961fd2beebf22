"""The control process: one at a time, as it owns the store's file and the state that relays report to. If the relays'
control process is on another machine, a process that shows their figures is in its place."""

from __future__ import annotations

import logging
import os
import signal
from typing import Any

from hemostat.config.schema import Settings
from hemostat.ipc.supervised import STOP_SECONDS
from hemostat.supervisor.child import Child, Launch, StartFailure
from hemostat.supervisor.role import Role
from hemostat.supervisor.run_folder import RunFolder
from hemostat.supervisor.sockets import Sockets

log = logging.getLogger("hemostat.serve")

MODULES = {
    Role.SERVE: "hemostat.control.process",
    Role.CONTROL: "hemostat.control.process",
    Role.RELAY: "hemostat.supervisor.relay_admin",
}


class ControlProcess:
    """Owns the control process that serves. Relays go on without one; requests to the admin port wait in its queue."""

    def __init__(self, launch: Launch, role: Role = Role.SERVE) -> None:
        self._role = role
        self._child = self._make(launch)

    def _make(self, launch: Launch) -> Child:
        return Child("control" if self._role.control else "admin port", MODULES[self._role], launch)

    async def load(self) -> None:
        """Starts it as far as it can be while another one still works: it has imported its modules. Raises
        StartFailure."""
        await self._child.load()

    async def begin(self) -> None:
        """Makes it open the store and listen; it is restarted from now on. Raises StartFailure."""
        await self._child.begin()
        self._child.keep()

    async def replace(self, launch: Launch) -> None:
        """Stops the process in order, then begins its successor, which is loaded already.

        Raises StartFailure if the successor did not start; one with the former settings serves again then.
        """
        former, successor = self._child, self._make(launch)
        try:
            await successor.load()
        except StartFailure:
            await successor.stop(signal.SIGKILL, STOP_SECONDS)
            raise
        await former.stop(signal.SIGTERM, STOP_SECONDS)
        self._child = successor
        try:
            await self.begin()
        except StartFailure:
            self._child = former
            await self.resume()
            raise

    async def stop(self) -> None:
        """Stops it in order: it writes what is queued, and closes the store."""
        await self._child.stop(signal.SIGTERM, STOP_SECONDS)

    async def resume(self) -> None:
        """Starts again after `stop`; keeps trying if that fails."""
        try:
            await self._child.start()
        except StartFailure as failure:
            log.error("%s", failure)
        self._child.keep()

    def send(self, message: dict[str, Any]) -> None:
        """Sends a line to its standard input, see `hemostat.control.process`; also for its restarts."""
        self._child.launch.settings.update(message)
        self._child.send(message)


def control_launch(settings: Settings, sockets: Sockets, folder: RunFolder, report: dict[str, Any]) -> Launch:
    """Returns the arguments of the control process. report: of the configuration that is in force, see
    `control.configuration`.
    """
    fd = sockets.admin.fileno()
    control_fd = None if sockets.control is None else sockets.control.fileno()
    return Launch(
        {
            "settings": settings.plain(),
            "socket": str(folder.control_socket),
            "lock": str(folder.control_lock),
            "parent": os.getpid(),
            "data_port": sockets.data_port,
            "passive": not sockets.data and sockets.control is None,
            "admin_fd": fd,
            "control_fd": control_fd,
            "configuration": report,
        },
        (fd,) if control_fd is None else (fd, control_fd),
    )
