"""The version of what a store holds, and how the state of an older version is carried over.

The state `schema` is a number. A store without it is new, or was written by a version before 2. A new version of the
format is one more function in `MIGRATIONS`: from the states as they were to those that change. A migration may be
interrupted at any point and is then repeated, so that it must give the same result on what it has changed already;
the number is written last.

    2   Profiles serve by kind of traffic, on evidence in each kind. What served under version 1 served whole scopes,
        without evidence by kind: it is offered as a candidate, and identity serves. Profiles, events, the mode and the
        numbers of tests are kept (alpha that was spent stays spent), the state of the alarm's tests is not.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Mapping

from hemostat.store.protocol import Store, StoreIncompatible, StoreWrites

log = logging.getLogger("hemostat.store")

SCHEMA_KEY = "schema"
OFFERED_KEY = "offered"
"""JSON: the profiles that a migration wants tested, as [[version, scope], …], and the `calibration.scope` of the
scopes; deleted once they are candidates."""
ALARM_TESTS_KEY = "alarm.tests"
"""How many tests the alarm had begun before its state was dropped."""

States = Mapping[str, str | None]


def _to_2(states: States) -> dict[str, str | None]:
    changed: dict[str, str | None] = {}
    if (serving := states.get("serving")) is not None:
        kind, served = _served_in_1(serving)
        if served:
            changed[OFFERED_KEY] = json.dumps({"scope": kind, "profiles": served})
            log.warning(
                "the store is of version 1, before kinds of traffic: %s served without evidence by kind, and is tested "
                "as a candidate; identity serves until then",
                ", ".join(version for version, _ in served),
            )
        changed["serving"] = None
    if (alarm := states.get("alarm")) is not None:
        changed[ALARM_TESTS_KEY] = str(_alarm_tests_in_1(alarm))
        changed["alarm"] = None
        log.warning("the alarm learns its baselines anew: its stored state is of version 1")
    return changed


def _served_in_1(text: str) -> tuple[str, list[tuple[str, str]]]:
    """`calibration.scope`, and the versions with their scopes, the pooled one first; none where it is damaged."""
    try:
        stored = json.loads(text)
        served = [(str(version), str(scope)) for scope, (version, _) in sorted(stored["selected"].items())]
        return str(stored["scope"]), served
    except (ValueError, KeyError, TypeError, AttributeError):
        log.error("the stored serving profiles of version 1 cannot be read: none is tested")
        return "pooled", []


def _alarm_tests_in_1(text: str) -> int:
    """0 where the state is damaged."""
    try:
        return max(0, int(json.loads(text)["fields"]["tests"]))
    except (ValueError, KeyError, TypeError):
        return 0


MIGRATIONS: tuple[tuple[tuple[str, ...], Callable[[States], dict[str, str | None]]], ...] = (
    (("serving", "alarm"), _to_2),
)
"""The n-th leads from version n to n + 1: the keys that it reads, and what it makes of them; None deletes a state."""
SCHEMA = len(MIGRATIONS) + 1


def require_known(stored: str | None) -> int:
    """The version of a store, from its state `schema`. StoreIncompatible where this program does not know it."""
    if stored is None:
        return 1
    if not stored.isdecimal() or not 1 <= int(stored) <= SCHEMA:
        raise StoreIncompatible(
            f"store.url: the store has schema {stored[:20]}, written by a newer hemostat; this one knows schemas up to "
            f"{SCHEMA}: install the version that wrote it, or name another store"
        )
    return int(stored)


def migrate(store: Store, writes: StoreWrites) -> None:
    """Bring what the store holds to `SCHEMA`. writes: the store, or its view for the leader.

    Raises StoreIncompatible where the store is of a newer version, StoreFailure where it fails.
    """
    stored = store.get_state(SCHEMA_KEY)
    version = require_known(stored)
    for keys, migration in MIGRATIONS[version - 1 :]:
        # What takes the place of a state is written before the state is deleted.
        for key, value in migration({key: store.get_state(key) for key in keys}).items():
            writes.set_state(key, value)
    if stored != str(SCHEMA):
        writes.set_state(SCHEMA_KEY, str(SCHEMA))
