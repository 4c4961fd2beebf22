"""Fetches of profiles: they delay no report, leave out an admin port that hangs, and what clients name is bounded."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from typing import Any

import pytest
from tests.support.engine_admin import TOKEN, EngineAdmin
from tests.support.engine_profiles import VOCAB_SIZE, make_profile
from tests.support.stack import wait_for
from tests.support.waiting import HANG_SECONDS

torch = pytest.importorskip("torch")

from hemostat_engine import admin_client, transform  # noqa: E402
from hemostat_engine import agent as agents  # noqa: E402
from hemostat_engine import library as libraries  # noqa: E402
from hemostat_engine.agent import Agent, Identity  # noqa: E402
from hemostat_engine.library import MAX_REQUESTED, Counters, Library  # noqa: E402
from hemostat_engine.settings import Settings  # noqa: E402
from hemostat_engine.taps import Taps  # noqa: E402

PROFILES = "/api/v1/engine/profiles/"
REPORT = "/api/v1/engine/report"
NAMES = [f"{number:032x}" for number in range(100)]
PROFILE = make_profile(1)


@pytest.fixture
def admins() -> Iterator[list[EngineAdmin]]:
    """Two ports; the first does not answer some requests."""
    both = [EngineAdmin(), EngineAdmin()]
    for admin, name in zip(both, ("aa", "bb"), strict=True):
        admin.registry.nonce_prefix = name
    yield both
    for admin in both:
        admin.close()


def make_agent(*admins: EngineAdmin, **more: Any) -> tuple[Agent, Library, Counters]:
    library, counters = Library(VOCAB_SIZE), Counters()
    settings = Settings(",".join(admin.url for admin in admins), TOKEN)
    identity = Identity("boot", 0, 1, VOCAB_SIZE, "v1", "test")
    return Agent(identity, settings, library, counters, Taps(counters), **more), library, counters


def fetched(admin: EngineAdmin) -> list[str]:
    return [path.removeprefix(PROFILES) for path in admin.seen if path.startswith(PROFILES)]


def test_reports_go_on_while_fetches_and_a_port_hang(
    admins: list[EngineAdmin], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Five names of clients and one port that hung silenced the reports for 30 s: the engine counted as gone."""
    monkeypatch.setattr(admin_client, "TIMEOUT_SECONDS", 2 * HANG_SECONDS)
    monkeypatch.setattr(agents, "TICK_SECONDS", 0.02)
    monkeypatch.setattr(agents, "REPORT_SECONDS", 0.05)
    hanging, healthy = admins
    hanging.hang = ("/",)
    agent, library, _ = make_agent(*admins)
    for name in NAMES[:5]:
        library.get(name)
    agent.start()
    try:
        wait_for("a fetch and a report hang", lambda: {*hanging.hung} >= {REPORT, PROFILES + NAMES[0]}, HANG_SECONDS)
        before = healthy.seen.count(REPORT)
        wait_for("20 more reports", lambda: healthy.seen.count(REPORT) >= before + 20, HANG_SECONDS)
        assert hanging.hung.count(REPORT) == 1
        assert len(fetched(hanging)) == 1
        assert fetched(healthy) == []
    finally:
        hanging.close()
        agent.stop()


def test_a_port_that_does_not_answer_is_left_out_for_a_while(
    admins: list[EngineAdmin], monkeypatch: pytest.MonkeyPatch
) -> None:
    hanging, healthy = admins
    hanging.hang = (PROFILES,)
    profiles = [make_profile(seed) for seed in range(5)]
    healthy.files = {profile.version: profile.to_bytes() for profile in profiles}
    for admin in admins:
        admin.registry.set_wanted([profile.version for profile in profiles])
    agent, library, _ = make_agent(*admins, spawn=lambda run: run())
    agent.tick(0.0)
    # From here on, so that a report on a busy machine still has the usual time.
    monkeypatch.setattr(admin_client, "TIMEOUT_SECONDS", 2.0)
    agent.fetcher.tick(0.0)
    assert {*library.versions()} == {*healthy.files}
    assert len(fetched(hanging)) == 1
    hanging.hang = ()
    hanging.files = {PROFILE.version: PROFILE.to_bytes()}
    library.hold([make_profile(9).version])
    agent.fetcher.tick(2.0)
    assert len(fetched(hanging)) == 2, "it is asked again"


def test_nothing_counts_as_missing_before_an_address_is_known(admins: list[EngineAdmin]) -> None:
    agent, library, counters = make_agent(*admins, spawn=lambda run: run())
    library.get(NAMES[0])
    agent.fetcher.tick(0.0)
    assert library.requested() == (NAMES[0],)
    assert "profiles_missing" not in counters.read()
    agent.tick(0.0)
    agent.fetcher.tick(0.0)
    assert [fetched(admin) for admin in admins] == [[NAMES[0]], [NAMES[0]]]
    assert library.requested() == ()


def test_what_clients_name_is_fetched_at_a_bounded_rate_and_after_what_is_asked_for(
    admins: list[EngineAdmin], caplog: pytest.LogCaptureFixture
) -> None:
    _, admin = admins
    admin.files = {PROFILE.version: PROFILE.to_bytes()}
    admin.registry.set_wanted([PROFILE.version])
    agent, library, counters = make_agent(admin, spawn=lambda run: run())
    with caplog.at_level(logging.INFO, "hemostat.engine"):
        for second in range(10):
            for name in NAMES:
                library.get(name)
            assert len(library.requested()) <= MAX_REQUESTED
            agent.tick(float(second))
            agent.fetcher.tick(float(second))
    assert fetched(admin)[0] == PROFILE.version
    assert len(fetched(admin)) - 1 == counters.read()["profiles_missing"] == 4 + 9
    assert admin.seen.count(REPORT) == 10
    assert [record.message for record in caplog.records] == [f"loaded profile {PROFILE.version}"]


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (torch.OutOfMemoryError("CUDA out of memory. Tried 7"), "OutOfMemoryError: CUDA out of memory"),
        (MemoryError(), "MemoryError: "),
    ],
)
def test_a_profile_that_the_device_has_no_memory_for_is_refused_when_it_is_loaded(
    admins: list[EngineAdmin],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    error: Exception,
    said: str,
) -> None:
    _, admin = admins
    large, small = make_profile(1), make_profile(2)
    admin.files = {profile.version: profile.to_bytes() for profile in (large, small)}
    admin.registry.set_wanted([large.version, small.version])
    agent, library, counters = make_agent(admin, spawn=lambda run: run())
    put, loads = transform.upload, iter((error, error))

    def upload(values: Any, device: Any) -> Any:
        if (values == large.parameters["bias"]).all() and (failure := next(loads, None)) is not None:
            raise failure
        return put(values, device)

    monkeypatch.setattr(transform, "upload", upload)
    for now in (0.0, 1.0):
        agent.tick(now)
        agent.fetcher.tick(now)
    agent.report_soon()
    agent.tick(1.5)
    assert library.versions() == (small.version,)
    assert admin.registry.acknowledged(0.0) == {small.version}
    assert counters.read()["profiles_refused"] == 2
    refused = [record.message for record in caplog.records if "not loaded" in record.message]
    assert refused == [f"profile {large.version} is not loaded: {said}"]
    # Once there is memory it is loaded.
    agent.fetcher.tick(10.0)
    assert library.versions() == (small.version, large.version)


def test_some_memory_is_left_to_vllm(monkeypatch: pytest.MonkeyPatch) -> None:
    library = Library(VOCAB_SIZE)
    monkeypatch.setattr(libraries, "free_bytes", lambda device: libraries.HEADROOM_BYTES + 4 * VOCAB_SIZE)
    with pytest.raises(libraries.InvalidProfileError, match="--gpu-memory-utilization"):
        library.put(PROFILE)
    assert library.versions() == ()
    monkeypatch.setattr(libraries, "free_bytes", lambda device: libraries.HEADROOM_BYTES + 4 * VOCAB_SIZE + 4)
    assert library.put(PROFILE)
