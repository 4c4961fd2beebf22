"""The plugin with speculative decoding, which only model runner V2 combines: on a GPU. Run by `make bench-gpu`."""

from __future__ import annotations

import json
import time
import urllib.request
from pathlib import Path

import numpy as np
import pytest
from tests.support.constant_profile import constant_profile
from tests.support.running_vllm import VLLM_ARGUMENTS, RunningVllm, running_vllm

from hemostat_lab.demo import vllm_server as vllm_process
from hemostat_lab.demo.checkpoints import Checkpoints

pytestmark = [
    pytest.mark.vllm,
    pytest.mark.slow,
    pytest.mark.timeout(600),
    pytest.mark.skipif(vllm_process.on_cpu(), reason="a CPU has no model runner V2"),
]

NGRAM = {"method": "ngram", "num_speculative_tokens": 3, "prompt_lookup_max": 3, "prompt_lookup_min": 1}
VOCAB_SIZE, FORCED, TOKENS = 49_152, 100, 32


def complete(server: RunningVllm, xargs: dict[str, str], tokens: int) -> list[int]:
    body = {"model": server.model, "prompt": "1, 2, 3, 1, 2, 3, 1,", "max_tokens": tokens, "temperature": 0}
    body |= {"ignore_eos": True, "return_token_ids": True, "vllm_xargs": xargs}
    request = urllib.request.Request(
        f"{server.url}/v1/completions", json.dumps(body).encode(), {"content-type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=280) as answer:
        ids: list[int] = json.load(answer)["choices"][0]["token_ids"]
    return ids


def test_a_profile_is_applied_to_drafts_and_every_position_is_tapped(checkpoints: Checkpoints, tmp_path: Path) -> None:
    bias = np.full(VOCAB_SIZE, -20.0, np.float32)
    bias[FORCED] = 20.0
    profile = constant_profile("", bias, 20.0)
    arguments = [*VLLM_ARGUMENTS, "--speculative-config", json.dumps(NGRAM)]
    with running_vllm(checkpoints, tmp_path, arguments) as server:
        (server.profile_dir / f"{profile.version}.safetensors").write_bytes(profile.to_bytes())
        end = time.monotonic() + 120
        while complete(server, {"hemostat": profile.version}, 1) != [FORCED]:
            assert time.monotonic() < end, server.log.read_text()[-2000:]
            time.sleep(0.2)
        asked = server.admin.signed({"hemostat": profile.version, "hemostat_tap": "drafted"})
        # Repeating one token, drafts of it are accepted: several rows a step.
        assert complete(server, asked, TOKENS) == [FORCED] * TOKENS
        taps, end = server.admin.registry.taps, time.monotonic() + 60
        while taps.covered("drafted") < TOKENS:
            assert time.monotonic() < end, "taps are missing"
            time.sleep(0.1)
        with urllib.request.urlopen(f"{server.url}/metrics", timeout=30) as answer:
            counted = [line for line in answer.read().decode().splitlines() if "num_accepted_tokens_total" in line]
    assert float(counted[-1].split()[-1]) > 0
