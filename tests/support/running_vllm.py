"""The real vLLM server that tests share."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from tests.support.engine_admin import EngineAdmin

from hemostat.models import vllm_server as vllm_process

VLLM_ARGUMENTS = [
    *("--enforce-eager", "--dtype", vllm_process.dtype(), "--max-model-len", "2048", "--max-logprobs", "64"),
    *("--no-enable-prefix-caching", "--enable-auto-tool-choice", "--tool-call-parser", "hermes"),
    *("--logits-processors", vllm_process.LOGITS_PROCESSOR),
]

LORA_ARGUMENTS = [*VLLM_ARGUMENTS, "--enable-lora", "--max-lora-rank", "16", "--max-loras", "2"]
LORA_ENVIRONMENT = {"HEMOSTAT_ADAPTERS": "1", "VLLM_ALLOW_RUNTIME_LORA_UPDATING": "True"}


@dataclass(frozen=True, slots=True)
class RunningVllm:
    """A real server with the W4A16 checkpoint and Hemostat's logits processor, profiles from `profile_dir`.

    admin: what the processor reports to.
    """

    url: str
    model: str
    profile_dir: Path
    log: Path
    admin: EngineAdmin
