"""What a replica shares of what its contextual learner has learned: the sums, and nothing else."""

from __future__ import annotations

from dataclasses import replace
from functools import cache

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.support.hidden_state_world import A, D, HiddenStateWorld, N, T, V
from tests.support.oracle import shift

from hemostat_calibration.errors import InvalidArgumentError
from hemostat_calibration.learning.contextual import storage
from hemostat_calibration.learning.contextual.learner import ContextualLearner, ContextualState
from hemostat_calibration.learning.contextual.rows import FOLDS, fold_of
from hemostat_calibration.learning.contextual.sharing import (
    GROWTH,
    MIN_CONVERSATIONS,
    SharedRows,
    Sharing,
    Unshared,
    condensed,
    spread,
)
from hemostat_calibration.learning.contextual.statistics import flushed


@cache
def world() -> HiddenStateWorld:
    return HiddenStateWorld()


UNITS = frozenset(b"%d" % n for n in range(MIN_CONVERSATIONS))


class Replica:
    """A follower: it learns, and shares what may be shared."""

    def __init__(self, learner: ContextualLearner) -> None:
        self.sharing = Sharing(learner)
        self.unshared = self.sharing.init()
        self.sent: list[SharedRows] = []
        self.seeds: list[int] = []

    def score(self, seed: int) -> list[SharedRows]:
        self.unshared = self.sharing.with_record(self.unshared, world().record(seed))
        self.seeds.append(seed)
        self.unshared, due = self.sharing.take_due(self.unshared)
        self.sent += due
        return due


def same_sums(learner: ContextualLearner, one: ContextualState, other: ContextualState) -> None:
    for mine, theirs in zip(one.folds, other.folds, strict=True):
        a, b = flushed(mine, one.tokens, learner.forgetting), flushed(theirs, other.tokens, learner.forgetting)
        assert a.weight == pytest.approx(b.weight, rel=1e-5)
        for x, y in ((a.cross, b.cross), (a.target, b.target)):
            np.testing.assert_allclose(x, y, atol=2e-5 * max(1.0, np.abs(y).max()))


@settings(max_examples=5, deadline=None)
@given(replicas=st.integers(2, 4), max_bytes=st.sampled_from([1, 3000, 10**9]), data=st.data())
def test_the_leader_gets_the_sums_of_all_tokens(replicas: int, max_bytes: int, data: st.DataObject) -> None:
    """In whichever order parts come; what is not shared yet is at most what may not be."""
    learner = world().learner()
    followers = [Replica(learner) for _ in range(replicas - 1)]
    leader, own = learner.init("m", V), []
    for seed in range(240):
        at = data.draw(st.integers(0, replicas - 1)) if seed < 12 else seed % replicas
        if at == replicas - 1:
            own.append(seed)
            leader = learner.update(leader, [world().record(seed)])
        else:
            followers[at].score(seed)
    parts = [part for one in followers for shared in one.sent for part in one.sharing.parts(shared, max_bytes)]
    for part in data.draw(st.permutations(parts)) if len(parts) < 100 else parts[::-1]:
        leader = Sharing(learner).add(leader, part)
    unshared = sum(u.tokens for one in followers for u in one.unshared)
    assert leader.tokens == 240 * T - unshared
    assert unshared < (replicas - 1) * FOLDS * max(A + 1 + T, MIN_CONVERSATIONS * T)
    shared = []
    for one in followers:
        for k, rest in enumerate(one.unshared):  # the last requests
            of_fold = [s for s in one.seeds if fold_of(world().record(s).prompt_key) == k]
            shared += of_fold[: len(of_fold) - rest.requests]
    same_sums(learner, leader, learner.update(learner.init("m", V), map(world().record, [*own, *shared])))
    assert leader.requests == len(own) + len(shared)


def test_the_profile_is_the_one_that_one_replica_learns_from_all_tokens() -> None:
    """With the rows of the leader, from which metric, scale and held-out gain come."""
    learner = world().learner()
    follower, leader, whole = Replica(learner), learner.init("m", V), learner.init("m", V)
    for seed in range(160):
        record = world().record(seed)
        if seed % 2:
            leader = learner.update(leader, [record])
        else:
            follower.score(seed)
        whole = learner.update(whole, [record])
    # The rest, which would wait for more requests.
    for fold, one in enumerate(follower.unshared):
        if one.tokens:
            follower.sent.append(SharedRows(fold, one.tokens, one.requests, spread(condensed(one.rows, A + 1))))
    own = leader
    for shared in follower.sent:
        leader = Sharing(learner).add(leader, shared)
    same_sums(learner, leader, whole)
    one, other = learner.fit(leader), learner.fit(replace(whole, recent=own.recent))
    assert one is not None
    assert other is not None
    assert (one.report.rank, one.report.tokens, one.report.requests) == (other.report.rank, 160 * T, 160)
    assert one.report.penalty == other.report.penalty
    assert one.report.gain == pytest.approx(other.report.gain, rel=1e-4)
    z = world().record(1000).features.values @ np.eye(N, V) + np.random.default_rng(0).normal(size=(T, V))
    mine, theirs = shift(one.profile, z), shift(other.profile, z)
    np.testing.assert_allclose(mine, theirs, atol=2e-3 * float(np.abs(theirs).max()))
    # And it does about as well as with the rows of all, and better than from the leader's part alone.
    alone, all_rows = learner.propose(own), learner.propose(whole)
    recovered = [world().recovered(profile) for profile in (alone, one.profile, all_rows)]
    assert recovered[1] > recovered[2] - 0.01
    assert recovered[1] > recovered[0]


def test_nothing_is_shared_of_fewer_requests_or_tokens_than_allowed() -> None:
    learner = world().learner()
    one = Replica(learner)
    before: dict[int, list[int]] = {}
    for seed in range(200):
        fold = fold_of(world().record(seed).prompt_key)
        before.setdefault(fold, []).append(seed)
        for shared in one.score(seed):
            assert shared.fold == fold
            assert shared.requests == len(before[fold]) >= MIN_CONVERSATIONS
            assert shared.tokens == len(before[fold]) * T > A + 1
            assert len(shared.rows) <= A + 1
            before[fold] = []
    assert one.sent


def test_no_token_is_among_the_rows_nor_in_their_span() -> None:
    learner = world().learner()
    one = Replica(learner)
    for seed in range(200):
        one.score(seed)
    tokens = np.concatenate([world().record(seed).features.values for seed in one.seeds])
    for shared in one.sent:
        z = shared.rows[:, :A]
        nearest = np.abs(z[:, None, :] - tokens[None, :, :A]).max(axis=2).min()
        assert nearest > 0.05
        # Whatever token comes lies in their span as much as those that they stand for.
        lengths = [np.linalg.svd(values.astype(np.float64), compute_uv=False) for values in (z, tokens[:, :A])]
        ranks = [int((found > 0.01 * found[0]).sum()) for found in lengths]
        assert ranks == [D, D]


def test_rows_follow_from_the_sums_alone() -> None:
    """Other tokens with the same sums give the same rows."""
    rng = np.random.default_rng(0)
    rows = rng.normal(size=(60, 1 + N + D)).astype(np.float32)
    rotation, _ = np.linalg.qr(rng.normal(size=(60, 60)))
    one, other = condensed(rows, A + 1), condensed((rotation @ rows).astype(np.float32), A + 1)
    signs = np.sign((one * other).sum(axis=1, keepdims=True))
    np.testing.assert_allclose(one, signs * other, atol=2e-3)


def test_bytes_grow_with_the_logarithm_of_the_tokens() -> None:
    sharing = Sharing(world().learner())
    width = 1 + N + D
    rows = np.ones((1, width), np.float32)
    sent, tokens = [0, 0], 0
    shared = 0
    for _ in range(100_000):
        tokens += 20
        one = Unshared(rows, tokens=tokens, requests=MIN_CONVERSATIONS, shared=shared, units=UNITS)
        (left, *_), due = sharing.take_due((one, *sharing.init()[1:]))
        if due:
            sent[shared > 50_000] += 1
            assert tokens >= GROWTH * shared
            shared, tokens = left.shared, 0
    assert sent[1] < 65, "50,000 to 2,000,000 tokens: log(40) / log(17 / 16) = 61"
    forgets = Sharing(world().learner(half_life_tokens=1000.0))
    recent = Unshared(rows, tokens=100, requests=MIN_CONVERSATIONS, shared=10**6, units=UNITS)
    assert len(forgets.take_due((recent, *forgets.init()[1:]))[1]) == 1, "what is forgotten has to be learned again"


def test_old_tokens_of_the_leader_count_less() -> None:
    """What is shared counts as tokens that come now."""
    learner = world().learner(half_life_tokens=500.0)
    leader = learner.update(learner.init("m", V), map(world().record, range(20)))
    rows = np.zeros((1, 1 + N + D), np.float32)
    rows[0, A] = 1000**0.5
    after = Sharing(learner).add(leader, SharedRows(0, 1000, 8, rows))
    before = flushed(leader.folds[0], leader.tokens, learner.forgetting)
    assert after.folds[0].weight == pytest.approx(before.weight / 4.0 + 1000.0)
    other = flushed(after.folds[1], after.tokens, learner.forgetting).weight
    assert other == pytest.approx(flushed(leader.folds[1], leader.tokens, learner.forgetting).weight / 4.0)
    assert after.recent == leader.recent
    assert after.tokens_by_source == leader.tokens_by_source


@pytest.mark.parametrize(
    "damaged",
    [
        SharedRows(0, 1, 1, np.zeros((1, N + D), np.float32)),
        SharedRows(0, 1, 1, np.full((1, 1 + N + D), np.nan, np.float32)),
        SharedRows(FOLDS, 1, 1, np.zeros((1, 1 + N + D), np.float32)),
        SharedRows(0, -1, 1, np.zeros((1, 1 + N + D), np.float32)),
        SharedRows(0, 1, 1, np.full((1, 1 + N + D), 1e30, np.float32)),  # sums would not fit float32
        SharedRows(0, 2**64, 1, np.ones((1, 1 + N + D), np.float32)),
        SharedRows(0, 1, 2**64, np.ones((1, 1 + N + D), np.float32)),
    ],
)
def test_damaged_rows_are_refused(damaged: SharedRows) -> None:
    learner = world().learner()
    with pytest.raises(InvalidArgumentError, match="shared rows"):
        Sharing(learner).add(learner.init("m", V), damaged)


def test_tokens_without_hidden_states_are_not_shared() -> None:
    sharing = Sharing(world().learner())
    record = world().record(0)
    for less in (replace(record, reference_hidden=None), replace(record, features=None)):
        assert all(one.tokens == 0 for one in sharing.with_record(sharing.init(), less))


def test_where_parts_are_lost_tokens_and_sums_agree_and_a_restart_goes_on() -> None:
    """Pushed out of the stream, or counted by a leader that died before it stored them."""
    learner = world().learner()
    one = Replica(learner)
    for seed in range(100):
        one.score(seed)
    assert one.sent
    for kept in (slice(1, None), slice(0, 1), slice(1, None, 2)):
        leader = learner.init("m", V)
        for shared in one.sent:
            parts = list(one.sharing.parts(shared, 500))
            assert len(parts) > 2
            assert sum(part.tokens for part in parts) == shared.tokens
            assert sum(part.requests for part in parts) == shared.requests
            for part in parts[kept]:
                leader = one.sharing.add(leader, part)
        weight = sum(fold.weight for fold in leader.folds)
        assert leader.tokens == pytest.approx(weight, abs=len(one.sent) * len(parts))
        assert leader.tokens > 0
        data = storage.save({"": leader}, learner, "m", 10**8)
        assert storage.load(data, learner, "m")[""].tokens == leader.tokens


@pytest.mark.parametrize("kind", ["turns of one conversation", "one request again and again"])
def test_what_is_of_few_conversations_is_not_shared(kind: str) -> None:
    """All of a conversation is in one fold: its sums would span its tokens, and follow from it alone."""
    sharing = Sharing(world().learner())
    unshared = sharing.init()

    def score(seed: int, unit: bytes) -> list[SharedRows]:
        nonlocal unshared
        record = replace(world().record(seed if kind.startswith("turns") else 0), conversation=unit)
        unshared, due = sharing.take_due(sharing.with_record(unshared, record))
        return due

    fold = fold_of(b"one")
    others = [unit for unit in (b"%d" % n for n in range(1000)) if fold_of(unit) == fold]
    for seed in range(5 * max(MIN_CONVERSATIONS, A // T)):
        assert score(seed, b"one") == []
    for seed, unit in enumerate(others[: MIN_CONVERSATIONS - 2]):
        assert score(100 + seed, unit) == []
    (due,) = score(200, others[MIN_CONVERSATIONS - 2])
    assert due.requests == 5 * max(MIN_CONVERSATIONS, A // T) + MIN_CONVERSATIONS - 1
    assert unshared[fold].units == frozenset()
