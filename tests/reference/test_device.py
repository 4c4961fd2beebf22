"""The device of a reference where the configuration says auto: a CUDA device only if nobody else uses it."""

from __future__ import annotations

import logging
import os
import signal
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers
from tests.support.children import children
from tests.support.fake_vllm import FakeVllm, serving
from tests.support.waiting import until

from hemostat.config.schema import Settings
from hemostat.reference import device, worker
from hemostat.reference.device import IDLE_BYTES, RESERVE_BYTES, CudaDevice, choose, look
from hemostat.reference.monitor import ReferenceMonitor
from hemostat.reference.pair import ReferenceState
from hemostat.reference.references import make_references
from hemostat.reference.server import VllmServer
from hemostat.reference.transformers import TransformersReference
from hemostat_lab.demo.vllm_server import free_port

GIB = 2**30
NEEDED = 15 * GIB


def gpu(index: int = 0, free: int = 79 * GIB, total: int = 80 * GIB, processes: int | None = 0) -> CudaDevice:
    return CudaDevice(index, "H100", free, total, processes)


@pytest.mark.parametrize(
    ("devices", "needed", "only", "expected", "words"),
    [
        ([], NEEDED, "", "cpu", "PyTorch finds no CUDA device"),
        ([gpu()], None, "", "cpu", "the size of the weights is not known"),
        ([gpu()], NEEDED, "", "cuda:0", "79.0 GiB free of 80.0 GiB, 0 other processes); 17.0 GiB are needed"),
        ([gpu(processes=1)], NEEDED, "", "cpu", "1 other processes): another process computes there"),
        ([gpu(processes=3)], NEEDED, "", "cpu", "other processes compute there"),
        # A vLLM that leaves a tenth of the memory; in a container its process may not be listed.
        (
            [gpu(free=70 * GIB)],
            NEEDED,
            "",
            "cpu",
            "70.0 GiB free of 80.0 GiB, 0 other processes): its memory is in use",
        ),
        ([gpu(free=70 * GIB, processes=None)], NEEDED, "", "cpu", "70.0 GiB free of 80.0 GiB): its memory is in use"),
        ([gpu(processes=None)], NEEDED, "", "cuda:0", "79.0 GiB free of 80.0 GiB);"),
        ([gpu(free=15 * GIB, total=16 * GIB)], NEEDED, "", "cpu", "17.0 GiB are needed"),
        ([gpu(free=NEEDED + RESERVE_BYTES, total=NEEDED + RESERVE_BYTES + IDLE_BYTES)], NEEDED, "", "cuda:0", ""),
        ([gpu(free=NEEDED + RESERVE_BYTES - 1, total=NEEDED + RESERVE_BYTES)], NEEDED, "", "cpu", "are needed"),
        ([gpu(0, processes=1), gpu(1)], NEEDED, "", "cuda:1", "cuda:1 (H100"),
        ([gpu(0), gpu(1, total=95 * GIB, free=95 * GIB)], NEEDED, "", "cuda:1", ""),
        ([gpu(0), gpu(1)], NEEDED, "", "cuda:0", ""),
        ([gpu(0), gpu(1, processes=1)], NEEDED, "cuda:1", "cpu", "the reference was on cuda:1 before"),
        ([gpu(0), gpu(1)], NEEDED, "cuda:1", "cuda:1", ""),
        ([gpu()], NEEDED, "cpu", "cpu", "it was chosen at the start"),
    ],
)
def test_the_device_that_is_chosen(
    devices: list[CudaDevice], needed: int | None, only: str, expected: str, words: str
) -> None:
    choice = choose(devices, needed, only)
    assert choice.device == expected
    assert words in choice.reason


def stand_ins(*, listed: int, error: bool = False) -> tuple[Any, Any, list[int]]:
    """Returns stand-ins of torch and of NVIDIA's library, and a list of the devices on which a context is made.

    listed: the number of processes on device 1.
    """
    contexts: list[int] = []

    def memory(index: int) -> tuple[int, int]:
        contexts.append(index)
        return 79 * GIB, 80 * GIB

    properties = [SimpleNamespace(name="H100", uuid=f"AA-{n}", total_memory=80 * GIB) for n in range(2)]
    cuda = SimpleNamespace(
        is_available=lambda: True,
        device_count=lambda: 2,
        get_device_properties=properties.__getitem__,
        mem_get_info=memory,
    )

    def processes(handle: int) -> list[int]:
        if error:
            raise RuntimeError("no permission")
        # The library counts in another order than PyTorch.
        return [7] * (listed if handle == 0 else 0)

    nvml = SimpleNamespace(
        nvmlInit=lambda: None,
        nvmlDeviceGetCount=lambda: 2,
        nvmlDeviceGetHandleByIndex=lambda index: index,
        nvmlDeviceGetUUID=lambda handle: ["GPU-aa-1", b"GPU-aa-0"][handle],
        nvmlDeviceGetComputeRunningProcesses=processes,
    )
    return SimpleNamespace(cuda=cuda), nvml, contexts


def test_no_memory_is_taken_on_a_device_that_another_process_uses() -> None:
    torch_module, nvml, contexts = stand_ins(listed=2)
    found = look(torch_module, nvml)
    assert [(each.index, each.processes) for each in found] == [(0, 0), (1, 2)]
    assert contexts == [0]
    assert choose(found, NEEDED).device == "cuda:0"


@pytest.mark.parametrize("installed", [True, False])
def test_without_the_library_memory_decides(installed: bool) -> None:
    torch_module, nvml, _ = stand_ins(listed=2, error=True)
    found = look(torch_module, nvml if installed else None)
    assert [each.processes for each in found] == [None, None]
    assert choose(found, NEEDED).device == "cuda:0"


def test_what_cannot_be_looked_at_is_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(device, "has_gpu", lambda: True)
    monkeypatch.setattr(device.sys, "executable", "/bin/false")
    choice = device.resolve("auto", "", lambda: NEEDED)
    assert choice is not None
    assert choice.device == "cpu"
    assert "could not be looked at (CalledProcessError)" in choice.reason


def test_the_look_is_a_process_whose_contexts_end_with_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(device, "has_gpu", lambda: True)
    assert device.cuda_devices() == [], "PyTorch's build for CPUs"
    assert device.resolve("cuda:3", "", lambda: NEEDED) is None, "the configuration names it"


@pytest.mark.parametrize("dtype", ["auto", "float32"])
def test_the_needed_memory_is_that_of_the_loaded_weights(tmp_path: Path, dtype: str) -> None:
    config = transformers.LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2
    )
    transformers.LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(tmp_path)
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=dtype)
    read = transformers.AutoConfig.from_pretrained(tmp_path)
    expected = sum(parameter.numel() * parameter.element_size() for parameter in loaded.parameters())
    assert worker._weight_bytes(read, dtype) == expected
    assert worker._weight_bytes(SimpleNamespace(dtype=None, get_text_config=lambda: None), dtype) is None


async def test_the_choice_is_said_before_the_weights_are_loaded_and_kept_after_a_restart(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "hemostat.reference")
    config = transformers.LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2
    )
    config.save_pretrained(tmp_path)
    settings = {"upstream": {"url": "http://a"}, "reference": {"backend": "transformers", "model": str(tmp_path)}}
    references = make_references(Settings.model_validate(settings))
    assert references is not None
    reference = references.first
    assert isinstance(reference, TransformersReference)
    said = "the reference is loaded on cpu: PyTorch finds no CUDA device"
    try:
        with pytest.raises(Exception, match="does not load"):  # there are no weights yet
            await reference.start()
        assert caplog.messages == [said]
        transformers.LlamaForCausalLM(config).save_pretrained(tmp_path)
        info = await reference.start()
        assert info.device == "cpu: PyTorch finds no CUDA device"
        assert caplog.messages == [said, said]
        (pid,) = children("hemostat.reference.worker")
        os.kill(pid, signal.SIGKILL)
        again = "the reference is loaded on cpu: it was chosen at the start"
        await until(lambda: again in caplog.messages)
        assert any("worker ended" in message for message in caplog.messages)
    finally:
        await reference.close()


@pytest.mark.parametrize(
    ("gpu_there", "wanted", "starts"), [(True, "auto", False), (True, "cpu", True), (False, "auto", True)]
)
async def test_the_device_is_chosen_after_the_upstream_answers(
    gpu_there: bool, wanted: str, starts: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A device that is free until then may be the one on which vLLM is being started."""
    monkeypatch.setattr(device, "has_gpu", lambda: gpu_there)
    upstream = f"http://127.0.0.1:{free_port()}"
    with serving(FakeVllm()) as url:
        settings = Settings.model_validate(
            {"upstream": {"url": upstream}, "reference": {"backend": "vllm", "url": url, "device": wanted}}
        )
        references = make_references(settings)
        assert references is not None
        assert references.first is not None
        started: list[str] = []
        plain = references.first.start

        async def start() -> Any:
            started.append("reference")
            return await plain()

        monkeypatch.setattr(references.first, "start", start)
        monitor = ReferenceMonitor(
            references,
            settings,
            compressed_scorer=None,
            scores_fail=lambda model: False,
            refused=lambda: 0.0,
        )

        server = VllmServer(upstream, None)
        try:
            await monitor._match(references, server)
        finally:
            await server.close()
            await references.first.close()
    assert bool(started) is starts
    assert monitor.state is ReferenceState.STARTING
    assert "the upstream does not answer" in monitor.detail
