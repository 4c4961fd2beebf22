"""The ports on which the demo, the benchmarks and the tests let servers listen."""

from __future__ import annotations

import socket
from pathlib import Path

import pytest

from hemostat_calibration.errors import HemostatError
from hemostat_lab.demo import vllm_server
from hemostat_lab.demo.vllm_server import MAX_PORT_TRIES, MIN_FREE_PORT, free_port


@pytest.mark.skipif(
    not Path("/proc/sys/net/ipv4/ip_local_port_range").exists(), reason="no Linux: the kernel's range is not known"
)
def test_no_outgoing_connection_can_take_the_port_before_the_server_listens() -> None:
    first, last = map(int, Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split())
    if first < MIN_FREE_PORT + MAX_PORT_TRIES:
        pytest.skip(f"this machine's connections take ports from {first} on: there is no room below")
    for _ in range(50):
        assert not first <= free_port() <= last


def test_ports_in_use_are_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    port, other = free_port(), free_port()
    with socket.create_server(("127.0.0.1", port)):
        monkeypatch.setattr(vllm_server.random, "sample", lambda *_: [port])
        with pytest.raises(HemostatError, match="no free TCP port"):
            free_port()
        monkeypatch.setattr(vllm_server.random, "sample", lambda *_: [port, other])
        assert free_port() == other
