"""Checkpoints that the tests of adapters share."""

from __future__ import annotations

import pytest
from tests.support.adapter_models import TinyCheckpoints, tiny_checkpoints


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> TinyCheckpoints:
    pytest.importorskip("torch")
    pytest.importorskip("transformers")
    pytest.importorskip("compressed_tensors")
    return tiny_checkpoints(tmp_path_factory.mktemp("adapters"))
