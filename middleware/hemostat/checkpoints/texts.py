"""The texts that an adapter is made from, and those that it is judged on."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from hemostat.checkpoints.errors import AdaptError
from hemostat_calibration.statistics.split import held_out, prompt_key

Ids = npt.NDArray[np.int32]

MIN_TOKENS = 100
"""Fewer say nothing about a layer's inputs; from 2,000 on an adapter is close to its best without training."""


@dataclass(frozen=True, slots=True)
class Text:
    """Token ids of a prompt [P] and of the text after it [T]. Statistics are taken at all positions, held-out figures
    at the positions of the output.

    unit: the 16-byte key of the conversation, or of the prompt, by which texts are split and counted.
    """

    prompt: Ids
    output: Ids
    unit: bytes = b""

    @property
    def ids(self) -> Ids:
        return np.concatenate([self.prompt, self.output])

    @property
    def key(self) -> bytes:
        return self.unit or prompt_key(self.prompt)

    def __len__(self) -> int:
        return len(self.prompt) + len(self.output)

    def beginning(self, tokens: int) -> Text:
        """At most so many tokens of it, of the same unit."""
        return Text(self.prompt[:tokens], self.output[: max(0, tokens - len(self.prompt))], self.key)


@dataclass(frozen=True, slots=True)
class Split:
    """Texts of different prompts on each side."""

    learn: list[Text]
    held_out: list[Text]


def split(texts: Iterable[Text], fraction: float, learn_tokens: int | None, held_out_tokens: int) -> Split:
    """Splits texts by their units: about `fraction` of the units are held out, always the same ones.

    learn_tokens: the largest number of tokens of the texts to learn from, prompts included; None: all.
    held_out_tokens: the largest number of tokens of the outputs of held-out texts. If there are more, the texts whose
    keys come first in the order of a hash are taken, the last one in part: a sample of all texts, whatever their
    order. Raises AdaptError if a side is empty or too small.
    """
    learn: list[Text] = []
    held: list[Text] = []
    for text in sorted(texts, key=lambda text: hashlib.blake2b(text.key, person=b"hemostat.adapt").digest()):
        if len(text) >= 2:
            (held if held_out(text.key, fraction) else learn).append(text)
    everything = len(learn) + len(held)
    learn = _up_to(learn, learn_tokens)
    tokens = sum(map(len, learn))
    if tokens < MIN_TOKENS:
        raise AdaptError(
            f"{tokens} tokens to learn from, in {len(learn)} of {everything} texts: at least {MIN_TOKENS} are needed, "
            "and 2,000 are a good start; give more prompts"
        )
    if fraction > 0.0 and not any(len(text.output) for text in held):
        raise AdaptError(
            f"none of the {everything} texts is held out: give more prompts, or --held-out 0 for an adapter that is "
            "not judged"
        )
    kept: list[Text] = []
    for text in held:
        left = held_out_tokens - sum(len(other.output) for other in kept)
        if left <= 0:
            break
        if len(text.output) and len(text.prompt):
            kept.append(Text(text.prompt, text.output[:left], text.key))
    return Split(learn, kept)


def read_records(path: Path, vocab_size: int) -> list[Text]:
    """The texts of a file that `records.path` wrote. AdaptError names the line that is none."""
    texts: list[Text] = []
    try:
        with path.open("rb") as file:
            for number, line in enumerate(file, 1):
                if line.strip():
                    texts.append(_record(line, f"--records: {path}:{number}", vocab_size))
    except OSError as error:
        raise AdaptError(
            f"--records: {path} cannot be read ({error.strerror}); name a file that records.path wrote"
        ) from None
    if not texts:
        raise AdaptError(f"--records: {path} holds no record; set records.path and let requests be scored")
    return texts


def check_ids(ids: Ids, vocab_size: int, where: str) -> None:
    """AdaptError for an id that the vocabulary does not have."""
    if len(ids) and not (int(ids.min()) >= 0 and int(ids.max()) < vocab_size):
        raise AdaptError(
            f"{where}: token id {int(ids.max())} is outside of the vocabulary of {vocab_size}: the text is of another "
            "model"
        )


def _record(line: bytes, where: str, vocab_size: int) -> Text:
    try:
        record = json.loads(line)
        prompt, output = (np.array(record[name], np.int32) for name in ("prompt_token_ids", "output_token_ids"))
        unit = bytes.fromhex(record.get("conversation") or "")
    except (ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError):
        raise AdaptError(
            f"{where} is no record: it needs prompt_token_ids and output_token_ids, lists of token ids"
        ) from None
    if prompt.ndim != 1 or output.ndim != 1:
        raise AdaptError(f"{where}: prompt_token_ids and output_token_ids must be lists of token ids")
    check_ids(prompt, vocab_size, where)
    check_ids(output, vocab_size, where)
    return Text(prompt, output, unit)


def _up_to(texts: Sequence[Text], tokens: int | None) -> list[Text]:
    if tokens is None:
        return list(texts)
    kept: list[Text] = []
    left = tokens
    for text in texts:
        if left < 2:
            break
        kept.append(text.beginning(left))
        left -= len(kept[-1])
    return kept
