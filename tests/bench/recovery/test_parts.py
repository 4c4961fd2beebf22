"""The benchmark's arithmetic, on numbers that can be counted by hand."""

from __future__ import annotations

import numpy as np
import pytest
from tests.bench.recovery import never_worse, prompts
from tests.bench.recovery.engine import Ask, Written
from tests.bench.recovery.figures import IDENTITY, Figures, Recovery, interval, measure, row
from tests.bench.recovery.learning import GrowingRun, contextual_records, first_tokens, judged, listed_records
from tests.bench.recovery.outcomes import (
    common_prefix,
    compare,
    holds_json_object,
    is_json_object,
    on_policy,
    same_answer,
)
from tests.support import oracle
from tests.support.constant_profile import constant_profile

from hemostat_calibration.learning.contextual.anchors import choose_anchors
from hemostat_calibration.learning.contextual.choose import ProfileLimits
from hemostat_calibration.learning.contextual.learner import ContextualLearner
from hemostat_calibration.profiles import transform
from hemostat_calibration.profiles.contextual import contextual_profile
from hemostat_calibration.record_checks import validate

V, D, N = 60, 6, 20


def world(texts: int, tokens: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray, list[Written], np.ndarray]:
    """An output embedding, anchors, texts, and the compressed model's true hidden states: the reference's are a linear
    map of them."""
    rng = np.random.default_rng(seed)
    weight = rng.normal(size=(V, D)).astype(np.float32)
    anchors = choose_anchors(weight, N)
    turn = np.eye(D) + 0.3 * rng.normal(size=(D, D))
    made, states = [], []
    for number in range(texts):
        h = rng.normal(size=(tokens, D))
        z = h @ weight[anchors].T
        states.append(h)
        made.append(
            Written(
                Ask(f"prompt {number}", tokens, 1.0, number),
                np.array([number, 1], np.int32),
                rng.integers(V, size=tokens).astype(np.int32),
                "",
                (z - z.mean(1, keepdims=True)).astype(np.float16),
                {},
                (h @ turn).astype(np.float16),
            )
        )
    return weight, anchors, made, np.concatenate(states)


def test_topics_are_on_one_side_and_prompts_are_distinct() -> None:
    made = prompts.open_ended()
    sides = [{p.topic for p in made if p.heldout == side} for side in (False, True)]
    assert not sides[0] & sides[1]
    assert len(sides[1]) >= 20
    assert len({p.text for p in made}) == len(made)
    # A prefix holds every topic before it holds one twice.
    assert len({p.topic for p in made[: len(sides[0])]}) == len(sides[0])
    assert len(set(prompts.short_answers())) == len(prompts.QUESTIONS)
    assert len(set(prompts.extraction())) == 40


def test_figures_are_those_of_the_full_distributions() -> None:
    weight, anchors, texts, h_c = world(4, 25)
    recovery = Recovery(weight, anchors, texts)
    profile = constant_profile("", np.linspace(-0.5, 0.5, V), 2.0)
    result = measure(weight, recovery, texts, {"it": profile})
    h_r = np.concatenate([t.hidden for t in texts if t.hidden is not None]).astype(np.float64)

    def log_softmax(z: np.ndarray) -> np.ndarray:
        return z - np.log(np.exp(z).sum(1, keepdims=True))

    log_r, z = log_softmax(h_r @ weight.T), h_c @ weight.T
    for label, log_c in ((IDENTITY, log_softmax(z)), ("it", log_softmax(z + oracle.shift(profile, z)))):
        kl = (np.exp(log_r) * (log_r - log_c)).sum(1)
        assert result[label].kl == pytest.approx(kl, abs=0.05)
        assert result[label].reverse_kl.mean() == pytest.approx(
            (np.exp(log_c) * (log_c - log_r)).sum(1).mean(), rel=0.02
        )
        assert result[label].tv.mean() == pytest.approx(
            0.5 * np.abs(np.exp(log_c) - np.exp(log_r)).sum(1).mean(), rel=0.02
        )
        assert result[label].top1.mean() == pytest.approx((log_c.argmax(1) == log_r.argmax(1)).mean(), abs=0.03)


def test_the_contextual_family_wins_back_what_a_linear_map_can() -> None:
    weight, anchors, texts, _ = world(120, 25)
    learning, heldout = texts[:80], texts[80:]
    learner = GrowingRun(ContextualLearner(weight, anchors, features=N, limits=ProfileLimits(D)))
    few = learner.learn(learning[:30], "few")
    all_ = learner.learn(learning, "all")
    assert few.profile is not None
    assert all_.profile is not None
    recovery = Recovery(weight, anchors, learning)
    result = measure(weight, recovery, heldout, {"few": few.profile, "all": all_.profile})
    prompt = np.repeat(np.arange(40), 25)
    said = row(result, "all", prompt, prompt // 2)
    assert said["kl_won_back"] > 0.8
    assert said["ci95"][0] < said["kl_won_back"] < said["ci95"][1]
    assert said["heldout_topics"] == 20
    assert row(result, IDENTITY, prompt, prompt)["kl_won_back"] == 0.0
    harmful = contextual_profile(
        model="", anchors=anchors, linear=np.zeros((1, 1)), offset=np.ones(1), up=np.arange(V)[:, None], clamp_nats=5.0
    )
    result |= {"bad": measure(weight, recovery, heldout, {"bad": harmful})["bad"]}
    assert not judged(harmful, result["bad"], result[IDENTITY], prompt)["promoted"]


def test_the_guard_promotes_what_helps_every_prompt_and_says_after_how_many() -> None:
    profile = constant_profile("", np.linspace(-0.5, 0.5, V), 0.5)
    ones = np.ones(2000)
    before, after = Figures(ones, ones, ones, ones), Figures(0.6 * ones, ones, ones, ones)
    verdict = judged(profile, after, before, np.repeat(np.arange(200), 10))
    assert verdict["promoted"]
    assert 3 < verdict["guard_requests"] < 60
    assert verdict["guard_progress"] == 1.0


def test_records_are_valid_and_say_what_the_texts_say() -> None:
    weight, anchors, texts, h_c = world(3, 30)
    recovery = Recovery(weight, anchors, texts)
    records = list(listed_records(weight, recovery, texts))
    for record in records:
        validate(record)
    assert (records[0].compressed.ids[:, 0] == (h_c[:30] @ weight.T).argmax(1)).mean() > 0.9
    (record, *_) = contextual_records(texts, anchors, V)
    assert record.features is not None
    assert record.features.anchors == transform.anchors_digest(anchors)
    assert [t.ask.number for t in first_tokens(texts, 31)] == [0, 1]


def test_intervals_hold_the_ratio_and_are_wider_for_clusters() -> None:
    rng = np.random.default_rng(0)
    group = np.repeat(np.arange(50), 40)
    values = np.repeat(rng.normal(1.0, 0.5, 50), 40) + rng.normal(0.0, 0.5, 2000)
    ratio, low, high = interval(group, values, np.ones(2000), "a")
    _, low_token, high_token = interval(np.arange(2000), values, np.ones(2000), "a")
    assert low < ratio < high
    assert ratio == pytest.approx(values.mean())
    assert high - low > 3 * (high_token - low_token)


def test_on_policy_compares_arms_topic_by_topic() -> None:
    topics = np.repeat(np.arange(30), 10)
    level = np.repeat(np.random.default_rng(1).gamma(4.0, 0.1, 30), 10)
    said = on_policy(level, topics, 0.7 * level[::-1], topics[::-1])
    assert said["kl_won_back"] == pytest.approx(0.3)
    # Topics differ far more than arms do: drawn together, they cancel.
    assert said["ci95"] == pytest.approx([0.3, 0.3])


@pytest.mark.parametrize(
    ("text", "valid"),
    [
        ('{"a": 1}', True),
        ('```json\n{"a": 1}\n```', True),
        ("[1]", False),
        ('{"a": 1} and more', False),
        ("", False),
    ],
)
def test_json(text: str, valid: bool) -> None:
    assert is_json_object(text) == valid


@pytest.mark.parametrize(
    ("text", "holds"),
    [('JSON:\n{"a": 1}', True), ('{ or {"a": {}} then', True), ('JSON: {"a": 1', False), ("[1]", False), ("", False)],
)
def test_json_inside(text: str, holds: bool) -> None:
    assert holds_json_object(text) == holds


def test_outcomes_are_paired_by_prompt() -> None:
    assert common_prefix(np.array([1, 2, 3]), np.array([1, 2, 4])) == 2
    assert common_prefix(np.array([1, 2]), np.array([1, 2, 4])) == 2
    assert same_answer("Paris.", " paris")
    assert not same_answer("Paris", "Lyon")

    def written(ids: list[int], text: str) -> Written:
        return Written(Ask("", 4, 0.0, 0), np.array([1], np.int32), np.array(ids, np.int32), text)

    kinds = ["open", "short", "json"] * 5
    reference = [written([1, 2, 3, 4], '{"a": 1}')] * 15
    plain = [written([1, 9, 9, 9], "no")] * 15
    treated = [written([1, 2, 3, 9], '{"a": 1}')] * 15
    said = compare(kinds, reference, plain, treated)
    assert said["common_prefix_tokens"]["without"] == 1.0
    assert said["common_prefix_tokens"]["with"] == 3.0
    assert said["common_prefix_tokens"]["ci95"] == [2.0, 2.0]
    assert said["short_answer_exact_match"]["difference"] == 1.0
    assert said["json_valid"] == {
        "prompts": 5,
        "without": 0.0,
        "with": 1.0,
        "difference": 1.0,
        "ci95": [1.0, 1.0],
        "reference": 1.0,
    }


def test_a_simulated_run_promotes_what_is_good(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(never_worse, "VOCABULARY", V)
    monkeypatch.setattr(never_worse, "ANCHORS", N)
    weight, anchors, texts, _ = world(160, 25)
    w = never_worse.world(weight, Recovery(weight, anchors, texts), texts, 160, 1.0)
    runs = [never_worse.run(w, seed) for seed in range(3)]
    assert all(r.proposed and 500 <= r.tokens < 2100 for r in runs)
    assert all(r.true_gain > 0.05 for r in runs)
    assert any(r.promoted for r in runs)
    assert runs[0] == never_worse.run(w, 0)
