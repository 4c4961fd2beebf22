"""Real vLLM servers: the ones that tests share, and ones that a test starts for itself."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import httpx
from tests.support.engine_admin import TOKEN, EngineAdmin
from tests.support.minutes import starting
from tests.support.paths import ROOT

from hemostat.engines.messages import TapAnswer
from hemostat_lab.demo import vllm_server as vllm_process
from hemostat_lab.demo.checkpoints import Checkpoints

VLLM_ARGUMENTS = [
    *("--enforce-eager", "--dtype", vllm_process.dtype(), "--max-model-len", "2048", "--max-logprobs", "64"),
    *("--no-enable-prefix-caching", "--enable-auto-tool-choice", "--tool-call-parser", "hermes"),
    *("--logits-processors", vllm_process.LOGITS_PROCESSOR),
]

RAISING_ARGUMENTS = [*VLLM_ARGUMENTS[:-1], "tests.support.raising_processor:LogitsProcessor"]
"""The same, but that a profile can be made to raise."""

FAULTS_ARGUMENTS = ["--worker-extension-cls", "tests.support.engine_faults.Faults"]
FAULTS_ENVIRONMENT = {"VLLM_SERVER_DEV_MODE": "1"}

LORA_ARGUMENTS = [*VLLM_ARGUMENTS, "--enable-lora", "--max-lora-rank", "16", "--max-loras", "2"]
CLIENT_HEADERS_ARGUMENTS = ["--middleware", "hemostat_engine.client_headers.ClientHeaders"]
"""With them, passive mode reads which headers clients send."""
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


@contextmanager
def running_vllm(
    checkpoints: Checkpoints,
    folder: Path,
    arguments: Sequence[str],
    more: Mapping[str, str] | None = None,
    *,
    port: int | None = None,
    given: EngineAdmin | None = None,
    module: str = "vllm.entrypoints.openai.api_server",
) -> Iterator[RunningVllm]:
    """more: environment. port: default a free one. given: the admin port, if it is to outlive the server.
    module: the program."""
    profile_dir = folder / "profiles"
    profile_dir.mkdir(exist_ok=True)
    admin = given or EngineAdmin()
    environment = {
        "HEMOSTAT_PROFILE_DIR": str(profile_dir),
        "HEMOSTAT_ADMIN_URL": admin.url,
        "HEMOSTAT_ENGINE_TOKEN": TOKEN,
        "PYTHONPATH": os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH")))),
        **(more or {}),
    }
    log = folder / "vllm.log"
    server = vllm_process.VllmServer(checkpoints.compressed, "smollm2", log, arguments, environment, port, module)
    try:
        with starting("vLLM"):
            server.start()
            server.wait_ready(600.0, progress=print)
        yield RunningVllm(server.url, server.model, profile_dir, server.log, admin)
    finally:
        server.stop()
        if given is None:
            admin.close()


def wait_until_signed_answers_are_recorded(server: RunningVllm) -> None:
    """Until the API server has asked the admin port for its secrets, which it does when a first request is tapped."""
    xargs = server.admin.signed({"hemostat_tap": "first", "hemostat_tap_top": "1"})
    body = {"model": server.model, "prompt": "x", "max_tokens": 1, "vllm_xargs": xargs}
    give_up = time.monotonic() + 60
    while "/api/v1/engine/answers" not in server.admin.seen:
        assert time.monotonic() < give_up, server.log.read_text()[-2000:]
        httpx.post(f"{server.url}/v1/completions", json=body, timeout=60).raise_for_status()
        time.sleep(0.5)


def answers_of(server: RunningVllm, nonce: str, choices: int = 1) -> list[TapAnswer]:
    """What the plugin has handed out of a request, once all its choices are there."""
    give_up = time.monotonic() + 60
    while time.monotonic() < give_up:
        with server.admin.lock:
            if server.admin.registry.answers.complete(nonce, choices):
                return list(server.admin.registry.answers.take(nonce))
        time.sleep(0.05)
    raise AssertionError(f"no answer of {nonce} came: {server.log.read_text()[-2000:]}")
