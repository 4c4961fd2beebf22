"""The prompts of a file, one in each line, as text or as JSON; or requests that `records.path` or a spool has
recorded."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from hemostat.config.packages import require
from hemostat.config.prompt_lines import PromptFileError, lines_of, parse_line, read_prompts
from hemostat.ipc.messages import REST_KIND
from hemostat.scoring.capture_arrays import prompt_ids
from hemostat_calibration.statistics.templates import TemplateTable

SHAPE = '{"prompt": "..."} or {"messages": [{"role": "user", "content": "..."}]}'
DEFAULT_KIND = "prompts"
MAX_TOKENS = 64
"""The largest number of tokens of an answer, unless the prompt names one."""
_KEY = b"hemostat gate"
"""The key of the table of templates. It is no secret: the prompts are the operator's own."""


class _Message(msgspec.Struct, frozen=True):
    role: str
    content: str


class Prompt(msgspec.Struct, frozen=True):
    """One line of the file. Either `prompt`, `messages` or, in a file of records, `prompt_token_ids` is given.
    response_format, tools: as in a request."""

    prompt: str = ""
    messages: tuple[_Message, ...] = ()
    kind: str = DEFAULT_KIND
    max_tokens: int = MAX_TOKENS
    response_format: dict[str, Any] | None = None
    tools: tuple[dict[str, Any], ...] = ()
    prompt_token_ids: tuple[int, ...] = ()

    @property
    def digest(self) -> str:
        """The identity of what is asked, whatever its kind is called."""
        what: list[Any] = [self.prompt, self.messages, self.max_tokens]
        if self.response_format or self.tools:
            what += [self.response_format, self.tools]
        if self.prompt_token_ids:
            what.append(self.prompt_token_ids)
        return hashlib.sha256(msgspec.json.encode(what)).hexdigest()[:32]

    @property
    def chat(self) -> list[dict[str, str]]:
        return [{"role": message.role, "content": message.content} for message in self.messages]


def load(path: Path | None, key: str = "plain") -> list[Prompt]:
    """Returns the prompts of a file, or of the files of a folder, each once. None: the prompts that come with Hemostat.
    key: of a spool's files, as in `spool.key`. Raises PromptFileError, and HemostatError for a spool."""
    prompts: dict[str, Prompt] = {}
    for name, data in _read(path):
        for number, line in lines_of(data):
            prompt = _parse(line, f"{name}:{number}")
            prompts.setdefault(prompt.digest, prompt)
    for prompt in _spooled(path, key):
        prompts.setdefault(prompt.digest, prompt)
    if not prompts:
        raise PromptFileError(f"--prompts: {path} has no prompt; write one in each line, as text or {SHAPE}")
    return list(prompts.values())


def _spooled(path: Path | None, key: str) -> Iterator[Prompt]:
    """Yields the prompts of a spool's segments."""
    files = sorted(path.glob("captures-*.parquet")) if path is not None and path.is_dir() else []
    if not files:
        return
    require("spool")
    from hemostat.scoring.spool.columns import SCHEMA_VERSION, VERSION_KEY, from_rows  # noqa: PLC0415
    from hemostat.scoring.spool.keys import read_key  # noqa: PLC0415
    from hemostat.scoring.spool.segments import read_segment  # noqa: PLC0415

    spool_key = read_key(key)
    for file in files:
        for spooled in from_rows(read_segment(file, spool_key, {VERSION_KEY: SCHEMA_VERSION})):
            ids = prompt_ids(spooled.capture).tolist()
            if ids:
                yield Prompt(prompt_token_ids=tuple(ids), kind=spooled.capture.kind or REST_KIND)


def _read(path: Path | None) -> list[tuple[str, bytes]]:
    """Returns the name and the content of each file."""
    if path is None:
        return [read_prompts(None, package) for package in ("hemostat.gate", "hemostat.canaries")]
    return [read_prompts(file) for file in (sorted(path.glob("*.jsonl")) if path.is_dir() else [path])]


def _parse(line: bytes, where: str) -> Prompt:
    prompt = parse_line(line, where, Prompt, SHAPE)
    if sum(map(bool, (prompt.prompt.strip(), prompt.messages, prompt.prompt_token_ids))) != 1:
        raise PromptFileError(f"{where}: give either prompt or messages, with a text in it: {SHAPE}")
    if not 1 <= prompt.max_tokens <= 4096:
        raise PromptFileError(f"{where}: max_tokens is {prompt.max_tokens}; give 1 to 4096")
    if prompt.tools and not prompt.messages:
        raise PromptFileError(f"{where}: tools are offered in a chat only; give messages in place of prompt")
    return prompt


@dataclass(frozen=True, slots=True)
class Asked:
    """A prompt that will be asked, and its token ids."""

    prompt: Prompt
    ids: tuple[int, ...]


def in_order(prompts: Sequence[Asked], seed: int, known: Collection[str] = ()) -> list[Asked]:
    """Returns the prompts in random order, one of each template: variants of one template are one piece of evidence.
    known: digests of prompts that there is evidence of; these come first."""
    shuffled = sorted(prompts, key=lambda asked: asked.prompt.digest)
    random.Random(seed).shuffle(shuffled)  # noqa: S311  no secret
    shuffled.sort(key=lambda asked: asked.prompt.digest not in known)
    table = TemplateTable(_KEY)
    first: dict[bytes, Asked] = {}
    for asked in shuffled:
        first.setdefault(table.assign(np.array(asked.ids, np.int32)), asked)
    return list(first.values())
