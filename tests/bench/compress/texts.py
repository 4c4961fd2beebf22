"""Texts that the reference writes at temperature 1: on topics to calibrate on, and on others to judge on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path

import numpy as np
import numpy.typing as npt
from tests.bench.recovery import prompts
from tests.bench.recovery.adapters import kinds

from hemostat.checkpoints.checkpoint_digest import checkpoint_digest
from hemostat.checkpoints.texts import Text
from hemostat.report.progress import Reporter
from hemostat_lab.commands.texts import Writer
from hemostat_lab.doctor.prompts import Prompt
from hemostat_lab.models.checkpoint import Checkpoint
from hemostat_lab.models.work_folder import WorkFolder

MAX_NEW_TOKENS = 96
_CODE = "Write a Python function"
_SPREAD = 7
"""Has no divisor in common with the number of extractions: each seventh in turn mixes their forms."""


class Domain(StrEnum):
    """Traffic. Prompts to judge on have other topics, or ask for other keys, than those to calibrate on."""

    OPEN = "open"
    """Open questions, one in 24 for code."""
    CODE = "code"
    JSON = "json"


@dataclass(frozen=True, slots=True)
class Texts:
    """topics: int [tokens of all held-out outputs], the topic of each, from 0."""

    learn: list[Text]
    heldout: list[Text]
    topics: npt.NDArray[np.int64]


def written(reference: Path, folder: Path, learn: int, heldout: int, seed: int, judge: Domain = Domain.OPEN) -> Texts:
    """learn, heldout: numbers of texts. Kept in `folder`; topics are mixed, so that fewer are a fair sample.

    judge: of the texts to judge on; those to calibrate on are of open questions.
    """
    asked = _asked(True, judge)[:heldout]
    texts = _written(reference, folder / _name("heldout", judge), asked, seed + 1)
    number = {topic: n for n, topic in enumerate(dict.fromkeys(p.topic for p in asked))}
    topics = [np.full(len(t.output), number[p.topic]) for t, p in zip(texts, asked, strict=True)]
    return Texts(calibration(reference, folder, learn, seed), texts, np.concatenate(topics))


def calibration(reference: Path, folder: Path, count: int, seed: int, domain: Domain = Domain.OPEN) -> list[Text]:
    """Texts to calibrate on, kept in `folder`: at most `count`."""
    return _written(reference, folder / _name("learn", domain), _asked(False, domain)[:count], seed)


def live(checkpoint: Path, folder: Path, first: int, count: int, seed: int) -> list[Text]:
    """What a checkpoint answers to prompts that nothing was calibrated on, from number `first` on."""
    return _written(checkpoint, folder, _asked(False)[first : first + count], seed + 2)


def _name(what: str, domain: Domain) -> str:
    return what if domain is Domain.OPEN else f"{what}-{domain}"


def _asked(heldout: bool, domain: Domain = Domain.OPEN) -> list[prompts.Prompt]:
    if domain is Domain.JSON:
        made = kinds.extraction() if heldout else kinds.other_extractions()
        mixed = [made[_SPREAD * n % len(made)] for n in range(len(made))]
        return [prompts.Prompt(text, text.rpartition("\n\n")[2], heldout) for text in mixed]
    asked = [p for p in prompts.open_ended() if p.heldout == heldout]
    return [p for p in asked if p.text.startswith(_CODE)] if domain is Domain.CODE else asked


def _written(checkpoint: Path, folder: Path, asked: Sequence[prompts.Prompt], seed: int) -> list[Text]:
    given = [Prompt(f"{n}", n, messages=[{"role": "user", "content": p.text}]) for n, p in enumerate(asked)]
    vocab_size = int(Checkpoint(checkpoint, "checkpoint").config.get_text_config().vocab_size)
    writer = Writer(checkpoint, "checkpoint", vocab_size, "cpu", MAX_NEW_TOKENS, seed)
    key = {"writer": checkpoint_digest(str(checkpoint), None), "seed": seed, "asked": [p.text for p in asked]}
    with WorkFolder(folder, key, "bench") as work, Reporter() as reporter:
        return writer.texts(given, work, reporter)
