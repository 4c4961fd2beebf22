"""Decisions with their reasons, the log of their events, and what the store keeps of them."""

from __future__ import annotations

import json
import logging

import pytest
from tests.support.stores import DirectWrites

from hemostat.profiles.decisions import DECISIONS, MAX_EVENTS, REASONS, Decision, EventLog, Reason, evidence_json
from hemostat.profiles.persistence import (
    MODE_KEY,
    SCHEMA,
    SERVING_KEY,
    StoredMode,
    StoredServing,
    stored_mode,
    stored_serving,
    whole_number,
)
from hemostat_calibration.guard import decisions as guard_decisions
from hemostat_calibration.guard.guard import Guard
from hemostat_calibration.state_codec import encode


def test_every_decision_has_reasons_and_every_reason_is_used() -> None:
    assert REASONS.keys() == set(Decision)
    assert {reason for _, reason in DECISIONS} == set(Reason)
    assert {str(reason) for reason in guard_decisions.Reason} <= {str(r) for r in REASONS[Decision.ROLL_BACK]}


def test_an_event_is_counted_logged_held_and_stored(caplog: pytest.LogCaptureFixture) -> None:
    store = DirectWrites()
    log = EventLog(store, lambda: 12.5)
    with caplog.at_level(logging.INFO, "hemostat.calibration"):
        log.record(Decision.PROMOTE, Reason.EVIDENCE, "v1", "better", {"requests": 3}, "chat text")
    event = {
        **{
            "at": 12.5,
            "decision": "promote",
            "reason": "evidence",
            "version": "v1",
            "kind": "chat text",
        },
        **{"why": "better", "evidence": {"requests": 3}},
    }
    assert store.events(5) == log.newest_first() == log.newest_first("v1") == [event]
    assert json.loads(json.dumps(event)) == event
    assert log.newest_first("v2") == []
    assert log.counts["promote", "evidence"] == 1
    assert sum(log.counts.values()) == 1
    assert "promote v1 for chat text: better" in caplog.text


def test_the_log_line_of_a_decision_has_its_evidence_in_json(caplog: pytest.LogCaptureFixture) -> None:
    """Names of roles and figures are words there, not representations of objects."""
    guard = Guard()
    guard.begin_candidate("a", {"rest": (1.0, 1.0)})
    evidence = evidence_json(guard.evidence("a", "rest"))
    with caplog.at_level(logging.INFO, "hemostat.calibration"):
        EventLog(DirectWrites(), lambda: 0.0).record(Decision.DROP, Reason.NEWER, "v1", "replaced", evidence)
    assert json.loads(caplog.messages[0].removeprefix("drop v1: replaced ")) == json.loads(json.dumps(evidence))
    assert "<" not in caplog.text


def test_events_are_bounded() -> None:
    log = EventLog(DirectWrites(), lambda: 0.0)
    log.restore({"version": str(n)} for n in range(MAX_EVENTS + 5))
    assert len(log.newest_first()) == MAX_EVENTS
    assert log.newest_first()[0]["version"] == str(MAX_EVENTS + 4)
    assert sum(log.counts.values()) == 0, "restored events were counted by an earlier process"


def test_evidence_without_requests_is_json_ready() -> None:
    guard = Guard()
    guard.begin_candidate("a", {"rest": (1.0, 1.0)})
    evidence = evidence_json(guard.evidence("a", "rest"))
    assert evidence["mean_gain"] is None
    assert evidence["units"] == 0
    json.dumps(evidence, allow_nan=False)
    assert evidence_json(None) == {}


def test_where_no_serving_state_is_stored_nothing_serves() -> None:
    reported: list[str] = []
    assert stored_serving({SERVING_KEY: None}, reported.append) == StoredServing()
    assert reported == []


@pytest.mark.parametrize("text", ["", "{", "[]", '{"schema": 1, "state": {"kinds": 1}}'])
def test_a_damaged_serving_state_is_reported_and_nothing_serves(text: str) -> None:
    reported: list[str] = []
    assert stored_serving({SERVING_KEY: text}, reported.append) == StoredServing()
    (line,) = reported
    assert line.startswith("what is stored as kinds cannot be read")


@pytest.mark.parametrize(
    ("stored", "mode"),
    [
        (StoredMode("auto", "off"), "off"),
        (StoredMode("observe", "off"), None),
        (StoredMode("auto", "fast"), None),
        (None, None),
    ],
)
def test_a_stored_mode_holds_while_the_configured_one_is_the_same(stored: StoredMode | None, mode: str | None) -> None:
    text = None if stored is None else encode(stored, SCHEMA).decode()
    assert stored_mode({MODE_KEY: text}, "auto") == mode


def test_a_damaged_mode_is_none() -> None:
    assert stored_mode({MODE_KEY: "auto off"}, "auto") is None


def test_a_damaged_count_of_tests_is_zero() -> None:
    assert [whole_number(text) for text in ("many", None, "3")] == [0, 0, 3]


def test_a_damaged_table_of_kinds_is_empty() -> None:
    assert StoredServing(table="junk").kind_table(3).followed == ()
