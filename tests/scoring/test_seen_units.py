"""A conversation is one observation in each kind; what is remembered is bounded."""

from dataclasses import replace

import numpy as np
from tests.support.records import make_record
from tests.support.world import World

from hemostat.measurement.measurements import Measurements
from hemostat.metrics import names
from hemostat.scoring.record_reader import SeenUnits

RECORD = make_record(World().truth(0), 20)
PROMPT = np.arange(40, dtype=np.int32)


def turn(conversation: bytes, kind: str = "chat text greedy"):
    return replace(RECORD, conversation=conversation, kind=kind)


def test_the_first_record_of_a_conversation_and_kind_is_fresh() -> None:
    seen = SeenUnits()
    assert seen.update(turn(b"a"), PROMPT)
    assert not seen.update(turn(b"a"), PROMPT)
    assert seen.update(turn(b"a", "chat text greedy reply"), PROMPT)
    assert seen.update(turn(b"b"), PROMPT)
    assert not seen.update(turn(b"b"), PROMPT)


def test_a_record_without_a_conversation_is_always_fresh() -> None:
    seen = SeenUnits()
    assert all(seen.update(turn(b""), PROMPT) for _ in range(3))


def test_the_oldest_is_forgotten_first() -> None:
    seen = SeenUnits(limit=2)
    assert [seen.update(turn(name), PROMPT) for name in (b"a", b"b", b"c")] == [True, True, True]
    assert not seen.update(turn(b"b"), PROMPT)
    assert not seen.update(turn(b"c"), PROMPT)
    assert seen.update(turn(b"a"), PROMPT)


def test_a_later_turn_counts_in_tokens_and_histograms_only() -> None:
    measured = Measurements()
    measured.update(RECORD, None, None)
    before = measured.summary(None)
    measured.update(RECORD, None, None, fresh=False)
    assert measured.summary(None) == before
    assert measured.tokens == 2 * RECORD.tokens
    scored = {s.labels: s.value for s in measured.samples() if s.name == names.SCORED_TOKENS}
    assert sum(scored.values()) == 2 * RECORD.tokens
