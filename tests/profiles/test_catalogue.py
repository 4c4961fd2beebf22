"""The profiles held are bounded."""

from __future__ import annotations

import pytest
from tests.support.profile_bench import Bench, harmful

from hemostat.profiles import catalogue
from hemostat.profiles.catalogue import MAX_PROFILES, Catalogue, parameter_bytes
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
    assert len(again.profiles.report.listing()["profiles"]) == 4, "the two newest, what serves, what is tested"


def test_the_oldest_profile_that_is_not_in_use_is_evicted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(catalogue, "MAX_PROFILES", 3)
    times = iter(range(10))
    held = Catalogue(lambda: float(next(times)))
    first, second, third, fourth = (harmful(seed=seed) for seed in range(4))
    for profile in (first, second, third):
        assert held.keep(profile, ()) == []
    assert held.keep(fourth, {first.version}) == [second.version]
    assert list(held) == [first.version, third.version, fourth.version]
    assert held.created(third.version) == 2.0
    assert held.keep(third, ()) == []
    assert list(held)[-1] == third.version, "it is the newest again"
    assert held.created(third.version) == 2.0


def test_a_removed_probe_is_no_longer_the_probe() -> None:
    held = Catalogue(lambda: 0.0)
    profile = harmful()
    held.probe = profile.version
    held.keep(profile, ())
    held.remove(profile.version)
    assert held.probe is None
    assert held.get(profile.version) is None
    assert held.get(None) is None
