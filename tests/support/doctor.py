"""Tiny pairs of checkpoints for the tests of `hemostat doctor`, and their report."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from hemostat.reference.match import PROBE_TEXT
from hemostat_lab.doctor import DoctorOptions, run

VOCAB = 320
LINES = [
    {"prompt": "Hello, world! 1234567890"},
    {"messages": [{"role": "user", "content": "What is 2 + 2?"}]},
    {"prompt": "two spaces and a def f(x)", "max_tokens": 5},
    {"prompt": "https://example.org", "completion": " return x**2"},
    {"prompt": "tabbed: ok"},
    {"messages": [{"role": "user", "content": "And 3 + 3?"}], "completion": "6"},
    {"prompt": "Hello"},
]
CHAT_TEMPLATE = "{% for m in messages %}<s>{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}<s>assistant: "


@dataclass(frozen=True)
class TinyPair:
    reference: Path
    compressed: Path
    prompts: Path
    """`LINES`"""

    @classmethod
    def in_folder(cls, folder: Path) -> TinyPair:
        """Only the prompts are written."""
        prompts = folder / "prompts.jsonl"
        prompts.write_text("\n".join(map(json.dumps, LINES)) + "\n")
        return cls(folder / "reference", folder / "compressed", prompts)

    def options(self, **changed: Any) -> DoctorOptions:
        small = {"tokens": 8, "batch": 2, "layer_tokens": 24, "prompts": self.prompts, "device": "cpu"} | changed
        return DoctorOptions(str(self.reference), str(self.compressed), **small)


def write_tokenizer(*folders: Path) -> int:
    """Write a real tokenizer with a chat template to the folders; returns the number of its ids."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    trained = Tokenizer(models.BPE())
    trained.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trained.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB, initial_alphabet=alphabet, special_tokens=["<s>", "</s>"], show_progress=False
    )
    trained.train_from_iterator([PROBE_TEXT, *map(json.dumps, LINES)], trainer)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=trained, bos_token="<s>", eos_token="</s>", chat_template=CHAT_TEMPLATE
    )
    for folder in folders:
        tokenizer.save_pretrained(folder)
    return len(tokenizer)


def report_of(options: DoctorOptions, tmp_path: Path) -> dict[str, Any]:
    """The JSON report of a run that must succeed."""
    target = tmp_path / "report.json"
    assert run(replace(options, json=target)) == 0
    report: dict[str, Any] = json.loads(target.read_text())
    return report
