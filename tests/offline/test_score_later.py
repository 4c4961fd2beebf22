"""Captures of a spool are scored later: with the figures of the live path, once, and going on where a run stopped."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tests.support.captures import INFO, capture
from tests.support.scorer_bench import Bench, FakeReference, running

from hemostat.commands import score as score_command
from hemostat.engines.taps import TapResult
from hemostat.reference.device import Choice, CudaDevice
from hemostat.reference.protocol import FailureReason, ReferenceFailure
from hemostat.scoring.offline.evidence import read_evidence
from hemostat.scoring.offline.folder import score_folder
from hemostat.scoring.offline.stages import OfflineModels, offline_stages
from hemostat.scoring.offline.summary import lines, page
from hemostat.scoring.score_rows import VERSIONS, StoredReference, score_rows, scored_rows
from hemostat.scoring.spool.columns import to_rows
from hemostat.scoring.spool.keys import SpoolError, SpoolKey
from hemostat.scoring.spool.segments import read_segment, segments, write_segment
from hemostat.scoring.spool.spooled import Spooled, SpooledTap
from hemostat_calibration.divergence.per_token import divergence

KEY = SpoolKey(bytes(range(32)))


def gpu(index: int, processes: int = 0) -> CudaDevice:
    return CudaDevice(index, "H100", 79 * 2**30, 80 * 2**30, processes)


def spool(folder: Path, count: int = 3, each: int = 4, **more: object) -> None:
    folder.mkdir()
    for segment in range(count):
        at = 1_700_000_000.0 + 60 * segment
        made = [Spooled(capture(f"{segment}-{n}", client=b"k" * 8, **more), at + n) for n in range(each)]
        write_segment(folder / f"captures-{round(at * 1000):013d}-00000000.parquet", to_rows(made), KEY)


async def score(tmp_path: Path, reference: FakeReference, model: str | None = None) -> int:
    (tmp_path / "out").mkdir(exist_ok=True)
    return await score_folder(
        tmp_path / "in", tmp_path / "out", reference, key=KEY, model=model, progress=lambda done, total, rate: None
    )


async def test_each_capture_is_scored_once_and_a_run_goes_on_where_one_stopped(tmp_path: Path) -> None:
    spool(tmp_path / "in")
    reference = FakeReference()

    def fail() -> None:
        if len(reference.asked) > 6:
            raise ReferenceFailure(FailureReason.DOWN, "gone")

    reference.before = fail
    with pytest.raises(SpoolError, match="run the same command again"):
        await score(tmp_path, reference)
    assert len(segments(tmp_path / "out")) == 1
    reference.before = lambda: None
    assert await score(tmp_path, reference) == 8
    assert await score(tmp_path, reference) == 0
    report = await read_evidence(tmp_path / "out", KEY, 0.0)
    assert (report["captures"], report["scored"], report["tokens"]) == (12, 12, 36)
    assert report["period"] == {"from": 1_700_000_000.0, "to": 1_700_000_123.0}
    assert "12 of 12 captures scored" in lines(report)[0]
    assert "12 of 12 captures scored" in page(report, "1")


async def test_the_figures_are_the_ones_of_the_live_path_to_the_byte(tmp_path: Path) -> None:
    spool(tmp_path / "in", 1)
    await score(tmp_path, FakeReference())
    (path,) = segments(tmp_path / "out")
    rows = list(scored_rows(read_segment(path, KEY, VERSIONS)))
    async with running(Bench()) as bench:
        await bench.ends(*(row.spooled.capture for row in rows))
        live = {record.request_id: record for record in bench.records}
    for row in rows:
        assert row.scores is not None
        assert row.info == INFO
        record = live[row.spooled.capture.request_id]
        np.testing.assert_array_equal(row.scores.at, record.reference_at)
        np.testing.assert_array_equal(row.scores.emitted, record.reference_emitted)
    report = await read_evidence(tmp_path / "out", KEY, 0.0)
    figures = [divergence(record).kl_rc.mean() for record in live.values()]
    assert report["raw"]["kl_nats"]["estimate"] == pytest.approx(float(np.mean(figures)), abs=0.0, rel=1e-12)


async def test_a_record_with_a_tap_is_the_one_of_the_live_path_to_the_byte() -> None:
    """The record is made of the row alone, with what the engine's plugin reported of the capture."""
    tap = TapResult("boot", "b" * 32, False, {"b" * 32: np.array([0.25, np.nan, 0.5])}, None, [])
    one = capture("tapped", engine="e:1", client=b"k" * 8)
    live_models = OfflineModels(FakeReference())
    live_models.set_pair("m", INFO)
    live, _ = await offline_stages(live_models).score(one, tap)
    rows = to_rows([Spooled(one, 1.0, 1.0, SpooledTap.of(tap))])
    (row,) = scored_rows(await score_rows(rows, offline_stages(live_models)))
    stored = StoredReference()
    stored.row = row
    models = OfflineModels(stored)
    assert row.info is not None
    assert row.spooled.tap is not None
    models.set_pair("m", row.info)
    later, _ = await offline_stages(models).score(row.spooled.capture, row.spooled.tap.result())
    assert (later.applied, later.engine_boot) == (live.applied, live.engine_boot) == ("b" * 32, "boot")
    for name in ("reference_at", "reference_emitted", "compressed_emitted", "reference_entropy", "output_ids"):
        np.testing.assert_array_equal(getattr(later, name), getattr(live, name))
    for field in ("kl_rc", "kl_cr", "js", "tv", "estimate_rc", "delta_p"):
        assert getattr(divergence(later), field).tobytes() == getattr(divergence(live), field).tobytes()


async def test_a_segment_that_cannot_be_read_is_left_out_and_counted(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    spool(tmp_path / "in")
    truncated, foreign = (tmp_path / f"in/captures-170000000000{n}-00000000.parquet" for n in (1, 2))
    truncated.write_bytes(segments(tmp_path / "in")[0].read_bytes()[:-9])
    write_segment(foreign, to_rows([Spooled(capture("x"), 1.0)]).replace_schema_metadata({}), KEY)
    (tmp_path / "in/captures-1700000000003-00000000.journal").write_bytes(b"left by a process that was killed")
    assert await score(tmp_path, FakeReference()) == 12
    assert caplog.text.count("left out: ") == 2
    assert "2 of 5 segments cannot be read" in caplog.text
    assert "1 journals were not scored" in caplog.text
    (tmp_path / "out" / foreign.name).write_bytes(foreign.read_bytes())
    report = await read_evidence(tmp_path / "out", KEY, 0.0)
    assert (report["captures"], report["segments"], report["segments_left_out"]) == (12, 4, 1)
    assert any("1 of 4 segments cannot be read" in line for line in lines(report))


async def test_several_references_share_the_segments(tmp_path: Path) -> None:
    spool(tmp_path / "in", 9)
    (tmp_path / "out").mkdir()
    references = [FakeReference() for _ in range(3)]
    place = (tmp_path / "in", tmp_path / "out", references[0])
    more: dict[str, Any] = {"key": KEY, "model": None, "progress": lambda *_: None, "others": references[1:]}
    assert await score_folder(*place, **more) == 36
    assert all(reference.asked for reference in references)
    assert sum(len(reference.asked) for reference in references) == 36
    for path in segments(tmp_path / "out")[:4]:
        path.unlink()

    def fail() -> None:
        raise ReferenceFailure(FailureReason.DOWN, "gone")

    references[1].before = fail
    with pytest.raises(SpoolError, match="run the same command again"):
        await score_folder(*place, **more)
    references[1].before = lambda: None
    await score_folder(*place, **more)
    assert (await read_evidence(tmp_path / "out", KEY, 0.0))["captures"] == 36


@pytest.mark.parametrize(
    ("found", "device", "expected"),
    [
        ([gpu(0), gpu(1), gpu(2, processes=1)], "auto", ["cuda:0", "cuda:1"]),
        ([gpu(0), gpu(1)], "cpu", ["cpu"]),
        ([gpu(0)], "auto", ["auto"]),
        ([], "auto", ["auto"]),
        (Choice("cpu", "they could not be looked at"), "auto", ["auto"]),
    ],
)
def test_each_idle_gpu_has_a_reference(
    monkeypatch: pytest.MonkeyPatch, found: Any, device: str, expected: list[str]
) -> None:
    monkeypatch.setattr(score_command, "cuda_devices", lambda: found)
    assert score_command.devices_of("some/model", device) == expected
    assert score_command.devices_of("http://127.0.0.1:8000", device) == [device]


async def test_a_folder_of_which_nothing_can_be_read_is_an_error(tmp_path: Path) -> None:
    spool(tmp_path / "in")
    (tmp_path / "out").mkdir()
    other, place = SpoolKey(bytes(32)), (tmp_path / "in", tmp_path / "out")
    with pytest.raises(SpoolError, match=f"the key {KEY.name} has encrypted it"):
        await score_folder(*place, FakeReference(), key=other, model=None, progress=lambda *_: None)
    await score(tmp_path, FakeReference())
    with pytest.raises(SpoolError, match=f"the key {KEY.name} has encrypted it"):
        await read_evidence(tmp_path / "out", other, 0.0)


async def test_requests_to_several_models_need_a_name(tmp_path: Path) -> None:
    spool(tmp_path / "in", 1)
    path = tmp_path / "in/captures-1800000000000-00000000.parquet"
    write_segment(path, to_rows([Spooled(capture("a"), 1.0), Spooled(capture("b", model="other"), 1.0)]), KEY)
    with pytest.raises(SpoolError, match="name one by --model"):
        await score(tmp_path, FakeReference())
    await score(tmp_path, FakeReference(), "m")
    report = await read_evidence(tmp_path / "out", KEY, 0.0)
    assert report["not_scored"] == {"unknown_model": 1}


async def test_the_last_tokens_of_an_output_are_scored_as_live(tmp_path: Path) -> None:
    one = capture("long", 10, client=b"k" * 8)
    models = OfflineModels(FakeReference())
    models.set_pair("m", INFO)
    live, _ = await offline_stages(models, max_scored=4).score(one, None)
    (tmp_path / "in").mkdir()
    (tmp_path / "out").mkdir()
    write_segment(tmp_path / "in/captures-1700000000000-00000000.parquet", to_rows([Spooled(one, 1.7e9)]), None)
    await score_folder(
        *(tmp_path / "in", tmp_path / "out", FakeReference()),
        key=None,
        model=None,
        progress=lambda *_: None,
        max_scored=4,
    )
    (path,) = segments(tmp_path / "out")
    (row,) = scored_rows(read_segment(path, None, VERSIONS))
    assert row.scores is not None
    assert row.scores.at.tobytes() == live.reference_at.tobytes()
    report = await read_evidence(tmp_path / "out", None, 0.0)
    # The report reads the row as far as it was scored; a part counts by position, context and phase only.
    assert (report["scored"], report["tokens"]) == (1, 0)
    assert len(live.reference_at) == 4
