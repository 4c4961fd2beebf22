"""A tiny pair of checkpoints for the tests of `hemostat doctor`."""

from __future__ import annotations

import json

import pytest
from tests.support.doctor import CHAT_TEMPLATE, LINES, TinyPair


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> TinyPair:
    """Checkpoints with a real tokenizer, so small that the doctor takes seconds."""
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    from hemostat.reference.match import PROBE_TEXT

    folder = tmp_path_factory.mktemp("doctor")
    trained = Tokenizer(models.BPE())
    trained.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trained.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=320, initial_alphabet=alphabet, special_tokens=["<s>", "</s>"], show_progress=False
    )
    trained.train_from_iterator([PROBE_TEXT, *map(json.dumps, LINES)], trainer)
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=trained, bos_token="<s>", eos_token="</s>", chat_template=CHAT_TEMPLATE
    )
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=len(tokenizer),
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
    pair = TinyPair(folder / "reference", folder / "compressed", folder / "prompts.jsonl")
    model.save_pretrained(pair.reference)
    with torch.no_grad():
        # The last layer is unchanged, and the second differs more than the first.
        for n, noise in ((0, 0.02), (1, 0.1)):
            for weights in model.model.layers[n].parameters():
                weights.add_(torch.randn_like(weights), alpha=noise)
    model.save_pretrained(pair.compressed)
    for checkpoint in (pair.reference, pair.compressed):
        tokenizer.save_pretrained(checkpoint)
    pair.prompts.write_text("\n".join(map(json.dumps, LINES)) + "\n")
    return pair
