"""A `ProfileManager` that is fed whole records of a synthetic world, and profiles for that world."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import lru_cache
from typing import Any

import numpy as np
from tests.support.evidence import evidence
from tests.support.oracle import shift
from tests.support.records import Truth, condition, make_record
from tests.support.stores import DirectWrites
from tests.support.temperature_bias import temperature_bias
from tests.support.world import V, World

from hemostat.config.schema import Adapter, Calibration, Evidence
from hemostat.profiles.manager import ProfileManager
from hemostat_calibration.profiles.contextual import contextual_profile
from hemostat_calibration.profiles.profile import CalibrationProfile
from hemostat_calibration.records import Shift, TokenRecord
from hemostat_calibration.statistics.split import held_out

MODEL = "m"
FRACTION = 0.3
"""`calibration.held_out_fraction`."""
LEARNED = [b"%d" % n for n in range(20_000) if not held_out(b"%d" % n, FRACTION)]
"""Prompt keys of the side that is learned from."""
JUDGED = [b"%d" % n for n in range(20_000) if held_out(b"%d" % n, FRACTION)]
"""Prompt keys of the held-out side."""


@lru_cache(1024)
def unmasked(truth: Truth) -> TokenRecord:
    return make_record(truth, 20)


class Bench:
    """A `ProfileManager` whose writes go to a store at once."""

    def __init__(
        self,
        store: DirectWrites | None = None,
        *,
        known: bool = True,
        evidence: Evidence | None = None,
        adapter: Adapter | None = None,
        cycle_hours: float = 0.0,
        **calibration: Any,
    ) -> None:
        """known: both models are. calibration: settings."""
        self.store = store or DirectWrites()
        given: dict[str, Any] = {"mode": "auto", "min_tokens": 500, "clamp_nats": 1.0, "held_out_fraction": FRACTION}
        self.settings = Calibration.model_validate(given | calibration)
        self.time = 0.0
        self.profiles = ProfileManager(
            self.settings,
            self.store,
            lambda: self.time,
            evidence=(evidence or Evidence()).model_copy(update={"cycle_hours": cycle_hours}),
            adapter=adapter,
        )
        if known:
            self.profiles.set_model_pair(MODEL, V)

    def restart(self, *, crash: bool = False, **calibration: Any) -> Bench:
        """Another process with the same store; the models are not known yet. crash: this one writes nothing more."""
        if not crash:
            self.profiles.writer.save()
        bench = Bench(self.store, known=False, **calibration)
        result = self.store.read()
        bench.profiles.restoring.restore(result.profiles, result.states, result.events)
        return bench

    def record(
        self, truth: Truth, key: bytes, mask: np.ndarray[Any, np.dtype[np.bool_]] | None = None, **more: Any
    ) -> TokenRecord:
        """With the exact effect of every evaluated profile, as reference and engine give it. mask: see `make_record`;
        then the effect is that on the allowed ids."""
        if mask is not None:
            compressed = condition(truth.compressed, mask)
            truth = replace(truth, reference=condition(truth.reference, mask), compressed=compressed)
        shifts = {}
        for profile in self.profiles.evaluated_profiles():
            delta = shift(profile, truth.compressed)
            expected = (np.exp(truth.reference) * delta).sum(-1)
            shifts[profile.version] = Shift(expected, np.log((np.exp(truth.compressed + delta)).sum(-1)))
        record = unmasked(truth) if mask is None else make_record(truth, 20, mask=mask)
        return replace(record, prompt_key=key, shifts=shifts, **more)

    def observe(self, record: TokenRecord) -> None:
        record = replace(record, kind=self.profiles.kinds.update(record.kind))
        self.profiles.update(evidence(record))

    def feed(self, world: World, keys: list[bytes], until: Callable[[], bool] = lambda: False, **more: Any) -> int:
        """One record a key, until `until` is true: how many."""
        for n, key in enumerate(keys):
            if until():
                return n
            self.time += 1.0
            self.observe(self.record(world.truth(n), key, **more))
        return len(keys)

    def status(self) -> dict[str, Any]:
        return self.profiles.report.status()

    def decisions(self) -> list[str]:
        """Oldest first."""
        return [event["decision"] for event in reversed(self.profiles.events.newest_first())]

    def last(self, decision: str) -> dict[str, Any]:
        """The newest event of this decision."""
        return next(event for event in self.profiles.events.newest_first() if event["decision"] == decision)

    def serves(self) -> bool:
        """Whether a profile is selected for all requests."""
        return self.profiles.serving.selected is not None

    def learn(self, seed: int = 0, tokens: int = 1_000) -> str:
        """Proposes what helps on the biased world, as a learner that has learned from so many tokens of it; returns its
        version."""
        profile = helpful(seed)
        assert self.profiles.proposals.propose(profile, f"learned from {tokens} tokens", {"tokens": tokens})
        return profile.version

    def promote(self) -> str:
        """Learns and judges on a biased world until something serves; returns its version."""
        self.learn()
        self.feed(BIASED, JUDGED, self.serves)
        assert self.profiles.serving.selected is not None
        return self.profiles.serving.selected


BIASED = World(bias=0.6)
EVEN = World()
"""Both models are the same."""


def harmful(vocabulary: int = V, seed: int = 5) -> CalibrationProfile:
    return temperature_bias(MODEL, vocabulary, 1.0, np.random.default_rng(seed).normal(0, 0.8, vocabulary), 1.0)


def helpful(seed: int = 0) -> CalibrationProfile:
    """Removes the bias of the biased world, up to a little noise."""
    noise = 0.1 * np.random.default_rng(seed).normal(size=V)
    return temperature_bias(MODEL, V, 1.0, noise - BIASED.bias, 1.0)


ANCHORS = np.arange(6, dtype=np.int32)


def contextual(
    bias: float = 1.0, anchors: np.ndarray[Any, np.dtype[np.int32]] = ANCHORS, tokens: int | None = None
) -> CalibrationProfile:
    """Removes `bias` times the bias of the biased world, in any context. tokens: that it says it was learned from."""
    return contextual_profile(
        model=MODEL,
        anchors=anchors,
        linear=np.zeros((1, 2)),
        offset=np.ones(1),
        up=-bias * BIASED.bias[:, None],
        clamp_nats=1.5,
        metadata={} if tokens is None else {"tokens": str(tokens)},
    )
