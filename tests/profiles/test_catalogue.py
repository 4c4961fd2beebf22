"""The profiles held are bounded."""

from __future__ import annotations

import pytest
from tests.support.profile_bench import (
    Bench,
    harmful,
)

from hemostat.profiles import catalogue
from hemostat.profiles.catalogue import MAX_PROFILES, parameter_bytes
from hemostat.profiles.decisions import MAX_EVENTS
from hemostat.profiles.trials import MAX_QUEUED_CANDIDATES, MAX_TESTED


def test_profiles_candidates_and_events_are_bounded() -> None:
    bench = Bench()
    for seed in range(MAX_PROFILES + 2 * MAX_QUEUED_CANDIDATES):
        bench.profiles.operator.import_profile(harmful(seed=seed))
        bench.time += 1.0
    assert len(bench.profiles.trials.tested_versions) == MAX_TESTED
    assert len(bench.status()["waiting"]) == MAX_QUEUED_CANDIDATES - MAX_TESTED
    assert len(bench.profiles.report.listing()["profiles"]) == MAX_PROFILES
    assert len(bench.store.profiles()) == MAX_PROFILES
    for n in range(2 * MAX_EVENTS):
        bench.profiles.operator.set_mode("off" if n % 2 else "auto")
    assert len(bench.profiles.events.newest_first()) == MAX_EVENTS
    assert bench.profiles.trials.running_tests == MAX_TESTED


def test_profiles_are_bounded_by_their_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    bench = Bench()
    profiles = [harmful(seed=seed) for seed in range(6)]
    monkeypatch.setattr(catalogue, "MAX_PROFILE_BYTES", 4 * parameter_bytes(profiles[0]))
    for profile in profiles:
        bench.profiles.operator.import_profile(profile)
    assert len(bench.profiles.report.listing()["profiles"]) == 6, "profiles that are tested or wait are not evicted"
    bench.profiles.operator.promote(profiles[5].version)
    bench.profiles.trials.remove(lambda c: True)
    bench.profiles.operator.import_profile(harmful(seed=9))
    assert len(bench.profiles.report.listing()["profiles"]) == 4
    monkeypatch.setattr(catalogue, "MAX_PROFILE_BYTES", 2 * len(profiles[0].to_bytes()))
    again = bench.restart()
    assert len(again.profiles.report.listing()["profiles"]) == 3, "the two newest ones and the one that serves"
