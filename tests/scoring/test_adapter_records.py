"""What an adapter answered: how its record is built, and to whom it is handed."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from tests.support.adapters import FakeDistances, adapted_record, adapter, distances_of
from tests.support.captures import INFO, capture, record_of, sized_capture
from tests.support.pipelines import record_pipeline
from tests.support.records import Truth, make_record
from tests.support.samples import values
from tests.support.served_models import pair, served_models
from tests.support.world import World

from hemostat.engines.taps import TapResult
from hemostat.measurement.measurements import Measurements
from hemostat.metrics import names
from hemostat.scoring import distances as distances_module
from hemostat.scoring.consumers import NoiseFloorOffers
from hemostat.scoring.record_builder import applied_version
from hemostat.scoring.records_file import RecordsFile
from hemostat_calibration.profiles.profile import IDENTITY
from hemostat_calibration.records import Arm, ExactDistances, Features, TokenRecord

A, B = "a" * 32, "b" * 32
KIND = "chat text sampled"


def tap(applied: str | None) -> TapResult:
    numbers = {"c" * 32: np.full(3, 0.3)}
    return TapResult("boot", applied, mixed=False, log_normalizer=numbers, features=None)


@pytest.mark.parametrize(
    ("requested", "answered", "tapped", "applied"),
    [
        (A, A, tap(None), A),
        (A, A, None, A),
        (A, None, tap(None), None),
        (A, None, None, None),
        (A, B, tap(None), B),
        (A, A, tap("c" * 32), "c" * 32),
        ("c" * 32, None, tap("c" * 32), "c" * 32),
        (None, None, tap(None), None),
        (None, A, tap(None), A),
    ],
    ids=[
        "named",
        "named, no plugin",
        "not named",
        "not named, no plugin",
        "another one answered",
        "beside another profile",
        "another family",
        "identity",
        "not requested",
    ],
)
def test_what_was_applied_follows_from_the_answer_and_the_tap(
    requested: str | None, answered: str | None, tapped: TapResult | None, applied: str | None
) -> None:
    captured = capture(requested=requested, adapter=answered, arm="treated")
    assert applied_version(captured, tapped) == applied
    record = record_of(captured, tapped)
    assert (record.applied, record.adapter) == (applied, answered)
    assert record.arm == (Arm.TREATED if applied == requested else Arm.NONE)


def test_numbers_of_the_adapted_model_are_not_taken_for_the_compressed_models() -> None:
    """The engine evaluates candidates on every tapped request, also on one that an adapter answers."""
    assert record_of(capture(), tap(None)).shifts.keys() == {"c" * 32}
    assert not record_of(capture(requested=A, adapter=A), tap(None)).shifts


# --- the pipeline ----------------------------------------------------------------------------------------------------

WORLD = World(bias=1.5)
ADAPTER = adapter()


def truth(seed: int) -> Truth:
    whole = WORLD.truth(seed)
    return Truth(whole.reference[:5], whole.compressed[:5], whole.emitted[:5])


class Pipeline:
    """With parts that note what they are handed. versions: what distances are asked for."""

    def __init__(self, source: FakeDistances | None, folder: Path | None = None, **found: Any) -> None:
        self.observed: list[TokenRecord] = []
        self.learned: list[TokenRecord] = []
        self.floor: list[TokenRecord] = []
        self.traced: list[dict[str, Any]] = []
        self.versions: tuple[str, ...] = (IDENTITY, ADAPTER.version)
        self.changes = 0
        self.measured = Measurements()
        self.records = RecordsFile(folder / "records.jsonl") if folder else None
        profiles = SimpleNamespace(
            kinds=SimpleNamespace(update=lambda kind: kind),
            calibrated_profile=lambda _: ADAPTER,
            catalogue=SimpleNamespace(get=lambda version: ADAPTER if version == ADAPTER.version else None),
            serving=SimpleNamespace(would_serve=lambda _: ADAPTER.version, reported=ADAPTER.version),
            is_held_out=lambda _: True,
            distance_versions=lambda _: self.versions,
            update=lambda scored: self.observed.append(scored.record),
            learns_from=lambda record: record.adapter is None,
        )
        consumers: Any = SimpleNamespace(
            measurements=self.measured,
            alarms=SimpleNamespace(update=lambda record, figures: None),
            engines=SimpleNamespace(update_totals=lambda record, figures: None, update=lambda record, figures: None),
            profiles=profiles,
            learner=SimpleNamespace(update=self.learned.append),
            records=self.records,
            texts=None,
            tracing=SimpleNamespace(record_score=lambda *_, **given: self.traced.append(given["attributes"])),
        )
        served = served_models(pair("m", object(), INFO, set(), set()))  # type: ignore[arg-type]
        self.pipeline = record_pipeline(consumers, served, on_change=self._changed, distances=source)
        floor: Any = SimpleNamespace(samples=list, offer=lambda prompt, record, reference: self.floor.append(record))
        self.pipeline.users.consumers.append(NoiseFloorOffers(floor))

    def _changed(self) -> None:
        self.changes += 1

    def use(self, record: TokenRecord, **more: Any) -> None:
        given = {"prompt_token_ids": np.arange(3, dtype="<i4").tobytes()} | more
        self.pipeline.update(
            replace(record, model="m", kind=KIND), sized_capture(record.request_id).__class__(**_fields(record, given))
        )

    def outcomes(self) -> dict[str, float]:
        return {outcome: records for outcome, records in self.pipeline.users.distances.outcomes.items() if records}


def _fields(record: TokenRecord, given: dict[str, Any]) -> dict[str, Any]:
    template = sized_capture(record.request_id)
    return {name: getattr(template, name) for name in template.__struct_fields__} | given


def found(record: TokenRecord) -> dict[str, ExactDistances]:
    return distances_of(truth(int(record.request_id)), {ADAPTER.version: 0.6})


def base(number: int) -> TokenRecord:
    return replace(make_record(truth(number), 20), request_id=str(number))


def treated(number: int) -> TokenRecord:
    return replace(adapted_record(truth(number), ADAPTER.version), request_id=str(number))


def test_a_record_of_an_adapter_is_no_noise_floor_and_nothing_is_learned_from_it() -> None:
    pipeline = Pipeline(None)
    pipeline.versions = ()
    pipeline.use(treated(1), traceparent="00-1-2-01")
    assert (pipeline.floor, pipeline.learned) == ([], [])
    assert pipeline.traced[0]["adapter"] == pipeline.traced[0]["profile"] == ADAPTER.version
    pipeline.use(base(2))
    assert len(pipeline.floor) == len(pipeline.learned) == 1
    assert len(pipeline.observed) == pipeline.changes == 2
    assert pipeline.pipeline.users.calibration.errors == 0


def test_records_wait_for_their_distances_and_are_judged_in_their_order(tmp_path: Path) -> None:
    source = FakeDistances(found)
    pipeline = Pipeline(source, tmp_path)
    for number in range(4):
        pipeline.use(treated(number) if number % 2 else base(number))
    assert (pipeline.observed, pipeline.changes) == ([], 0)
    assert pipeline.pipeline.users.distances.waiting == 4
    assert source.offers[0][1:] == ([0, 1, 2], (IDENTITY, ADAPTER.version))
    assert pipeline.measured.tokens == 20, "measured at once"
    source.answer()
    assert [record.request_id for record in pipeline.observed] == ["0", "1", "2", "3"]
    assert all(record.distances.keys() == {IDENTITY, ADAPTER.version} for record in pipeline.observed)
    assert pipeline.outcomes() == {"computed": 4}
    gained = pipeline.measured.gained(ADAPTER.version)
    assert gained is not None
    assert gained["requests"] == 4
    assert values(pipeline.pipeline.samples())[names.RECOVERED_DIVERGENCE_RATIO, "all"] > 0.5
    assert pipeline.records is not None
    pipeline.records.close()
    lines = [json.loads(line) for line in (tmp_path / "records.jsonl").read_text().splitlines()]
    assert [line["adapter"] for line in lines] == [None, ADAPTER.version] * 2
    means = lines[1]["distances"][ADAPTER.version]
    assert means.keys() == {"kl_nats", "total_variation", "top1_agreement"}
    assert means["kl_nats"] < lines[1]["distances"][IDENTITY]["kl_nats"]


@pytest.mark.parametrize("refuses", [True, False])
def test_a_refused_record_is_judged_at_once_without(refuses: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    source = FakeDistances(found)
    source.takes = not refuses
    monkeypatch.setattr(distances_module, "MAX_WAITING", 1)
    pipeline = Pipeline(source)
    pipeline.use(base(0))
    pipeline.use(base(1))
    assert [record.request_id for record in pipeline.observed] == (["0", "1"] if refuses else ["1"])
    source.answer()
    assert [bool(record.distances) for record in pipeline.observed] == ([False] * 2 if refuses else [False, True])
    assert pipeline.outcomes() == ({"refused": 2} if refuses else {"refused": 1, "computed": 1})


@pytest.mark.parametrize(
    ("answer", "outcome"),
    [
        (lambda _: {}, "failed"),
        (lambda _: {IDENTITY: ExactDistances(np.zeros(4), np.zeros(4), np.ones(4, np.bool_))}, "invalid"),
        (lambda _: {IDENTITY: ExactDistances(np.full(5, np.nan), np.zeros(5), np.ones(5, np.bool_))}, "invalid"),
    ],
    ids=["none", "other tokens", "NaN"],
)
def test_what_cannot_be_used_is_counted(answer: Callable[[TokenRecord], Any], outcome: str) -> None:
    source = FakeDistances(answer)
    pipeline = Pipeline(source)
    pipeline.use(base(0))
    source.answer()
    assert [dict(record.distances) for record in pipeline.observed] == [{}]
    assert pipeline.outcomes() == {outcome: 1}


def test_at_the_end_what_waits_is_used_without_and_a_late_answer_is_ignored() -> None:
    source = FakeDistances(found)
    pipeline = Pipeline(source)
    pipeline.use(base(0))
    pipeline.use(base(1))
    pipeline.pipeline.users.distances.flush()
    assert [record.request_id for record in pipeline.observed] == ["0", "1"]
    source.answer()
    assert len(pipeline.observed) == 2


def test_features_of_an_adapted_model_reach_no_learner() -> None:
    pipeline = Pipeline(None)
    pipeline.versions = ()
    features = Features("0" * 32, np.zeros((5, 3), np.float32))
    pipeline.use(replace(treated(1), features=features))
    assert pipeline.learned == []
