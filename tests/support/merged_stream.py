"""A stream of a real vLLM as one text and the forms of its events: how many tokens share an event is chance."""

from __future__ import annotations

import json
import re
from typing import Any

from tests.support.wire import normal

TEXTS = ("delta", "content", "text")
"""Members that hold a piece of the text, where they are strings."""
VARYING = ("id", "item_id", "request_id", "created", "created_at", "sequence_number")


def merged(body: bytes) -> tuple[str, list[str]]:
    """All texts of a stream in their order, and the JSON of its events without texts and what varies, each once."""
    texts: list[str] = []
    forms: list[str] = []
    for line in body.splitlines():
        name, _, data = line.partition(b": ")
        if name != b"data" or data == b"[DONE]":
            continue
        form = json.dumps(_form(json.loads(data), texts))
        if form not in forms:
            forms.append(form)
    assert forms, f"no stream: {body[:200]!r}"
    return "".join(texts), forms


def _form(value: Any, texts: list[str]) -> Any:
    if isinstance(value, list):
        return [_form(item, texts) for item in value]
    if not isinstance(value, dict):
        return value
    form = {}
    for name, inner in value.items():
        if name in VARYING:
            form[name] = None
        elif name in TEXTS and isinstance(inner, str):
            texts.append(inner)
            form[name] = ""
        else:
            form[name] = _form(inner, texts)
    return form


def by_choice(body: bytes) -> list[bytes]:
    """The body; of a stream, the events of the first choice, then those of the second, and so on.

    In which order vLLM sends the events of different prompts is up to chance, with and without Hemostat.
    """
    if not body.startswith(b"data:"):
        return [normal(body)]

    def choice(event: bytes) -> int:
        match = re.search(rb'"choices":\[\{"index":(\d+)', event)
        return 99 if match is None else int(match[1])

    return sorted(normal(body).split(b"\n\n"), key=choice)


def joined(body: bytes) -> dict[int, Any]:
    """By choice (-1: events without one), a stream's events added up: how many tokens share an event is chance."""
    if not body.startswith(b"data:"):
        return {0: json.loads(normal(body))}
    result: dict[int, Any] = {}
    for event in normal(body).split(b"\n\n"):
        data = event.removeprefix(b"data: ")
        if not data or data == b"[DONE]":
            continue
        parsed = json.loads(data)
        number = parsed["choices"][0]["index"] if parsed["choices"] else -1
        result[number] = added(result[number], parsed) if number in result else parsed
    return result


def same_answer(body: bytes, other: bytes) -> bool:
    """Returns whether two answers are the same, however many tokens share an event of theirs."""
    return by_choice(body) == by_choice(other) or joined(body) == joined(other)


def bytes_of_events(body: bytes) -> set[bytes]:
    """Returns the events of a stream, each once, as they are but for the texts and numbers in them."""
    without_texts = re.sub(rb'"(content|text|arguments)":"(?:[^"\\]|\\.)*"', rb'"\1":""', normal(body))
    return set(re.sub(rb":\d+", b":0", without_texts).split(b"\n\n"))


def added(value: Any, other: Any, name: str = "") -> Any:
    """Lists of tokens and pieces of text one after the other; of anything else, what came last."""
    if isinstance(value, dict) and isinstance(other, dict):
        return {key: added(value.get(key), other.get(key), key) for key in value | other}
    if name == "choices":
        return [added(value[0], other[0])]
    if isinstance(value, list) and isinstance(other, list):
        return value + other
    if isinstance(value, str) and isinstance(other, str) and name in {"content", "text"}:
        return value + other
    return value if other is None else other
