"""The listening sockets. The supervisor binds them and never accepts on them; relays and the control process inherit
them.

Each relay has a socket of its own (SO_REUSEPORT): the kernel then spreads connections over the relays by a hash. With
one socket for all, the process that wakes first takes every connection of a burst (16 of 16 in a measurement with two
processes), and a few long-lived connections stay on one relay. A socket's queue of connections survives its relay,
because the supervisor holds the socket, too; until the spare relay has taken the ended one's place, its share of the
new connections waits there.
"""

from __future__ import annotations

import socket
from collections.abc import Mapping
from dataclasses import dataclass

from hemostat.config.errors import ConfigError
from hemostat.config.fields import split_address
from hemostat.config.schema import Settings
from hemostat.supervisor.role import Role
from hemostat.supervisor.service import ADMIN, CONTROL, DATA

BACKLOG = 2048
"""The number of connections that may wait in the queue of one socket (the kernel's limit is net.core.somaxconn)."""
MAX_DATA_SOCKETS = 128
"""The largest number of data sockets: so many file descriptors can be passed on in one message. With more relays than
this some share a socket.
"""

Address = tuple[str, int]


@dataclass(frozen=True, slots=True)
class Sockets:
    """The listening sockets.

    data: all of one address, none without relays. admin: one. control: for relays on other machines, if there are to be
    any. All of them listen. by_service: a service manager has chosen their addresses, whatever the settings say.
    """

    data: list[socket.socket]
    admin: socket.socket
    control: socket.socket | None = None
    by_service: bool = False

    @property
    def data_port(self) -> int:
        """The data port; 0 without relays."""
        return int(self.data[0].getsockname()[1]) if self.data else 0

    @property
    def admin_port(self) -> int:
        return int(self.admin.getsockname()[1])

    def provide(self, workers: int) -> None:
        """Binds more sockets to the data port, as far as it can be shared, until each relay has its own.

        Once relays accept on them there are never fewer: what waits in the queue of a closed socket would be lost.
        """
        if not self.data:
            return
        first = self.data[0]
        while len(self.data) < min(workers, MAX_DATA_SOCKETS) and first.getsockopt(
            socket.SOL_SOCKET, socket.SO_REUSEPORT
        ):
            try:
                self.data.append(_listen(first.family, first.getsockname()[:2], reuse_port=True))
            except OSError:
                return  # made by another user, such as systemd's: the relays share what there is

    def withdraw(self, number: int) -> None:
        """Closes those beyond the first `number`, which no relay accepts on: what connects there would hang."""
        while len(self.data) > number:
            self.data.pop().close()

    def of_worker(self, worker: int, workers: int) -> list[socket.socket]:
        """Returns the sockets that one relay accepts on: every socket belongs to a relay, and every relay has one."""
        if len(self.data) >= workers:
            return self.data[worker::workers]
        return [self.data[worker % len(self.data)]]

    def by_name(self) -> dict[str, list[socket.socket]]:
        return {DATA: self.data, ADMIN: [self.admin], CONTROL: [self.control] if self.control is not None else []}

    def all(self) -> list[socket.socket]:
        return [sock for sockets in self.by_name().values() for sock in sockets]

    def close(self) -> None:
        for sock in self.all():
            sock.close()


def addresses(settings: Settings, role: Role) -> dict[str, tuple[str, Address]]:
    """Returns, by name of the sockets that this role listens on, the setting of the port, and host and port."""
    result = {ADMIN: ("admin.port", (settings.admin.host, settings.admin.port))}
    if role.relays:
        result[DATA] = ("listen.port", (settings.listen.host, settings.listen.port))
    if role.control and settings.control.listen is not None:
        result[CONTROL] = ("control.listen", split_address(settings.control.listen))
    return result


def open_sockets(
    wanted: Mapping[str, tuple[str, Address]], passed: Mapping[str, list[socket.socket]], *, by_service: bool
) -> Sockets:
    """Binds what was not passed on, and returns all sockets. wanted: see `addresses`. passed: by name. Raises
    ConfigError if a port is taken."""
    result = {name: passed[name] for name in wanted if passed.get(name)}
    bound: list[socket.socket] = []
    try:
        for name in wanted.keys() - result.keys():
            bound.append(_bind(*wanted[name], reuse_port=name == DATA))
            result[name] = [bound[-1]]
    except ConfigError:
        for sock in bound:
            sock.close()
        raise
    return Sockets(result.get(DATA, []), result[ADMIN][0], next(iter(result.get(CONTROL, [])), None), by_service)


def serves(sock: socket.socket, host: str, port: int) -> bool:
    """Returns True if a socket that was passed on is bound to this address. port: 0 is any."""
    try:
        own = sock.getsockname()[:2]
        result = {info[4][:2] for info in socket.getaddrinfo(host, own[1], sock.family, socket.SOCK_STREAM)}
    except OSError:
        return False
    return own in result and port in {0, own[1]}


def _bind(setting: str, address: Address, *, reuse_port: bool) -> socket.socket:
    host, port = address
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        # With SO_REUSEPORT alone, a second Hemostat of the same user would silently get half of the connections; the
        # first bind without it detects that.
        with socket.socket(family, socket.SOCK_STREAM) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind((host, port))
            bound = probe.getsockname()[:2]
        return _listen(family, bound, reuse_port=reuse_port)
    except OSError as error:
        raise ConfigError(
            f"{setting}: cannot bind {host}:{port} ({error.strerror}); free it or choose another"
        ) from error


def _listen(family: int, address: Address, *, reuse_port: bool) -> socket.socket:
    sock = socket.socket(family, socket.SOCK_STREAM)
    try:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if reuse_port:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        sock.bind(address)
        sock.listen(BACKLOG)
    except OSError:
        sock.close()
        raise
    return sock
