"""The device of a reference where `reference.device` is auto: a CUDA device only if nobody else uses it, else the CPU.

The engine that serves clients comes first: a reference on its device would take memory that the engine needs, or slow
down its kernels. `choose` is the rule. `cuda_devices` looks at the machine, in a process of its own, because a look at
a device's memory leaves a CUDA context of some hundred MiB there until the process ends.
"""

from __future__ import annotations

import importlib
import os
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import msgspec

AUTO = "auto"
RESERVE_BYTES = 2 * 2**30
"""The memory that a request needs in addition to the weights: activations, logits, CUDA's libraries."""
IDLE_BYTES = 2**30
"""The most memory that is in use on a device without another process: the driver's, and the context of the look."""
LOOK_SECONDS = 120.0


class CudaDevice(msgspec.Struct, frozen=True):
    """One CUDA device, by its number in PyTorch."""

    index: int
    name: str
    free_bytes: int
    total_bytes: int
    processes: int | None
    """The number of other processes that compute there; None if NVIDIA's management library is not installed."""


class Choice(msgspec.Struct, frozen=True):
    """A device, and why it was chosen, with the numbers."""

    device: str
    reason: str


def choose(devices: Sequence[CudaDevice], needed: int | None, only: str = "") -> Choice:
    """Returns the CUDA device with most free memory among those that can be used, else the CPU.

    needed: bytes of the weights; None if unknown. only: the device that was chosen before, in place of which only the
    CPU may be; "" for the first choice.

    >>> choose([CudaDevice(0, "H100", 78 * 2**30, 79 * 2**30, 0)], 15 * 2**30).device
    'cuda:0'
    """
    if only == "cpu":
        return Choice("cpu", "it was chosen at the start")
    if not devices:
        return Choice("cpu", "PyTorch finds no CUDA device")
    if needed is None:
        return Choice("cpu", "the size of the weights is not known before they are loaded")
    obstacles = {device.index: _obstacle(device, needed, only) for device in devices}
    usable = [device for device in devices if not obstacles[device.index]]
    if usable:
        best = max(usable, key=lambda device: (device.free_bytes, -device.index))
        return Choice(f"cuda:{best.index}", f"{_described(best)}; {_gib(needed + RESERVE_BYTES)} are needed")
    return Choice("cpu", "; ".join(f"{_described(device)}: {obstacles[device.index]}" for device in devices))


def idle(devices: Sequence[CudaDevice], needed: int) -> list[str]:
    """Returns the names of all CUDA devices that can be used. needed: bytes of the weights; 0 if unknown.

    >>> gib = 2**30
    >>> idle([CudaDevice(0, "H100", 78 * gib, 79 * gib, 0), CudaDevice(1, "H100", 0, 79 * gib, 1)], 15 * gib)
    ['cuda:0']
    """
    return [f"cuda:{device.index}" for device in devices if not _obstacle(device, needed, "")]


def _obstacle(device: CudaDevice, needed: int, only: str) -> str:
    """Returns why the device is not used; "" if it can be."""
    if only and only != f"cuda:{device.index}":
        return f"the reference was on {only} before, and others may need this device"
    if device.processes:
        return "another process computes there" if device.processes == 1 else "other processes compute there"
    if device.total_bytes - device.free_bytes > IDLE_BYTES:
        # In a container the library may not list processes that are outside of it.
        return "its memory is in use, so that another process computes there"
    if device.free_bytes < needed + RESERVE_BYTES:
        return f"{_gib(needed + RESERVE_BYTES)} are needed"
    return ""


def _described(device: CudaDevice) -> str:
    processes = "" if device.processes is None else f", {device.processes} other processes"
    memory = f"{_gib(device.free_bytes)} free of {_gib(device.total_bytes)}"
    return f"cuda:{device.index} ({device.name}, {memory}{processes})"


def _gib(count: int) -> str:
    return f"{count / 2**30:.1f} GiB"


def has_gpu() -> bool:
    """Returns True if this machine may have a GPU: its driver's device file is there. Imports nothing."""
    return any(Path(path).exists() for path in ("/dev/nvidiactl", "/dev/dxg", "/dev/kfd"))


def resolve(device: str, only: str, needed: Callable[[], int | None]) -> Choice | None:
    """Returns the choice for auto; None if the configuration names a device. Needs torch where there is a GPU."""
    if device != AUTO:
        return None
    devices = [] if only == "cpu" else cuda_devices()
    return devices if isinstance(devices, Choice) else choose(devices, needed() if devices else None, only)


def cuda_devices() -> list[CudaDevice] | Choice:
    """Returns the devices of this machine; the CPU as a choice if they cannot be looked at."""
    if not has_gpu():
        return []
    command = [sys.executable, "-m", __name__]
    try:
        done = subprocess.run(command, capture_output=True, check=True, timeout=LOOK_SECONDS)
        return msgspec.json.decode(done.stdout, type=list[CudaDevice])
    except (OSError, subprocess.SubprocessError, msgspec.MsgspecError) as error:
        return Choice("cpu", f"the CUDA devices could not be looked at ({type(error).__name__})")


def look(torch: Any, nvml: Any | None) -> list[CudaDevice]:
    """Returns the devices. nvml: the module `pynvml`; None if it is not installed. Leaves contexts behind."""
    if not torch.cuda.is_available():
        return []
    # The library is asked first: later this process itself is one that computes there.
    counted = None if nvml is None else _processes(nvml)
    result = []
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        processes = None if counted is None else counted.get(_uuid(properties.uuid))
        if processes:
            # No context where another process computes: its memory is not ours to take, not even for a moment.
            free, total = 0, properties.total_memory
        else:
            free, total = torch.cuda.mem_get_info(index)
        result.append(CudaDevice(index, properties.name, int(free), int(total), processes))
    return result


def _processes(nvml: Any) -> Counter[str] | None:
    """Returns the number of processes by device; None if the library cannot tell."""
    counted: Counter[str] = Counter()
    try:
        nvml.nvmlInit()
        for index in range(nvml.nvmlDeviceGetCount()):
            handle = nvml.nvmlDeviceGetHandleByIndex(index)
            counted[_uuid(nvml.nvmlDeviceGetUUID(handle))] += len(nvml.nvmlDeviceGetComputeRunningProcesses(handle))
    except Exception:  # noqa: BLE001  the library's own errors: no driver, no permission, a partitioned device
        return None
    return counted


def _uuid(uuid: object) -> str:
    """Returns the same text for PyTorch's form and the library's, which begins with GPU-."""
    text = uuid.decode() if isinstance(uuid, bytes) else str(uuid)
    return text.lower().removeprefix("gpu-")


def main() -> int:
    torch = importlib.import_module("torch")
    try:
        nvml = importlib.import_module("pynvml")
    except ImportError:
        nvml = None
    os.write(1, msgspec.json.encode(look(torch, nvml)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
