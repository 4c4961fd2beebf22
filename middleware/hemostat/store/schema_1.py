"""Takes along the states of a store with schema 1, in which seven of them had formats of their own.

Each becomes what `states.read_state` reads. What cannot be read stays as it is, so that its owner reports it.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Callable, Mapping
from typing import Any

from hemostat.store.protocol import StateKey

SCHEMA = 1
_SEEN_BYTES = 6
"""The number of bytes of each conversation that `outcomes` had seen."""


def upgraded(states: Mapping[StateKey, str]) -> dict[StateKey, str]:
    """Returns the states that change, in their new format."""
    changed = {}
    for key, upgrade in _UPGRADES.items():
        if key not in states:
            continue
        try:
            changed[key] = json.dumps({"schema": 1, "state": upgrade(states[key])}, separators=(",", ":"))
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
            continue
    return changed


def _kinds(text: str) -> Any:
    stored = json.loads(text)
    kinds = {
        name: {field: value for field, value in kind.items() if field not in {"learned_of", "scope"}}
        for name, kind in stored["kinds"].items()
    }
    known = {"table": "", "queue": [], "former": {}, "proposals": []}
    return {name: stored.get(name, default) for name, default in known.items()} | {"kinds": kinds}


def _mode(text: str) -> Any:
    configured, _, mode = text.partition(" ")
    return {"configured": configured, "mode": mode}


def _proposed(text: str) -> Any:
    return {"tokens": json.loads(text)}


def _drained(text: str) -> Any:
    return {"engines": json.loads(text)}


def _models(text: str) -> Any:
    return {"probe": []} | json.loads(text)


def _salt(text: str) -> Any:
    return {"salt": text}


def _outcomes(text: str) -> Any:
    stored = json.loads(text)
    if stored["format"] != 2:
        raise ValueError(f"format {stored['format']}")
    seen = base64.b64decode(stored["seen"], validate=True)
    names = ("control_fraction", "sampling", "kinds", "begun")
    return {name: stored[name] for name in names} | {"seen": [_SEEN_BYTES, base64.b64encode(seen).decode()]}


_UPGRADES: Mapping[StateKey, Callable[[str], Any]] = {
    StateKey(key): upgrade
    for key, upgrade in (
        ("kinds", _kinds),
        ("mode", _mode),
        ("proposed", _proposed),
        ("drained_engines", _drained),
        ("models", _models),
        ("salt", _salt),
        ("outcomes", _outcomes),
    )
}
