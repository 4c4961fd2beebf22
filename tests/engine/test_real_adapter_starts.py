"""The host of adapters beside real vLLM servers (CPU) that are started in other ways than they should be."""

from __future__ import annotations

import json
import urllib.error
import urllib.request
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
from tests.support.engine_admin import EngineAdmin
from tests.support.lora_world import unusable_reason
from tests.support.real_adapter_host import SECONDS, CopyInProcess, Engines, Profiles, corrections_of, hosting, settled
from tests.support.running_vllm import (
    LORA_ARGUMENTS,
    LORA_ENVIRONMENT,
    VLLM_ARGUMENTS,
    RunningVllm,
    running_vllm,
)
from tests.support.samples import values
from tests.support.waiting import until

from hemostat.adapters.serving.host import HostState
from hemostat.metrics import names
from hemostat_calibration.profiles.adapter import adapter_layers
from hemostat_calibration.profiles.peft import peft_files
from hemostat_calibration.profiles.profile import CalibrationProfile
from hemostat_lab.demo.checkpoints import Checkpoints
from hemostat_lab.demo.vllm_server import free_port
from hemostat_lab.models.copies import Copy

pytestmark = [
    pytest.mark.vllm,
    pytest.mark.slow,  # each starts one or two servers of its own
    pytest.mark.timeout(3600),
]


@pytest.fixture(scope="module")
def adapter(checkpoints: Checkpoints) -> CalibrationProfile:
    return corrections_of(checkpoints)[0]


def copy_of(checkpoints: Checkpoints, adapter: CalibrationProfile) -> CopyInProcess:
    return CopyInProcess(Copy.load(checkpoints.compressed), {adapter.version: adapter_layers(adapter)})


def post(server: RunningVllm, path: str, body: dict[str, Any]) -> tuple[int, str]:
    request = urllib.request.Request(server.url + path, json.dumps(body).encode(), {"content-type": "application/json"})
    try:
        with urllib.request.urlopen(request, timeout=280) as answer:
            return answer.status, answer.read().decode()
    except urllib.error.HTTPError as error:
        with error:
            return error.code, error.read().decode()


def complete(server: RunningVllm, model: str) -> tuple[int, str]:
    return post(
        server, "/v1/completions", {"model": model, "prompt": "Water boils at", "max_tokens": 4, "temperature": 0}
    )


async def test_a_server_that_comes_back_without_enable_lora_is_asked_for_no_adapter(
    checkpoints: Checkpoints, adapter: CalibrationProfile, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    profiles, copy = Profiles([adapter]), copy_of(checkpoints, adapter)
    admin, port, first = EngineAdmin(), free_port(), ExitStack()
    try:
        server = first.enter_context(
            running_vllm(checkpoints, tmp_path, LORA_ARGUMENTS, LORA_ENVIRONMENT, port=port, given=admin)
        )
        async with hosting(server, profiles, copy) as host:
            profiles.versions = [adapter.version]
            await settled(host, profiles)
            assert host.ready == {adapter.version}, host.status()
            first.close()
            admin.now += 3600.0  # what the first one reported is too old to count
            with running_vllm(checkpoints, tmp_path, VLLM_ARGUMENTS, LORA_ENVIRONMENT, port=port, given=admin) as again:
                await until(lambda: len(Engines(again).live(0.0)) == 1, SECONDS)
                await until(lambda: bool(unusable_reason(host)), SECONDS)
                assert host.ready == {}
                assert (host.capacity, "\n" in unusable_reason(host)) == (0, False)
                assert "--enable-lora" in unusable_reason(host), unusable_reason(host)
                assert any("--enable-lora" in record.getMessage() for record in caplog.records)
                result = values(host.samples())
                assert result[names.ADAPTER_LOADS, "refused"] == 0
                assert result[names.ADAPTERS, "ready"] == 0
                # A request that was under way is refused in a way after which the relay sends the client's own.
                status, said = complete(again, adapter.version)
                assert (status, "--enable-lora" in said, adapter.version in said) == (400, True, True), said
                log = again.log.read_text()
                assert (log.count("Traceback"), log.count("adapters are off: LoRA is not enabled")) == (0, 1)
                assert complete(again, again.model)[0] == 200
                profiles.versions = []
                await until(lambda: host.state is HostState.IDLE, SECONDS)
    finally:
        first.close()
        admin.close()


async def test_without_the_plugin_adapters_are_loaded_from_the_shared_folder(
    checkpoints: Checkpoints, adapter: CalibrationProfile, tmp_path: Path
) -> None:
    shared = tmp_path / "shared"
    shared.mkdir()
    environment = {"VLLM_ALLOW_RUNTIME_LORA_UPDATING": "True"}
    with running_vllm(checkpoints, tmp_path, LORA_ARGUMENTS, environment) as server:
        profiles, copy = Profiles([adapter]), copy_of(checkpoints, adapter)
        async with hosting(server, profiles, copy, folder=str(shared)) as host:
            profiles.versions = [adapter.version]
            await settled(host, profiles)
            status = host.status()
            assert host.ready == {adapter.version}, status
            assert (status["way"], status["capacity"]) == ("folder", 1)
            assert "0 of 8 texts" in status["probes"]["isolation"]["detail"]
            assert (shared / adapter.version / "adapter_model.safetensors").is_file()
            plain, adapted = (complete(server, model) for model in (server.model, adapter.version))
            assert (plain[0], adapted[0]) == (200, 200)
            assert json.loads(plain[1])["choices"][0]["text"] != json.loads(adapted[1])["choices"][0]["text"]


async def test_with_vllms_own_product_a_server_that_was_full_is_not_used_until_it_restarts(
    checkpoints: Checkpoints, adapter: CalibrationProfile, tmp_path: Path
) -> None:
    """A client's own adapters take both slots: from then on rows without an adapter may get one."""
    environment = LORA_ENVIRONMENT | {"HEMOSTAT_ADAPTERS_CPU_PRODUCT": "0"}
    folders = [tmp_path / name for name in ("mine", "yours")]
    for folder in folders:
        folder.mkdir()
        for name, data in peft_files(adapter, "smollm2").items():
            (folder / name).write_bytes(data)
    with running_vllm(checkpoints, tmp_path, LORA_ARGUMENTS, environment) as server:
        profiles, copy = Profiles([adapter]), copy_of(checkpoints, adapter)
        await until(lambda: len(Engines(server).live(0.0)) == 1, SECONDS)
        (report,) = Engines(server).live(0.0)
        assert report.lora is not None
        assert (report.lora.grouped, report.lora.was_full) == (False, False)
        for folder in folders:
            load = {"lora_name": folder.name, "lora_path": str(folder)}
            assert post(server, "/v1/load_lora_adapter", load)[0] == 200
            assert complete(server, folder.name)[0] == 200
        async with hosting(server, profiles, copy) as host:
            profiles.versions = [adapter.version]
            await until(lambda: bool(unusable_reason(host)), SECONDS)
            assert host.ready == {}
            assert "restart vLLM with --max-loras 3" in unusable_reason(host)
            # That they are unloaded does not mend it.
            for folder in folders:
                assert post(server, "/v1/unload_lora_adapter", {"lora_name": folder.name})[0] == 200
            await until(lambda: not Engines(server).live(0.0)[0].adapters, SECONDS)
            await until(lambda: host.status()["loaded"] == [] and bool(unusable_reason(host)), SECONDS)
            (report,) = Engines(server).live(0.0)
            assert report.lora is not None
            assert report.lora.was_full
            assert host.ready == {}
            assert complete(server, server.model)[0] == 200
