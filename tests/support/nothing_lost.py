"""What no fault may take from a store: whatever happens between two reads of it, this holds."""

from __future__ import annotations

import json

from hemostat.control.stored_state import SALT_KEY
from hemostat.ipc.messages import rest_of
from hemostat.measurement.alarms import STATE_KEY as ALARM_KEY
from hemostat.profiles.begun_tests import TESTS_BEGUN_KEY
from hemostat.profiles.persistence import SERVING_KEY, TESTS_KEY
from hemostat.store.protocol import Snapshot
from hemostat_calibration.alarm.serialization import begun_tests

SERVES = ("promote", "pin", "roll_back")
"""Decisions that change what serves a kind."""
TESTS = ("import", "propose", "drop", "promote", "pin")
"""Decisions that change who is a candidate."""


def check(before: Snapshot, snapshot: Snapshot) -> None:
    """AssertionError where something that had happened has not."""
    assert snapshot.head.revision >= before.head.revision
    new = list(snapshot.events)[: len(snapshot.events) - len(before.events)]
    assert [*new, *before.events] == list(snapshot.events), "an event is gone"
    assert all(list(snapshot.events).count(event) == 1 for event in new), "an event was written twice"
    for name, count in counts(before).items():
        assert counts(snapshot).get(name, 0) >= count, name
    if SALT_KEY in before.states:
        assert snapshot.states.get(SALT_KEY) == before.states[SALT_KEY]
    decided = {(event["decision"], event.get("version"), event.get("kind")) for event in new}
    was, now = serving(before), serving(snapshot)
    for kind in was.keys() | now.keys():
        # A new kind begins with what serves the rest of the traffic.
        where = {kind} if kind in was else {kind, rest_of(kind)}
        if now.get(kind) != was.get(kind, was.get(rest_of(kind))):
            assert any(what in SERVES and named in where for what, _, named in decided), kind
    for version in candidates(before) ^ candidates(snapshot):
        assert any(what in TESTS and which == version for what, which, _ in decided), version
    held = {profile.version for profile in snapshot.profiles}
    assert candidates(snapshot) | set(now.values()) - {None} <= held


def counts(snapshot: Snapshot) -> dict[str, int]:
    """What has been begun, by what it is counted by."""
    windows = json.loads(snapshot.states.get(TESTS_KEY, '{"state": {"windows": {}}}'))["state"]["windows"]
    begun = int(snapshot.states.get(TESTS_BEGUN_KEY, 0))
    alarms = begun_tests(snapshot.states.get(ALARM_KEY, "").encode())
    return {"tests": begun, "alarms": alarms} | {f"windows of {kind}": number for kind, number in windows.items()}


def serving(snapshot: Snapshot) -> dict[str, str | None]:
    """Versions by kind; None: identity."""
    kinds = json.loads(snapshot.states.get(SERVING_KEY, '{"state": {"kinds": {}}}'))["state"]["kinds"]
    return {name: kind["version"] for name, kind in kinds.items()}


def candidates(snapshot: Snapshot) -> set[str]:
    stored = json.loads(snapshot.states.get(SERVING_KEY, '{"state": {"queue": []}}'))["state"]
    return {version for version, _, _ in stored["queue"]}
