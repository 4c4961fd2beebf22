"""Processes behind a network that can be dropped: a network namespace with one link to this machine."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import pytest


@dataclass(frozen=True, slots=True)
class Namespace:
    """address: of this machine, as processes in the namespace reach it."""

    name: str
    address: str
    link: str

    def command(self, command: Sequence[str]) -> list[str]:
        """`command`, in the namespace."""
        return ["ip", "netns", "exec", self.name, *command]

    def drop(self) -> None:
        """From now on no packet passes, and nobody is told."""
        _ip("link", "set", self.link, "down")

    def restore(self) -> None:
        _ip("link", "set", self.link, "up")


@contextmanager
def namespace() -> Iterator[Namespace]:
    """Skips the test where this user or kernel makes none."""
    name = f"hemostat{os.getpid()}"
    subnet = f"169.254.{1 + os.getpid() // 63 % 254}.{4 * (os.getpid() % 63)}"
    address, inside = (f"{subnet.rpartition('.')[0]}.{int(subnet.rpartition('.')[2]) + n}" for n in (1, 2))
    created = Namespace(name, address, f"he{os.getpid()}")
    if shutil.which("ip") is None:
        pytest.skip("no program `ip` here: apt-get install iproute2")
    if _ip("netns", "add", name, check=False):
        pytest.skip("no network namespaces here: they need root")
    try:
        _ip("link", "add", created.link, "type", "veth", "peer", "name", "inside", "netns", name)
        _ip("addr", "add", f"{address}/30", "dev", created.link)
        _ip("link", "set", created.link, "up")
        for arguments in (["addr", "add", f"{inside}/30", "dev", "inside"], ["link", "set", "inside", "up"]):
            _ip("-n", name, *arguments)
        yield created
    finally:
        _ip("link", "del", created.link, check=False)
        _ip("netns", "del", name)


def _ip(*arguments: str, check: bool = True) -> int:
    return subprocess.run(["ip", *arguments], check=check, capture_output=True).returncode
