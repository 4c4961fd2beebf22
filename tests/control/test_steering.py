"""The life of profiles on synthetic worlds: nothing is proven by what was learned from, nothing serves unproven."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.support.oracle import shift
from tests.support.records import Truth, log_softmax, make_record, profiles, truths
from tests.support.world import V, World

from hemostat.config.schema import Calibration
from hemostat.engines.registry import HOLD_AT_MOST
from hemostat.profiles.lifecycle import (
    AFTER_CONTEXTUAL,
    EVENTS_HELD,
    LINE_AT_MOST,
    LOGIT_BIAS_AT_MOST,
    PROFILES_HELD,
    PROPOSE_AGAIN,
    PROPOSE_WITHIN,
    REPLACE_TESTED,
    SCOPES_APART,
    SCOPES_FOLLOWED,
    STATES,
    Steering,
    as_request,
    weight,
    width,
)
from hemostat.profiles.trials import TESTED_AT_ONCE
from hemostat.store.memory import MemoryStore
from hemostat.store.protocol import StoredProfile
from hemostat_calibration import guard
from hemostat_calibration.divergence.gain import gain
from hemostat_calibration.errors import HemostatError, InvalidArgumentError, InvalidProfileError
from hemostat_calibration.learning.temperature_bias import TemperatureBiasLearner
from hemostat_calibration.profiles.contextual import contextual_profile, probe_profile
from hemostat_calibration.profiles.profile import CalibrationProfile, temperature_bias
from hemostat_calibration.profiles.transform import anchors_digest
from hemostat_calibration.records import Features, Shift, TokenRecord
from hemostat_calibration.statistics.split import held_out

MODEL = "m"
FRACTION = 0.3
LEARNED = [b"%d" % n for n in range(20_000) if not held_out(b"%d" % n, FRACTION)]
JUDGED = [b"%d" % n for n in range(20_000) if held_out(b"%d" % n, FRACTION)]


class Bench:
    """A `Steering` whose writes go to a store at once, and which is fed whole records."""

    def __init__(
        self, store: MemoryStore | None = None, *, known: bool = True, tempered: bool = False, **calibration: Any
    ) -> None:
        self.store = store or MemoryStore()
        given: dict[str, Any] = {"mode": "auto", "min_tokens": 500, "clamp_nats": 1.0, "held_out_fraction": FRACTION}
        self.settings = Calibration.model_validate(given | calibration)
        self.time = 0.0
        self.steering = Steering(self.settings, self.store, lambda: self.time, tempered=tempered)
        if known:
            self.steering.know(MODEL, V)

    def restart(self, **calibration: Any) -> Bench:
        """Another process with the same store; the models are not known yet."""
        bench = Bench(self.store, known=False, **calibration)
        states = {name: self.store.get_state(name) for name in STATES}
        bench.steering.restore(self.store.profiles(), states, self.store.events(EVENTS_HELD))
        return bench

    def record(self, truth: Truth, key: bytes, **more: Any) -> TokenRecord:
        """With the exact effect of every profile in question, as reference and engine give it."""
        shifts = {}
        for profile in self.steering.evaluated():
            delta = shift(profile, truth.compressed)
            expected = (np.exp(truth.reference) * delta).sum(-1)
            shifts[profile.version] = Shift(expected, np.log((np.exp(truth.compressed + delta)).sum(-1)))
        return replace(make_record(truth, 20, key=key), shifts=shifts, **more)

    def feed(self, world: World, keys: list[bytes], until: Callable[[], bool] = lambda: False, **more: Any) -> int:
        for n, key in enumerate(keys):
            if until():
                return n
            self.time += 1.0
            self.steering.observe(self.record(world.truth(n), key, **more))
        return len(keys)

    def decisions(self) -> list[str]:
        return [event["decision"] for event in reversed(self.steering.listing()["events"])]

    def last(self, decision: str) -> dict[str, Any]:
        return next(e for e in self.steering.listing()["events"] if e["decision"] == decision)

    def promote(self) -> str:
        """Learn and judge on a biased world until something serves."""
        self.feed(BIASED, LEARNED[:40])
        self.feed(BIASED, JUDGED, lambda: self.steering.selected is not None)
        assert self.steering.selected is not None
        return self.steering.selected


BIASED = World(bias=0.6)
EVEN = World()


def harmful(vocabulary: int = V, seed: int = 5) -> CalibrationProfile:
    return temperature_bias(MODEL, vocabulary, 1.0, np.random.default_rng(seed).normal(0, 0.8, vocabulary), 1.0)


def helpful(seed: int = 0) -> CalibrationProfile:
    noise = 0.1 * np.random.default_rng(seed).normal(size=V)
    return temperature_bias(MODEL, V, 1.0, noise - BIASED.bias, 1.0)


ANCHORS = np.arange(6, dtype=np.int32)


def contextual(bias: float = 1.0, anchors: np.ndarray[Any, np.dtype[np.int32]] = ANCHORS) -> CalibrationProfile:
    """One that takes back `bias` times what the biased world adds, in whatever context."""
    return contextual_profile(
        model=MODEL,
        anchors=anchors,
        linear=np.zeros((1, 2)),
        offset=np.ones(1),
        up=-bias * BIASED.bias[:, None],
        clamp_nats=1.5,
    )


def test_it_learns_from_one_side_only_and_judges_on_the_other_only() -> None:
    bench = Bench()
    bench.feed(BIASED, JUDGED[:60])
    status = bench.steering.status()
    assert (status["learned_requests"], status["candidates"]) == (0, [])
    bench.feed(BIASED, LEARNED[:40])
    status = bench.steering.status()
    assert status["learned_requests"] == 40
    assert [c["requests"] for c in status["candidates"]] == [0, 0], "what it learned from is no evidence"
    bench.feed(BIASED, JUDGED[:5])
    status = bench.steering.status()
    assert status["learned_requests"] == 40
    assert [c["requests"] for c in status["candidates"]] == [5, 5]


def test_a_helpful_candidate_is_promoted_with_its_evidence_and_kept() -> None:
    bench = Bench()
    version = bench.promote()
    steering = bench.steering
    assert steering.serving == version
    assert bench.decisions() == ["propose", "propose", "promote"]
    event = bench.last("promote")
    assert event["version"] == version
    assert event["at"] == bench.time
    evidence = event["evidence"]
    assert 0 < evidence["lower"] < evidence["mean_gain"]
    assert evidence["requests"] >= 5
    assert json.loads(json.dumps(event, allow_nan=False)) == event
    assert version in (bench.store.get_state("serving") or "")
    kept = bench.store.get_profile(version)
    assert kept is not None
    assert CalibrationProfile.from_bytes(kept.data, version).version == version
    assert steering.promotions == 1
    assert sorted(p["state"] for p in steering.listing()["profiles"]) == ["retired", "selected"]


def test_in_observe_nothing_ever_serves() -> None:
    bench = Bench(mode="observe")
    version = bench.promote()
    assert bench.steering.serving is None
    assert bench.steering.shown == version, "what it would win back is reported"
    bench.steering.set_mode("auto")
    assert bench.steering.serving == version


def test_what_does_nothing_or_harms_is_never_promoted() -> None:
    bench = Bench()
    bench.steering.add(harmful())
    bench.feed(EVEN, LEARNED[:40])
    bench.feed(EVEN, JUDGED[:250])
    assert bench.steering.selected is None
    assert "promote" not in bench.decisions()
    candidates = bench.steering.status()["candidates"]
    assert candidates[0]["mean_gain"] < -0.05
    assert candidates[0]["requests"] == 250


def test_what_turns_harmful_is_rolled_back() -> None:
    bench = Bench()
    version = bench.promote()
    turned = World()
    turned.bias = -BIASED.bias
    fed = bench.feed(turned, JUDGED, lambda: bench.steering.selected is None)
    assert fed < 300
    assert bench.steering.serving is None
    event = bench.last("roll_back")
    assert event["version"] == version
    assert event["evidence"]["upper"] < 0
    assert bench.steering.rollbacks == 1
    assert bench.restart().steering.selected is None


def test_bounds_alone_promote_nothing() -> None:
    """Without the engine's and the reference's exact terms the tail may hold anything."""
    bench = Bench()
    bench.feed(BIASED, LEARNED[:40])
    for n, key in enumerate(JUDGED[:60]):
        truth = BIASED.truth(n)
        bench.steering.observe(make_record(truth, 2, reference_k=2, key=key))
    assert bench.steering.selected is None
    assert [c["requests"] for c in bench.steering.status()["candidates"]] == [60, 60]


def in_context(vocabulary: int, seed: int) -> CalibrationProfile:
    random = np.random.default_rng(seed)
    ids = random.permutation(vocabulary)[:5]
    return contextual_profile(
        model="",
        anchors=ids,
        linear=random.normal(size=(3, len(ids))),
        offset=random.normal(size=3),
        up=random.normal(size=(vocabulary, 3)),
        clamp_nats=1.5,
    )


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_no_record_breaks_the_guards_range(data: st.DataObject) -> None:
    """Whatever two models say and however little is known: the gain stays within what was promised to the guard."""
    truth = data.draw(truths(rows=3))
    vocabulary = truth.compressed.shape[1]
    candidate, serving = (
        data.draw(profiles(vocabulary)) if data.draw(st.booleans()) else in_context(vocabulary, seed) for seed in (0, 1)
    )
    bench = Bench(known=False, clamp_nats=2.0)
    bench.steering.know(MODEL, vocabulary)
    bench.steering.add(replace(serving, model=MODEL))
    bench.steering.promote(bench.steering.candidates[0])
    bench.steering.add(replace(candidate, model=MODEL))
    whole = bench.record(truth, JUDGED[0])
    known = data.draw(st.booleans())
    k = data.draw(st.integers(1, vocabulary))
    reference_k = data.draw(st.one_of(st.none(), st.integers(1, vocabulary)))
    record = make_record(truth, k, reference_k=reference_k, key=JUDGED[0])
    before = bench.steering.listing()["events"]
    ids = in_context(vocabulary, 0).parameters["anchors"]
    values = np.where(np.isfinite(truth.compressed[:, ids]), truth.compressed[:, ids], np.nan).astype(np.float32)
    if data.draw(st.booleans()):
        record = replace(record, features=Features(anchors_digest(ids), values))
    bench.steering.observe(replace(record, shifts=whole.shifts if known else {}))
    assert len(bench.steering.listing()["events"]) >= len(before)


def test_off_ends_serving_learning_and_judging_at_once() -> None:
    bench = Bench()
    bench.promote()
    learned = bench.steering.status()["learned_requests"]
    judged = bench.steering.status()["selected"]["requests"]
    bench.steering.set_mode("off")
    assert bench.steering.serving is None
    assert bench.steering.shown is None
    assert bench.steering.evaluated() == ()
    bench.feed(BIASED, [*LEARNED[:40], *JUDGED[:20]])
    assert bench.steering.status()["learned_requests"] == learned
    assert bench.steering.status()["selected"]["requests"] == judged
    assert bench.last("mode")["why"] == "set to off by the operator"


def test_the_operators_mode_outlives_the_process_until_the_configuration_changes() -> None:
    bench = Bench()
    bench.steering.set_mode("off")
    assert bench.restart(mode="auto").steering.mode == "off"
    assert bench.restart(mode="observe").steering.mode == "observe", "a changed configuration wins"
    bench.steering.set_mode("auto")
    assert bench.restart(mode="auto").steering.mode == "auto"


def test_a_restart_takes_up_what_served_and_goes_on_judging_it() -> None:
    bench = Bench()
    version = bench.promote()
    again = bench.restart()
    assert again.steering.serving is None, "not before it is known that the model is the same"
    again.steering.know(MODEL, V)
    assert again.steering.serving == version
    assert [e["decision"] for e in again.steering.listing()["events"]] == ["promote", "propose", "propose"]
    again.feed(BIASED, JUDGED[:3])
    assert again.steering.status()["selected"]["requests"] == 3
    again.steering.rollback("asked for")
    assert bench.restart().steering.selected is None


@pytest.mark.parametrize(("model", "vocabulary"), [("another", V), (MODEL, V + 1)])
def test_another_model_starts_anew(model: str, vocabulary: int) -> None:
    bench = Bench()
    bench.promote()
    again = bench.restart()
    again.steering.know(model, vocabulary)
    assert again.steering.selected is None
    assert again.decisions()[-1] == "roll_back"
    assert again.steering.wanted() == []


def test_learning_begins_anew_with_the_model_and_proposes_as_soon_as_the_first_time() -> None:
    bench = Bench()
    bench.feed(BIASED, LEARNED[:43])
    assert len(bench.steering.candidates) == 2
    bench.steering.know("another", V)
    assert bench.steering.candidates == []
    assert bench.steering.status()["learned_requests"] == 0
    bench.feed(BIASED, LEARNED[:32])
    assert len(bench.steering.candidates) == 2


def test_a_damaged_stored_profile_is_left_alone() -> None:
    bench = Bench()
    version = bench.promote()
    bench.store.put_profile(StoredProfile(version, b"junk", 0.0))
    again = bench.restart()
    again.steering.know(MODEL, V)
    assert again.steering.serving is None


def test_an_import_has_to_prove_itself_and_survives_new_proposals() -> None:
    bench = Bench()
    profile = helpful()
    assert bench.steering.add(profile) == profile.version
    assert bench.steering.add(profile) == profile.version
    assert bench.decisions() == ["import"]
    assert bench.steering.serving is None
    bench.feed(EVEN, LEARNED[:40])
    assert bench.steering.candidates[0] == profile.version
    assert len(bench.steering.candidates) > 1
    bench.feed(BIASED, JUDGED, lambda: bench.steering.selected is not None)
    assert bench.steering.serving == profile.version


def test_an_import_that_reads_other_anchors_than_the_learner_is_said_to() -> None:
    bench = Bench()
    bench.steering.probe(probe_profile(MODEL, V, ANCHORS, 1.0))
    bench.steering.add(contextual())
    assert bench.last("import")["why"] == "imported by the operator"
    other = contextual(anchors=ANCHORS + 1)
    bench.steering.add(other)
    assert "other anchors" in bench.last("import")["why"]
    # It is tested, by what is known of it: on records that brought the learner's anchors, nothing.
    record = make_record(BIASED.truth(0), 20, key=JUDGED[0])
    values = np.zeros((record.tokens, len(ANCHORS)), np.float32)
    bench.steering.observe(replace(record, features=Features(anchors_digest(ANCHORS), values), engine_boot="boot"))
    judged = {c["version"]: c["requests"] for c in bench.steering.status()["candidates"]}
    assert judged[other.version] == 0


def test_an_import_starts_over_when_something_else_is_promoted() -> None:
    bench = Bench()
    other = harmful()
    bench.steering.add(other)
    bench.promote()
    assert bench.steering.candidates == [other.version]
    assert bench.steering.status()["candidates"][0]["requests"] == 0


def test_a_profile_of_another_vocabulary_is_refused_and_said_why() -> None:
    with pytest.raises(InvalidProfileError, match="vocabulary of 61 ids, the model has 60"):
        Bench().steering.add(harmful(V + 1))


def test_rolling_back_nothing_is_said_to_be_nothing() -> None:
    with pytest.raises(HemostatError, match="identity serves"):
        Bench().steering.rollback("asked for")


def test_a_forced_profile_goes_everywhere_and_nothing_is_learned_meanwhile() -> None:
    bench = Bench(known=False)
    profile = harmful()
    bench.steering.force(profile)
    bench.steering.know(MODEL, V)
    assert bench.steering.forced == bench.steering.shown == profile.version
    assert bench.steering.serving is None
    assert bench.steering.wanted() == [profile.version]
    bench.feed(BIASED, [*LEARNED[:40], *JUDGED[:10]])
    assert bench.steering.status()["learned_requests"] == 0
    bench.steering.know(MODEL, V + 1)
    assert bench.steering.forced is None, "it would be numbers without a meaning"


def test_everything_held_is_bounded() -> None:
    bench = Bench()
    for seed in range(PROFILES_HELD + 2 * LINE_AT_MOST):
        bench.steering.add(harmful(seed=seed))
        bench.time += 1.0
    assert len(bench.steering.candidates) == TESTED_AT_ONCE
    assert len(bench.steering.status()["waiting"]) == LINE_AT_MOST - TESTED_AT_ONCE
    assert len(bench.steering.listing()["profiles"]) == PROFILES_HELD
    assert len(bench.store.profiles()) == PROFILES_HELD
    for n in range(2 * EVENTS_HELD):
        bench.steering.set_mode("off" if n % 2 else "auto")
    assert len(bench.steering.listing()["events"]) == EVENTS_HELD
    assert len(bench.steering._trials._guard.running) == TESTED_AT_ONCE


def test_a_store_that_grew_too_large_is_cut_on_restart() -> None:
    bench = Bench()
    for seed in range(PROFILES_HELD + 5):
        profile = harmful(seed=seed)
        bench.store.put_profile(StoredProfile(profile.version, profile.to_bytes(), float(seed)))
    oldest = bench.store.profiles()[-1].version
    bench.store.set_state("serving", f'{{"scope": "pooled", "pinned": false, "selected": {{"": ["{oldest}", 300]}}}}')
    again = bench.restart()
    again.steering.know(MODEL, V)
    assert again.steering.serving == oldest
    assert again.steering.status()["selected"]["window"] == 300
    assert len(bench.store.profiles()) == PROFILES_HELD + 1


def test_profiles_are_bounded_by_what_they_weigh_too(monkeypatch: pytest.MonkeyPatch) -> None:
    bench = Bench()
    profiles = [harmful(seed=seed) for seed in range(6)]
    monkeypatch.setattr("hemostat.profiles.lifecycle.BYTES_HELD", 4 * weight(profiles[0]))
    for profile in profiles:
        bench.steering.add(profile)
    assert len(bench.steering.listing()["profiles"]) == 6, "who is tested or waits stays"
    bench.steering.promote(profiles[5].version)
    bench.steering._trials.remove(lambda c: True)
    bench.steering.add(harmful(seed=9))
    assert len(bench.steering.listing()["profiles"]) == 4
    monkeypatch.setattr("hemostat.profiles.lifecycle.BYTES_HELD", 2 * len(profiles[0].to_bytes()))
    again = bench.restart()
    assert len(again.steering.listing()["profiles"]) == 3, "the two newest ones, and what serves"


def test_records_that_cannot_be_used_do_not_come_back(monkeypatch: pytest.MonkeyPatch) -> None:
    bench = Bench()
    bench.feed(BIASED, LEARNED[:7])

    def refuse(*_: object) -> None:
        raise InvalidArgumentError("no")

    with monkeypatch.context() as patch:
        patch.setattr(TemperatureBiasLearner, "update", refuse)
        with pytest.raises(InvalidArgumentError):
            bench.feed(BIASED, LEARNED[7:8])
    bench.feed(BIASED, LEARNED[:8])
    assert bench.steering.status()["learned_requests"] == 8


def test_records_of_another_vocabulary_are_passed_over() -> None:
    bench = Bench()
    record = make_record(Truth(*(log_softmax(np.zeros((3, 9))),) * 2, np.zeros(3, int)), 4, key=LEARNED[0])
    bench.steering.observe(record)
    assert bench.steering._seats[""].batch == []


@pytest.mark.parametrize("tempered", [False, True])
def test_for_requests_only_what_a_request_can_carry_is_tested(tempered: bool) -> None:
    vocabulary = 2 * LOGIT_BIAS_AT_MOST
    bench = Bench(known=False, tempered=tempered, apply="request", mode="auto")
    bench.steering.know(MODEL, vocabulary)
    warm = temperature_bias(MODEL, vocabulary, 1.1, np.zeros(vocabulary), 1.0)
    if not tempered:
        with pytest.raises(InvalidProfileError, match=r"temperature 1\.1"):
            bench.steering.add(warm)
    rng = np.random.default_rng(0)
    off = rng.normal(size=vocabulary)
    for key in LEARNED[:40]:
        z = rng.normal(size=(40, vocabulary))
        truth = Truth(log_softmax(z), log_softmax(0.8 * z + off), rng.integers(0, vocabulary, 40))
        bench.steering.observe(make_record(truth, vocabulary, key=key))
    candidates = [bench.steering.held(v) for v in bench.steering.candidates]
    assert len(candidates) == (2 if tempered else 1)
    for profile in candidates:
        assert profile is not None
        assert 0 < np.count_nonzero(profile.parameters["bias"]) <= LOGIT_BIAS_AT_MOST
    bench.steering.promote(bench.steering.candidates[0])
    sent = bench.steering.request_parameters()
    assert bench.steering.request_parameters() is sent, "not computed again for every policy"
    assert len(sent["request_logit_bias"]) <= LOGIT_BIAS_AT_MOST
    assert Bench().steering.request_parameters() == {}


def test_request_parameters_do_to_logits_what_the_profile_does() -> None:
    bias = np.zeros(V)
    bias[[3, 7]] = 0.5, -0.25
    profile = temperature_bias(MODEL, V, 0.8, bias, 20.0)
    sent = as_request(profile)
    z = np.random.default_rng(0).normal(size=V)
    ours = z.copy()
    for token, value in sent["request_logit_bias"].items():
        ours[int(token)] += value
    ours /= sent["request_temperature"]
    np.testing.assert_allclose(log_softmax(ours), log_softmax(z + shift(profile, z)), atol=1e-4)


def test_a_temperature_of_one_is_not_sent_over_the_servers_own() -> None:
    assert as_request(temperature_bias(MODEL, V, 1.0, np.zeros(V), 1.0)) == {
        "request_temperature": None,
        "request_logit_bias": {},
    }


def test_temperature_and_bias_keep_the_largest_kl_from_identity() -> None:
    bench = Bench(clamp_nats=2.0, clamp_kl_nats=0.02)
    bench.feed(World(beta=0.6, bias=1.5), LEARNED[:40])
    found = [bench.steering.held(version) for version in bench.steering.candidates]
    assert found
    worst = 0.0
    for profile in found:
        assert profile is not None
        for n in range(40):
            truth = World(bias=0.5, seed=n).truth(n)
            after = log_softmax(truth.compressed + shift(profile, truth.compressed))
            kl = (np.exp(after) * (after - truth.compressed)).sum(-1)
            worst = max(worst, float(kl.max()))
    assert 0.01 < worst <= 0.02, "it binds, and is kept"


def test_identity_has_a_width_that_the_guard_takes() -> None:
    nothing = temperature_bias(MODEL, V, 1.0, np.zeros(V), 1.0)
    guard.begin_test(guard.init(), nothing.version, guard.Role.CANDIDATE, width(nothing))


def test_a_prompt_counts_once_however_often_it_is_asked() -> None:
    """Ten recurring prompts are ten observations, not thousands: they can never prove anything by repetition."""
    bench = Bench()
    bench.feed(BIASED, LEARNED[:40])
    assert bench.steering.candidates
    bench.feed(BIASED, JUDGED[:10] * 60)
    assert bench.steering.selected is None
    assert {candidate["requests"] for candidate in bench.steering.status()["candidates"]} == {10}
    assert bench.feed(BIASED, JUDGED[10:], lambda: bench.steering.selected is not None) < len(JUDGED) - 10


# --- what the learner process proposes --------------------------------------------------------------------------------


def test_a_contextual_proposal_is_tested_promoted_and_said_what_it_was_learned_from() -> None:
    bench = Bench()
    profile = contextual()
    report = {"tokens": 15_000, "rank": 8, "won_back": 0.3}
    assert bench.steering.propose(profile, "ridge, rank 8", report)
    event = bench.last("propose")
    assert (event["version"], event["why"], event["evidence"]) == (profile.version, "ridge, rank 8", report)
    bench.feed(BIASED, JUDGED, lambda: bench.steering.selected is not None)
    assert bench.steering.serving == profile.version
    shown = bench.steering.describe(profile.version)
    assert shown is not None
    assert (shown["family"], shown["state"], shown["scopes"]) == ("contextual", "selected", [""])
    again = bench.restart()
    again.steering.know(MODEL, V)
    assert again.steering.serving == profile.version


def test_a_proposal_has_to_have_learned_from_enough_more_and_more_so_while_one_is_tested() -> None:
    bench = Bench()
    first, second, third = contextual(1.0), contextual(0.9), contextual(0.8)
    assert bench.steering.awaits(1)
    assert bench.steering.propose(first, "", {"tokens": 10_000})
    assert not bench.steering.propose(second, "", {"tokens": REPLACE_TESTED * 10_000 - 1})
    assert bench.steering.candidates == [first.version]
    bench.feed(BIASED, JUDGED[:3])
    assert bench.steering.propose(second, "", {"tokens": REPLACE_TESTED * 10_000})
    assert bench.steering.candidates == [second.version]
    dropped = bench.last("drop")
    assert (dropped["version"], dropped["reason"], dropped["evidence"]["requests"]) == (first.version, "newer", 3)
    bench.feed(BIASED, JUDGED, lambda: bench.steering.selected is not None)
    learned = REPLACE_TESTED * 10_000
    assert not bench.steering.awaits(PROPOSE_AGAIN * learned - 1)
    assert bench.steering.awaits(PROPOSE_AGAIN * learned)
    assert not bench.steering.propose(second, "", {"tokens": PROPOSE_AGAIN * learned}), "it serves"
    assert bench.steering.propose(third, "", {"tokens": PROPOSE_WITHIN + PROPOSE_AGAIN * learned})
    bench.steering.rollback("asked for")
    assert not bench.steering.awaits(PROPOSE_WITHIN + PROPOSE_AGAIN * learned + 1), "one is under test"


def test_after_a_roll_back_a_new_proposal_comes_soon() -> None:
    bench = Bench()
    bench.steering.propose(contextual(), "", {"tokens": 100_000})
    bench.feed(BIASED, JUDGED, lambda: bench.steering.selected is not None)
    bench.steering.rollback("asked for")
    assert not bench.steering.awaits(100_000)
    assert bench.steering.awaits(100_000 + bench.settings.min_tokens)


def test_a_learner_that_begins_anew_has_to_surpass_only_what_serves(caplog: pytest.LogCaptureFixture) -> None:
    bench = Bench()
    profile = replace(contextual(), metadata={"tokens": "100000"})
    bench.steering.propose(profile, "", {"tokens": 100_000})
    bench.steering.probe(probe_profile(MODEL, V, ANCHORS, 1.0))
    assert not bench.steering.awaits(150_000), "it is under test"
    bench.feed(BIASED, JUDGED, lambda: bench.steering.selected is not None)
    for one in (bench, bench.restart()):
        one.steering.know(MODEL, V)
        one.steering.probe(probe_profile(MODEL, V, ANCHORS, 1.0))
        assert one.steering.selected == profile.version
        assert not one.steering.awaits(150_000)
        assert one.steering.awaits(10**6)
    assert "other anchors" not in caplog.text
    bench.steering.probe(probe_profile(MODEL, V, ANCHORS[:4], 1.0))
    assert "other anchors" in caplog.text
    bench.steering.rollback("asked for")
    assert not bench.steering.awaits(1_000)
    bench.steering.probe(probe_profile(MODEL, V, ANCHORS, 1.0))
    assert bench.steering.awaits(1_000)


def test_temperature_and_bias_make_room_for_a_contextual_candidate() -> None:
    bench = Bench()
    bench.feed(BIASED, LEARNED[:40])
    bias, both = bench.steering.candidates
    profile = contextual()
    assert bench.steering.propose(profile, "", {"tokens": 1000})
    assert bench.steering.candidates == [profile.version, bias]
    status = bench.steering.status()
    assert [waiting["version"] for waiting in status["waiting"]] == [both]
    bench.feed(BIASED, JUDGED, lambda: bench.steering.selected is not None)
    assert bench.steering.candidates == []


def test_where_a_contextual_learner_is_at_work_its_proposal_has_the_first_of_alpha() -> None:
    bench = Bench()
    bench.steering.probe(probe_profile(MODEL, V, ANCHORS, 1.0))
    bench.feed(BIASED, LEARNED, lambda: bench.steering.status()["learned_tokens"] >= 2 * bench.settings.min_tokens)
    assert bench.steering.candidates == [], "temperature and bias wait"
    profile = contextual()
    assert bench.steering.propose(profile, "", {"tokens": 1000})
    bench.feed(BIASED, LEARNED, lambda: len(bench.steering.candidates) > 1)
    assert bench.steering.candidates[0] == profile.version
    assert [c["test"] for c in bench.steering.status()["candidates"]] == [1, 2]


def test_temperature_and_bias_do_not_wait_for_ever() -> None:
    bench = Bench()
    bench.steering.probe(probe_profile(MODEL, V, ANCHORS, 1.0))
    bench.feed(BIASED, LEARNED, lambda: bool(bench.steering.candidates))
    learned, least = bench.steering.status()["learned_tokens"], AFTER_CONTEXTUAL * bench.settings.min_tokens
    assert least <= learned < least + 1000


@pytest.mark.parametrize(
    "made", [{"mode": "off"}, {"known": False}, {"apply": "request"}], ids=["off", "not known", "by request"]
)
def test_nothing_is_taken_that_could_not_be_tested(made: dict[str, Any]) -> None:
    bench = Bench(**made)
    assert not bench.steering.awaits(10**9)
    assert not bench.steering.propose(contextual(), "", {"tokens": 10**9})


def test_a_proposal_for_another_model_is_refused_by_name() -> None:
    bench = Bench()
    with pytest.raises(InvalidProfileError, match="the model another, not for m"):
        bench.steering.propose(replace(contextual(), model="another"), "", {"tokens": 1})
    bench.steering.know(MODEL, V + 1)
    with pytest.raises(InvalidProfileError, match="vocabulary of 60 ids"):
        bench.steering.propose(contextual(), "", {"tokens": 1})


def test_a_probe_is_held_and_neither_tested_nor_served() -> None:
    bench = Bench()
    asked = probe_profile(MODEL, V, ANCHORS, 1.0)
    bench.steering.probe(asked)
    steering = bench.steering
    assert steering.wanted() == [asked.version]
    assert steering.evaluated() == ()
    assert steering.held(asked.version) is asked
    shown = steering.describe(asked.version)
    assert shown is not None
    assert shown["state"] == "probe"
    assert bench.store.profiles() == []
    with pytest.raises(HemostatError, match="no profile"):
        steering.promote(asked.version)
    assert steering.add(asked) == asked.version
    bench.feed(BIASED, JUDGED[:20])
    assert steering.candidates == []
    other = contextual(anchors=ANCHORS[::-1])
    steering.propose(other, "", {"tokens": 1})
    assert steering.wanted() == [other.version, asked.version]
    steering.propose(contextual(), "", {"tokens": 10})
    assert asked.version not in steering.wanted(), "another one that is held has these anchors"
    steering.set_mode("off")
    assert asked.version not in steering.wanted()
    steering.set_mode("auto")
    newer = probe_profile(MODEL, V, ANCHORS[:3], 1.0)
    steering.probe(newer)
    assert steering.held(asked.version) is None
    assert steering.wanted()[-1] == newer.version
    steering.know(MODEL, V + 1)
    assert steering.wanted() == []


def test_who_has_not_proven_itself_in_time_makes_room_for_who_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hemostat.profiles.lifecycle.PATIENCE", 30)
    bench = Bench()
    first, second, third = (bench.steering.add(harmful(seed=seed)) for seed in range(3))
    bench.feed(EVEN, JUDGED[:29])
    assert bench.steering.candidates == [first, second]
    bench.feed(EVEN, JUDGED[29:31])
    assert bench.steering.candidates == [second, third]
    event = bench.last("drop")
    assert (event["version"], event["reason"], event["evidence"]["requests"]) == (first, "unproven", 30)
    bench.feed(EVEN, JUDGED[31:80])
    assert bench.steering.candidates == [second, third], "nobody waits any more"
    bench.feed(EVEN, LEARNED[:40])
    bias = bench.steering.status()["waiting"][0]["version"]
    monkeypatch.setattr("hemostat.profiles.lifecycle.LONGER_PATIENCE", 110)
    bench.feed(EVEN, JUDGED[80:109])
    assert bench.steering.candidates == [second, third], "temperature and bias have to wait longer"
    bench.feed(EVEN, JUDGED[109:112])
    assert bench.steering.candidates == [third, bias]


def test_where_the_engine_said_nothing_of_a_profile_the_record_is_no_evidence() -> None:
    bench = Bench()
    profile = contextual()
    bench.steering.propose(profile, "", {"tokens": 1})
    for n, key in enumerate(JUDGED[:9]):
        record = bench.record(BIASED.truth(n), key)
        said = record.shifts[profile.version]
        unsaid = replace(said, log_normalizer=np.full(record.tokens, np.nan))
        bench.steering.observe(replace(record, engine_boot="b", shifts={}))
        bench.steering.observe(replace(record, engine_boot="b", shifts={profile.version: unsaid}))
        bench.steering.observe(replace(record, shifts={}))
    assert bench.steering.status()["candidates"][0]["requests"] == 0
    bench.feed(BIASED, JUDGED[:9], engine_boot="b")
    assert bench.steering.status()["candidates"][0]["requests"] == 9


def test_a_token_whose_features_were_lost_is_left_out_and_one_that_is_masked_has_won_nothing() -> None:
    bench = Bench()
    profile = contextual()
    bench.steering.propose(profile, "", {"tokens": 1})
    whole = bench.record(BIASED.truth(0), JUDGED[0])
    exact = gain(whole, profile).lower
    said = whole.shifts[profile.version]
    values = np.zeros((whole.tokens, len(ANCHORS)), np.float32)
    values[:10] = np.nan
    expected, normalizer = said.expected.copy(), said.log_normalizer.copy()
    expected[:10], normalizer[:4], normalizer[4:10] = np.nan, np.nan, 1e-6
    record = replace(
        whole,
        features=Features(anchors_digest(ANCHORS), values),
        shifts={profile.version: Shift(expected, normalizer)},
        engine_boot="b",
    )
    assert bench.steering._won(whole, profile.version) == (pytest.approx(exact.mean()), pytest.approx(exact.mean()))
    mean = pytest.approx(exact[10:].sum() / (whole.tokens - 4))
    assert bench.steering._won(record, profile.version) == (mean, mean)
    lost = replace(record, shifts={profile.version: Shift(np.full_like(expected, np.nan), normalizer)})
    bounds = bench.steering._won(lost, profile.version)
    assert bounds is not None
    assert bounds[0] < exact[10:].mean() < bounds[1], "where only one of the terms is known, its bounds count"


# --- no longer supported ----------------------------------------------------------------------------------------------


def halved() -> World:
    """Where what takes back the whole bias does as much harm as good."""
    world = World()
    world.bias = 0.5 * BIASED.bias
    return world


def test_what_no_longer_helps_is_rolled_back_though_it_does_no_harm() -> None:
    bench = Bench()
    bench.steering.propose(contextual(), "", {"tokens": 1})
    bench.feed(BIASED, JUDGED, lambda: bench.steering.selected is not None)
    window = bench.steering.status()["selected"]["window"]
    bench.feed(BIASED, JUDGED[:window])
    assert bench.steering.status()["selected"]["supported"]
    fed = bench.feed(halved(), JUDGED[window:], lambda: bench.steering.selected is None)
    assert fed == window
    event = bench.last("roll_back")
    assert event["reason"] == "unsupported"
    assert event["evidence"]["requests"] == window
    assert event["evidence"]["upper"] > 0
    assert bench.steering.decisions["roll_back", "unsupported"] == 1


# --- the operator's word ----------------------------------------------------------------------------------------------


def test_what_the_operator_promotes_is_recorded_as_such_and_watched_like_any_other() -> None:
    bench = Bench()
    bad = bench.steering.add(harmful())
    bench.feed(EVEN, JUDGED[:5])
    bench.steering.promote(bad)
    assert bench.steering.serving == bad
    event = bench.last("promote")
    assert (event["reason"], event["evidence"]["requests"]) == ("operator", 5)
    assert bench.steering.decisions["promote", "operator"] == bench.steering.promotions == 1
    with pytest.raises(HemostatError, match="serves there already"):
        bench.steering.promote(bad)
    bench.feed(EVEN, JUDGED, lambda: bench.steering.selected is None)
    assert bench.last("roll_back")["reason"] == "harm"


def test_a_pinned_profile_stays_whatever_is_measured_until_it_is_unpinned() -> None:
    bench = Bench()
    bad, good = bench.steering.add(harmful()), bench.steering.add(helpful())
    bench.steering.pin(bad)
    bench.feed(BIASED, JUDGED[:300])
    assert bench.steering.serving == bad
    status = bench.steering.status()
    assert status["pinned"]
    assert status["selected"]["upper"] < 0
    assert status["candidates"][0]["lower"] > 0
    with pytest.raises(HemostatError, match="unpin"):
        bench.steering.promote(good)
    again = bench.restart()
    again.steering.know(MODEL, V)
    assert (again.steering.serving, again.steering.pinned) == (bad, True)
    bench.steering.unpin()
    bench.feed(BIASED, JUDGED[300:], lambda: bench.steering.selected == good)
    assert bench.steering.serving == good
    assert [d for d in bench.decisions() if "pin" in d] == ["pin", "unpin"]
    with pytest.raises(HemostatError, match="nothing is pinned"):
        bench.steering.unpin()
    bench.steering.pin(good)
    assert bench.steering.promotions == 2, "it served already"
    bench.steering.rollback("asked for")
    assert (bench.steering.serving, bench.steering.pinned) == (None, False)


def test_another_model_ends_a_pin() -> None:
    bench = Bench()
    bench.steering.pin(bench.steering.add(harmful()))
    bench.steering.know("another", V)
    assert (bench.steering.selected, bench.steering.pinned) == (None, False)
    assert bench.restart().steering.pinned is False


def test_who_is_not_there_cannot_serve() -> None:
    bench = Bench()
    for act in (bench.steering.promote, bench.steering.pin):
        with pytest.raises(HemostatError, match="no profile"):
            act("0" * 32)
    assert not bench.steering.pinned


def test_what_was_spent_of_alpha_is_not_there_again_after_a_restart() -> None:
    bench = Bench()
    bench.steering.add(harmful())
    bench.promote()
    before = bench.steering.status()["tests_begun"]
    assert before["candidate"] >= 3
    assert before["serving"] == 1
    again = bench.restart()
    again.steering.know(MODEL, V)
    assert again.steering.status()["tests_begun"] == {"candidate": before["candidate"], "serving": 2}
    again.steering.add(harmful(seed=9))
    found = again.steering.status()["candidates"][0]
    assert found["test"] == before["candidate"] + 1
    assert found["alpha"] == pytest.approx(0.05 / (found["test"] * (found["test"] + 1)))
    damaged = MemoryStore()
    damaged.set_state("tests.candidate", "many")
    damaged.set_state("serving", "{")
    Bench(damaged).restart().steering.know(MODEL, V)


def test_a_test_that_has_seen_nothing_is_not_begun_again_at_a_price() -> None:
    bench = Bench()
    tested, next_ = [bench.steering.add(helpful(seed)) for seed in range(3)][1:]
    bench.feed(BIASED, JUDGED[:3])
    bench.steering.promote(bench.steering.candidates[0])
    found = {c["version"]: (c["test"], c["requests"]) for c in bench.steering.status()["candidates"]}
    # The one that moved up has its first test, the other one, which is compared with another now, its second.
    assert found == {tested: (4, 0), next_: (3, 0)}
    assert bench.steering.status()["tests_begun"]["candidate"] == 4


def test_what_another_replica_says_was_spent_is_never_less_than_what_this_one_spent() -> None:
    bench = Bench()
    bench.promote()
    before = bench.steering.status()["tests_begun"]
    states = {name: bench.store.get_state(name) for name in STATES} | {"tests.candidate": "1"}
    bench.steering.take_up(bench.store.profiles(), states, [])
    assert bench.steering.status()["tests_begun"]["candidate"] == before["candidate"]


# --- scopes -----------------------------------------------------------------------------------------------------------


def labelled(**more: Any) -> Bench:
    return Bench(scope="label", **more)


def test_a_label_gets_a_profile_of_its_own_where_it_proves_better_there() -> None:
    """Two labels whose models are off in opposite directions: nothing helps both."""
    bench = labelled()
    opposite = World()
    opposite.bias = -BIASED.bias
    for n in range(60):
        bench.feed(BIASED, LEARNED[2 * n : 2 * n + 1], label="a")
        bench.feed(opposite, LEARNED[2 * n + 1 : 2 * n + 2], label="b")
    found = {(c["scope"], c["source"]) for c in [*bench.steering.status()["candidates"]]}
    found |= {(c["scope"], c["source"]) for c in bench.steering.status()["waiting"]}
    assert ("a", "temperature_bias") in found

    def served() -> bool:
        return "a" in bench.steering.scoped

    for n, key in enumerate(JUDGED):
        if served():
            break
        bench.feed(BIASED if n % 2 else opposite, [key], label="a" if n % 2 else "b")
    assert served()
    own = bench.steering.scoped["a"]
    assert bench.steering.serving != own
    event = bench.last("promote")
    assert (event["scope"], event["version"]) == ("a", own)
    record = bench.record(BIASED.truth(0), JUDGED[0])
    pooled = bench.steering.serving
    for label, expected in (("a", own), ("b", bench.steering.scoped.get("b", pooled)), ("", pooled)):
        stage = bench.steering.stage_of(replace(record, label=label))
        assert (stage.version if stage else None) == expected
    status = bench.steering.status()
    assert status["scopes"]["a"]["version"] == own
    assert own in bench.steering.wanted()
    again = bench.restart(scope="label")
    again.steering.know(MODEL, V)
    assert again.steering.scoped == bench.steering.scoped
    for_all = bench.restart()
    for_all.steering.know(MODEL, V)
    assert for_all.steering.scoped == {}, "all is pooled now"
    bench.feed(opposite, JUDGED[500:], lambda: not served(), label="a")
    assert bench.last("roll_back")["scope"] == "a"
    assert bench.store.get_state("serving") is not None


def test_a_labels_evidence_is_of_that_label_and_over_what_serves_there() -> None:
    bench = labelled()
    bench.feed(BIASED, JUDGED[:1], label="a")
    version = bench.steering.add(helpful(), "a")
    bench.feed(BIASED, JUDGED[1:4], label="a")
    bench.feed(BIASED, JUDGED[4:9], label="b")
    [candidate] = bench.steering.status()["candidates"]
    assert (candidate["scope"], candidate["requests"]) == ("a", 3)
    other = bench.steering.add(contextual(0.3))
    bench.steering.promote(other)
    [candidate] = bench.steering.status()["candidates"]
    assert candidate["requests"] == 0, "what it has to be better than is another now"
    bench.feed(BIASED, JUDGED[10:], lambda: "a" in bench.steering.scoped, label="a")
    assert bench.steering.scoped == {"a": version}
    assert bench.steering.serving == other


def test_what_serves_all_is_put_to_the_test_against_a_labels_own() -> None:
    bench = labelled()
    bench.feed(BIASED, JUDGED[:1], label="a")
    weak = bench.steering.add(contextual(0.1), "a")
    bench.steering.promote(weak, "a")
    strong = bench.steering.add(contextual(1.0))
    bench.steering.promote(strong)
    assert [(c["scope"], c["source"]) for c in bench.steering.status()["candidates"]] == [("a", "pooled")]
    bench.feed(BIASED, JUDGED[1:], lambda: not bench.steering.scoped, label="a")
    assert bench.steering.scoped == {}
    assert bench.last("promote")["version"] == strong
    bench.steering.promote(weak, "a")
    bench.steering.rollback("asked for", "a")
    assert (bench.steering.serving, bench.steering.scoped) == (strong, {})
    assert bench.steering.candidates == []
    bench.steering.promote(weak, "a")
    bench.steering.pin(weak)
    assert (bench.steering.serving, bench.steering.scoped) == (weak, {}), "pinned for all"
    bench.steering.unpin()
    assert bench.steering.scoped == {"a": weak}
    bench.steering.rollback("asked for")
    assert (bench.steering.serving, bench.steering.scoped) == (None, {})


@pytest.mark.parametrize("how", ["unpin", "rollback"])
def test_what_was_better_than_a_pinned_profile_has_yet_to_be_better_than_a_labels_own(how: str) -> None:
    bench = labelled()
    bench.feed(BIASED, JUDGED[:1], label="a")
    own = bench.steering.add(helpful(), "a")
    bench.steering.promote(own, "a")
    version = bench.steering.add(contextual(0.3), "a")
    bench.steering.pin(bench.steering.add(harmful()))
    bench.feed(BIASED, JUDGED[1:400], label="a")
    [candidate] = [c for c in bench.steering.status()["candidates"] if c["version"] == version]
    assert candidate["requests"] > 0
    assert candidate["lower"] > 0, "better than the pinned one"
    if how == "unpin":
        bench.steering.unpin()
    else:
        bench.steering.rollback("asked for", "")
    assert bench.steering.scoped == {"a": own}
    [candidate] = [c for c in bench.steering.status()["candidates"] if c["version"] == version]
    assert candidate["requests"] == 0
    bench.feed(BIASED, JUDGED[400:420], label="a")
    assert bench.steering.scoped == {"a": own}, "it is weaker"


def test_scopes_are_bounded_and_named() -> None:
    bench = labelled()
    for n in range(SCOPES_FOLLOWED + 5):
        bench.feed(BIASED, JUDGED[:1], label=f"l{n}")
    assert len(bench.steering.status()["scopes"]) == SCOPES_FOLLOWED
    profiles = [bench.steering.add(contextual(0.1 * n)) for n in range(1, SCOPES_APART + 2)]
    for n, version in enumerate(profiles[:-1]):
        bench.steering.promote(version, f"l{n}")
    with pytest.raises(HemostatError, match="as many as engines hold"):
        bench.steering.promote(profiles[-1], f"l{SCOPES_APART}")
    assert not bench.steering.awaits(10**6, f"l{SCOPES_APART}")
    assert bench.steering.awaits(10**6, "l0")
    bench.steering.promote(profiles[-1], "l0")
    with pytest.raises(HemostatError, match="no scored request was of the label 'x'; seen: l0"):
        bench.steering.promote(profiles[-1], "x")
    with pytest.raises(HemostatError, match=r"calibration\.scope is pooled"):
        Bench().steering.add(helpful(), "x")
    assert not Bench().steering.awaits(1, "x")


@pytest.mark.parametrize(("kind", "place"), [("route", "/v1/completions"), ("model", "m"), ("label", "chat")])
def test_a_scope_is_read_from_the_record(kind: str, place: str) -> None:
    bench = Bench(scope=kind)
    bench.feed(BIASED, LEARNED[:1], route="/v1/completions", model="m", label="chat")
    assert list(bench.steering.status()["scopes"]) == [place]


OPERATIONS = ("add", "propose", "promote", "pin", "unpin", "rollback", "feed", "mode", "know", "restart", "probe")


@settings(max_examples=80, deadline=None)
@given(st.data())
def test_whatever_happens_what_is_held_stays_bounded_and_tests_are_of_who_is_tested(data: st.DataObject) -> None:
    bench = labelled(min_tokens=100)
    made = [contextual(0.1 * n - 0.3) for n in range(12)]
    scopes = st.sampled_from(["", "a", "b", "c"])
    for n in range(data.draw(st.integers(1, 30))):
        steering = bench.steering
        profile, scope = made[data.draw(st.integers(0, 11))], data.draw(scopes)
        try:
            match data.draw(st.sampled_from(OPERATIONS)):
                case "add":
                    steering.add(profile, scope)
                case "propose":
                    steering.propose(profile, "", {"tokens": 10**n}, scope)
                case "promote":
                    steering.promote(profile.version, scope)
                case "pin":
                    steering.pin(profile.version)
                case "unpin":
                    steering.unpin()
                case "rollback":
                    steering.rollback("", data.draw(st.sampled_from([None, scope])))
                case "feed":
                    keys = LEARNED if data.draw(st.booleans()) else JUDGED
                    bench.feed(BIASED, keys[10 * n : 10 * n + 10], label=scope)
                case "mode":
                    steering.set_mode(data.draw(st.sampled_from(["off", "observe", "auto"])))
                case "know":
                    steering.know(data.draw(st.sampled_from([MODEL, "other"])), V)
                case "restart":
                    bench = bench.restart(scope="label")
                    bench.steering.know(MODEL, V)
                case "probe":
                    steering.probe(probe_profile(MODEL, V, ANCHORS[: 1 + n % 6], 1.0))
        except HemostatError:
            pass
        steering = bench.steering
        assert len(steering.wanted()) <= HOLD_AT_MOST
        assert all(steering.held(version) is not None for version in steering.wanted())
        trials = steering._trials
        serving = [scope for scope, seat in steering._seats.items() if seat.selected]
        assert len(trials._guard.running) == len(trials.tested) + len(serving)
        assert len(trials.line) <= LINE_AT_MOST + SCOPES_APART
        assert len(set(trials.line)) == len(trials.line)
        for place in serving:
            trials.of_serving(place)
        shown = [steering.status(), steering.listing()]
        assert json.loads(json.dumps(shown, allow_nan=False)) == shown
        assert {**steering.scoped}.keys() <= {"a", "b", "c"}
