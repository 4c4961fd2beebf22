"""The one format of states in the store: a dataclass as JSON, with the number of its schema (`state_codec`).

The numbers of tests are stored apart from it, in a format that does not change (`spent_alpha`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, TypeVar

from hemostat.store.protocol import StateKey, StoreWrites
from hemostat_calibration.errors import InvalidArgumentError
from hemostat_calibration.state_codec import decode, encode

T = TypeVar("T")


def write_state(writes: StoreWrites, key: StateKey, state: Any, schema: int) -> None:
    """Queues a write of a state, which is a dataclass. schema: another number if its fields change."""
    writes.set_state(key, encode(state, schema).decode())


def read_state(
    states: Mapping[StateKey, str | None],
    key: StateKey,
    kind: type[T],
    schema: int,
    report: Callable[[str], None],
) -> T | None:
    """Returns what `write_state` has stored; None if nothing is stored.

    A state that is damaged, or that a newer version has written, begins anew: None is returned, and `report` gets one
    line that says so.
    """
    stored = states.get(key)
    if stored is None:
        return None
    try:
        return decode(kind, stored.encode(), schema)
    except InvalidArgumentError as error:
        report(f"what is stored as {key} cannot be read, and begins anew: {error}")
        return None
