"""The agent against a real HTTP server: fetches, digests, tampering, backoff, taps, and what the registry gets."""

from __future__ import annotations

import json
import logging
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tests.support.engine_admin import TOKEN, EngineAdmin
from tests.support.engine_profiles import VOCAB_SIZE, make_contextual, make_profile
from tests.support.memory import kept_bytes

from hemostat.engines.api import MAX_TAP_BYTES
from hemostat.engines.messages import LoraState
from hemostat_calibration import __version__
from hemostat_calibration.errors import InvalidArgumentError

torch = pytest.importorskip("torch")

from hemostat_engine import agent as agents  # noqa: E402
from hemostat_engine import transform  # noqa: E402
from hemostat_engine.adapters.state import AdapterState  # noqa: E402
from hemostat_engine.admin_client import AdminClient, FetchError  # noqa: E402
from hemostat_engine.agent import Agent, Identity  # noqa: E402
from hemostat_engine.library import Counters, Library  # noqa: E402
from hemostat_engine.peers import Peers  # noqa: E402
from hemostat_engine.retries import Retries  # noqa: E402
from hemostat_engine.settings import Settings  # noqa: E402
from hemostat_engine.taps import Reading, Step, TappedRow, Taps  # noqa: E402

PROFILE = make_profile(1)


@pytest.fixture
def admin() -> Iterator[EngineAdmin]:
    server = EngineAdmin()
    yield server
    server.close()


class Rank:
    """An agent without threads, with its library, counters and taps."""

    def __init__(self, settings: Settings, rank: int = 0, world_size: int = 1, boot_id: str = "boot") -> None:
        self.library = Library(VOCAB_SIZE)
        self.counters = Counters()
        self.taps = Taps(self.counters)
        identity = Identity(boot_id, rank, world_size, VOCAB_SIZE, "v1", "test")
        self.spawn: Callable[[Callable[[], None]], None] = lambda run: run()
        self.agent = Agent(identity, settings, self.library, self.counters, self.taps, spawn=self._spawn)

    def _spawn(self, run: Callable[[], None]) -> None:
        self.spawn(run)

    def tick(self, now: float) -> None:
        """What both threads do, one after the other."""
        self.agent.tick(now)
        self.agent.fetcher.tick(now)


def test_a_report_says_the_version_of_the_plugin(admin: EngineAdmin) -> None:
    Rank(at(admin)).tick(0.0)
    assert admin.registry.plugins(0.0) == {__version__: 1}


def at(admin: EngineAdmin, **more: Any) -> Settings:
    return Settings(admin_url=admin.url, engine_token=TOKEN, **more)


def test_requested_profile_is_acknowledged_once_every_rank_has_it(admin: EngineAdmin) -> None:
    admin.files[PROFILE.version] = PROFILE.to_bytes()
    admin.registry.set_wanted([PROFILE.version])
    ranks = [Rank(at(admin), rank, 2) for rank in range(2)]
    ranks[0].tick(0.0)
    assert ranks[0].library.versions() == (PROFILE.version,)
    ranks[0].tick(0.25)
    assert admin.registry.acknowledged(0.0) == frozenset()
    ranks[1].tick(0.5)
    assert admin.registry.acknowledged(0.0) == frozenset()
    ranks[1].tick(0.75)
    assert admin.registry.acknowledged(0.0) == {PROFILE.version}


def test_version_named_by_a_request_is_fetched(admin: EngineAdmin) -> None:
    admin.files[PROFILE.version] = PROFILE.to_bytes()
    rank = Rank(at(admin))
    assert rank.library.get(PROFILE.version) is None
    rank.tick(0.0)
    assert rank.library.get(PROFILE.version) is not None


@pytest.mark.parametrize("make", [make_profile, make_contextual])
def test_tampered_truncated_and_foreign_profiles_are_refused_and_counted(make: Any, admin: EngineAdmin) -> None:
    first, second, other = make(1), make(2), make(3, vocab_size=VOCAB_SIZE + 1)
    tampered = bytearray(first.to_bytes())
    tampered[-1] ^= 1
    admin.files = {
        first.version: bytes(tampered),
        second.version: second.to_bytes()[:-1],
        other.version: other.to_bytes(),
    }
    admin.registry.set_wanted([first.version, second.version, other.version])
    rank = Rank(at(admin))
    rank.tick(0.0)
    assert rank.library.versions() == ()
    assert rank.counters.read()["profiles_refused"] == 3
    # The intact file is accepted.
    admin.files[first.version] = first.to_bytes()
    rank.tick(1.0)
    assert rank.library.versions() == (first.version,)


def test_unknown_family_is_refused(admin: EngineAdmin, monkeypatch: pytest.MonkeyPatch) -> None:
    profile = make_contextual(1)
    admin.files[profile.version] = profile.to_bytes()
    admin.registry.set_wanted([profile.version])
    rank = Rank(at(admin))
    monkeypatch.setattr(transform, "FAMILIES", {})
    rank.tick(0.0)
    assert rank.counters.read()["profiles_refused"] == 1
    assert rank.library.versions() == ()


def test_restarted_engine_fetches_again_and_old_taps_are_unchanged(
    admin: EngineAdmin,
) -> None:
    profile = make_contextual(1)
    admin.files[profile.version] = profile.to_bytes()
    admin.registry.set_wanted([profile.version])
    old, new = Rank(at(admin), boot_id="old"), Rank(at(admin), boot_id="new")
    old.tick(0.0)
    old.tick(0.25)
    for position in range(3):
        old.taps.push(step(position, [0.5], features=[1.0, -1.0]))
    old.tick(0.5)
    assert admin.registry.acknowledged(0.0) == {profile.version}
    # The old engine ends here, in the middle of a request: its taps are kept, and nothing is added to them.
    admin.now = 16.0
    new.tick(0.0)
    assert new.library.versions() == (profile.version,)
    assert admin.registry.acknowledged(16.0) == frozenset()
    new.tick(0.25)
    assert admin.registry.acknowledged(16.0) == {profile.version}
    taken = admin.registry.taps.take("n", 99)
    assert taken is not None
    assert (taken.boot_id, len(taken.log_normalizer["0" * 32])) == ("old", 3)


def test_pause_doubles_for_a_version_that_does_not_exist(admin: EngineAdmin) -> None:
    rank = Rank(at(admin))
    asked = []
    for now in range(200):
        rank.library.get("0" * 32)
        before = len(admin.seen)
        rank.tick(float(now))
        if any("profiles" in path for path in admin.seen[before:]):
            asked.append(now)
    assert asked == [0, 1, 3, 7, 15, 31, 63, 123, 183]
    assert rank.counters.read() == {"profiles_missing": 9}


def test_failing_admin_port_is_backed_off_and_logged_once(admin: EngineAdmin, caplog: pytest.LogCaptureFixture) -> None:
    admin.status = 500
    rank = Rank(at(admin))
    with caplog.at_level(logging.INFO, "hemostat.engine"):
        for now in range(30):
            rank.tick(float(now))
        assert len(admin.seen) == 5
        assert rank.counters.read() == {"report_errors": 5}
        admin.status = None
        rank.tick(40.0)
    assert [r.message for r in caplog.records] == ["/api/v1/engine/report: HTTP 500", "report works again"]


@pytest.mark.parametrize("answer", [b"", b"[]", b'{"hold": 3}', b'{"hold": [3]}', b"x" * 100_000])
def test_invalid_response_is_a_counted_failure(admin: EngineAdmin, answer: bytes) -> None:
    admin.answer = answer or b" "
    rank = Rank(at(admin))
    rank.tick(0.0)
    assert rank.counters.read() == {"report_errors": 1}


def test_invalid_version_is_used_in_no_path_and_no_url(admin: EngineAdmin, tmp_path: Path) -> None:
    admin.answer = json.dumps({"hold": ["../../etc/passwd", "A" * 32, PROFILE.version + "/x"]}).encode()
    (tmp_path / "notes.safetensors").write_bytes(b"not a profile")
    rank = Rank(at(admin, profile_dir=tmp_path))
    rank.tick(0.0)
    assert admin.seen == ["/api/v1/engine/report"]
    assert rank.library.missing() == ()


def test_token_is_not_sent_to_the_target_of_a_redirect(admin: EngineAdmin) -> None:
    admin.status = 302
    with pytest.raises(FetchError, match="HTTP 302"):
        AdminClient(admin.url, TOKEN).profile(PROFILE.version)
    assert "/elsewhere" not in admin.seen


def test_token_is_not_sent_to_a_proxy_of_the_environment(admin: EngineAdmin, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("http_proxy", admin.url)
    monkeypatch.delenv("no_proxy", raising=False)
    with pytest.raises(FetchError):
        AdminClient("http://192.0.2.1.invalid:8081", TOKEN).profile(PROFILE.version)
    assert admin.seen == []


def test_wrong_token_is_a_fetch_error_with_the_status(admin: EngineAdmin) -> None:
    with pytest.raises(FetchError, match="HTTP 401"):
        AdminClient(admin.url, "wrong").profile(PROFILE.version)


def test_refused_connection_is_a_fetch_error() -> None:
    with pytest.raises(FetchError, match=r"127\.0\.0\.1:9"):
        AdminClient("http://127.0.0.1:9", None).profile(PROFILE.version)


def test_profiles_are_loaded_from_the_folder_alone(tmp_path: Path) -> None:
    rank = Rank(Settings(profile_dir=tmp_path))
    rank.tick(0.0)
    (tmp_path / f"{PROFILE.version}.safetensors").write_bytes(PROFILE.to_bytes())
    (tmp_path / f"{'0' * 32}.safetensors").write_bytes(PROFILE.to_bytes())
    rank.tick(0.5)
    assert rank.library.versions() == ()
    rank.tick(1.0)
    assert rank.library.versions() == (PROFILE.version,)
    assert rank.counters.read() == {"profiles_refused": 1}


def test_missing_folder_is_counted(tmp_path: Path) -> None:
    rank = Rank(Settings(profile_dir=tmp_path / "none"))
    rank.library.get(PROFILE.version)
    rank.tick(0.0)
    assert rank.counters.read() == {"profiles_missing": 1}


def test_thread_fetches_and_acknowledges(admin: EngineAdmin) -> None:
    admin.files[PROFILE.version] = PROFILE.to_bytes()
    admin.registry.set_wanted([PROFILE.version])
    rank = Rank(at(admin))
    rank.agent.start()
    waited = threading.Event()
    for _ in range(100):
        if admin.registry.acknowledged(0.0):
            break
        waited.wait(0.1)
    rank.agent.stop()
    assert admin.registry.acknowledged(0.0) == {PROFILE.version}


def step(
    position: int,
    values: list[float],
    applied: str | None = None,
    versions: int = 1,
    features: list[float] | None = None,
) -> Step:
    names = tuple(f"{i:032x}" for i in range(versions))
    numbers = torch.tensor([values] * versions)
    reading = Reading(
        versions=names,
        values=numbers,
        clamped=numbers > 1e9,
        anchors="d" * 32 if features else None,
        features=torch.tensor([features or []], dtype=torch.float16),
    )
    return Step(reading, [TappedRow(0, "n", applied, position)])


def test_taps_reach_the_registry_as_runs(admin: EngineAdmin) -> None:
    rank = Rank(at(admin))
    for position in (0, 1, 2):
        rank.taps.push(step(position, [0.5 + position], "a" * 32))
    rank.taps.push(step(3, [9.0], "a" * 32, versions=2))
    rank.taps.push(step(2, [float("nan")], "a" * 32))
    rank.tick(0.0)
    assert rank.counters.read()["taps_sent"] == 5
    assert admin.registry.taps.covered("n") == 4
    taken = admin.registry.taps.take("n", 99)
    assert taken is not None
    assert (taken.boot_id, taken.applied, taken.mixed) == ("boot", "a" * 32, False)
    assert taken.log_normalizer["0" * 32].tolist()[:2] == [0.5, 1.5]
    assert taken.log_normalizer["0" * 32][3] == 9.0
    assert taken.log_normalizer["0" * 32][2] != taken.log_normalizer["0" * 32][2]
    assert taken.log_normalizer[f"{1:032x}"].tolist()[3] == 9.0
    assert admin.registry.taps.take("n", 99) is None


def test_features_with_non_finite_values_become_nan_rows(admin: EngineAdmin) -> None:
    rank = Rank(at(admin))
    for position, features in enumerate(([1.0, -1.0], [2.0, float("nan")], None, [float("inf"), 0.0], [3.0, -3.0])):
        rank.taps.push(step(position, [0.0], features=features))
    rank.tick(0.0)
    taken = admin.registry.taps.take("n", 99)
    assert taken is not None
    assert taken.features is not None
    assert taken.features.anchors == "d" * 32
    unknown = [float("nan")] * 2
    np.testing.assert_array_equal(taken.features.values, [[1.0, -1.0], unknown, unknown, unknown, [3.0, -3.0]])
    assert taken.log_normalizer["0" * 32].tolist() == [0.0] * 5


def test_messages_of_taps_stay_below_the_limit_of_the_admin_port(admin: EngineAdmin) -> None:
    rank = Rank(at(admin))
    wide = [0.5] * 200_000
    for position in range(60):
        rank.taps.push(step(position, [0.0], features=wide))
    now = 0.0
    while len(rank.taps):
        rank.tick(now)
        now += 0.25
    assert max(admin.sizes["/api/v1/engine/tap"]) < MAX_TAP_BYTES / 1.5
    assert admin.registry.taps.covered("n") == 60


def test_undeliverable_taps_are_dropped_and_counted(admin: EngineAdmin) -> None:
    admin.status = 503
    rank = Rank(at(admin))
    rank.taps.push(step(0, [1.0]))
    rank.tick(0.0)
    assert rank.counters.read()["taps_dropped"] == 1
    rank.taps.push(step(1, [1.0]))
    rank.tick(0.25)
    assert len(rank.taps) == 1
    admin.status = None
    rank.tick(2.0)
    assert rank.counters.read()["taps_sent"] == 1


# --- several admin ports ----------------------------------------------------------------------------------------------


@pytest.fixture
def admins() -> Iterator[list[EngineAdmin]]:
    """Of two middlewares."""
    both = [EngineAdmin(), EngineAdmin()]
    for admin, name in zip(both, ("aa", "bb"), strict=True):
        admin.registry.nonce_prefix = name
    yield both
    for admin in both:
        admin.close()


def at_all(admins: list[EngineAdmin]) -> Settings:
    return Settings(admin_url=",".join(admin.url for admin in admins), engine_token=TOKEN)


def test_every_port_gets_reports_and_those_that_answer_have_priority(admins: list[EngineAdmin]) -> None:
    serving, candidate, probe = (make_profile(seed) for seed in (1, 2, 3))
    admins[0].registry.set_wanted([serving.version, probe.version])
    admins[1].registry.set_wanted([serving.version, candidate.version])
    # Only one of them has the candidate, only the other one the probe.
    admins[0].files = {profile.version: profile.to_bytes() for profile in (serving, probe)}
    admins[1].files = {profile.version: profile.to_bytes() for profile in (serving, candidate)}
    rank = Rank(at_all(admins))
    rank.tick(0.0)
    rank.tick(0.25)
    expected = (serving.version, probe.version, candidate.version)
    assert tuple(held.version for held in rank.library.candidates()) == expected
    for admin in admins:
        assert admin.registry.acknowledged(0.0) == set(expected)
    assert "profiles_missing" not in rank.counters.read(), "each is fetched from the port that asked for it"
    admins[0].status = 503
    rank.tick(2.0)
    expected = (serving.version, candidate.version, probe.version)
    assert tuple(held.version for held in rank.library.candidates()) == expected, "what the first asked for is kept"


def test_the_others_continue_when_one_fails(admins: list[EngineAdmin]) -> None:
    admins[0].registry.set_wanted([PROFILE.version])
    admins[0].files[PROFILE.version] = PROFILE.to_bytes()
    rank = Rank(at_all(admins))
    admins[1].status = 503
    rank.tick(0.0)
    rank.tick(0.25)
    assert admins[0].registry.acknowledged(0.0) == {PROFILE.version}
    # The one that has it fails before the fetch; the other one has it, too.
    other = make_profile(2)
    admins[0].registry.set_wanted([other.version])
    rank.tick(2.0)
    assert rank.library.missing() == (other.version,)
    admins[0].status, admins[1].status = 503, None
    admins[1].registry.set_wanted([other.version])
    admins[1].files[other.version] = other.to_bytes()
    for now in (10.0, 10.25):
        rank.tick(now)
    assert admins[1].registry.acknowledged(10.25) == {PROFILE.version, other.version}


def test_taps_go_to_the_middleware_of_the_request(admins: list[EngineAdmin]) -> None:
    rank = Rank(at_all(admins))
    rank.tick(0.0)
    for nonce, value in (("aa-1", 0.25), ("bb-1", 0.5), ("cc-1", 0.75)):
        made = step(0, [value])
        rank.taps.push(Step(made.reading, [TappedRow(0, nonce, None, 0)]))
    rank.tick(0.25)
    for admin, nonce, value in zip(admins, ("aa-1", "bb-1"), (0.25, 0.5), strict=True):
        taken = admin.registry.taps.take(nonce, 99)
        assert taken is not None
        assert taken.log_normalizer["0" * 32].tolist() == [value]
        assert admin.registry.taps.runs_dropped == 0
        assert [admin.registry.taps.take(other, 99) for other in ("aa-1", "bb-1", "cc-1")] == [None] * 3
    assert rank.counters.read() == {"taps_sent": 2, "taps_dropped": 1}


def test_dns_name_is_every_address_that_it_has_now(admins: list[EngineAdmin], monkeypatch: pytest.MonkeyPatch) -> None:
    port = admins[0].url.rpartition(":")[2]
    hosts = ["127.0.0.1"]

    def resolve(host: str, number: int, **_: Any) -> list[Any]:
        assert (host, str(number)) == ("hemostat", port)
        if not hosts:
            raise OSError("no such name")
        return [(0, 0, 0, "", (address, number)) for address in hosts]

    monkeypatch.setattr("hemostat_engine.peers.socket.getaddrinfo", resolve)
    peers = Peers(Settings.from_environment({"HEMOSTAT_ADMIN_URL": f"dns+http://hemostat:{port}"}))
    peers.refresh(0.0)
    [first] = peers.all
    assert first.url == admins[0].url
    hosts += ["127.0.0.2", "fd00::1"]
    peers.refresh(1.0)
    assert peers.all == [first], "not resolved again yet"
    peers.refresh(6.0)
    assert [peer.url for peer in peers.all] == [f"http://{h}:{port}" for h in ("127.0.0.1", "127.0.0.2", "[fd00::1]")]
    assert peers.all[0] is first
    hosts.clear()
    peers.refresh(12.0)
    assert len(peers.all) == 3, "the last known addresses are kept while the name cannot be resolved"


@pytest.mark.parametrize(
    "url",
    [
        *("ftp://host", "admin:9091", "file:///etc", "http://"),
        "http://a:1,b:2",
        "dns+https://a",
        "dns+a:1",
        "http://a:x",
    ],
)
def test_invalid_admin_url_names_the_variable(url: str) -> None:
    with pytest.raises(InvalidArgumentError, match="HEMOSTAT_ADMIN_URL"):
        Settings.from_environment({"HEMOSTAT_ADMIN_URL": url})


def test_settings_from_the_environment() -> None:
    assert Settings.from_environment({"HEMOSTAT_ADMIN_URL": ""}) == Settings()
    several = {"HEMOSTAT_ADMIN_URL": "http://h:1/, dns+http://g:2 ,"}
    assert Settings.from_environment(several) == Settings("http://h:1,dns+http://g:2")
    full = {"HEMOSTAT_ADMIN_URL": "http://h:1/", "HEMOSTAT_ENGINE_TOKEN": "t", "HEMOSTAT_PROFILE_DIR": "/p"}
    assert Settings.from_environment(full) == Settings("http://h:1", "t", Path("/p"))


def test_remembered_failures_are_bounded() -> None:
    retries, kept = Retries(), []
    for i in range(1000):
        retries.failed(f"{i:04}", FetchError("down"), 0.0)
        kept.append(kept_bytes(retries))
    assert kept[-1] < 1.6 * kept[256]
    assert sum(not retries.may_try(f"{i:04}", 0.0) for i in range(1000)) == 256


def test_report_says_which_adapters_are_loaded_and_the_answer_which_are_wanted(
    admin: EngineAdmin, monkeypatch: pytest.MonkeyPatch
) -> None:

    state = AdapterState()
    monkeypatch.setattr(agents, "adapters", state)
    admin.registry.set_wanted([PROFILE.version])
    rank = Rank(at(admin))
    rank.tick(0.0)
    (report,) = admin.registry.live(0.0)
    assert (report.adapters, report.lora) == ([], None)
    assert state.wanted == {PROFILE.version}
    state.add("adapters_loaded")
    state.set_loaded(["a" * 32, "own", None], slots=4, max_rank=16)
    rank.tick(2.0)
    (report,) = admin.registry.live(0.0)
    assert report.adapters == ["a" * 32]
    assert report.lora == LoraState(slots=4, max_rank=16, grouped=False, loaded=3, was_full=False)
    assert report.counters["adapters_loaded"] == 1


def test_where_no_thread_can_start_the_call_is_made_later(admin: EngineAdmin) -> None:
    """The limit of threads was reached for a moment: no report was sent from then on."""

    def refuse(run: object) -> None:
        raise RuntimeError("can't start new thread")

    rank = Rank(at(admin))
    rank.agent.tick(0.0)
    spawn, rank.spawn = rank.spawn, refuse
    with pytest.raises(RuntimeError, match="thread"):
        rank.agent.tick(2.0)
    rank.spawn = spawn
    rank.agent.tick(4.0)
    assert admin.seen.count("/api/v1/engine/report") == 2
