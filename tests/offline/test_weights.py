"""Figures weigh requests by 1/probability of admission, so that a full spool does not bias them; tests do not."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from tests.support.captures import K, capture
from tests.support.scorer_bench import FakeReference

from hemostat.ipc.messages import Capture
from hemostat.scored_record import MAX_WEIGHT
from hemostat.scoring.offline.evidence import read_evidence
from hemostat.scoring.offline.folder import score_folder
from hemostat.scoring.offline.summary import notes
from hemostat.scoring.spool.columns import to_rows
from hemostat.scoring.spool.segments import write_segment
from hemostat.scoring.spool.spool import admission
from hemostat.scoring.spool.spooled import Spooled
from hemostat_calibration.statistics.confidence import ClippedMean

KIND = "chat text sampled"


def sharp(name: str) -> Capture:
    """Returns a capture whose compressed model is surer than the one of `capture`, and further from the reference."""
    logprobs = np.tile(np.log([0.9, 0.05, 0.02, 0.01, 1e-300]).astype("<f4"), (3, 1))
    logprobs[:, K] = -np.inf
    emitted = logprobs[:, 0].tobytes()
    return capture(name, kind=KIND, candidate_logprobs=logprobs.tobytes(), emitted_logprobs=emitted)


async def report_of(folder: Path, rows: list[Spooled]) -> dict[str, object]:
    (folder / "in").mkdir(parents=True)
    (folder / "out").mkdir()
    write_segment(folder / "in/captures-1700000000000-00000000.parquet", to_rows(rows), None)
    await score_folder(folder / "in", folder / "out", FakeReference(), key=None, model=None, progress=lambda *_: None)
    return await read_evidence(folder / "out", None, 0.0)


def kl(report: dict[str, object]) -> float:
    raw = report["raw"]
    assert isinstance(raw, dict)
    return float(raw["kl_nats"]["estimate"])


async def test_the_mean_is_the_one_of_all_requests_that_came(tmp_path: Path) -> None:
    at = 1_700_000_000.0
    all_of_them = [Spooled(capture(f"a{n}", kind=KIND), at + n) for n in range(8)]
    all_of_them += [Spooled(sharp(f"b{n}"), at + 100 + n) for n in range(8)]
    admitted = all_of_them[:8] + [Spooled(sharp(f"b{n}"), at + 100 + n, 0.25) for n in range(2)]
    whole, sample = await report_of(tmp_path / "1", all_of_them), await report_of(tmp_path / "2", admitted)
    unweighted = await report_of(tmp_path / "3", [Spooled(row.capture, row.at) for row in admitted])
    assert kl(sample) == pytest.approx(kl(whole), rel=1e-9)
    assert kl(unweighted) != pytest.approx(kl(whole), rel=0.05)
    by_kind = sample["by_kind"]
    assert isinstance(by_kind, list)
    assert by_kind[0]["raw"]["kl_nats"]["estimate"] == pytest.approx(kl(whole), rel=1e-9)
    assert sample["captures"] == 10
    assert "at most 10" in notes(sample)[0]


async def test_a_weight_has_a_cap(tmp_path: Path) -> None:
    at = 1_700_000_000.0
    rows = [Spooled(capture("a", kind=KIND), at), Spooled(sharp("b"), at + 1, 1e-6)]
    capped = [Spooled(capture("a", kind=KIND), at), Spooled(sharp("b"), at + 1, 1.0 / MAX_WEIGHT)]
    assert kl(await report_of(tmp_path / "1", rows)) == kl(await report_of(tmp_path / "2", capped))


def test_the_interval_covers_the_mean_of_all_requests_while_the_spool_fills() -> None:
    """The figure rises while the spool fills: without weights the mean would be too low in nearly every life."""
    generator, requests, lives = np.random.default_rng(5), 600, 60
    level = np.linspace(1.0, 3.0, requests)
    probability = np.array([admission(fill) for fill in np.linspace(0.3, 0.95, requests)])
    covered = {True: 0, False: 0}
    for _ in range(lives):
        values = level + generator.exponential(0.3, requests)
        taken = generator.random(requests) < probability
        for weighted in covered:
            mean = ClippedMean(0.0, 20.0)
            for value, p in zip(values[taken], probability[taken], strict=True):
                mean = mean.update(np.array([value]), min(1.0 / p, MAX_WEIGHT) if weighted else 1.0)
            interval = mean.get()
            covered[weighted] += interval.low <= 2.3 <= interval.high
    assert covered[True] >= 0.95 * lives
    assert covered[False] <= 0.1 * lives
