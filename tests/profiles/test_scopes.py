"""What is learned separately: profiles of labels, routes and models, tested in their own kinds of traffic only."""

from __future__ import annotations

import pytest
from tests.support.profile_bench import BIASED, JUDGED, LEARNED, Bench, contextual, helpful
from tests.support.world import World

from hemostat.profiles.scopes import MAX_SCOPES
from hemostat_calibration.errors import HemostatError

OPPOSITE = World()
OPPOSITE.bias = -BIASED.bias


def test_what_a_label_was_learned_from_is_tested_in_the_labels_kinds_and_serves_there() -> None:
    """Two labels whose models are off in opposite directions: nothing helps both."""
    bench = Bench(scope="label")
    for n in range(60):
        bench.feed(BIASED, LEARNED[2 * n : 2 * n + 1], label="a", kind="chat label a")
        bench.feed(OPPOSITE, LEARNED[2 * n + 1 : 2 * n + 2], label="b", kind="chat label b")
    waiting = {(c["scope"], c["source"]) for c in [*bench.status()["candidates"], *bench.status()["waiting"]]}
    assert {("a", "temperature_bias"), ("b", "temperature_bias")} <= waiting
    for n, key in enumerate(JUDGED[:1500]):
        if len(bench.profiles.serving.version_by_kind) == 2:
            break
        label = "b" if n % 2 else "a"
        bench.feed(OPPOSITE if n % 2 else BIASED, [key], label=label, kind=f"chat label {label}")
    served = bench.profiles.serving.kinds
    assert served["chat label a"].learned_of in {"", "a"}
    assert served["chat label b"].learned_of in {"", "b"}
    assert served["chat label a"].version != served["chat label b"].version
    assert served["rest"].version is None
    for candidate in bench.profiles.trials.tested:
        for kind in bench.profiles.trials.running_kinds(candidate):
            assert candidate.scope in ("", kind.removeprefix("chat label "))


def test_an_import_for_a_label_is_tested_in_its_kinds_only() -> None:
    bench = Bench(scope="label")
    bench.feed(BIASED, JUDGED[:1], label="a", kind="chat label a")
    version = bench.profiles.operator.import_profile(helpful(), "a")
    bench.feed(BIASED, JUDGED[1:4], label="a", kind="chat label a")
    bench.feed(BIASED, JUDGED[4:9], label="b", kind="chat label b")
    [candidate] = bench.status()["candidates"]
    assert (candidate["scope"], candidate["requests"]) == ("a", 3)
    bench.feed(BIASED, JUDGED[9:], lambda: bool(bench.profiles.serving.version_by_kind), label="a", kind="chat label a")
    assert bench.profiles.serving.version_by_kind == {"chat label a": version}
    bench.feed(BIASED, JUDGED[:3], label="a", kind="code label a")
    assert [(c.version, c.source) for c in bench.profiles.trials.tested] == [(version, "serving")], "in its new kind"
    assert bench.profiles.trials.running_kinds(bench.profiles.trials.tested[0]) == ["code label a"]


def test_scopes_are_bounded_and_must_have_been_seen() -> None:
    bench = Bench(scope="label")
    for n in range(MAX_SCOPES + 5):
        bench.feed(BIASED, JUDGED[:1], label=f"l{n}")
    assert len(bench.status()["scopes"]) == MAX_SCOPES
    with pytest.raises(HemostatError, match="no scored request was of the label 'x'; seen: l0"):
        bench.profiles.operator.import_profile(contextual(), "x")
    with pytest.raises(HemostatError, match=r"calibration\.scope is pooled"):
        Bench().profiles.operator.import_profile(helpful(), "x")
    assert not Bench().profiles.proposals.accepts(1, "x")


@pytest.mark.parametrize(("kind", "place"), [("route", "/v1/completions"), ("model", "m"), ("label", "chat")])
def test_the_scope_is_read_from_the_record(kind: str, place: str) -> None:
    bench = Bench(scope=kind)
    bench.feed(BIASED, LEARNED[:1], route="/v1/completions", model="m", label="chat")
    assert bench.status()["scopes"] == [place]
