"""A kind whose tokens a grammar restricts: judged by its conditional gain, and by itself."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from tests.support.profile_bench import BIASED, JUDGED, LEARNED, Bench, harmful, helpful
from tests.support.records import Truth
from tests.support.world import World

from hemostat.ipc.messages import REST_KIND

KIND = "chat grammar greedy"
FREE = "chat text greedy"
OPPOSITE = World()
OPPOSITE.bias = -BIASED.bias


def allowed(truth: Truth, share: float = 0.3) -> np.ndarray[Any, np.dtype[np.bool_]]:
    """[T, V]: those ids that a grammar allows, the emitted ones among them."""
    rng = np.random.default_rng(int(truth.emitted.sum()))
    mask = rng.random(truth.compressed.shape) < share
    mask[np.arange(len(mask)), truth.emitted] = True
    return mask


def feed(bench: Bench, world: World, keys: list[bytes], kind: str = KIND) -> None:
    for n, key in enumerate(keys):
        truth = world.truth(n)
        bench.time += 1.0
        bench.observe(bench.record(truth, key, allowed(truth), kind=kind))


def test_a_profile_serves_it_after_it_was_proven_there_and_nowhere_else() -> None:
    bench = Bench()
    feed(bench, BIASED, JUDGED[:10])
    version = bench.profiles.operator.import_profile(helpful())
    feed(bench, BIASED, JUDGED[10:400])
    assert bench.profiles.serving.version_by_kind == {KIND: version}
    event = bench.last("promote")
    assert (event["kind"], event["evidence"]["kind"]) == (KIND, KIND)
    # The gain that it was promoted on is that in KL(r‖c) given the allowed ids.
    assert event["evidence"]["mean_gain"] == pytest.approx(_conditional_gain(150), rel=0.1)


def _conditional_gain(requests: int) -> float:
    """Mean over requests of the gain at each token, by the definition."""
    profile, gains = helpful(), []
    delta = np.clip(profile.parameters["bias"], -profile.clamp_nats, profile.clamp_nats).astype(float)
    for n in range(requests):
        truth = BIASED.truth(n)
        mask = allowed(truth)
        r, c = (np.where(mask, np.exp(of), 0.0) for of in (truth.reference, truth.compressed))
        r, c = r / r.sum(1, keepdims=True), c / c.sum(1, keepdims=True)
        gains.append(float((r @ delta - np.log(c @ np.exp(delta))).mean()))
    return float(np.mean(gains))


def test_what_harms_it_does_not_serve_it_though_it_helps_the_others() -> None:
    bench = Bench()
    bench.feed(BIASED, JUDGED[:10], kind=FREE)
    feed(bench, OPPOSITE, JUDGED[10:20])
    version = bench.profiles.operator.import_profile(helpful())
    for n in range(20, 420, 20):
        bench.feed(BIASED, JUDGED[n : n + 10], kind=FREE)
        feed(bench, OPPOSITE, JUDGED[n + 10 : n + 20])
    assert bench.profiles.serving.version_by_kind == {FREE: version}


def test_one_that_harms_it_is_rolled_back_there_and_serves_the_others() -> None:
    bench = Bench()
    bench.feed(BIASED, JUDGED[:10], kind=FREE)
    feed(bench, BIASED, JUDGED[10:20])
    version = bench.profiles.operator.import_profile(helpful())
    bench.profiles.operator.promote(version)
    assert bench.profiles.serving.version_by_kind == {REST_KIND: version, FREE: version, KIND: version}
    feed(bench, OPPOSITE, JUDGED[20:400])
    assert bench.profiles.serving.version_by_kind == {REST_KIND: version, FREE: version}
    event = bench.last("roll_back")
    assert (event["kind"], event["reason"]) == (KIND, "harm")


def test_nothing_is_learned_from_it_and_a_harmful_profile_is_not_promoted() -> None:
    bench = Bench()
    truth = BIASED.truth(0)
    restricted, free = (bench.record(truth, LEARNED[0], mask) for mask in (allowed(truth), None))
    assert not bench.profiles.learns_from(restricted)
    assert bench.profiles.learns_from(free)
    bench.profiles.operator.import_profile(harmful())
    feed(bench, BIASED, JUDGED[:300])
    assert bench.profiles.serving.version_by_kind == {}
