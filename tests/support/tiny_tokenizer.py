"""A tokenizer of single bytes with a few longer tokens, whose texts and ids are easy to follow."""

from __future__ import annotations

import json
from pathlib import Path

WORDS = ('{"', '":', '"a', "true", "false", "null", "yes", "no", "<tool_call>", "</tool_call>", '"name', "\n")
EOS = "<|end|>"
THINK_END = "</think>"


def write_tokenizer(folder: Path) -> int:
    """Write its files to `folder`; returns the number of ids."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {character: number for number, character in enumerate(alphabet)}
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    merges: list[tuple[str, str]] = []
    for word in WORDS:
        parts = list("".join(piece for piece, _ in byte_level.pre_tokenize_str(word)))
        while len(parts) > 1:
            pair = (parts[0], parts[1])
            if pair not in merges:
                merges.append(pair)
            parts[:2] = ["".join(pair)]
            vocabulary.setdefault(parts[0], len(vocabulary))
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=merges))
    tokenizer.pre_tokenizer = byte_level
    tokenizer.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=EOS, additional_special_tokens=[THINK_END])
    folder.mkdir(parents=True, exist_ok=True)
    fast.save_pretrained(str(folder))
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [fast.eos_token_id]}))
    return len(fast)
