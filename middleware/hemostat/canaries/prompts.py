"""The prompts of canaries: those that come with Hemostat, or a file of the operator's."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path

import msgspec

from hemostat.config.prompt_lines import PromptFileError, lines_of, parse_line, read_prompts
from hemostat_calibration.canaries import MAX_SEQUENCES, MIN_SEQUENCES

SHAPE = '{"prompt": "..."}'


class Prompt(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One prompt. kind: the kind of text, for readers."""

    prompt: str
    kind: str = ""


@dataclass(frozen=True, slots=True)
class Prompts:
    """All prompts of a file. digest: of the file's bytes."""

    prompts: tuple[Prompt, ...]
    digest: str


def load(path: Path | None = None) -> Prompts:
    """Returns the prompts of a file, one per line, as text or as SHAPE; without `path`, the prompts of this package.
    Raises PromptFileError.
    """
    name, data = read_prompts(path, "hemostat.canaries", None)
    prompts = tuple(_parse(line, f"{name}:{number}") for number, line in lines_of(data))
    if not MIN_SEQUENCES <= len(prompts) <= MAX_SEQUENCES:
        raise PromptFileError(
            f"{name}: {len(prompts)} prompts; give {MIN_SEQUENCES} to {MAX_SEQUENCES}, one per line, as text or {SHAPE}"
        )
    return Prompts(prompts, hashlib.sha256(data).hexdigest()[:16])


def _parse(data: bytes, where: str) -> Prompt:
    result = parse_line(data, where, Prompt, SHAPE)
    if not result.prompt.strip():
        raise PromptFileError(f"{where}: prompt is empty; fill it in or leave the line out")
    return result
