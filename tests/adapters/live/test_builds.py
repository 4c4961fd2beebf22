"""Texts, the process that makes adapters of them, and whatever can become of it."""

from __future__ import annotations

import asyncio
import json
import os
import stat
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tests.support import fake_builder, tiny_checkpoints
from tests.support.children import children
from tests.support.constants import with_constants
from tests.support.samples import values
from tests.support.waiting import until

from hemostat.adapters.live import builder, client
from hemostat.adapters.live.client import AdapterLearner, AdapterTarget
from hemostat.adapters.live.collected_texts import MAX_TEXT_TOKENS, Texts
from hemostat.adapters.live.folders import CheckpointFolders, FolderError, find_folders
from hemostat.adapters.live.job import (
    PREFIX,
    InvalidResult,
    Job,
    JobFolder,
    delete_left_behind,
    linear_shapes,
    read_result,
)
from hemostat.checkpoints.checkpoint_digest import checkpoint_digest
from hemostat.config.schema import Adapter
from hemostat.ipc.turns import Turns
from hemostat.metrics import names
from hemostat_calibration.profiles.adapter import adapter_layers
from hemostat_calibration.profiles.profile import CalibrationProfile

FAKE = (sys.executable, str(Path(fake_builder.__file__)))
SECRET = 499
WITHOUT_COMPRESSED_TENSORS = """
import runpy, sys
sys.modules["compressed_tensors"] = None
runpy.run_module(sys.argv.pop(1), run_name="__main__", alter_sys=True)
"""


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> CheckpointFolders:
    return tiny_checkpoints.make_pair(tmp_path_factory.mktemp("pair"))


@pytest.fixture(autouse=True)
def own_temporary_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "temporary"
    folder.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    return folder


class Receiver:
    def __init__(self) -> None:
        self.last = 0
        self.accepting = True
        self.testing = False
        self.proposed: list[tuple[CalibrationProfile, dict[str, Any]]] = []

    def accepts(self, family: str, tokens: int) -> bool:
        return self.accepting and tokens >= 2 * self.last

    def is_testing(self, family: str) -> bool:
        return self.testing

    def propose(self, profile: CalibrationProfile, why: str, report: Mapping[str, Any]) -> bool:
        assert why
        self.proposed.append((profile, dict(report)))
        self.last = report["tokens"]
        return True


def target(folders: CheckpointFolders, **more: Any) -> AdapterTarget:
    return AdapterTarget("m", tiny_checkpoints.VOCAB, folders, **more)


@asynccontextmanager
async def learner(
    receiver: Receiver,
    command: Sequence[str] = FAKE,
    turns: Turns | None = None,
    clock: Callable[[], float] = time.monotonic,
    **settings: Any,
) -> AsyncIterator[AdapterLearner]:
    given = {"enabled": True, "max_tokens": 400, "memory_mib": 512} | settings
    limited = with_constants(Adapter, min_tokens=100)(**given)
    made = AdapterLearner(limited, receiver, command=command, turns=turns, clock=clock)
    running = asyncio.create_task(made.run())
    try:
        yield made
    finally:
        running.cancel()
        await asyncio.gather(running, return_exceptions=True)


def texts(adapter_learner: AdapterLearner, count: int, first: int = 0) -> None:
    """Of 20 tokens each."""
    for n in range(first, first + count):
        ids = np.random.default_rng(n).integers(0, SECRET, 20).astype(np.int32)
        adapter_learner.update(n.to_bytes(16, "little"), ids[:8], ids[8:])


def no_process_is_left() -> bool:
    return not children("fake_builder")


def job_folders() -> list[Path]:
    return list(Path(tempfile.gettempdir()).glob(f"{PREFIX}*"))


# --- texts ---------------------------------------------------------------------------------------------------------


def test_the_newest_texts_are_kept_and_a_later_turn_takes_the_place_of_the_earlier_one() -> None:
    kept = Texts(100)
    for n in range(20):
        kept.update(bytes([n]), np.full(4, n, np.int32), np.full(6, n, np.int32))
    assert [int(text.output[0]) for text in kept.all()] == list(range(10, 20))
    assert kept.tokens == 100
    kept.update(bytes([12]), np.full(14, 12, np.int32), np.full(6, 99, np.int32))
    assert [int(text.output[0]) for text in kept.all()] == [11, 13, 14, 15, 16, 17, 18, 19, 99], "and the oldest went"
    assert kept.tokens == sum(map(len, kept.all())) == 100


def test_of_a_long_text_the_newest_tokens_are_kept() -> None:
    kept = Texts(10_000)
    kept.update(b"a", np.arange(3000, dtype=np.int32), np.arange(3000, 3010, dtype=np.int32))
    kept.update(b"b", np.arange(5, dtype=np.int32), np.arange(3000, dtype=np.int32))
    learning, other = kept.all()
    assert len(learning) == MAX_TEXT_TOKENS
    assert len(other) == MAX_TEXT_TOKENS
    assert learning.prompt[-1] == 2999
    assert learning.output.tolist() == list(range(3000, 3010))
    assert len(other.prompt) == 1
    assert other.output[-1] == 2999


# --- folders -------------------------------------------------------------------------------------------------------


def test_the_folders_are_those_of_the_settings_or_those_that_the_models_were_loaded_from(
    folders: CheckpointFolders, tmp_path: Path
) -> None:
    reference, compressed = folders.reference, folders.compressed
    assert find_folders(Adapter(), None, reference, str(compressed)) == folders
    assert find_folders(Adapter(), str(reference), None, str(compressed)) == folders
    assert find_folders(Adapter(compressed=compressed), "org/name", reference, "org/name-w4") == folders
    empty = tmp_path / "empty"
    empty.mkdir()
    for settings, model, root, says in (
        (Adapter(), "org/name", str(compressed), "reference.folder: name the folder"),
        (Adapter(), str(reference), "org/name-w4", "adapter.compressed: name the folder .* org/name-w4, which is no"),
        (Adapter(), str(reference), "", "adapter.compressed: name the folder .* names none"),
        (Adapter(compressed=empty), str(reference), "", r"adapter.compressed: .*empty holds no \.safetensors"),
        (Adapter(compressed=reference), str(reference), "", "adapter.compressed: .* is also the reference's"),
    ):
        with pytest.raises(FolderError, match=says) as raised:
            find_folders(settings, model, None, root)
        assert "\n" not in str(raised.value)
    with pytest.raises(FolderError, match=r"reference.folder: .*empty holds no \.safetensors"):
        find_folders(Adapter(), None, empty, str(compressed))
    with pytest.raises(FolderError, match=r"reference.model: .*empty holds no \.safetensors"):
        find_folders(Adapter(), str(empty), None, str(compressed))


def test_the_folder_of_a_job_is_private_and_deleted_at_the_next_start_unless_it_is_in_use(
    folders: CheckpointFolders,
) -> None:
    job = Job(folders, ("", ""), "m", 1, [], {})
    with pytest.raises(ValueError, match="concatenate"):
        JobFolder(job)
    assert job_folders() == [], "also where it could not be written"
    kept = Texts(100)
    kept.update(b"a", np.array([1], np.int32), np.array([2], np.int32))
    used = JobFolder(Job(folders, ("", ""), "m", 1, kept.all(), {}))
    assert stat.S_IMODE(used.path.stat().st_mode) == 0o700
    left = JobFolder(Job(folders, ("", ""), "m", 1, kept.all(), {}))
    for descriptor in Path("/proc/self/fd").iterdir():  # as the kernel does where its process is killed
        if descriptor.is_symlink() and Path(os.readlink(descriptor)).is_relative_to(left.path):
            os.close(int(descriptor.name))
    assert delete_left_behind() == 1
    assert job_folders() == [used.path]
    used.delete()
    assert job_folders() == []


# --- builds --------------------------------------------------------------------------------------------------------


async def test_an_adapter_is_made_of_enough_tokens_and_again_of_twice_as_many(folders: CheckpointFolders) -> None:
    receiver = Receiver()
    async with learner(receiver) as learning:
        texts(learning, 10)
        assert learning.tokens == 0, "nothing is collected before it is known for what"
        learning.set_target(target(folders, reference_digest=checkpoint_digest(str(folders.reference), None)))
        texts(learning, 4)
        await asyncio.sleep(0.1)
        assert learning.state == "collecting"
        texts(learning, 1, 4)
        await until(lambda: len(receiver.proposed) == 1)
        assert learning.state == "collecting"
        profile, report = receiver.proposed[0]
        assert report["tokens"] == 100
        assert learning.status()["next_tokens"] == 200
        assert learning.last_build is not None
        assert learning.last_build["version"] == profile.version
        assert set(adapter_layers(profile)) == {n for n in linear_shapes(folders.reference) if n.endswith("_proj")}
        texts(learning, 4, 5)
        await asyncio.sleep(0.1)
        assert len(receiver.proposed) == 1
        texts(learning, 40, 9)
        await until(lambda: len(receiver.proposed) == 2)
        assert learning.tokens == 400, "bounded"
        assert receiver.proposed[1][1] | {"tokens": 980, "made_from_tokens": 400} == receiver.proposed[1][1]
        await asyncio.sleep(0.1)
        texts(learning, 40, 50)
        assert learning.state == "collecting"
        assert learning.status()["next_tokens"] == 1960
        result = values(learning.samples())
        assert result[names.ADAPTER_BUILDS, "proposed"] == 2
        assert result[names.ADAPTER_BUILDS, "ended"] == 0, "so that an alert sees the first one"
        assert learning.failing == ""
        assert result[names.ADAPTER_RANK,] == 2
        assert (names.ADAPTER_HELD_OUT_RECOVERED_RATIO,) not in result, "nothing was held out"
        texts(learning, 20, 90)
        await until(lambda: len(receiver.proposed) == 3)
        assert receiver.proposed[2][1]["made_from_tokens"] == 400, "of newer texts: as many as are kept"
    assert job_folders() == []


async def test_nothing_is_made_that_would_not_be_tested(folders: CheckpointFolders) -> None:
    """As after a restart: what serves was made from more."""
    receiver = Receiver()
    receiver.last = 150
    async with learner(receiver) as learning:
        learning.set_target(target(folders))
        texts(learning, 14)
        await asyncio.sleep(0.2)
        assert learning.state == "collecting"
        texts(learning, 1, 14)
        await until(lambda: len(receiver.proposed) == 1)
        assert receiver.proposed[0][1]["tokens"] == 300


async def test_while_an_adapter_is_tested_none_is_made_and_the_next_one_is_made_of_more_texts(
    folders: CheckpointFolders, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(client, "RECHECK_SECONDS", 0.01)
    receiver, now = Receiver(), [1000.0]
    async with learner(receiver, clock=lambda: now[0]) as learning:
        learning.set_target(target(folders))
        receiver.testing = True
        texts(learning, 30)
        await until(lambda: learning.detail == client.TESTING)
        assert learning.status()["next_tokens"] == 1200
        receiver.testing = False
        await until(lambda: learning.detail == "")
        texts(learning, 29, 30)
        now[0] += client.PAUSE_AFTER_TEST_SECONDS
        await asyncio.sleep(0.1)
        assert learning.outcomes == {}, "not of as many texts as were known while the last one was tested"
        now[0] -= 1.0
        texts(learning, 1, 59)
        await asyncio.sleep(0.1)
        assert learning.state == "collecting", "soon after a test none is made"
        now[0] += 1.0
        await until(lambda: len(receiver.proposed) == 1)
        assert receiver.proposed[0][1]["tokens"] == 1200


async def test_a_build_and_another_heavy_job_take_turns(
    folders: CheckpointFolders, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(client, "RECHECK_SECONDS", 0.01)
    turns, receiver = Turns(cores=2), Receiver()
    assert turns.take("another job")
    async with learner(receiver, turns=turns) as learning:
        learning.set_target(target(folders))
        texts(learning, 5)
        await until(lambda: learning.detail == client.OTHER_WORK)
        assert no_process_is_left()
        turns.give_back("another job")
        await until(lambda: learning.state == "building")
        assert not turns.take("another job"), "the build has its turn"
        await until(lambda: len(receiver.proposed) == 1)
        await until(lambda: turns.take("another job"))


@pytest.mark.parametrize("stage", [0, 2, len(fake_builder.STAGES) - 1])
async def test_killed_at_any_moment_it_is_started_again_and_continues(
    folders: CheckpointFolders, monkeypatch: pytest.MonkeyPatch, stage: int
) -> None:
    monkeypatch.setattr(client, "BACKOFF", (0.01,))
    monkeypatch.setenv(fake_builder.ENVIRONMENT, f"killed:{stage}")
    receiver = Receiver()
    async with learner(receiver) as learning:
        learning.set_target(target(folders))
        texts(learning, 5)
        await until(lambda: len(receiver.proposed) == 1)
        assert learning.restarts == 1
        assert learning.outcomes == {"proposed": 1}


async def test_killed_again_and_again_it_waits(folders: CheckpointFolders, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(client, "BACKOFF", (0.01,))
    monkeypatch.setenv(fake_builder.ENVIRONMENT, "killed_always")
    receiver = Receiver()
    async with learner(receiver) as learning:
        learning.set_target(target(folders))
        texts(learning, 5)
        await until(lambda: learning.outcomes == {"ended": 1})
        assert learning.restarts == client.MAX_ATTEMPTS - 1
        assert learning.state == "collecting"
        assert "code -9" in learning.detail
        assert learning.failing == learning.detail
        texts(learning, 20, 5)
        await asyncio.sleep(0.1)
        assert learning.state == "collecting", "not at once"
    assert receiver.proposed == []
    assert job_folders() == []


@pytest.mark.parametrize(
    ("fault", "says"),
    [
        ("half", "profile"),
        ("bit", "is not the report's"),
        ("nan", "NaN"),
        ("half_report", r"report\.json"),
        ("nothing", r"report\.json"),
        ("wrong_base", "adapter.compressed: it was made from other weights"),
        ("other_model", "it is for another"),
        ("misfit", "_proj: the correction is"),
    ],
)
def test_a_result_that_is_damaged_or_about_something_else_is_invalid(
    folders: CheckpointFolders, monkeypatch: pytest.MonkeyPatch, fault: str, says: str
) -> None:
    kept = Texts(100)
    kept.update(b"a", np.arange(9, dtype=np.int32), np.arange(9, dtype=np.int32))
    digests = checkpoint_digest(str(folders.reference), None), checkpoint_digest(str(folders.compressed), None)
    job = Job(folders, digests, "m", tiny_checkpoints.VOCAB, kept.all(), {})
    folder = JobFolder(job)
    monkeypatch.setenv(fake_builder.ENVIRONMENT, "")
    assert fake_builder.main(folder.path) == 0
    assert read_result(folder.path, job).profile.family == "adapter"
    for name in ("report.json", "profile.safetensors"):
        (folder.path / name).unlink()
    monkeypatch.setenv(fake_builder.ENVIRONMENT, fault)
    assert fake_builder.main(folder.path) == 0
    with pytest.raises(InvalidResult, match=says) as raised:
        read_result(folder.path, job)
    assert "\n" not in str(raised.value)
    folder.delete()


@pytest.mark.parametrize(
    ("fault", "outcome", "says"),
    [
        ("wrong_base", "invalid", "adapter.compressed: it was made from other weights"),
        ("refuses", "refused", "adapter.compressed: cannot be read"),
        ("disk", "disk", "File too large"),
        ("memory:700", "memory", "more than adapter.memory_mib, 512 MiB"),
    ],
)
async def test_what_cannot_be_used_is_never_proposed_and_counted(
    folders: CheckpointFolders,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    fault: str,
    outcome: str,
    says: str,
) -> None:
    monkeypatch.setattr(client, "MAX_ATTEMPTS", 1)
    monkeypatch.setenv(fake_builder.ENVIRONMENT, fault)
    receiver = Receiver()
    async with learner(receiver) as learning:
        learning.set_target(target(folders))
        texts(learning, 5)
        await until(lambda: bool(learning.outcomes))
        assert learning.outcomes == {outcome: 1}
        assert says in learning.detail
        errors = [record.getMessage() for record in caplog.records if "no adapter was made" in record.getMessage()]
        assert len(errors) == 1
        assert says in errors[0]
        assert "\n" not in errors[0]
        assert values(learning.samples())[names.ADAPTER_BUILDS, outcome] == 1
    assert receiver.proposed == []
    assert job_folders() == []
    assert no_process_is_left()


async def test_without_a_package_that_it_needs_a_build_is_refused_once_and_reported(tmp_path: Path) -> None:
    """Not tried again and again: that a package is missing does not pass."""
    pair = tiny_checkpoints.make_pair(tmp_path)
    config = json.loads((pair.compressed / "config.json").read_text())
    quantization = {"quant_method": "compressed-tensors", "format": "pack-quantized", "config_groups": {}}
    (pair.compressed / "config.json").write_text(json.dumps(config | {"quantization_config": quantization}))
    command = (sys.executable, "-c", WITHOUT_COMPRESSED_TENSORS, builder.COMMAND[-1])
    async with learner(Receiver(), command=command, memory_mib=4096) as learning:
        learning.set_target(target(pair))
        texts(learning, 5)
        await until(lambda: learning.outcomes == {"refused": 1}, 120)
        assert learning.state == "unavailable"
        assert "not installed: compressed-tensors; pip install 'compressed-tensors<" in learning.detail
        assert learning.restarts == 0


async def test_a_folder_that_is_not_what_the_reference_serves_is_refused(folders: CheckpointFolders) -> None:
    receiver = Receiver()
    async with learner(receiver) as learning:
        learning.set_target(target(folders, reference_digest="0" * 32))
        texts(learning, 5)
        await until(lambda: learning.outcomes == {"refused": 1})
        assert learning.state == "unavailable"
        assert learning.failing.startswith("reference.folder: ")
        learning.stop("no folder", unavailable=True)
        learning.stop("no folder", unavailable=True)
        assert (learning.outcomes, learning.failing) == ({"refused": 2}, "no folder"), "a build that cannot begin, once"
        learning.set_target(target(folders))
        assert learning.failing == ""
    assert receiver.proposed == []


async def test_a_job_that_cannot_be_written_is_tried_again_later(
    folders: CheckpointFolders, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(client, "BACKOFF", (0.01,))
    full = True
    savez = np.savez

    def save(*given: Any, **arrays: Any) -> None:
        if full:
            raise OSError(28, "No space left on device")
        savez(*given, **arrays)

    monkeypatch.setattr(np, "savez", save)
    now = 0.0
    receiver = Receiver()
    async with learner(receiver, clock=lambda: now) as learning:
        learning.set_target(target(folders))
        texts(learning, 5)
        await until(lambda: learning.outcomes == {"disk": 1})
        assert "No space left on device" in learning.detail
        assert job_folders() == []
        full, now = False, client.RETRY_SECONDS
        texts(learning, 1, 5)
        await until(lambda: len(receiver.proposed) == 1)


@pytest.mark.parametrize("how", ["stop", "target", "cancel"])
async def test_stopped_the_process_ends_and_the_texts_are_deleted(
    folders: CheckpointFolders, monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    monkeypatch.setenv(fake_builder.ENVIRONMENT, "hangs")
    receiver = Receiver()
    async with learner(receiver) as learning:
        learning.set_target(target(folders))
        texts(learning, 5)
        await until(lambda: "0/" in learning.detail)
        assert os.getpriority(os.PRIO_PROCESS, 0) <= 19
        (folder,) = job_folders()
        if how == "stop":
            learning.stop("calibration is off")
        elif how == "target":
            learning.set_target(AdapterTarget("another", tiny_checkpoints.VOCAB, folders))
        if how != "cancel":
            await until(no_process_is_left)
            await until(lambda: not folder.exists())
            assert learning.tokens == 0
            assert learning.state == ("off" if how == "stop" else "collecting")
            assert learning.outcomes == {}
    assert no_process_is_left()
    assert job_folders() == []


async def test_a_process_without_progress_is_ended(folders: CheckpointFolders, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(fake_builder.ENVIRONMENT, "hangs")
    monkeypatch.setattr(builder, "STALLED_SECONDS", 2.0)
    monkeypatch.setattr(client, "MAX_ATTEMPTS", 1)
    async with learner(Receiver()) as learning:
        learning.set_target(target(folders))
        texts(learning, 5)
        await until(lambda: learning.outcomes == {"stalled": 1})
    assert no_process_is_left()
