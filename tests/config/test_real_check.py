"""`hemostat check` beside a real vLLM that is started for adapters."""

from __future__ import annotations

from typing import Any

import pytest
from tests.support.running_vllm import RunningVllm

from hemostat.commands.setup_check import Finding, State, check, table
from hemostat.config.schema import Settings
from hemostat.reference.server import VllmServer
from hemostat_lab.demo import vllm_server as vllm_process
from hemostat_lab.demo.checkpoints import Checkpoints

pytestmark = [pytest.mark.vllm, pytest.mark.timeout(600)]


async def findings(server: RunningVllm, reference: dict[str, Any], **sections: Any) -> dict[str, Finding]:
    settings = Settings.model_validate({"upstream": {"url": server.url}, "reference": reference, **sections})
    result = await check(settings)
    print(table(result))
    return {f.what: f for f in result}


async def test_every_probe_is_answered_without_a_traceback_in_vllms_log(
    lora_server: RunningVllm, checkpoints: Checkpoints
) -> None:
    began = lora_server.log.stat().st_size
    reference = {"backend": "transformers", "model": str(checkpoints.reference), "dtype": vllm_process.dtype()}
    adapter = {"enabled": True, "compressed": str(checkpoints.compressed)}
    # 64 is the server's --max-logprobs: a probe is refused. Without a reference, which starts slowly, that is a note.
    result = await findings(lora_server, {}, shadow={"top_k": 65})
    assert result["max_logprobs"].state is State.NOTE
    assert "shadow.top_k 65: " in result["max_logprobs"].detail
    result = await findings(lora_server, reference, adapter=adapter, shadow={"top_k": 64}, calibration={"mode": "auto"})
    assert {what for what, f in result.items() if f.state is State.NO} == set()
    assert {what for what, f in result.items() if f.state is State.OK} >= {
        *("upstream", "max_logprobs", "return_token_ids", "logprobs_mode", "engine plugin"),
        *("reference", "reference score", "same tokens", "evidence"),
    }
    assert "rendered chat" in result["same tokens"].detail
    assert result["adapters"].detail.endswith("1 of Hemostat's at a time (--max-loras 2)")
    logged = lora_server.log.read_bytes()[began:].decode()
    assert "POST /v1/load_lora_adapter" in logged
    assert "Traceback" not in logged


@pytest.mark.slow
async def test_the_upstream_is_refused_as_its_own_reference(lora_server: RunningVllm) -> None:
    server = VllmServer(lora_server.url)
    try:
        folder = (await server.model(None)).root
    finally:
        await server.close()
    for reference, why in (
        ({"backend": "vllm", "url": lora_server.url}, "is the upstream, and serves the same model"),
        ({"backend": "vllm", "url": lora_server.url.replace("127.0.0.1", "localhost")}, "is the upstream"),
        ({"backend": "transformers", "model": folder, "dtype": vllm_process.dtype()}, f"the same files as {folder}"),
    ):
        result = (await findings(lora_server, reference))["reference"]
        assert result.state is State.NO
        assert why in result.detail
        assert result.fix.endswith("to the uncompressed model")
