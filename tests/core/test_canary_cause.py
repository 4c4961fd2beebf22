"""The table of causes: what each of six faults gives, that conflicting statements are unknown, what is refused."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.support.slow import examples

from hemostat_calibration import state_codec
from hemostat_calibration.arrays import Floats
from hemostat_calibration.canaries import TOLERANCE_NATS
from hemostat_calibration.canary_cause import (
    _TABLE,
    DECODING,
    Cause,
    CauseBaseline,
    Measured,
    State,
    Variant,
    Verdict,
    decoded_part,
    of_engines,
    shapes,
)
from hemostat_calibration.errors import InvalidArgumentError

LENGTH = 1_000
TEXT = np.arange(LENGTH, dtype=np.int32)
FINE, COARSE = 9.4, 6.9
"""log2 of distinct values of a bfloat16 cache, and of an FP8 cache."""


class World:
    """An engine whose results differ by noise, nats."""

    def __init__(self, noise: float = 0.0, seed: int = 0) -> None:
        self.rng, self.noise = np.random.default_rng(seed), noise
        self.true = {variant: -self.rng.exponential(2.0, size) for variant, size in shapes(LENGTH).items()}
        self.true[Variant.LONG_BESIDE] = self.true[Variant.LONG]
        self.true |= dict.fromkeys(DECODING, decoded_part(self.true[Variant.LONG], LENGTH))
        self.baseline = CauseBaseline(TEXT, (self.measured(), self.measured()))

    def measured(self, *changed: Variant, nats: float = 0.2, precision: float = FINE, **begins: int) -> Measured:
        """changed: by ± nats. begins: the first token that is, by variant."""
        scores: dict[str, Floats] = {}
        for variant, values in self.true.items():
            now = values + self.rng.standard_normal(len(values)) * self.noise
            if variant in changed:
                now[begins.get(variant, 1) - 1 :] += nats
            scores[variant] = now
        return Measured(scores, precision)

    def cause(self, *changed: Variant, **more: float) -> Cause:
        return self.baseline.explain(self.measured(*changed, **more), TOLERANCE_NATS).cause  # type: ignore[arg-type]


LONG, BESIDE = (Variant.LONG, Variant.LONG_BESIDE), Variant.BESIDE


@pytest.mark.parametrize("noise", [0.0, 0.01])
@pytest.mark.parametrize(
    ("changed", "more", "cause"),
    [
        ((), {}, Cause.NONE),
        (tuple(Variant), {}, Cause.WEIGHTS),
        (tuple(Variant), {"precision": COARSE}, Cause.KV_CACHE),
        ((Variant.CACHED,), {}, Cause.PREFIX_CACHE),
        ((BESIDE, Variant.LONG_BESIDE), {}, Cause.BATCH),
        ((BESIDE,), {}, Cause.BATCH),
        (LONG, {"long": 513, "long_beside": 510}, Cause.CHUNK_BOUNDARY),
        ((*LONG, *DECODING), {"long": 65, "long_beside": 62}, Cause.CHUNK_BOUNDARY),
        # The same token whatever the chunks: another path of the attention for long contexts, say.
        (LONG, {"long": 513, "long_beside": 513}, Cause.UNKNOWN),
        (DECODING, {}, Cause.DECODING),
        ((Variant.SHORT,), {}, Cause.UNKNOWN),
        ((Variant.CACHED, BESIDE), {}, Cause.UNKNOWN),
        (tuple(Variant), {"precision": FINE - 1.0}, Cause.UNKNOWN),
        (tuple(Variant), {"precision": 0.0}, Cause.UNKNOWN),
    ],
)
def test_what_each_fault_gives(
    changed: tuple[Variant, ...], more: dict[str, float], cause: Cause, noise: float
) -> None:
    world = World(noise)
    verdict = world.baseline.explain(world.measured(*changed, **more), TOLERANCE_NATS)  # type: ignore[arg-type]
    assert verdict.cause is cause, verdict.text


def test_no_two_causes_explain_the_same_states() -> None:
    """A cause is said where one fits: so the order of the table decides nothing."""
    for states in itertools.product(State, repeat=len(Variant)):
        found = dict(zip(Variant, states, strict=True))
        fits = [c for c, rows in _TABLE.items() if all(found[v] in allowed for v, allowed in rows.items())]
        assert len(fits) <= 1, (found, fits)
    assert all(rows.keys() == set(Variant) for rows in _TABLE.values())


@settings(deadline=None, max_examples=examples(60))
@given(st.sets(st.sampled_from(list(Variant))), st.floats(0.03, 3.0), st.integers(0, 99))
def test_a_cause_other_than_unknown_is_never_of_other_variants(changed: set[Variant], nats: float, seed: int) -> None:
    world = World(seed=seed)
    cause = world.cause(*changed, nats=nats)
    explained = {
        frozenset(): Cause.NONE,
        frozenset(Variant): Cause.WEIGHTS,
        frozenset({Variant.CACHED}): Cause.PREFIX_CACHE,
        frozenset({BESIDE}): Cause.BATCH,
        frozenset({BESIDE, Variant.LONG_BESIDE}): Cause.BATCH,
        frozenset(DECODING): Cause.DECODING,
    }
    assert cause is explained.get(frozenset(changed), Cause.UNKNOWN)


@pytest.mark.parametrize("seed", range(20))
def test_an_unchanged_engine_with_noise_has_none(seed: int) -> None:
    world = World(0.05, seed)
    assert [world.cause() for _ in range(5)] == [Cause.NONE] * 5


def test_without_the_plugin_less_is_said() -> None:
    world = World()

    def without(measured: Measured, cache: str = "auto") -> Measured:
        scores = {name: values for name, values in measured.scores.items() if name not in DECODING}
        return Measured(scores, 0.0, cache)

    baseline = CauseBaseline(TEXT, (without(world.measured()),) * 2)
    none = baseline.explain(without(world.measured()), TOLERANCE_NATS)
    assert none.cause is Cause.NONE
    assert "not measured: decoding, decoding after a cached prompt" in none.text
    whole = world.measured(*Variant)
    assert "the engine's plugin would distinguish" in baseline.explain(without(whole), TOLERANCE_NATS).text
    named = baseline.explain(without(whole, "fp8"), TOLERANCE_NATS)
    assert named.cause is Cause.KV_CACHE
    assert "the cache's dtype was auto, and is fp8" in named.text
    beside = without(world.measured(Variant.LONG_BESIDE))
    assert baseline.explain(beside, TOLERANCE_NATS).cause is Cause.UNKNOWN


def test_of_several_engines_the_one_that_differs_is_named() -> None:
    none, whole, batch = (Verdict(cause, f"{cause}: figures") for cause in (Cause.NONE, Cause.WEIGHTS, Cause.BATCH))
    assert of_engines({"a": none, "b": none}).cause is Cause.NONE
    one = of_engines({"a": none, "b": whole, "c": none})
    assert (one.cause, one.text) == (
        Cause.ONE_ENGINE,
        "one engine of several: b differs from then, 2 others do not; there weights: figures",
    )
    assert of_engines({"a": whole, "b": batch}).cause is Cause.UNKNOWN
    assert of_engines({"a": whole, "b": whole, "c": none}).cause is Cause.UNKNOWN


def test_a_baseline_is_read_as_it_was_written_and_refused_where_it_does_not_fit() -> None:
    baseline = World().baseline
    read = state_codec.decode(CauseBaseline, state_codec.encode(baseline, 1), 1)
    assert read.explain(baseline.measured[0], TOLERANCE_NATS).cause is Cause.NONE
    broken = Measured(baseline.measured[0].scores | {Variant.SHORT: np.zeros(3)})
    for measured, text in (((broken, broken), "variant short"), (baseline.measured[:1], "lack replays")):
        with pytest.raises(InvalidArgumentError, match=text):
            CauseBaseline(TEXT, measured)
