"""Outcomes: prompts with known answers (`outcomes.jsonl`) and whether a response has them."""

from __future__ import annotations

import json
import re
from importlib import resources
from typing import Any

import msgspec

MAX_TOKENS = 40


class Task(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """`fields`: the JSON object to answer with. `answers`: any of these words, otherwise."""

    prompt: str
    answers: list[str] = []
    fields: dict[str, str | int] | None = None

    @property
    def kind(self) -> str:
        return "short" if self.fields is None else "json"


class Outcome(msgspec.Struct, frozen=True):
    """Of one response. parses: it is a JSON object (alone or fenced); None for a short answer. correct: its fields, or
    the first word of the answer, are the known ones."""

    task: int
    parses: bool | None
    correct: bool


def tasks() -> list[Task]:
    """All packaged tasks, the two kinds in turn: a prefix has both."""
    lines = resources.files(__package__).joinpath("outcomes.jsonl").read_bytes().splitlines()
    result = [msgspec.json.decode(line, type=Task) for line in lines]
    kinds = [[task for task in result if task.kind == kind] for kind in ("json", "short")]
    return [task for both in zip(*kinds, strict=True) for task in both]


def judge(number: int, task: Task, text: str) -> Outcome:
    if task.fields is None:
        words = re.findall(r"[\w]+", text.lower())
        return Outcome(number, None, any(answer.lower() in words[:12] for answer in task.answers))
    result = json_object(text)
    return Outcome(number, result is not None, result == task.fields)


def json_object(text: str) -> dict[str, Any] | None:
    """The JSON object that the text is, alone or in a fenced block."""
    body = text.strip()
    if body.startswith("```"):
        body = body.removeprefix("```json").removeprefix("```").removesuffix("```").strip()
    try:
        value = json.loads(body)
    except (ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) else None
