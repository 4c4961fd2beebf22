"""A local Ray cluster writes the same files as this process, to the byte, also if its workers are killed."""

from __future__ import annotations

import asyncio
import os
import random
import signal
import threading
import time
from pathlib import Path
from typing import Any

import pytest
from tests.support.captures import capture
from tests.support.scorer_bench import FakeReference

from hemostat.reference.protocol import ReferenceScores, ScoreRequest
from hemostat.scoring.offline.folder import score_folder
from hemostat.scoring.offline.on_ray import Job, score_on_ray
from hemostat.scoring.spool.columns import to_rows
from hemostat.scoring.spool.keys import SpoolError
from hemostat.scoring.spool.segments import segments, write_segment
from hemostat.scoring.spool.spooled import Spooled

pytestmark = pytest.mark.slow
"""Ray is no part of the test environment: install it by `.[ray]`, and run `make test-slow`."""

ROOT = Path(__file__).resolve().parents[2]
TOKEN = f"{os.getpid()}-{time.time_ns()}"
"""The mark in the environment of the workers of this run."""


class SlowReference(FakeReference):
    """Takes a moment for each capture, so that a kill comes in the middle of a part."""

    async def score(self, request: ScoreRequest) -> ReferenceScores:
        await asyncio.sleep(0.05)
        return await super().score(request)


@pytest.fixture(scope="module")
def cluster() -> Any:
    environment = {"HEMOSTAT_TEST": TOKEN, "PYTHONPATH": f"{ROOT}:{os.environ.get('PYTHONPATH', '')}"}
    ray = pytest.importorskip("ray", reason="ray is not installed")
    ray.init(
        num_cpus=2,
        include_dashboard=False,
        log_to_driver=False,
        logging_level="ERROR",
        runtime_env={"env_vars": environment},
    )
    yield ray
    ray.shutdown()


def spool(folder: Path, count: int, each: int) -> None:
    folder.mkdir()
    for number in range(count):
        at = 1_700_000_000.0 + 60 * number
        rows = to_rows([Spooled(capture(f"{number}-{n}", client=b"k" * 8), at + n) for n in range(each)])
        write_segment(folder / f"captures-{round(at * 1000):013d}-00000000.parquet", rows, None)


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in segments(folder)}


async def expected(tmp_path: Path) -> dict[str, bytes]:
    (tmp_path / "local").mkdir()
    await score_folder(
        tmp_path / "in", tmp_path / "local", FakeReference(), key=None, model=None, progress=lambda *_: None
    )
    return contents(tmp_path / "local")


def workers() -> list[int]:
    """Returns the processes of this run's actors."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                command, given = (entry / "cmdline").read_bytes(), (entry / "environ").read_bytes()
            except OSError:
                continue
            if command.startswith(b"ray::") and b"MapBatches" in command and TOKEN.encode() in given:
                found.append(int(entry.name))
    return found


def score(tmp_path: Path, reference: type[FakeReference] = FakeReference, key: str = "plain") -> int:
    (tmp_path / "out").mkdir(exist_ok=True)
    job = Job(tmp_path / "in", tmp_path / "out", key, None, reference)
    return score_on_ray(job, address=None, workers=2, gpus=0.0, progress=lambda *_: None)


async def test_it_writes_the_same_files_and_goes_on(cluster: Any, tmp_path: Path) -> None:
    spool(tmp_path / "in", 6, 4)
    assert score(tmp_path) == 24
    assert contents(tmp_path / "out") == await expected(tmp_path)
    assert score(tmp_path) == 0
    segments(tmp_path / "out")[2].unlink()
    assert score(tmp_path) == 4
    assert contents(tmp_path / "out") == contents(tmp_path / "local")


def test_what_cannot_be_read_is_left_out_in_one_line(
    cluster: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    spool(tmp_path / "in", 2, 1)
    (tmp_path / "in/captures-1700000000001-00000000.parquet").write_bytes(b"no parquet")
    assert score(tmp_path) == 2
    assert caplog.text.count("left out: ") == 1
    for path in (*segments(tmp_path / "in")[::2], *segments(tmp_path / "out")):
        path.unlink()
    with pytest.raises(SpoolError, match="cannot be read"):
        score(tmp_path)


async def killed(tmp_path: Path, kills: int) -> None:
    spool(tmp_path / "in", 6 + 10 * kills, 25)
    generator, over, done = random.Random(3), threading.Event(), 0

    def kill() -> None:
        nonlocal done
        while done < kills and not over.wait(generator.uniform(0.2, 1.0)):
            if found := workers():
                os.kill(generator.choice(found), signal.SIGKILL)
                done += 1

    thread = threading.Thread(target=kill)
    thread.start()
    try:
        score(tmp_path, SlowReference)
    finally:
        over.set()
        thread.join()
    print(f"{done} workers were killed")
    assert done == kills
    assert contents(tmp_path / "out") == await expected(tmp_path)


async def test_a_worker_that_is_killed_changes_nothing(cluster: Any, tmp_path: Path) -> None:
    await killed(tmp_path, 1)


@pytest.mark.slow
async def test_workers_that_are_killed_at_random_moments_change_nothing(cluster: Any, tmp_path: Path) -> None:
    await killed(tmp_path, 30)
