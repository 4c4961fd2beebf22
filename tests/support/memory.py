"""Measures the memory of a process, by what the kernel says, and of an object, with all that it refers to."""

from __future__ import annotations

import gc
import sys
from pathlib import Path
from types import BuiltinFunctionType, FunctionType, MethodType, ModuleType


def resident_mib(pid: int) -> float:
    return _status(pid, "VmRSS")


def peak_mib(pid: int) -> float:
    """The most so far."""
    return _status(pid, "VmHWM")


def _status(pid: int, name: str) -> float:
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(name + ":")) / 1024


def kept_bytes(*roots: object) -> int:
    """Returns the bytes of these objects and of all that they refer to, without code, modules and classes.

    So a test can say that memory is bounded and need not know in which member it is kept."""
    seen: dict[int, object] = {}
    waiting = list(roots)
    while waiting:
        found = waiting.pop()
        if id(found) in seen or isinstance(found, _SHARED):
            continue
        seen[id(found)] = found
        waiting.extend([found.__self__] if isinstance(found, MethodType) else gc.get_referents(found))
    return sum(map(sys.getsizeof, seen.values()))


_SHARED = (type, ModuleType, FunctionType, BuiltinFunctionType)
