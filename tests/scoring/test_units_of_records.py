"""What uses a scored record, in the pipeline: a conversation is one observation in each kind."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
from tests.support.captures import sized_capture
from tests.support.pipelines import record_pipeline
from tests.support.records import Truth, make_record
from tests.support.world import World

from hemostat.measurement.measurements import Measurements

CONVERSATIONS, TURNS = 12, 10


@pytest.mark.parametrize("named", [True, False])
def test_alike_turns_count_once(named: bool) -> None:
    """Without a conversation, every record is an observation."""
    learned: list[Any] = []
    alarmed: list[Any] = []
    fresh_seen: list[bool] = []
    profiles = SimpleNamespace(
        kinds=SimpleNamespace(update=lambda kind: kind),
        calibrated_profile=lambda _: None,
        catalogue=SimpleNamespace(get=lambda _: None),
        is_held_out=lambda _: False,
        distance_versions=lambda _: (),
        update=lambda scored: fresh_seen.append(scored.fresh and len(scored.figures.kl_rc) > 0),
        learns_from=lambda _: True,
    )
    measured = Measurements()
    consumers: Any = SimpleNamespace(
        measurements=measured,
        alarms=SimpleNamespace(update=lambda record, figures: alarmed.append(record)),
        engines=SimpleNamespace(update_totals=lambda record, figures: None, update=lambda record, figures: None),
        profiles=profiles,
        learner=SimpleNamespace(update=learned.append),
        records=None,
        tracing=None,
        texts=None,
    )
    pipeline = record_pipeline(consumers, SimpleNamespace(of=lambda _: None, calibrated=None))
    for conversation in range(CONVERSATIONS):
        truth = World().truth(conversation)
        record = make_record(Truth(truth.reference[:5], truth.compressed[:5], truth.emitted[:5]), 20)
        name = conversation.to_bytes(8, "big") if named else b""
        for _ in range(TURNS):
            pipeline.update(replace(record, conversation=name, kind="chat text sampled"), sized_capture())
    assert pipeline.users.calibration.errors == 0
    units = CONVERSATIONS if named else CONVERSATIONS * TURNS
    assert measured.summary(None)["requests"] == len(alarmed) == len(learned) == sum(fresh_seen) == units
    assert len(fresh_seen) == CONVERSATIONS * TURNS
    assert measured.tokens == 5 * CONVERSATIONS * TURNS, "tokens are counted of all"
