"""Takes along the states of a store with schema 1, in which seven of them had formats of their own, and one may be in a
blob.

Each becomes what `states.read_state` reads. A state that cannot be read stays as it is, so that its owner reports it.
"""

from __future__ import annotations

import base64
import json
import logging
from collections.abc import Callable, Mapping
from typing import Any

from hemostat.store.protocol import BlobKey, StateKey

log = logging.getLogger("hemostat.calibration")

SCHEMA = 1
PROPOSED_BLOB = BlobKey("temperature_bias")
"""The key of the blob that holds what was proposed, if there is no state of it."""
_PROPOSED = "proposed"
_MAX_HEADER_BYTES = 1 << 20
"""The largest header of `PROPOSED_BLOB`, which is a safetensors file."""
_SEEN_BYTES = 6
"""The number of bytes of each conversation that `outcomes` had seen."""
_DAMAGED = (ValueError, KeyError, TypeError, AttributeError, RecursionError)


def upgraded(states: Mapping[StateKey, str], blobs: Mapping[BlobKey, bytes]) -> dict[StateKey, str]:
    """Returns the states that change, in their new format."""
    changed = {}
    if (key := StateKey(_PROPOSED)) not in states and (blob := blobs.get(PROPOSED_BLOB)) is not None:
        try:
            changed[key] = _state({"tokens": _proposed_in(blob)})
        except _DAMAGED as error:
            log.error("what was proposed before cannot be read, the next proposals may come sooner: %s", error)
    for key, upgrade in _UPGRADES.items():
        if key not in states:
            continue
        try:
            changed[key] = _state(upgrade(states[key]))
        except _DAMAGED:
            continue
    return changed


def _state(state: Any) -> str:
    return json.dumps({"schema": 1, "state": state}, separators=(",", ":"))


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


def _proposed_in(blob: bytes) -> Any:
    """Returns the numbers of tokens by family, which are in the header's notes."""
    length = int.from_bytes(blob[:8], "little")
    header = json.loads(blob[8 : 8 + min(length, _MAX_HEADER_BYTES)])
    notes = json.loads(header["__metadata__"]["learned"]).get("notes", "")
    return json.loads(notes or "{}").get("proposed_at", {}).get("", {})


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
        (_PROPOSED, _proposed),
        ("drained_engines", _drained),
        ("models", _models),
        ("salt", _salt),
        ("outcomes", _outcomes),
    )
}
