"""Figures by place: of each bucket those of its tokens, in the report and in the counters."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from tests.support.records import make_record
from tests.support.samples import values
from tests.support.world import T, World

from hemostat.measurement.by_place import CONTEXTS, POSITIONS, ByPlace
from hemostat.measurement.figures import RequestFigures
from hemostat.measurement.measurements import Measurements
from hemostat.metrics import names
from hemostat_calibration.divergence.per_token import divergence
from hemostat_calibration.reasoning import Thinking

WORLD = World(noise=0.4)
RECORDS = [make_record(WORLD.truth(n), 8) for n in range(30)]


def test_each_bucket_has_the_figures_of_its_tokens() -> None:
    measured = ByPlace()
    tokens = dict.fromkeys(POSITIONS, 0)
    nats = dict.fromkeys(POSITIONS, 0.0)
    for n, one in enumerate(RECORDS):
        record = replace(one, position=10 * n)
        raw = divergence(record)
        measured.update(record, RequestFigures(raw), fresh=True)
        for at, kl in enumerate(raw.kl_rc.tolist(), 10 * n):
            name = next(label for label in POSITIONS if at <= float(label.partition("-")[2] or "inf"))
            tokens[name] += 1
            nats[name] += kl
    report = {row["place"]: row for row in measured.report()["position"]}
    assert list(report) == [name for name in POSITIONS if tokens[name]]
    result = values(measured.samples())
    for name, one in report.items():
        assert one["tokens"] == result[names.PLACE_KL_TOKENS, "position", name] == tokens[name]
        assert one["kl_nats"]["estimate"] == pytest.approx(nats[name] / tokens[name])
        assert result[names.PLACE_KL_NATS, "position", name] == pytest.approx(nats[name])
        assert one["kl_nats"]["ci95"] == [None, None], "too few requests to know how much they depend on each other"


def test_errors_that_grow_with_the_context_are_seen() -> None:
    """What a quantized KV cache may do: the longer the context, the farther apart the models."""
    measured = ByPlace()
    for n in range(60):
        noise = 0.1 + 0.4 * (n % 3)
        record = replace(make_record(World(noise=noise).truth(n), 20), context_tokens=(100, 5_000, 50_000)[n % 3])
        measured.update(record, RequestFigures(divergence(record)), fresh=True)
    kl = {row["place"]: row["kl_nats"]["estimate"] for row in measured.report()["context"]}
    assert list(kl) == ["0-511", "2048-8191", "32768-131071"]
    assert kl["0-511"] < kl["2048-8191"] < kl["32768-131071"]


def test_later_turns_of_a_conversation_count_in_the_counters_only() -> None:
    measured = ByPlace()
    measured.update(RECORDS[0], RequestFigures(divergence(RECORDS[0])), fresh=False)
    assert measured.report()["position"] == []
    result = values(measured.samples())
    assert sum(value for key, value in result.items() if key[:2] == (names.PLACE_KL_TOKENS, "position")) == T


def test_every_series_is_there_from_the_start() -> None:
    result = values(ByPlace().samples())
    assert {key[2] for key in result if key[:2] == (names.PLACE_KL_TOKENS, "context")} == set(CONTEXTS)
    assert {key[2] for key in result if key[:2] == (names.PLACE_KL_NATS, "phase")} == {"thinking", "answer"}
    assert set(result.values()) == {0.0}


def test_the_phases_are_measured_apart() -> None:
    measured = Measurements()
    for n, record in enumerate(RECORDS):
        measured.update(replace(record, thinking=Thinking(0, n, ended=True)), None, None)
    phases = {row["place"]: row for row in measured.by_place.report()["phase"]}
    assert phases["thinking"]["tokens"] == sum(range(30))
    assert phases["thinking"]["tokens"] + phases["answer"]["tokens"] == 30 * T
    assert phases["answer"]["requests"] == 30
    raws = [divergence(record).kl_rc[:n] for n, record in enumerate(RECORDS)]
    assert phases["thinking"]["kl_nats"]["estimate"] == pytest.approx(np.concatenate(raws).mean())


def test_a_part_of_an_output_counts_by_place_alone() -> None:
    """The last tokens are no sample of all of them: no other figure may be made from them."""
    measured, other = Measurements(), Measurements()
    before = values(measured.samples())
    part = replace(RECORDS[0], position=500, context_tokens=900)
    measured.update_part(part, divergence(part), fresh=True)
    changed = {key for key, value in values(measured.samples()).items() if before.get(key) != value}
    assert {key[:2] for key in changed} == {
        (name, division)
        for name in (names.PLACE_KL_NATS, names.PLACE_KL_TOKENS)
        for division in ("position", "context")
    }
    assert measured.summary(None) == other.summary(None)
    assert measured.tokens == 0
    measured.update_part(replace(part, adapter="a" * 32), divergence(part), fresh=True)
    assert measured.by_place.report()["position"][0]["requests"] == 1, "one of an adapter is of another model"


def test_conditional_figures_are_not_mixed_with_others() -> None:
    measured = ByPlace()
    measured.update(replace(RECORDS[0], constraint="grammar"), RequestFigures(divergence(RECORDS[0])), fresh=True)
    assert set(values(measured.samples()).values()) == {0.0}
