"""First on PYTHONPATH, with TRITON_INTERPRET=1: Triton's kernels run on a CPU, interpreted, and vLLM takes them.

vLLM looks for a Triton that has a backend for CPUs, which the package index's has not; the interpreter needs none.
"""

from __future__ import annotations

from typing import Any

from triton.backends import Backend, backends
from triton.backends.compiler import BaseBackend, GPUTarget
from triton.backends.driver import DriverBase


class _Interpreter(DriverBase):
    def __init__(self) -> None:
        pass

    @staticmethod
    def is_active() -> bool:
        return True

    def get_current_target(self) -> Any:
        return GPUTarget("cpu", 0, 1)

    def get_active_torch_device(self) -> Any:
        import torch

        return torch.device("cpu")

    def get_benchmarker(self) -> Any:
        raise NotImplementedError

    def map_python_to_cpp_type(self, ty: str) -> str:
        raise NotImplementedError


backends["cpu"] = Backend(BaseBackend, _Interpreter)
