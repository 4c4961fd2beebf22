"""The messages between relays and the control process are those of the protocol number, which both ends compare."""

from __future__ import annotations

import hashlib
import typing
from collections.abc import Iterator
from typing import Any

import msgspec

from hemostat.ipc import messages

RECORDED = (2, "34a45d4fa480c7ad")
"""`PROTOCOL`, and the digest of its messages. Where they change, raise `PROTOCOL`, unless all that an older version
would not understand is a new field with a default value, and record both anew."""


def described(kind: type[msgspec.Struct], seen: set[type[msgspec.Struct]]) -> Iterator[str]:
    """A line for each struct and field, those of other structs that it holds, too."""
    if kind in seen:
        return
    seen.add(kind)
    config = kind.__struct_config__
    yield f"{kind.__name__} {config.tag} {config.array_like}"
    hints = typing.get_type_hints(kind)
    for field in msgspec.structs.fields(kind):
        yield f"  {field.encode_name} {hints[field.name]!r} {'required' if field.required else 'optional'}"
    for hint in hints.values():
        for part in parts(hint):
            yield from described(part, seen)


def parts(hint: Any) -> Iterator[type[msgspec.Struct]]:
    if isinstance(hint, type) and issubclass(hint, msgspec.Struct):
        yield hint
    for argument in typing.get_args(hint):
        yield from parts(argument)


def test_messages_change_with_the_protocol_number() -> None:
    seen: set[type[msgspec.Struct]] = set()
    lines = [line for kind in typing.get_args(messages.Message) for line in described(kind, seen)]
    assert {messages.Capture, messages.Policy, messages.OutcomeReport, messages.EngineHealth} <= seen
    digest = hashlib.sha256("\n".join(lines).encode()).hexdigest()[:16]
    assert (messages.PROTOCOL, digest) == RECORDED, "see RECORDED"
