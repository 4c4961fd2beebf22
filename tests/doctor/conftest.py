"""A tiny pair of checkpoints with a real tokenizer: everything that the doctor does, in seconds."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from hemostat.doctor import DoctorOptions, run

LINES = [
    {"prompt": "Hello, world! 1234567890"},
    {"messages": [{"role": "user", "content": "What is 2 + 2?"}]},
    {"prompt": "two spaces and a def f(x)", "max_tokens": 5},
    {"prompt": "https://example.org", "completion": " return x**2"},
    {"prompt": "tabbed: ok"},
    {"messages": [{"role": "user", "content": "And 3 + 3?"}], "completion": "6"},
    {"prompt": "Hello"},
]
TEMPLATE = "{% for m in messages %}<s>{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}<s>assistant: "


@dataclass(frozen=True)
class TinyPair:
    reference: Path
    compressed: Path
    prompts: Path
    """`LINES`"""

    def options(self, **changed: Any) -> DoctorOptions:
        small = {"tokens": 8, "batch": 2, "layer_tokens": 24, "prompts": self.prompts, "device": "cpu"} | changed
        return DoctorOptions(str(self.reference), str(self.compressed), **small)


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> TinyPair:
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
        tokenizer_object=trained, bos_token="<s>", eos_token="</s>", chat_template=TEMPLATE
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
        # The last layer stays as it is, and one layer is much worse than the other.
        for n, noise in ((0, 0.02), (1, 0.1)):
            for weights in model.model.layers[n].parameters():
                weights.add_(torch.randn_like(weights), alpha=noise)
    model.save_pretrained(pair.compressed)
    for checkpoint in (pair.reference, pair.compressed):
        tokenizer.save_pretrained(checkpoint)
    pair.prompts.write_text("\n".join(map(json.dumps, LINES)) + "\n")
    return pair


def report_of(options: DoctorOptions, tmp_path: Path) -> dict[str, Any]:
    """The JSON of one run that succeeds."""
    from dataclasses import replace

    target = tmp_path / "report.json"
    assert run(replace(options, json=target)) == 0
    report: dict[str, Any] = json.loads(target.read_text())
    return report
