"""The listening sockets: bound here, shared between relays, or passed on by systemd."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator

import pytest

from hemostat.config.errors import ConfigError
from hemostat.config.schema import Settings
from hemostat.supervisor import service
from hemostat.supervisor.role import Role
from hemostat.supervisor.sockets import Sockets, addresses, open_sockets, serves


def opened(role: Role = Role.SERVE, **more: object) -> Sockets:
    given = {"upstream": {"url": "http://a:1"}, "listen": {"host": "127.0.0.1", "port": 0}, "admin": {"port": 0}}
    return open_sockets(addresses(Settings.model_validate(given | more), role), {}, by_service=False)


@pytest.fixture
def sockets() -> Iterator[Sockets]:
    made = opened()
    yield made
    made.close()


@pytest.mark.parametrize(
    ("role", "data", "control"), [(Role.SERVE, 1, True), (Role.RELAY, 1, False), (Role.CONTROL, 0, True)]
)
def test_each_command_listens_on_what_it_serves(role: Role, data: int, control: bool) -> None:
    made = opened(role, control={"listen": "[::1]:0", "addresses": ["127.0.0.1:8082"], "token": "t"})
    try:
        assert len(made.data) == data
        assert (made.data_port != 0) == (data > 0)
        assert (made.control is not None) == control
        if made.control is not None:
            assert made.control.getsockname()[0] == "::1"
        made.provide(3)
        assert len(made.data) == (3 if data else 0)
        assert len(made.all()) == len(made.data) + 1 + control
    finally:
        made.close()


def test_a_port_that_is_taken_is_named_by_its_setting() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(ConfigError, match=f"control.listen: cannot bind 127.0.0.1:{port} .*; free it or choose"):
            opened(Role.CONTROL, control={"listen": f"127.0.0.1:{port}", "token": "t"})
        with pytest.raises(ConfigError, match=f"admin.port: cannot bind 127.0.0.1:{port}"):
            opened(admin={"port": port})


@pytest.mark.parametrize("workers", [1, 2, 3, 5, 200])
def test_every_relay_has_a_socket_and_every_socket_a_relay(sockets: Sockets, workers: int) -> None:
    sockets.provide(3)
    sockets.provide(workers)
    shares = [sockets.of_worker(worker, workers) for worker in range(workers)]
    assert all(shares)
    assert {sock for share in shares for sock in share} == set(sockets.data)
    assert len({sock.getsockname() for sock in sockets.data}) == 1, "one address"
    if workers <= 128:
        assert sum(map(len, shares)) == max(workers, 3), "no two relays share one"


def test_a_socket_that_cannot_be_shared_is_used_by_all(sockets: Sockets) -> None:
    with socket.create_server(("127.0.0.1", 0)) as data:
        given = Sockets([data], sockets.admin, by_service=True)
        given.provide(4)
        assert given.data == [data]
        assert [given.of_worker(n, 4) for n in range(4)] == [[data]] * 4


def test_inherited_sockets_are_used_for_the_same_address_only(sockets: Sockets) -> None:
    sock, port = sockets.data[0], sockets.data_port
    assert serves(sock, "127.0.0.1", port)
    assert serves(sock, "127.0.0.1", 0)
    assert serves(sock, "localhost", port)
    assert not serves(sock, "127.0.0.1", port - 1)
    assert not serves(sock, "0.0.0.0", port)
    assert not serves(sock, "::1", port)
    assert not serves(sock, "no.such.host.invalid", port)


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["data", "other"], "set FileDescriptorName=data, admin or control"),
        (["data", "data"], "two sockets are named data"),
        (["admin", "data"], "data is not a listening TCP socket"),
    ],
)
def test_wrong_units_of_systemd_are_named(monkeypatch: pytest.MonkeyPatch, names: list[str], message: str) -> None:
    listening, other = socket.create_server(("127.0.0.1", 0)), socket.socket()
    first = 900
    os.dup2(listening.detach(), first)
    os.dup2(other.detach(), first + 1)
    monkeypatch.setattr(service, "FIRST_FD", first)
    environment = {"LISTEN_PID": "7", "LISTEN_FDS": "2", "LISTEN_FDNAMES": ":".join(names)}
    with pytest.raises(ConfigError, match=message):
        service.passed_sockets(environment, 7)
    assert environment == {}, "for this process only"


def test_sockets_for_another_process_are_ignored() -> None:
    environment = {"LISTEN_PID": "7", "LISTEN_FDS": "2"}
    assert service.passed_sockets(environment, 8) == {}
    assert environment == {}


def test_the_service_manager_is_notified(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("NOTIFY_SOCKET", raising=False)
    service.notify("READY=1")
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
        manager.bind(f"\0hemostat-test-{os.getpid()}")
        manager.settimeout(30)
        monkeypatch.setenv("NOTIFY_SOCKET", f"@hemostat-test-{os.getpid()}")
        service.notify("READY=1")
        assert manager.recv(100) == b"READY=1"
