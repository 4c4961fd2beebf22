"""Short canaries: what is suspicious, when all are replayed, and what is stated of it."""

from __future__ import annotations

import numpy as np
import pytest

from hemostat_calibration.arrays import Floats
from hemostat_calibration.canaries import Canary, CanarySet, Origin
from hemostat_calibration.canary_short import (
    HOUR_SECONDS,
    SHORT_ANSWER,
    SHORT_PROMPT,
    SHORT_SEQUENCES,
    WHOLE_REPLAYS,
    ShortWatch,
    excesses,
    is_far,
    short_sequences,
)

SCORED = SHORT_PROMPT + SHORT_ANSWER - 1
EACH = Canary("", np.zeros(SHORT_PROMPT, np.int32), np.zeros(SHORT_ANSWER, np.int32))
RNG = np.random.default_rng(0)
TRUE = RNG.normal(-2.0, 1.0, SHORT_SEQUENCES * SCORED)


def taken(rows: int = 28, noise: float = 0.01) -> CanarySet:
    rng = np.random.default_rng(1)
    replays = TRUE + rng.normal(0.0, noise, (rows, len(TRUE)))
    return CanarySet((EACH,) * SHORT_SEQUENCES, replays, Origin(""))


def replay(nats: float = 0.0, share: float = 1.0) -> Floats:
    """Returns a replay in which this share of the sequences is off by so many nats a token."""
    hit = np.repeat(np.arange(SHORT_SEQUENCES) < share * SHORT_SEQUENCES, SCORED)
    values: Floats = TRUE + RNG.normal(0.0, 0.01, len(TRUE)) + nats * hit
    return values


def one(values: Floats, sequence: int = 0) -> Floats:
    return values.reshape(SHORT_SEQUENCES, SCORED)[sequence]


def asked(watch: ShortWatch, its: CanarySet, values: Floats, now: float = 0.0, sequence: int = 0) -> bool:
    single = one(values, sequence)
    return watch.suspects(its, sequence, single) and watch.confirmed(its, sequence, single, single, now)


def test_sequences_of_a_small_set_and_of_short_texts_are_what_there_is() -> None:
    short = Canary("", np.arange(3, dtype=np.int32), np.arange(2, dtype=np.int32))
    sequences = short_sequences([short] * 16)
    assert len(sequences) == 16
    assert sequences[0].ids == short.ids
    long = Canary("", np.arange(90, dtype=np.int32), np.arange(40, dtype=np.int32))
    assert short_sequences([long] * 16)[0].ids == [*range(81, 90), *range(10)]


def test_a_mode_is_not_suspicious_and_a_fault_is_only_where_it_is_seen_twice() -> None:
    its, watch = taken(), ShortWatch()
    assert not watch.suspects(its, 0, one(replay(0.03)))
    assert watch.suspects(its, 0, one(replay(0.1)))
    assert not watch.confirmed(its, 0, one(replay(0.1)), one(replay()), 0.0)
    assert watch.state.wholes == ()
    assert watch.confirmed(its, 0, one(replay(0.1)), one(replay(0.1)), 0.0)
    assert watch.state.wholes == (0.0,)


def test_a_fault_of_half_of_the_sequences_is_stated_by_votes_and_one_of_a_few_is_not() -> None:
    its = taken()
    for share, stated in ((0.5, True), (0.2, False)):
        watch, values = ShortWatch(), replay(0.1, share)
        assert asked(watch, its, values)
        assert watch.whole(its, values, 7.0) is stated
        assert watch.state.since == (7.0 if stated else None)


def test_one_sequence_is_stated_only_if_it_is_far_in_all_three_replays() -> None:
    its, values = taken(), replay(0.5, 1 / SHORT_SEQUENCES)
    assert is_far(its, 0, one(values))
    watch = ShortWatch()
    assert asked(watch, its, values)
    assert watch.whole(its, values, 0.0)
    # Another sequence was suspicious, or it was less far before.
    other = ShortWatch()
    assert asked(other, its, replay(0.5), sequence=5)
    assert not other.whole(its, values, 0.0)
    near = ShortWatch()
    assert asked(near, its, replay(0.1))
    assert not near.whole(its, values, 0.0)


def test_whole_replays_are_as_many_as_the_bound_of_false_statements_assumes() -> None:
    its, watch, seen = taken(), ShortWatch(), replay(0.1)
    assert [asked(watch, its, seen, n) for n in range(WHOLE_REPLAYS + 2)] == [True] * WHOLE_REPLAYS + [False] * 2
    restarted = ShortWatch(state=watch.state)
    assert not asked(restarted, its, seen, 10.0)
    assert asked(restarted, its, seen, HOUR_SECONDS)
    assert len(restarted.state.wholes) <= WHOLE_REPLAYS


def test_a_statement_ends_with_a_pass_that_shows_nothing() -> None:
    its, watch, values = taken(), ShortWatch(), replay(0.5)
    assert not watch.passed(its, replay())
    assert asked(watch, its, values)
    assert watch.whole(its, values, 0.0)
    assert not asked(watch, its, values, 2 * HOUR_SECONDS)  # nothing is asked while it is stated
    assert not watch.passed(its, values)
    assert watch.passed(its, replay())
    assert watch.state.since is None


@pytest.mark.parametrize("rows", [4, 8])
def test_whole_replays_of_an_unchanged_engine_state_nothing_where_any_number_of_votes_would(
    rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The worst case: each whole replay is made, whatever single ones show."""

    def stated() -> int:
        rng, count = np.random.default_rng(5), 0
        for _ in range(300):
            replays = TRUE + rng.standard_t(3, (rows + 1, len(TRUE))) * 0.02
            its = CanarySet((EACH,) * SHORT_SEQUENCES, replays[:-1], Origin(""))
            count += ShortWatch().whole(its, replays[-1], 0.0)
        return count

    assert stated() == 0
    monkeypatch.setattr(CanarySet, "needed", property(lambda _: 1))
    monkeypatch.setattr("hemostat_calibration.canaries.MODE_TOLERANCES", 0.0)
    assert stated() > 10


def test_excesses_are_those_of_each_replay_alone() -> None:
    its = taken()
    several = np.stack([one(replay(nats)) for nats in (0.0, 0.05, 0.2)])
    expected = [float(excesses(its, 0, values)) for values in several]
    np.testing.assert_allclose(excesses(its, 0, several), expected)
