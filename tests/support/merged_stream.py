"""A stream of a real vLLM as one text and the forms of its events: how many tokens share an event is chance."""

from __future__ import annotations

import json
from typing import Any

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
