"""A model that is small, but whose layers divide into groups of 64, with the tokenizer of the tiny pair."""

from __future__ import annotations

from pathlib import Path

import pytest
from tests.support.doctor import TinyPair

from hemostat_lab.doctor import DoctorOptions
from hemostat_lab.doctor.options import Axis


@pytest.fixture(scope="session")
def swept(tiny: TinyPair, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of its checkpoint."""
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    folder = tmp_path_factory.mktemp("swept") / "model"
    tokenizer = transformers.AutoTokenizer.from_pretrained(tiny.reference)
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        initializer_range=0.12,
        bos_token_id=0,
        eos_token_id=1,
    )
    transformers.LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def options(swept: Path, tiny: TinyPair, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> DoctorOptions:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return DoctorOptions(
        str(swept), str(swept), prompts=tiny.prompts, tokens=6, device="cpu", sweep=tuple(Axis), sweep_budget=60.0
    )
