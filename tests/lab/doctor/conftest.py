"""A tiny pair of checkpoints for the tests of `hemostat doctor`."""

from __future__ import annotations

import pytest
from tests.support.doctor import VOCAB, TinyPair, write_tokenizer


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> TinyPair:
    """Checkpoints with a real tokenizer, so small that the doctor takes seconds."""
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
        initializer_range=0.3,
        bos_token_id=0,
        eos_token_id=1,
    )
    model = transformers.LlamaForCausalLM(config)
    pair = TinyPair.in_folder(tmp_path_factory.mktemp("doctor"))
    model.save_pretrained(pair.reference)
    with torch.no_grad():
        # The last layer is unchanged, and the second differs more than the first.
        for n, noise in ((0, 0.02), (1, 0.1)):
            for weights in model.model.layers[n].parameters():
                weights.add_(torch.randn_like(weights), alpha=noise)
    model.save_pretrained(pair.compressed)
    assert write_tokenizer(pair.reference, pair.compressed) == VOCAB
    return pair
