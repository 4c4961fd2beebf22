"""Tensor parallelism of two ranks in a real vLLM (model runner V1, CPU build): profiles, taps, adapters and the sets
that a grammar allows are the same on both."""

from __future__ import annotations

import json
import os
import time
import urllib.request
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from tests.support import rank_processor
from tests.support.adapter_models import save, tiny_model
from tests.support.constant_profile import constant_profile
from tests.support.running_vllm import LORA_ENVIRONMENT, RunningVllm, running_vllm
from tests.support.tiny_tokenizer import write_tokenizer

from hemostat.scoring.conditioning import allowed_sets
from hemostat_calibration.adapters.factors import LowRank
from hemostat_calibration.profiles.adapter import adapter_profile
from hemostat_calibration.profiles.profile import CalibrationProfile

pytestmark = [pytest.mark.vllm, pytest.mark.slow, pytest.mark.timeout(900)]

WIDTH, HEADS, LAYERS, RANK = 256, 8, 2, 8
TOKENS = 12
FORCED = 100
ARGUMENTS = [
    *("--tensor-parallel-size", "2", "--enforce-eager", "--dtype", "float32", "--max-model-len", "256"),
    *("--no-enable-prefix-caching", "--enable-lora", "--max-lora-rank", str(RANK), "--max-loras", "2"),
    *("--logits-processors", "tests.support.rank_processor:LogitsProcessor"),
]


def checkpoint(folder: Path) -> tuple[Path, int]:
    """A random Llama that two ranks can share, and the size of its vocabulary."""
    vocab_size = write_tokenizer(folder)
    model = tiny_model(
        vocab_size=vocab_size,
        hidden_size=WIDTH,
        num_attention_heads=HEADS,
        num_key_value_heads=HEADS // 2,
        num_hidden_layers=LAYERS,
        max_position_embeddings=256,
    )
    return save(model, folder), vocab_size


def forcing(vocab_size: int) -> CalibrationProfile:
    """Makes greedy decoding repeat one token."""
    bias = np.full(vocab_size, -20.0, np.float32)
    bias[FORCED] = 20.0
    return constant_profile("", bias, 20.0)


def correction(vocab_size: int) -> CalibrationProfile:
    rng = np.random.default_rng(0)
    layers = {
        f"model.layers.{layer}.{name}": LowRank(
            rng.normal(0.0, 1.0, (RANK, WIDTH)).astype(np.float32),
            rng.normal(0.0, 0.2, (outputs, RANK)).astype(np.float32),
        )
        for layer in range(LAYERS)
        for name, outputs in (("self_attn.q_proj", WIDTH), ("self_attn.v_proj", WIDTH // 2), ("mlp.up_proj", 384))
    }
    return adapter_profile(model="", vocab_size=vocab_size, layers=layers)


def until(what: str, condition: Callable[[], Any], server: RunningVllm) -> Any:
    end = time.monotonic() + 120
    while time.monotonic() < end:
        if value := condition():
            return value
        time.sleep(0.1)
    pytest.fail(f"{what}: {server.log.read_text()[-3000:]}")


def complete(server: RunningVllm, xargs: dict[str, str] | None = None, **more: Any) -> list[int]:
    body = {"model": server.model, "prompt": "abc", "max_tokens": TOKENS, "temperature": 0, "ignore_eos": True}
    body |= {"return_token_ids": True, **({"vllm_xargs": xargs} if xargs else {}), **more}
    request = urllib.request.Request(
        f"{server.url}/v1/completions", json.dumps(body).encode(), {"content-type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=280) as answer:
        ids: list[int] = json.load(answer)["choices"][0]["token_ids"]
    return ids


def test_both_ranks_apply_the_same(tmp_path: Path) -> None:
    folder, vocab_size = checkpoint(tmp_path / "model")
    profile, adapter = forcing(vocab_size), correction(vocab_size)
    environment = {
        **LORA_ENVIRONMENT,
        rank_processor.FOLDER: str(tmp_path),
        "VLLM_CPU_OMP_THREADS_BIND": "0|1" if (os.cpu_count() or 1) > 1 else "0|0",
    }
    with running_vllm(SimpleNamespace(compressed=folder), tmp_path, ARGUMENTS, environment) as server:
        plain = complete(server)
        (server.profile_dir / f"{profile.version}.safetensors").write_bytes(profile.to_bytes())
        until(
            "the profile",
            lambda: complete(server, {"hemostat": profile.version}, max_tokens=1) == [FORCED],
            server,
        )
        treated = server.admin.signed({"hemostat": profile.version, "hemostat_tap": "treated"})
        assert complete(server, treated) == [FORCED] * TOKENS
        assert complete(server) == plain

        # One rank only sends taps; both report.
        taps = server.admin.registry.taps
        until("a tap", lambda: taps.covered("treated") >= TOKENS, server)
        with server.admin.lock:
            tapped = taps.take("treated", TOKENS)
            reports = server.admin.registry.live(server.admin.now)
        assert tapped is not None
        assert (tapped.applied, sum(run.tokens for run in tapped.runs)) == (profile.version, TOKENS)
        assert {(report.rank, report.world_size) for report in reports} == {(0, 2), (1, 2)}
        assert len({report.boot_id for report in reports}) == 1

        asked = {"structured_outputs": {"regex": "[a-c]{12}"}}
        restricted = complete(server, server.admin.signed({"hemostat_tap": "grammar"}), **asked)
        until("the sets", lambda: taps.covered("grammar") >= TOKENS, server)
        with server.admin.lock:
            given = taps.take("grammar", TOKENS)
        assert given is not None
        sets = allowed_sets(given.runs, slice(0, TOKENS), vocab_size)
        abc = np.nonzero(sets.mask(slice(0, 1))[0])[0].tolist()
        assert len(abc) == 3
        assert set(restricted) <= set(abc)

        server.admin.files[adapter.version] = adapter.to_bytes()
        assert complete(server, model=adapter.version) != plain
        assert complete(server) == plain
    ranks = [(tmp_path / f"rank{rank}").read_text().splitlines() for rank in (0, 1)]
    assert len(ranks[0]) >= 6 * TOKENS
    assert ranks[0] == ranks[1]
