"""The text of the errors of the configuration: one line each, with values of any size shown shortly."""

from __future__ import annotations

import json
import reprlib
from collections.abc import Sequence

from hemostat_calibration.messages import shown_address

Key = tuple[str | int, ...]
"""The path of a key, from the section to the value."""


def dotted_key(key: Sequence[str | int]) -> str:
    """Returns the key as it is written in messages and flags: `shadow.rate`."""
    return ".".join(shown_address(part) if "@" in (part := str(element)) else part for element in key)


def short_repr(value: object) -> str:
    """Returns a short representation of any value, including cyclic and very large ones; of an address without
    credentials, of null, true and false as YAML writes them."""
    if value is None or isinstance(value, bool):
        return json.dumps(value)
    if isinstance(value, str) and ("@" in value or "://" in value):
        return repr(shown_address(value))
    return "the value" if "@" in str(value) or "://" in str(value) else reprlib.repr(value)


def one_line(text: str) -> str:
    """Returns the text without line ends and other characters that cannot be printed."""
    return " ".join("".join(c if c.isprintable() else " " for c in text).split())
