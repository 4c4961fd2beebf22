"""The supervisor's whole life: start, reload, hand over, stop."""

from __future__ import annotations

import asyncio
import logging
import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from typing import Any

from hemostat import logs
from hemostat.config.errors import ConfigError
from hemostat.config.fields import is_loopback, split_address
from hemostat.config.reloading import plan_reload
from hemostat.config.schema import Settings
from hemostat.config.waiting_times import waiting_times
from hemostat.engines.passive import PLUGIN_ALONE
from hemostat.ipc.addresses import client_context, server_context
from hemostat.supervisor import service, takeover
from hemostat.supervisor.child import Launch, StartFailure
from hemostat.supervisor.commands import Command, Commands, Stopped
from hemostat.supervisor.control import ControlProcess, control_launch
from hemostat.supervisor.relays import Relays, relay_launches
from hemostat.supervisor.role import Role
from hemostat.supervisor.run_folder import RunFolder
from hemostat.supervisor.sockets import Address, Sockets, addresses, open_sockets, serves
from hemostat.supervisor.takeover import Channel, TakeoverFailed

log = logging.getLogger("hemostat.serve")

CONTAINER_INIT = 1
"""The process id of a container's first process."""


def _print_line(text: str) -> None:
    # Flushed, since output to a pipe (a service manager, a container) would stay in a buffer until the end.
    print(text, flush=True)  # noqa: T201


def main(load: Callable[[], Settings], role: Role = Role.SERVE) -> int:
    """Runs until SIGTERM or SIGINT, or until a successor has taken over; returns 0, or 2 if a process cannot start.

    load: reads the configuration, now and at every SIGHUP. Raises ConfigError.
    """
    load = partial(with_role, load, role)
    settings = load()
    logs.set_up(settings.log.level, settings.log.format)
    announce = log.info if settings.log.format == "json" else _print_line  # for programs, or for people
    return asyncio.run(_run(settings, load, role, announce))


def with_role(load: Callable[[], Settings], role: Role) -> Settings:
    """Returns the configuration, with what this command needs. Raises ConfigError."""
    settings = load()
    control = settings.control
    if role is Role.RELAY and not control.addresses:
        raise ConfigError("control.addresses: required for hemostat relay, like [control-0:8082, control-1:8082]")
    try:
        if not role.control and control.ca is not None:
            client_context(control.ca)
        if role.control and control.cert is not None and control.key is not None:
            server_context(control.cert, control.key)
    except OSError as error:
        raise ConfigError(f"control.{'cert' if role.control else 'ca'}: {error}") from None
    return settings


async def _run(settings: Settings, load: Callable[[], Settings], role: Role, announce: Callable[[str], None]) -> int:
    commands = Commands()
    passed = service.passed_sockets(os.environ, os.getpid())
    by_service = bool(passed)
    predecessor = takeover.connect_to_predecessor(settings.run_dir)
    inherited = None
    if predecessor is not None:
        message, received = await predecessor.receive()
        if message["role"] != role.value:
            raise ConfigError(f"run_dir: hemostat {message['role']} runs there; give each command a folder of its own")
        by_service = by_service or message["by_service"]
        _select(received, message["sockets"], addresses(settings, role), passed, any_address=message["by_service"])
        inherited = message["folder"]
    folder = RunFolder.make(settings.run_dir, inherited)
    sockets = open_sockets(addresses(settings, role), passed, by_service=by_service)
    supervisor = Supervisor(settings, load, announce, commands, sockets, folder, role)
    try:
        await commands.unless_stopped(supervisor.start(predecessor))
        await supervisor.obey()
    except StartFailure as failure:
        if not failure.explained:
            log.error("%s", failure)
        return 2
    except Stopped:
        pass
    finally:
        if predecessor is not None:
            predecessor.close()
        await supervisor.stop()
        commands.close()
    return 0


def _select(
    received: list[socket.socket],
    counts: dict[str, int],
    wanted: dict[str, tuple[str, Address]],
    passed: dict[str, list[socket.socket]],
    *,
    any_address: bool,
) -> None:
    """Adds a predecessor's sockets to `passed`: those that are bound to the configured address, or all of them."""
    for name, count in counts.items():
        own, received = received[:count], received[count:]
        if own and name in wanted and name not in passed and (any_address or serves(own[0], *wanted[name][1])):
            passed[name] = own
        else:
            for sock in own:
                sock.close()


class Supervisor:
    """Owns the settings in force, the sockets and the two kinds of processes, until `stop` or a successor."""

    def __init__(
        self,
        settings: Settings,
        load: Callable[[], Settings],
        announce: Callable[[str], None],
        commands: Commands,
        sockets: Sockets,
        folder: RunFolder,
        role: Role = Role.SERVE,
    ) -> None:
        self._role = role
        self._settings = settings
        self._load = load
        self._announce = announce
        self._commands = commands
        self._sockets = sockets
        self._folder = folder
        self._access_log = open_access_log(settings)
        self._relays = Relays()
        self._report: dict[str, Any] = {"loaded_at": time.time(), "error": "", "needs_restart": []}
        """The report about the configuration in the status, see `control.configuration`."""
        self._control = ControlProcess(control_launch(settings, sockets, folder, self._report), role)
        self._successor: subprocess.Popen[bytes] | None = None
        self._owns_folder = False
        self._replaced = False
        """It is True once a successor serves."""

    async def start(self, predecessor: Channel | None) -> None:
        """Serves, and takes the predecessor's place. Raises StartFailure or TakeoverFailed; then the predecessor goes
        on.
        """
        settings = self._settings
        self._owns_folder = predecessor is None
        launches = self._relay_launches(settings, self._access_log)
        await self._control.load()
        if predecessor is None:
            await self._control.begin()
            await self._relays.start(launches)
        else:
            await self._relays.start(launches)
            predecessor.send({"step": takeover.RELEASE_CONTROL})
            await predecessor.expect(takeover.RELEASED)
            await self._control.begin()
            predecessor.send({"step": takeover.SERVING, "pid": os.getpid()})
            self._owns_folder = True
        await self._relays.keep()
        if settings.run_dir is not None:
            self._commands.listen(takeover.listen_for_successors(self._folder.path))
        self._announce_ports()
        service.notify("READY=1")

    def _announce_ports(self) -> None:
        """Says the addresses first, so that programs find them in the first lines, then what people should know."""
        settings, sockets = self._settings, self._sockets
        host, admin = _url_host(settings.listen.host), _url_host(settings.admin.host)
        if sockets.data:
            engines = ", ".join(settings.upstream.addresses)
            self._announce(f"hemostat: data port http://{host}:{sockets.data_port} -> {engines}")
        if sockets.control is not None:
            listens = _url_host(split_address(settings.control.listen or "")[0])
            port = sockets.control.getsockname()[1]
            how = "TLS" if settings.control.cert is not None else "no TLS"
            self._announce(f"hemostat: relays connect to {listens}:{port} ({how})")
        elif self._role is Role.CONTROL:
            self._announce(f"hemostat: {PLUGIN_ALONE}; with control.listen relays can connect")
        shows = "console, /metrics" if self._role.control else "/metrics of the relays"
        self._announce(f"hemostat: admin port http://{admin}:{sockets.admin_port} ({shows})")
        if sockets.data and not is_loopback(settings.listen.host):
            self._announce(
                f"hemostat: the data port accepts clients from other machines, as listen.host is "
                f"{settings.listen.host}; for this machine alone: --host 127.0.0.1"
            )
        if self._role.control and settings.reference.backend == "none":
            self._announce(
                "hemostat: nothing is measured, as no reference is configured: requests are only relayed; name the "
                "uncompressed model with --reference (reference.backend)"
            )
        if self._role.control:
            self._announce_waiting_times(settings)

    def _announce_waiting_times(self, settings: Settings) -> None:
        """Says what is known when, so that nobody takes a day of silence for a fault."""
        times = waiting_times(settings)
        if times:
            self._announce("hemostat: what is known when, at the earliest:")
        for time_ in times:
            self._announce(f"  {time_.line()}")

    def _relay_launches(self, settings: Settings, access_log: int | None) -> list[Launch]:
        return relay_launches(settings, self._sockets, self._folder.control_socket, access_log, self._role)

    async def obey(self) -> None:
        """Does what signals and successors ask for, until a successor has taken over and all relays have drained.
        Raises Stopped at SIGTERM or SIGINT."""
        while not self._replaced:
            command = await self._commands.next()
            if command is Command.RELOAD:
                await self._commands.unless_stopped(self._reload())
            else:
                channel = self._start_successor() if command is Command.UPGRADE else command
                if channel is not None:
                    await self._commands.unless_stopped(self._hand_over(channel))
        await self._commands.unless_stopped(self._relays.drain(self._settings.drain_seconds))

    async def _reload(self) -> None:
        """Reads the configuration; where it is valid, replaces the relays, and the control process if that is
        needed."""
        service.notify(f"RELOADING=1\nMONOTONIC_USEC={time.monotonic_ns() // 1000}")
        try:
            plan = plan_reload(self._settings, await asyncio.to_thread(self._load))
            access_log = open_access_log(plan.settings)
        except ConfigError as error:
            log.error("SIGHUP: nothing was changed: %s", error)
            self._report = self._report | {"error": str(error)}
            self._control.send({"configuration": self._report})
            service.notify("READY=1")
            return
        settings = plan.settings
        report = {"loaded_at": time.time(), "error": "", "needs_restart": plan.needs_restart}
        bound, control_replaced = len(self._sockets.data), False
        try:
            # The control process first: where it does not start, no request has gone where new relays would send it.
            # Until they serve, it reports the former configuration as the one in force.
            if plan.replaces_control:
                await self._control.replace(control_launch(settings, self._sockets, self._folder, self._report))
                control_replaced = True
            await self._relays.replace(self._relay_launches(settings, access_log), settings)
            self._access_log, access_log = access_log, self._access_log
        except StartFailure as failure:
            log.error("SIGHUP: %s with the new configuration; the former one serves", failure)
            report = self._report | {"error": str(failure)}
            self._sockets.withdraw(bound)
            if control_replaced:
                await self._restore_control()
        else:
            self._settings = settings
            logs.set_up(settings.log.level, settings.log.format)
            log.info("SIGHUP: reloaded; changed: %s", ", ".join(plan.changed) or "nothing")
            if plan.needs_restart:
                log.warning("SIGHUP: these settings take effect after a restart: %s", ", ".join(plan.needs_restart))
            self._control.send({"settings": settings.plain()})
        finally:
            if access_log is not None:
                os.close(access_log)
        self._report = report
        self._control.send({"configuration": report})
        service.notify("READY=1")

    async def _restore_control(self) -> None:
        """Begins the control process with the former configuration again: the relays did not start with the new one."""
        try:
            await self._control.replace(control_launch(self._settings, self._sockets, self._folder, self._report))
        except StartFailure as failure:
            log.error("SIGHUP: %s with the former configuration; the control process has the new one", failure)

    def _start_successor(self) -> Channel | None:
        """Starts the program anew, as this process was started. Returns the channel to it, or None if it could not be
        started."""
        if os.getpid() == CONTAINER_INIT:
            log.error(
                "SIGUSR2: this is a container's first process, with which the container would end; replace the pod"
            )
            return None
        ours: Channel | None = None
        try:
            ours, theirs = takeover.pair()
            with theirs:
                # Not by asyncio, which would kill it at the end of this process.
                self._successor = subprocess.Popen(
                    [sys.executable, *sys.orig_argv[1:]],
                    pass_fds=(theirs.fileno(),),
                    env=os.environ | {takeover.FD_VARIABLE: str(theirs.fileno())},
                )
        except OSError as error:
            if ours is not None:
                ours.close()
            log.error("SIGUSR2: cannot start a successor (%s); this one serves on", error.strerror or error)
            return None
        return ours

    async def _hand_over(self, successor: Channel) -> None:
        """Hands over to the successor, or serves on if the successor fails."""
        sockets = self._sockets
        released = False
        log.info("another supervisor takes over")
        try:
            counts = {name: len(own) for name, own in sockets.by_name().items()}
            message = {
                "role": self._role.value,
                "folder": self._folder.describe(),
                "sockets": counts,
                "by_service": sockets.by_service,
            }
            successor.send(message, sockets.all())
            await successor.expect(takeover.RELEASE_CONTROL)
            released = True
            await self._control.stop()
            successor.send({"step": takeover.RELEASED})
            pid = (await successor.expect(takeover.SERVING))["pid"]
        except TakeoverFailed as error:
            log.error("it did not take over: %s; this one serves on", error)
            if released:
                await self._control.resume()
            if self._successor is not None:
                self._successor.poll()
            return
        finally:
            successor.close()
        self._replaced, self._owns_folder = True, False
        service.notify(f"MAINPID={pid}")
        self._sockets.close()
        log.info("process %s serves; draining for up to %.0f s", pid, self._settings.drain_seconds)

    async def stop(self) -> None:
        """Lets the requests in progress end, within `shutdown_seconds`; the successor's go on."""
        if not self._replaced:
            log.info("stopping: draining for up to %.0f s", self._settings.shutdown_seconds)
            service.notify("STOPPING=1")
        # Closed here first: once the relays have closed theirs, too, connections are refused, not kept waiting.
        self._sockets.close()
        # Relays first: while they drain, /readyz answers that they are not ready, and their captures are still scored.
        await self._relays.stop(self._settings.shutdown_seconds)
        await self._control.stop()
        if self._owns_folder:
            self._folder.remove()


def open_access_log(settings: Settings) -> int | None:
    """Returns the file descriptor that relays write to, opened for appending. Raises ConfigError."""
    target = settings.log.access
    if target == "off":
        return None
    try:
        if target == "stdout":
            return os.dup(1)
        return os.open(target, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o640)
    except OSError as error:
        raise ConfigError(f"log.access: cannot open {target} ({error.strerror}); name a writable file") from None


def _url_host(host: str) -> str:
    return f"[{host}]" if ":" in host else host
