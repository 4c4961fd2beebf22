"""The prompt file: one prompt per line, as JSON or as plain text."""

from __future__ import annotations

from itertools import islice
from pathlib import Path

import msgspec

from hemostat.config.prompt_lines import PromptFileError, lines_of, parse_line, read_prompts

SHAPE = '{"prompt": "..."} or {"messages": [{"role": "user", "content": "..."}]}'


class _Message(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    role: str
    content: str


class _Line(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    prompt: str | None = None
    messages: list[_Message] | None = None
    completion: str | None = None
    max_tokens: int | None = None
    kind: str = ""


class Prompt(msgspec.Struct, frozen=True):
    """One line: `text` or `messages` is given, not both. `completion`: a text to score instead of a generated one."""

    where: str
    """`file:line`"""
    line: int
    text: str | None = None
    messages: list[dict[str, str]] | None = None
    completion: str | None = None
    max_tokens: int | None = None

    @property
    def display_text(self) -> str:
        """The prompt in one string, for `--show-text`."""
        if self.messages is None:
            return self.text or ""
        return "\n".join(f"{message['role']}: {message['content']}" for message in self.messages)


def load(path: Path | None, max_prompts: int | None) -> list[Prompt]:
    """Returns the first `max_prompts` prompts of a file (None: all); without `path`, the demo's prompts. Raises
    PromptFileError."""
    name, data = read_prompts(path)
    lines = islice(lines_of(data), max_prompts)
    prompts = [_parse(line, f"{name}:{number}", number) for number, line in lines]
    if not prompts:
        raise PromptFileError(f"--prompts: {name} contains no prompt; write one per line, as text or as {SHAPE}")
    return prompts


def _parse(data: bytes, where: str, number: int) -> Prompt:
    line = parse_line(data, where, _Line, SHAPE)
    if (line.prompt is None) == (line.messages is None):
        raise PromptFileError(f"{where}: give either prompt or messages, as in {SHAPE}")
    for name, value in (("prompt", line.prompt), ("messages", line.messages), ("completion", line.completion)):
        if value is not None and not value:
            raise PromptFileError(f"{where}: {name} is empty; fill it in or leave the line out")
    if line.max_tokens is not None and line.max_tokens < 1:
        raise PromptFileError(f"{where}: max_tokens is {line.max_tokens}; give at least 1")
    messages = None if line.messages is None else [{"role": m.role, "content": m.content} for m in line.messages]
    return Prompt(where, number, line.prompt, messages, line.completion, line.max_tokens)
