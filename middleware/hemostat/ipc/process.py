"""Small things that child processes need."""

from __future__ import annotations

import ctypes
import os
import signal
import sys
from importlib.machinery import EXTENSION_SUFFIXES
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from hemostat.tracing import Tracing

_PR_SET_PDEATHSIG = 1


def die_with_parent(parent: int, sig: int = signal.SIGTERM) -> None:
    """Have the kernel send `sig` when the process `parent` is gone; ends at once if it is gone already. Linux only."""
    if not sys.platform.startswith("linux"):
        return
    libc = ctypes.CDLL(None, use_errno=True)
    libc.prctl(_PR_SET_PDEATHSIG, sig, 0, 0, 0)
    if os.getppid() != parent:
        sys.exit(0)


def is_compiled(module: str) -> bool:
    """Whether this process has loaded that module from machine code instead of its source; False if not loaded."""
    return str(getattr(sys.modules.get(module), "__file__", "")).endswith(tuple(EXTENSION_SUFFIXES))


def make_tracing(config: dict[str, Any] | None) -> Tracing | None:
    """From `tracing` of the configuration; None where it names no endpoint."""
    if not config or not config.get("endpoint"):
        return None
    from hemostat.tracing import Tracing  # noqa: PLC0415  an extra: only what is used

    return Tracing(config["endpoint"], config["ratio"], version("hemostat"))
