"""Texts that the reference writes at temperature 1: on topics to calibrate on, and on others to judge on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
from tests.bench.recovery import prompts

from hemostat.commands.texts import Writer
from hemostat.doctor.progress import Reporter
from hemostat.doctor.prompts import Prompt
from hemostat.models.checkpoint import Checkpoint
from hemostat.models.checkpoint_digest import checkpoint_digest
from hemostat.models.texts import Text
from hemostat.models.work_folder import WorkFolder

MAX_NEW_TOKENS = 96
CODE = "Write a Python function"
"""Prompts that begin so: traffic of one domain."""


@dataclass(frozen=True, slots=True)
class Texts:
    """topics: int [tokens of all held-out outputs], the topic of each, from 0."""

    learn: list[Text]
    heldout: list[Text]
    topics: npt.NDArray[np.int64]


def written(reference: Path, folder: Path, learn: int, heldout: int, seed: int, of_code: bool = False) -> Texts:
    """learn, heldout: numbers of texts. Kept in `folder`; topics are mixed, so that fewer are a fair sample.

    of_code: only those to judge on.
    """
    asked = _asked(True, of_code)[:heldout]
    texts = _written(reference, folder / ("heldout-code" if of_code else "heldout"), asked, seed + 1)
    number = {topic: n for n, topic in enumerate(dict.fromkeys(p.topic for p in asked))}
    topics = [np.full(len(t.output), number[p.topic]) for t, p in zip(texts, asked, strict=True)]
    return Texts(calibration(reference, folder, learn, seed), texts, np.concatenate(topics))


def calibration(reference: Path, folder: Path, count: int, seed: int, of_code: bool = False) -> list[Text]:
    """Texts to calibrate on, kept in `folder`."""
    return _written(reference, folder / ("learn-code" if of_code else "learn"), _asked(False, of_code)[:count], seed)


def live(compressed: Path, folder: Path, first: int, count: int, seed: int) -> list[Text]:
    """What a compressed checkpoint itself answers to prompts that nothing was calibrated on, from number `first` on."""
    return _written(compressed, folder, _asked(False)[first : first + count], seed + 2)


def _asked(heldout: bool, of_code: bool = False) -> list[prompts.Prompt]:
    asked = [p for p in prompts.open_ended() if p.heldout == heldout]
    return [p for p in asked if p.text.startswith(CODE)] if of_code else asked


def _written(checkpoint: Path, folder: Path, asked: Sequence[prompts.Prompt], seed: int) -> list[Text]:
    given = [Prompt(f"{n}", n, messages=[{"role": "user", "content": p.text}]) for n, p in enumerate(asked)]
    vocab_size = int(Checkpoint(checkpoint, "checkpoint").config.get_text_config().vocab_size)
    writer = Writer(checkpoint, "checkpoint", vocab_size, "cpu", MAX_NEW_TOKENS, seed)
    key = {"writer": checkpoint_digest(str(checkpoint), None), "seed": seed, "asked": [p.text for p in asked]}
    with WorkFolder(folder, key, "bench") as work, Reporter() as reporter:
        return writer.texts(given, work, reporter)
