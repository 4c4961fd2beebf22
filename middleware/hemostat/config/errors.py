"""Errors of the configuration, explained in one line: where, which key, and what would be right."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from pathlib import Path
from typing import get_args

from pydantic import SecretStr, ValidationError

from hemostat.config.fields import without_optional
from hemostat.config.schema import LEAVES, section_at
from hemostat.config.text import Key, dotted_key, one_line, short_repr
from hemostat_calibration.errors import HemostatError


class ConfigError(HemostatError):
    """The configuration is not usable; the text is one line."""


REMOVED: Mapping[str, str] = {
    "drain_seconds": "this setting has gone: relays that were replaced have 600 s; leave it out",
    "limits.connections": "this setting has gone: a relay process accepts 16384 connections, or what ulimit -n allows; "
    "leave it out, and set workers for more",
    "adapter.reference": "this setting has gone: adapters are made from the reference's checkpoint; leave it out, and "
    "if the reference is a server, name the folder in reference.folder",
    "calibration.apply": "this setting has gone: the plugin in vLLM applies profiles; leave it out",
    "calibration.force": "this setting has gone: import the profile and pin it (hemostat profile import, then hemostat "
    "profile pin); leave it out",
    "calibration.scope": "this setting has gone: profiles are learned from all traffic, and each kind of it decides "
    "which one serves; leave it out",
}
"""The settings of earlier versions, with what takes their place."""


def explain(error: ValidationError, path: Path | None, places: Mapping[Key, str]) -> str:
    """Returns the first error in one line, with the number of further ones.

    places: for each key that is set, the file and line, variable or flag that sets it.
    """
    errors = error.errors(include_url=False)
    # An unknown key is the most likely cause of a missing one.
    errors.sort(key=lambda e: e["type"] != "extra_forbidden")
    first = errors[0]
    key = tuple(first["loc"])
    kind = first["type"]
    where = next((places[key[:n]] for n in range(len(key), 0, -1) if key[:n] in places), None)
    if where is None:
        where = one_line(str(path)) if path is not None else "configuration"
    if kind == "extra_forbidden":
        text = REMOVED.get(dotted_key(key)) or f"unknown key{_suggestion(key)}"
    elif kind == "missing":
        missing = (*key, "url") if key == ("upstream",) else key
        key = missing
        text = "required, like http://127.0.0.1:8000 (the vLLM server that runs the compressed model)"
    elif kind == "value_error":
        text = str(first["ctx"]["error"])
    elif kind in {"model_type", "model_attributes_type"}:
        fields = ", ".join(section_at(key).model_fields)
        text = f"{short_repr(first['input'])} is not a mapping; its keys are {fields}"
    elif kind == "dict_type":
        text = f"{short_repr(first['input'])} is not a mapping; write name: reference, one line for each model"
    elif kind == "literal_error":
        allowed = get_args(without_optional(LEAVES[dotted_key(key)]))
        near = nearest(str(first["input"]), dict.fromkeys(allowed))
        text = f"{short_repr(first['input'])} is not one of {', '.join(allowed)}" + (
            f"; did you mean {near}?" if near else ""
        )
    else:
        secret = without_optional(LEAVES.get(dotted_key(key))) is SecretStr
        shown = "the value" if secret else short_repr(first["input"])
        text = f"{shown} does not fit: {first['msg'].removeprefix('Input ')}"
        if kind == "string_type" and isinstance(first["input"], int | float):
            text += "; put it in quotes"
    more = f" (and {len(errors) - 1} more)" if len(errors) > 1 else ""
    label = f"{dotted_key(key)}: " if key else ""
    return one_line(f"{where}: {label}{text}{more}")


def _suggestion(key: Key) -> str:
    """Returns a suggestion for an unknown key."""
    known = list(section_at(key[:-1]).model_fields)
    last = str(key[-1])
    prefix = dotted_key(key[:-1]) + "." if len(key) > 1 else ""
    # The right name in the wrong section is likelier than a name that is only alike.
    near = next((leaf for leaf in LEAVES if leaf.rpartition(".")[2] == last), None)
    if near is None:
        near = nearest(last, {name: prefix + name for name in known})
    if near is None:
        near = nearest(prefix + last, {leaf: leaf for leaf in LEAVES})
    return f"; did you mean {near}?" if near else f"; the keys here are {', '.join(known)}"


def nearest(word: str, known: Mapping[str, str | None]) -> str | None:
    """Returns the value of the closest key (or the key itself where the value is None)."""
    close = difflib.get_close_matches(word[:200], list(known), 1, 0.6)
    return (known[close[0]] or close[0]) if close else None
