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
from tests.core.strategies import Truth, log_softmax, make_record, profiles, truths
from tests.core.test_calibrator import V, World

from hemostat.config import Calibration
from hemostat.steering import (
    EVENTS_HELD,
    LINE_AT_MOST,
    LOGIT_BIAS_AT_MOST,
    PROFILES_HELD,
    STATES,
    Steering,
    as_request,
    width,
)
from hemostat.store import MemoryStore, StoredProfile
from hemostat.trials import TESTED_AT_ONCE
from hemostat_calibration import guard
from hemostat_calibration.calibrator import TemperatureBias
from hemostat_calibration.errors import HemostatError, InvalidArgumentError, InvalidProfileError
from hemostat_calibration.profile import CalibrationProfile, temperature_bias
from hemostat_calibration.records import Shift, TokenRecord
from hemostat_calibration.split import held_out
from hemostat_calibration.transform import shift

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
        self.steering = Steering(self.settings, self._save, lambda: self.time, tempered=tempered)
        if known:
            self.steering.know(MODEL, V)

    def _save(self, method: str, *args: Any) -> None:
        getattr(self.store, method)(*args)

    def restart(self, **calibration: Any) -> Bench:
        """Another process with the same store; the models are not known yet."""
        bench = Bench(self.store, known=False, **calibration)
        states = {name: self.store.get_state(name) for name in STATES}
        bench.steering.restore(self.store.profiles(), states, self.store.events(EVENTS_HELD))
        return bench

    def record(self, truth: Truth, key: bytes) -> TokenRecord:
        """With the exact effect of every profile in question, as reference and engine give it."""
        shifts = {}
        for profile in self.steering.evaluated():
            delta = shift(profile, truth.compressed)
            expected = (np.exp(truth.reference) * delta).sum(-1)
            shifts[profile.version] = Shift(expected, np.log((np.exp(truth.compressed + delta)).sum(-1)))
        return replace(make_record(truth, 20, key=key), shifts=shifts)

    def feed(self, world: World, keys: list[bytes], until: Callable[[], bool] = lambda: False) -> int:
        for n, key in enumerate(keys):
            if until():
                return n
            self.time += 1.0
            self.steering.observe(self.record(world.truth(n), key))
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


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_no_record_breaks_the_guards_range(data: st.DataObject) -> None:
    """Whatever two models say and however little is known: the gain stays within what was promised to the guard."""
    truth = data.draw(truths(rows=3))
    vocabulary = truth.compressed.shape[1]
    candidate, serving = data.draw(profiles(vocabulary)), data.draw(profiles(vocabulary))
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
    assert len(bench.steering._trials._guard.watches) == TESTED_AT_ONCE


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


def test_records_that_cannot_be_used_do_not_come_back(monkeypatch: pytest.MonkeyPatch) -> None:
    bench = Bench()
    bench.feed(BIASED, LEARNED[:7])

    def refuse(*_: object) -> None:
        raise InvalidArgumentError("no")

    with monkeypatch.context() as patch:
        patch.setattr(TemperatureBias, "update", refuse)
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


def test_identity_has_a_width_that_the_guard_takes() -> None:
    nothing = temperature_bias(MODEL, V, 1.0, np.zeros(V), 1.0)
    guard.enter(guard.init(), nothing.version, guard.Role.CANDIDATE, width(nothing))


def test_a_prompt_counts_once_however_often_it_is_asked() -> None:
    """Ten recurring prompts are ten observations, not thousands: they can never prove anything by repetition."""
    bench = Bench()
    bench.feed(BIASED, LEARNED[:40])
    assert bench.steering.candidates
    bench.feed(BIASED, JUDGED[:10] * 60)
    assert bench.steering.selected is None
    assert {candidate["requests"] for candidate in bench.steering.status()["candidates"]} == {10}
    assert bench.feed(BIASED, JUDGED[10:], lambda: bench.steering.selected is not None) < len(JUDGED) - 10
