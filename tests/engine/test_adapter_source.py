"""Adapters in the API server: fetched by version, checked, written to a private folder, unloaded."""

from __future__ import annotations

import asyncio
import logging
import os
import shutil
import stat
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from tests.support.engine_admin import TOKEN, EngineAdmin
from tests.support.temperature_bias import temperature_bias

from hemostat_calibration.adapters.factors import LowRank
from hemostat_calibration.profiles.adapter import adapter_profile
from hemostat_calibration.profiles.profile import CalibrationProfile
from hemostat_engine.adapters import api_server
from hemostat_engine.adapters import folder as folders
from hemostat_engine.adapters import source as sources
from hemostat_engine.adapters.api_server import Resolver, Serving
from hemostat_engine.adapters.folder import AdapterFolder
from hemostat_engine.adapters.source import AdapterSource, Engine
from hemostat_engine.adapters.state import LORA_OFF, PROBE
from hemostat_engine.peers import Peers
from hemostat_engine.settings import Settings

BASE = "my-org/my-model"
FILES = {"a.json": b"{}", "b.bin": b"12"}


def adapter(seed: int = 0, rank: int = 2, vocab_size: int = 8) -> CalibrationProfile:
    rng = np.random.default_rng(seed)
    layer = LowRank(rng.normal(size=(rank, 4)).astype(np.float32), rng.normal(size=(3, rank)).astype(np.float32))
    return adapter_profile(model="m", vocab_size=vocab_size, layers={"model.layers.0.mlp.up_proj": layer})


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def admin() -> Iterator[EngineAdmin]:
    admin = EngineAdmin()
    yield admin
    admin.close()


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def make_source(admin: EngineAdmin, tmp_path: Path, clock: Clock) -> Iterator[Callable[..., AdapterSource]]:
    made = []

    def make(url: str | None = None, **more: Any) -> AdapterSource:
        folder = AdapterFolder(tmp_path, **more)
        made.append(folder)
        return AdapterSource(Peers(Settings(url or admin.url, TOKEN)), folder, clock=clock)

    yield make
    for folder in made:
        folder.close()


def find(source: AdapterSource, version: str, engine: Engine | None = None) -> Path | None:
    return source.find(version, BASE, engine or Engine())


def test_adapter_is_written_complete_into_a_private_folder(
    admin: EngineAdmin, make_source: Callable[..., AdapterSource]
) -> None:
    profile, source = adapter(), make_source()
    admin.files[profile.version] = profile.to_bytes()
    path = find(source, profile.version, Engine(vocab_size=8, max_rank=2))
    assert path is not None
    assert path.name == profile.version
    assert sorted(p.name for p in path.iterdir()) == ["adapter_config.json", "adapter_model.safetensors"]
    assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700
    # Asked for again, it is there.
    assert find(source, profile.version) == path
    assert admin.seen == [f"/api/v1/engine/profiles/{profile.version}"]


@pytest.mark.parametrize(
    ("profile", "engine", "said"),
    [
        (adapter(vocab_size=9), Engine(vocab_size=8), "vocabulary of 9"),
        (adapter(rank=4), Engine(max_rank=2), "--max-lora-rank"),
        (temperature_bias("m", 8, 2.0, np.zeros(8), 1.0), Engine(), "temperature_bias"),
    ],
)
def test_what_does_not_fit_is_refused_in_one_line(
    admin: EngineAdmin,
    make_source: Callable[..., AdapterSource],
    caplog: pytest.LogCaptureFixture,
    profile: CalibrationProfile,
    engine: Engine,
    said: str,
) -> None:
    admin.files[profile.version] = profile.to_bytes()
    with caplog.at_level(logging.WARNING):
        assert find(make_source(), profile.version, engine) is None
    (record,) = caplog.records
    assert said in record.getMessage()


def test_other_bytes_than_the_versions_are_refused(
    admin: EngineAdmin, make_source: Callable[..., AdapterSource], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    wanted, other = adapter(1), adapter(2)
    source = make_source()
    for data in (other.to_bytes(), wanted.to_bytes()[:-1], b"", b"\xff" * 100):
        admin.files[wanted.version] = data
        with caplog.at_level(logging.WARNING):
            assert find(source, wanted.version) is None
    assert len(caplog.records) == 4
    assert not list(tmp_path.glob(f"*/{wanted.version}"))


def test_missing_version_is_not_looked_for_again_for_some_seconds(
    admin: EngineAdmin, make_source: Callable[..., AdapterSource], clock: Clock
) -> None:
    source, version = make_source(), "a" * 32
    assert source.may_look_up(version)
    assert find(source, version) is None
    assert not source.may_look_up(version)
    clock.now += sources.MISSING_SECONDS - 0.1
    assert not source.may_look_up(version)
    clock.now += 0.2
    assert source.may_look_up(version)


def test_admin_port_that_is_down_is_asked_again_soon(make_source: Callable[..., AdapterSource], clock: Clock) -> None:
    source, version = make_source("http://127.0.0.1:9"), "a" * 32
    assert find(source, version) is None
    assert not source.may_look_up(version)
    clock.now += sources.RETRY_SECONDS + 0.1
    assert source.may_look_up(version)


def test_any_port_that_has_it_will_do(admin: EngineAdmin, make_source: Callable[..., AdapterSource]) -> None:
    profile, other = adapter(), EngineAdmin()
    try:
        admin.files[profile.version] = profile.to_bytes()
        assert find(make_source(f"http://127.0.0.1:9,{other.url},{admin.url}"), profile.version) is not None
    finally:
        other.close()


def test_names_that_clients_make_up_reach_the_admin_port_at_a_bounded_rate(
    make_source: Callable[..., AdapterSource], clock: Clock
) -> None:
    source = make_source()
    names = [f"{i:032x}" for i in range(1000)]
    assert sum(map(source.may_look_up, names)) == int(sources.MAX_LOOKUPS)
    clock.now += 3.0
    assert sum(map(source.may_look_up, names)) == int(3.0 * sources.LOOKUPS_PER_SECOND)


def test_what_is_remembered_is_bounded(
    make_source: Callable[..., AdapterSource], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sources, "MAX_REMEMBERED", 3)
    source = make_source("http://127.0.0.1:9")
    names = [f"{i:032x}" for i in range(5)]
    for name in names:
        assert find(source, name) is None
    assert [source.may_look_up(name) for name in names] == [True, True, False, False, False]


def test_full_disk_is_one_line_and_leaves_nothing_half_written(
    admin: EngineAdmin,
    make_source: Callable[..., AdapterSource],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    tmp_path: Path,
    clock: Clock,
) -> None:
    profile, source = adapter(), make_source()
    admin.files[profile.version] = profile.to_bytes()
    write = Path.write_bytes

    def full(self: Path, data: bytes) -> int:
        write(self, data[: len(data) // 2])
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch, caplog.at_level(logging.WARNING):
        patch.setattr(Path, "write_bytes", full)
        assert find(source, profile.version) is None
    (record,) = caplog.records
    assert "No space left on device" in record.getMessage()
    assert [p.name for p in tmp_path.glob("*/*")] == [folders.LOCK]
    clock.now += sources.RETRY_SECONDS + 0.1
    assert find(source, profile.version) is not None


def test_folder_is_bounded_and_keeps_what_is_listed_or_was_used_lately(tmp_path: Path) -> None:
    folder = AdapterFolder(tmp_path, max_adapters=2)
    listed = folder.write("a", FILES, (), 0.0)
    old = folder.write("b", FILES, (), 0.0)
    with pytest.raises(OSError, match="above the limits"):
        folder.write("c", FILES, ("a",), 1.0)
    later = folders.KEEP_SECONDS + 1.0
    new = folder.write("c", FILES, ("a",), later)
    assert (listed.is_dir(), old.is_dir(), new.is_dir()) == (True, False, True)
    assert folder.find("b", later) is None
    folder.close()
    assert not list(tmp_path.iterdir())


def test_folder_is_bounded_in_bytes(tmp_path: Path) -> None:
    folder = AdapterFolder(tmp_path, max_bytes=10)
    with pytest.raises(OSError, match="above the limits"):
        folder.write("a", {"x": b"1" * 11}, (), 0.0)
    folder.close()


def test_folder_of_a_killed_process_is_removed_and_that_of_a_live_one_kept(tmp_path: Path) -> None:
    killed = (
        "import os, sys; from pathlib import Path; from hemostat_engine.adapters.folder import AdapterFolder;"
        "AdapterFolder(Path(sys.argv[1])).write('a', {'x': b'1'}, (), 0.0); os.kill(os.getpid(), 9)"
    )
    subprocess.run([sys.executable, "-c", killed, str(tmp_path)], check=False, timeout=60)
    (left,) = tmp_path.iterdir()
    live, mine = AdapterFolder(tmp_path), AdapterFolder(tmp_path)
    kept = live.write("a", FILES, (), 0.0)
    assert not left.exists()
    mine.write("a", FILES, (), 0.0)
    assert kept.is_dir()
    live.close()
    mine.close()
    os.makedirs(tmp_path / f"{folders.PREFIX}x")  # without a lock: not ours to remove
    other = AdapterFolder(tmp_path)
    other.write("a", FILES, (), 0.0)
    assert (tmp_path / f"{folders.PREFIX}x").is_dir()
    other.close()


def test_a_folder_that_was_removed_is_made_again(tmp_path: Path) -> None:
    """As by a program that cleans the folder for temporary files."""
    folder = AdapterFolder(tmp_path)
    shutil.rmtree(folder.write("a", FILES, (), 0.0).parent)
    assert folder.find("a", 1.0) is None
    written = folder.write("a", FILES, (), 2.0)
    assert folder.find("a", 3.0) == written
    folder.close()
    assert list(tmp_path.iterdir()) == []


class Request(SimpleNamespace):
    """vLLM's LoRARequest."""


async def test_resolver_answers_versions_only(admin: EngineAdmin, make_source: Callable[..., AdapterSource]) -> None:
    profile = adapter()
    admin.files[profile.version] = profile.to_bytes()
    resolver = Resolver(make_source(), Request)
    for name in ("", "sql", "A" * 32, "a" * 31, "a" * 33, "../" + "a" * 29, f"{profile.version}\n"):
        assert await resolver.resolve_lora(BASE, name) is None
    assert admin.seen == []
    with pytest.raises(ValueError, match="Hemostat's resolver"):
        await resolver.resolve_lora(BASE, PROBE)
    assert admin.seen == []
    result = await resolver.resolve_lora(BASE, profile.version)
    assert result.lora_name == profile.version
    assert Path(result.lora_path).name == profile.version
    assert await resolver.resolve_lora(BASE, "b" * 32) is None


async def test_without_lora_every_version_is_refused_with_the_flag_and_none_is_fetched(
    admin: EngineAdmin, make_source: Callable[..., AdapterSource], caplog: pytest.LogCaptureFixture
) -> None:
    wrapped: Any = type("Wrapped", (Models,), {})
    serving = Serving()
    serving.install(wrapped)
    models = wrapped(lora=False)
    assert [record.getMessage() for record in caplog.records] == [f"adapters are off: {LORA_OFF}"]
    assert models.engine_client is models
    profile = adapter()
    admin.files[profile.version] = profile.to_bytes()
    resolver = Resolver(make_source(), Request, serving.engine)
    with pytest.raises(
        ValueError, match=f"adapter {profile.version} cannot be loaded: LoRA is not enabled: .*--enable"
    ):
        await resolver.resolve_lora(BASE, profile.version)
    assert await resolver.resolve_lora(BASE, "a-client's") is None
    assert admin.seen == []


async def test_slow_source_blocks_neither_the_event_loop_nor_more_than_a_few_requests(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    import threading

    release = threading.Event()
    asked = []

    class Slow:
        def may_look_up(self, _: str) -> bool:
            return True

        def find(self, version: str, *_: Any) -> Path | None:
            asked.append(version)
            release.wait(60)
            return None

    monkeypatch.setattr(api_server, "RESOLVE_SECONDS", 0.05)
    thread = ThreadPoolExecutor(1)
    with monkeypatch.context() as making:
        making.setattr("concurrent.futures.ThreadPoolExecutor", lambda *_: thread)
        resolver = Resolver(Slow(), Request)  # type: ignore[arg-type]
    names = [f"{i:032x}" for i in range(1, 30)]
    result = await asyncio.gather(*(resolver.resolve_lora(BASE, name) for name in names))
    assert result == [None] * len(names)
    release.set()
    thread.shutdown()
    assert len(asked) <= api_server.MAX_WAITING


class Models:
    """vLLM's OpenAIServingModels, as far as it is used."""

    def __init__(self, error: Exception | None = None, lora: bool = True) -> None:
        self.lora_requests: dict[str, Any] = {}
        self.removed: list[int] = []
        self.error = error
        self.engine_client = self
        self.vllm_config = SimpleNamespace(lora_config=SimpleNamespace(max_lora_rank=16) if lora else None)
        self.model_config = SimpleNamespace(get_vocab_size=lambda: 8)

    async def unload_lora_adapter(self, request: Any) -> str:
        return "removed" if self.lora_requests.pop(request.lora_name, None) else "not found"

    async def remove_lora(self, ident: int) -> bool:
        if self.error:
            raise self.error
        self.removed.append(ident)
        return True


@pytest.mark.parametrize("error", [None, RuntimeError("engine is gone")])
async def test_unloading_frees_the_engines_slot(error: Exception | None, caplog: pytest.LogCaptureFixture) -> None:
    wrapped: Any = type("Wrapped", (Models,), {})
    serving = Serving()
    serving.install(wrapped)
    serving.install(wrapped)
    assert serving.engine() == Engine()
    models = wrapped(error)
    version = "a" * 32
    for ident, name in enumerate((version, "clients-own"), 1):
        models.lora_requests[name] = SimpleNamespace(lora_name=name, lora_int_id=ident)
    result = serving.engine()
    assert (result.vocab_size, result.max_rank, result.lora) == (8, 16, True)
    assert set(result.listed()) == {version, "clients-own"}
    for name, answer in ((version, "removed"), (version, "not found"), ("clients-own", "removed")):
        assert await models.unload_lora_adapter(SimpleNamespace(lora_name=name)) == answer
    # Once, and only ours: vLLM's clients get what they know.
    assert models.removed == ([] if error else [1])
    assert len(caplog.records) == (1 if error else 0)
