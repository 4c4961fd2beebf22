"""The host of adapters against a real vLLM server (CPU): loaded by the resolver, isolated, in agreement with a copy."""

from __future__ import annotations

import pytest
from tests.support.lora_world import unusable_reason
from tests.support.real_adapter_host import SECONDS, CopyInProcess, Engines, Profiles, corrections_of, hosting
from tests.support.running_vllm import RunningVllm
from tests.support.waiting import until

from hemostat_calibration.profiles.adapter import adapter_layers
from hemostat_calibration.profiles.profile import CalibrationProfile
from hemostat_lab.demo.checkpoints import Checkpoints
from hemostat_lab.models.copies import Copy

pytestmark = [
    pytest.mark.vllm,
    pytest.mark.timeout(600),
]


@pytest.fixture(scope="module")
def corrections(checkpoints: Checkpoints) -> list[CalibrationProfile]:
    return corrections_of(checkpoints)


@pytest.mark.slow
async def test_loaded_isolated_in_agreement_replaced_and_a_wrong_one_rejected(
    lora_server: RunningVllm, checkpoints: Checkpoints, corrections: list[CalibrationProfile]
) -> None:
    """With 2 slots one adapter is loaded at a time. The copy of the second one has twice the factors, as if the engine
    applied it by half."""
    whole, half = corrections
    full = adapter_layers(whole)
    copy = CopyInProcess(Copy.load(checkpoints.compressed), {whole.version: full, half.version: full})
    profiles = Profiles(corrections)
    async with hosting(lora_server, profiles, copy) as host:
        profiles.versions = [whole.version]
        await until(lambda: host.ready == {whole.version} or unusable_reason(host) or profiles.rejected, SECONDS)
        status = host.status()
        assert host.ready == {whole.version}, status
        assert (status["way"], status["capacity"]) == ("resolver", 1)
        assert "0 of 8 texts" in status["probes"]["isolation"]["detail"]
        profiles.versions = [half.version, whole.version]
        await until(lambda: half.version in profiles.rejected, SECONDS)
        assert "does not apply it as our copy does" in profiles.rejected[half.version]
        await until(lambda: host.ready == {whole.version}, SECONDS)
        (report,) = Engines(lora_server).live(0.0)
        assert report.lora is not None
        assert not report.lora.was_full
