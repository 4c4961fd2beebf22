"""The prompts of canaries: those that come with Hemostat, or a file of the operator's."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import TypeVar

import msgspec

from hemostat_calibration.canaries import MAX_SEQUENCES, MIN_SEQUENCES
from hemostat_calibration.errors import HemostatError

T = TypeVar("T", bound=msgspec.Struct)

SHAPE = '{"prompt": "..."}'


class PromptFileError(HemostatError):
    """One line with the file, the line and the correction."""


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
    name = str(path or "prompts.jsonl")
    try:
        data = resources.files(__package__).joinpath(name).read_bytes() if path is None else path.read_bytes()
    except OSError as error:
        raise PromptFileError(f"{name}: cannot be read ({error.strerror}); name a text file") from None
    lines = enumerate(data.split(b"\n"), 1)
    prompts = tuple(_parse(line, f"{name}:{number}") for number, line in lines if line.strip())
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


def parse_line(data: bytes, where: str, shape: type[T], example: str) -> T:
    """Returns the prompt of a line, which is text, or JSON of this shape. where: the file and the line. example: of the
    shape, for the error. Raises PromptFileError."""
    try:
        text = data.decode().rstrip("\r")
        return msgspec.json.decode(text, type=shape) if text.lstrip().startswith("{") else shape(text)
    except UnicodeDecodeError as error:
        raise PromptFileError(f"{where}: not UTF-8 (byte {error.start}); save it as UTF-8") from None
    except msgspec.DecodeError as error:
        raise PromptFileError(f"{where}: no prompt ({error}); write {example}, or text without a brace first") from None
