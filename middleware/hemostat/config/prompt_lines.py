"""Files of prompts, which settings and commands name: one prompt in each line, as text or as JSON."""

from __future__ import annotations

from collections.abc import Iterator
from importlib import resources
from pathlib import Path
from typing import TypeVar

import msgspec

from hemostat_calibration.errors import HemostatError

T = TypeVar("T", bound=msgspec.Struct)
_PACKAGED = "prompts.jsonl"


class PromptFileError(HemostatError):
    """A file of prompts is invalid; the text is one line with the file, the line and the correction."""


def read_prompts(
    path: Path | None, package: str = "hemostat.gate", option: str | None = "--prompts"
) -> tuple[str, bytes]:
    """Returns the name and the content of a file of prompts. Without `path` it is the one that comes with the package.
    option: of the command that names the file, for the error; None if a setting may name it, too. Raises
    PromptFileError."""
    if path is None:
        return _PACKAGED, resources.files(package).joinpath(_PACKAGED).read_bytes()
    try:
        return str(path), path.read_bytes()
    except OSError as error:
        where = f"{option}: {path}" if option else str(path)
        raise PromptFileError(f"{where} cannot be read ({error.strerror}); name a file of prompts") from None


def lines_of(data: bytes) -> Iterator[tuple[int, bytes]]:
    """Yields the lines of a file that are not blank, each after its number."""
    for number, line in enumerate(data.split(b"\n"), 1):
        if line.strip():
            yield number, line


def parse_line(data: bytes, where: str, shape: type[T], example: str) -> T:
    """Returns the prompt of a line, which is text, or JSON of this shape. where: the file and the line. example: of the
    shape, for the error. Raises PromptFileError."""
    text = _decoded(data, where).rstrip("\r")
    if not text.lstrip().startswith("{"):
        return shape(text)
    return _parsed(text, where, shape, f"{example}, or text without a brace first")


def parse_json_line(data: bytes, where: str, shape: type[T], example: str) -> T:
    """Returns the prompt of a line that is JSON of this shape. Raises PromptFileError. The arguments are the ones of
    `parse_line`."""
    return _parsed(_decoded(data, where), where, shape, example)


def _decoded(data: bytes, where: str) -> str:
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        raise PromptFileError(f"{where}: not UTF-8 (byte {error.start}); save it as UTF-8") from None


def _parsed(text: str, where: str, shape: type[T], correction: str) -> T:
    try:
        return msgspec.json.decode(text, type=shape)
    except msgspec.DecodeError as error:
        raise PromptFileError(f"{where}: no prompt ({error}); write {correction}") from None
