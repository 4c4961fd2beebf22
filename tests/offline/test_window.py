"""The spool is scored in a window of the day: in order, each row once or not at all, and nothing is treated by it."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest
from tests.support.captures import capture
from tests.support.control import listen_to_policies, settings, told
from tests.support.scorer_bench import FakeReference

from hemostat.config.schema import Settings
from hemostat.control.composition import Control
from hemostat.ipc.messages import Capture
from hemostat.reference.protocol import FailureReason, ReferenceFailure
from hemostat.scoring.offline.evidence_time import EvidenceTime
from hemostat.scoring.offline.stages import OfflineModels, offline_stages
from hemostat.scoring.offline.window import BATCH_ROWS, SpoolScoring, is_open
from hemostat.scoring.spool.columns import to_rows
from hemostat.scoring.spool.keys import SpoolKey
from hemostat.scoring.spool.segments import taken, write_segment
from hemostat.scoring.spool.spooled import Spooled
from hemostat_calibration.records import TokenRecord

KEY = SpoolKey(bytes(range(32)))
DAY = 1_700_006_400.0
"""Midnight, UTC."""


class World:
    """A spool with segments of `rows` rows each, and a reference that a test has fail."""

    def __init__(self, folder: Path, rows: int = BATCH_ROWS + 5, segments: int = 2) -> None:
        self.folder, self.wall, self.active = folder, DAY + 3 * 3600, True
        self.handed: list[str] = []
        self.dies_after: int | None = None
        """The number of rows that are handed on before the process ends."""
        self.times: list[float] = []
        self.saves = 0
        self.reference = FakeReference()
        for number in range(segments):
            at = DAY - 7200.0 + 60.0 * number
            made = [Spooled(capture(f"{number}-{row}"), at + row) for row in range(rows)]
            write_segment(folder / f"captures-{round(at * 1000):013d}-00000000.parquet", to_rows(made), KEY)
        self.expected = [f"{number}-{row}" for number in range(segments) for row in range(rows)]

    async def process(self) -> SpoolScoring:
        models = OfflineModels(self.reference)
        models.set_pair("m", await self.reference.start())
        time = EvidenceTime(lambda: self.wall)

        def emit(record: TokenRecord, complete: Capture, probability: float) -> None:
            if len(self.handed) == self.dies_after:
                raise KeyboardInterrupt
            assert record.request_id == complete.request_id
            self.handed.append(record.request_id)
            self.times.append(time.now())

        def save() -> None:
            self.saves += 1

        return SpoolScoring(
            self.folder,
            KEY,
            offline_stages(models),
            emit=emit,
            save=save,
            evidence_time=time,
            may_score=lambda: is_open((120, 300), self.wall) and self.active,
            wall=lambda: self.wall,
        )


async def test_rows_are_scored_in_their_order_and_once(tmp_path: Path) -> None:
    world = World(tmp_path)
    scoring = await world.process()
    await scoring.look()
    await scoring.look()
    await (await world.process()).look()
    assert world.handed == world.expected
    assert world.times == sorted(world.times)
    assert world.times[0] == DAY - 7200.0
    assert (scoring.scored, scoring.evidence_time.began) == (len(world.expected), DAY - 7200.0)
    assert world.saves > 0


async def test_nothing_is_scored_outside_of_the_window_or_by_a_process_that_is_not_active(tmp_path: Path) -> None:
    world = World(tmp_path, rows=3, segments=1)
    scoring = await world.process()
    for world.wall, world.active in ((DAY + 3600, True), (DAY + 5 * 3600, True), (DAY + 3 * 3600, False)):
        await scoring.look()
    assert not world.handed
    world.active = True
    await scoring.look()
    assert world.handed == world.expected


async def test_a_window_that_closes_ends_a_segment_which_goes_on_the_next_day(tmp_path: Path) -> None:
    world = World(tmp_path)

    def close() -> None:
        world.wall = DAY + 5 * 3600

    world.reference.before = close
    await (await world.process()).look()
    assert world.handed == world.expected[:BATCH_ROWS]
    world.reference.before, world.wall = (lambda: None), DAY + 27 * 3600
    await (await world.process()).look()
    assert world.handed == world.expected


async def test_an_error_of_our_own_costs_its_segment_and_no_process(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    world = World(tmp_path, rows=3)

    def fail() -> None:
        if len(world.reference.asked) == 2:
            raise RuntimeError("a bug")

    world.reference.before = fail
    scoring = await world.process()
    await scoring.look()
    assert (scoring.left_out, world.handed) == (1, world.expected[3:])
    assert "left out from row 0 on" in caplog.text


@pytest.mark.parametrize("reason", [FailureReason.DOWN, FailureReason.TIMEOUT])
async def test_a_reference_that_is_down_loses_no_row(tmp_path: Path, reason: FailureReason) -> None:
    world = World(tmp_path)

    def fail() -> None:
        if len(world.reference.asked) > BATCH_ROWS + 2:
            raise ReferenceFailure(reason, "gone")

    world.reference.before = fail
    scoring = await world.process()
    await scoring.look()
    assert world.handed == world.expected[:BATCH_ROWS]
    world.reference.before = lambda: None
    again = await world.process()
    await again.look()
    assert world.handed == world.expected


async def test_a_process_that_ends_at_any_moment_hands_on_each_row_once_or_not_at_all(tmp_path: Path) -> None:
    """It ends while a batch is handed on: no row of the batch comes again."""
    world = World(tmp_path)
    world.dies_after = 7
    with pytest.raises(KeyboardInterrupt):
        await (await world.process()).look()
    world.dies_after = None
    await (await world.process()).look()
    assert len(world.handed) == len(set(world.handed)) == len(world.expected) - (BATCH_ROWS - 7)


async def test_what_cannot_be_read_is_left_out_in_one_line(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    world = World(tmp_path, rows=2)
    (tmp_path / "captures-0000000000000-00000000.parquet").write_bytes(b"no parquet")
    scoring = await world.process()
    await scoring.look()
    await scoring.look()
    assert world.handed == world.expected
    assert caplog.text.count("left out") == 1
    assert scoring.left_out == 1


async def test_a_row_that_can_never_be_scored_has_its_reason(tmp_path: Path) -> None:
    world = World(tmp_path, rows=0, segments=0)
    made = [Spooled(capture("a"), DAY), Spooled(capture("b", model="other"), DAY)]
    path = tmp_path / "captures-1700000000000-00000000.parquet"
    write_segment(path, to_rows(made), KEY)
    scoring = await world.process()
    await scoring.look()
    assert world.handed == ["a"]
    assert dict(scoring.unscored) == {"unknown_model": 1}
    assert taken(path) == 2


def given(tmp_path: Path, **spool: object) -> dict[str, Any]:
    values = settings().model_dump(mode="python")
    values["spool"] = {"path": tmp_path, "key": "plain"} | spool
    values["calibration"]["mode"] = "off"
    return values


@pytest.mark.parametrize(
    ("spool", "mode", "says"),
    [
        ({"score": "2:00-5:00"}, "off", "two times of the day"),
        ({"score": "02:00-02:00"}, "off", "two times of the day"),
        ({"score": "02:00-24:00"}, "off", "two times of the day"),
        ({"score": "never", "path": None}, "off", "path: required"),
        ({"score": "never"}, "observe", "must be off"),
        ({"score": "22:00-05:00"}, "auto", "must be off"),
    ],
)
def test_settings_that_do_not_fit_are_refused(tmp_path: Path, spool: dict[str, Any], mode: str, says: str) -> None:
    values = given(tmp_path, **spool)
    values["calibration"]["mode"] = mode
    with pytest.raises(ValueError, match=says):
        Settings.model_validate(values)


@pytest.mark.parametrize("score", ["never", "02:00-05:00"])
async def test_captures_only_go_to_the_spool_and_nothing_is_treated(tmp_path: Path, score: str) -> None:
    values = given(tmp_path, score=score)
    values["reference"] = {"backend": "vllm", "url": "http://127.0.0.1:1"}
    one = Control(Settings.model_validate(values), 0)
    listen_to_policies(one)
    assert one.pipeline.scorer is not None
    assert one.pipeline.scorer.stages is None
    assert (one.later is not None) == (score != "never")
    one.profile_manager.operator.set_mode("auto")
    assert told(one).mode == "off"
    status = one.status.current()
    assert (status.later is not None) == (score != "never")
    assert one.spool is not None
    one.spool.update(capture("kept"), None)
    one.spool.flush()
    counted = one.status.current().spool
    assert status.spool is not None
    assert counted is not None
    assert (status.spool.written, counted.written) == (0, 1)
    assert (counted.lost, counted.refused, counted.journals_left) == (0, 0, 0)
    assert counted.bytes > status.spool.bytes
    await asyncio.sleep(0)
    await one.close()
