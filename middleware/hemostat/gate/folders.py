"""Starts a vLLM server with the checkpoint of a folder, by the laboratory, for as long as the gate runs."""

from __future__ import annotations

import asyncio
import importlib
import tempfile
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from hemostat.config.packages import install_command
from hemostat_calibration.errors import HemostatError

MODULE = "hemostat_lab.demo.vllm_server"
GPU_SHARE = 0.8
"""The part of the GPU's memory that all servers together may take. The rest is for a reference on the same GPU."""
READY_SECONDS = 900.0


class FolderError(HemostatError):
    """A folder cannot be served; the text says why."""


@asynccontextmanager
async def serving(flag: str, folder: Path, servers: int, log: Callable[[str], None]) -> AsyncIterator[str]:
    """Yields the URL of a server that ends with the context, and with this process however that ends. flag: the name of
    the model, for people. servers: the number of servers on this machine, which share its GPU. Raises HemostatError."""
    if not (folder / "config.json").is_file():
        raise FolderError(
            f"--{flag}: {folder} is neither the URL of a vLLM server nor the folder of a checkpoint, with config.json"
        )
    vllm_process = _laboratory(flag)
    with tempfile.TemporaryDirectory(prefix="hemostat-gate-") as work:
        arguments = ["--max-model-len", "auto"]
        if vllm_process.on_cpu():
            arguments += ["--enforce-eager", "--dtype", vllm_process.dtype()]
        else:
            arguments += ["--gpu-memory-utilization", f"{GPU_SHARE / servers:.2f}"]
        server = vllm_process.VllmServer(folder, flag, Path(work) / "vllm.log", arguments)
        try:
            server.start()
            log(f"--{flag}: started vLLM with {folder} at {server.url} ({' '.join(arguments)})")
            await asyncio.to_thread(server.wait_ready, READY_SECONDS, log)
            yield server.url
        finally:
            server.stop()


def _laboratory(flag: str) -> Any:
    """Returns the laboratory's module that starts vLLM."""
    try:
        return importlib.import_module(MODULE)
    except ModuleNotFoundError:
        raise FolderError(
            f"--{flag}: the laboratory serves a folder, and is not installed; {install_command('lab')}, or name "
            "the URL of a vLLM server"
        ) from None
