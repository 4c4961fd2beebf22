"""The states of a version at one engine: every sequence of calls keeps to the table, and memory is bounded."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hemostat.adapters.serving.versions import (
    BACKOFF,
    MAX_VERSIONS,
    TRANSITIONS,
    IllegalTransition,
    Versions,
    VersionState,
)

CALLS = {
    VersionState.LOADED: lambda versions, version: versions.loaded(version),
    VersionState.FAILED: lambda versions, version: versions.failed(version, "it is too large"),
    VersionState.REJECTED: lambda versions, version: versions.reject(version, "a probe has failed"),
}


@given(st.lists(st.sampled_from(sorted(CALLS, key=lambda state: state.value)), max_size=12))
def test_a_version_changes_its_state_as_the_table_says_and_else_raises(targets: list[VersionState]) -> None:
    versions = Versions()
    for target in targets:
        before = versions.state("a")
        if target in TRANSITIONS[before]:
            CALLS[target](versions, "a")
            assert versions.state("a") is target
        else:
            with pytest.raises(IllegalTransition, match=f"a: from {before.name} to {target.name}"):
                CALLS[target](versions, "a")
            assert versions.state("a") is before
    versions.begin_anew()
    assert versions.state("a") is VersionState.UNKNOWN, "a restart of the engine ends each state"


def test_the_table_has_each_state_and_only_a_restart_ends_a_rejection() -> None:
    assert TRANSITIONS.keys() == set(VersionState)
    assert not TRANSITIONS[VersionState.REJECTED]
    assert all(VersionState.UNKNOWN not in following for following in TRANSITIONS.values())


def test_a_reason_is_new_once_and_again_after_it_was_loaded() -> None:
    versions = Versions()
    assert [versions.failed("a", "x"), versions.failed("a", "x"), versions.failed("a", "y")] == [True, False, True]
    assert versions.reasons(VersionState.FAILED) == {"a": "y"}
    versions.loaded("a")
    assert versions.reasons(VersionState.FAILED) == {}
    assert versions.failed("a", "y")


def test_each_attempt_waits_longer_also_after_one_that_has_succeeded() -> None:
    versions, now, pauses = Versions(), 100.0, []
    for attempt in range(6):
        assert versions.may_load("a", now)
        versions.begin_load("a", now)
        if attempt % 2:
            versions.loaded("a")
        assert not versions.may_load("a", now)
        longest = BACKOFF[min(attempt, len(BACKOFF) - 1)]
        assert not versions.may_load("a", now + 0.49 * longest)
        assert versions.may_load("a", now + longest)
        pauses.append(longest)
        now += longest
    assert pauses == [*BACKOFF, BACKOFF[-1], BACKOFF[-1]]


def test_rejected_versions_are_forgotten_last() -> None:
    versions = Versions()
    versions.reject("bad", "a probe has failed")
    for number in range(3 * MAX_VERSIONS):
        versions.failed(str(number), "it is too large")
    assert list(versions.reasons(VersionState.REJECTED)) == ["bad"]
    assert len(versions.reasons(VersionState.FAILED)) == MAX_VERSIONS - 1
    for number in range(3 * MAX_VERSIONS):
        versions.reject(f"bad {number}", "a probe has failed")
    assert len(versions.reasons(VersionState.REJECTED)) == MAX_VERSIONS
    versions.failed("new", "it is too large")
    assert versions.reasons(VersionState.FAILED) == {"new": "it is too large"}
