"""Speculative decoding by vLLM's own code: what model runner V1 refuses, and what V2 takes."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("vllm.v1.worker.gpu.sample.logits_processor")
from tests.support.slots import request_states  # noqa: E402
from vllm.v1.sample.logits_processor import build_logitsprocs  # noqa: E402
from vllm.v1.worker.gpu.sample.logits_processor import build_custom_logits_processors  # noqa: E402

NAME = "hemostat_engine:LogitsProcessor"


def config(speculative: object) -> Any:
    return SimpleNamespace(parallel_config=SimpleNamespace(), speculative_config=speculative)


def test_v1_refuses_the_plugin_and_v2_takes_it_without_sets_of_grammars() -> None:
    """`hemostat check` says so. Once V1 takes both, this fails, and the check and the docs have to change."""
    with pytest.raises(ValueError, match="not supported when speculative decoding"):
        build_logitsprocs(config(object()), torch.device("cpu"), False, False, [NAME])
    for speculative, sets in ((None, True), (object(), False)):
        (processor,) = build_custom_logits_processors(config(speculative), request_states(), False, [NAME])
        assert processor.core.agent.identity.sets is sets
