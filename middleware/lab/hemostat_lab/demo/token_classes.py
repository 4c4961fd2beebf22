"""The loss by class of token, from the records that Hemostat has written."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from tokenizers import Tokenizer

from hemostat_calibration.profiles.profile import IDENTITY
from hemostat_lab.doctor.classes import CLASSES, classify_all

ANCHOR = "a"
"""A text that tokens are appended to, so that the tokenizer keeps the space that a token begins with."""


@dataclass(frozen=True, slots=True)
class ClassLoss:
    """The tokens of one class. kl_nats: the sum of their KL, at least, of the compressed model without a profile."""

    name: str
    tokens: int
    kl_nats: float


def losses_by_class(records: Path, reference: Path) -> list[ClassLoss]:
    """Returns the classes that were met, in the order of `CLASSES`. Requests that a profile has changed are left out.

    records: a file of `records.path`. reference: the folder of a checkpoint, with its tokenizer.
    """
    sums: dict[int, tuple[int, float]] = {}
    with records.open("rb") as lines:
        for line in map(json.loads, lines):
            if line["profile"] != IDENTITY:
                continue
            for token, kl in zip(line["output_token_ids"], line["kl_nats"], strict=True):
                if kl is not None:
                    count, total = sums.get(token, (0, 0.0))
                    sums[token] = count + 1, total + kl
    texts, special = _texts(sums, reference)
    classes = classify_all(texts, special)
    result = []
    for name in CLASSES:
        of_class = [sums[token] for token in sums if classes[token] == name]
        if of_class:
            result.append(ClassLoss(name, sum(n for n, _ in of_class), sum(kl for _, kl in of_class)))
    return result


def _texts(ids: Iterable[int], reference: Path) -> tuple[dict[int, str], set[int]]:
    """Returns the text that each id adds, and the ids that are special."""
    tokenizer = Tokenizer.from_file(str(reference / "tokenizer.json"))
    anchor = tokenizer.encode(ANCHOR, add_special_tokens=False).ids
    start = tokenizer.decode(anchor)
    texts = {i: tokenizer.decode([*anchor, i], skip_special_tokens=False).removeprefix(start) for i in ids}
    return texts, {i for i, token in tokenizer.get_added_tokens_decoder().items() if token.special}
