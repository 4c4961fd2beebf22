"""What several files of this folder use."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from tests.support.running_vllm import RunningVllm
from tests.support.stack import Stack, hemostat, sampling_settings

from hemostat_lab.demo import vllm_server as vllm_process
from hemostat_lab.demo.checkpoints import Checkpoints


@pytest.fixture(scope="session")
def sampled(
    vllm_server: RunningVllm, checkpoints: Checkpoints, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Stack]:
    """`hemostat serve` before the real vLLM, with the real reference; every request is sampled. Tests leave it working,
    and count from what was there before them."""
    reference = {"backend": "transformers", "model": str(checkpoints.reference), "dtype": vllm_process.dtype()}
    with hemostat(sampling_settings(vllm_server.url, reference), tmp_path_factory.mktemp("sampled")) as stack:
        stack.wait_scoring()
        yield stack
