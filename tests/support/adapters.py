"""Adapters in a synthetic world: profiles, the adapted model's distribution, its records, and exact distances."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import numpy as np
from tests.support.exact import exact
from tests.support.records import Truth, log_softmax, make_record
from tests.support.world import V

from hemostat_calibration.adapters.factors import LowRank
from hemostat_calibration.arrays import Ids
from hemostat_calibration.profiles.adapter import adapter_profile
from hemostat_calibration.profiles.profile import IDENTITY, CalibrationProfile
from hemostat_calibration.records import Arm, ExactDistances, TokenRecord

MODEL = "m"


def adapter(
    seed: int = 0,
    *,
    vocabulary: int = V,
    tokens: int | None = None,
    model: str = MODEL,
) -> CalibrationProfile:
    """One layer of rank 1; another one for each seed. tokens: that it says it was learned from."""
    rng = np.random.default_rng(seed)
    layer = LowRank(rng.normal(size=(1, 3)).astype(np.float32), rng.normal(size=(2, 1)).astype(np.float32))
    metadata = {} if tokens is None else {"tokens": str(tokens)}
    return adapter_profile(model=model, vocab_size=vocabulary, layers={"mlp": layer}, metadata=metadata)


def adapted(truth: Truth, share: float = 0.6) -> Truth:
    """With an adapter that takes this share of the way, in logits, from the compressed model to the reference; below
    0, away from it."""
    moved = log_softmax((1.0 - share) * truth.compressed + share * truth.reference)
    return Truth(truth.reference, moved, truth.emitted)


def adapted_record(truth: Truth, version: str, share: float = 0.6, *, k: int = 20, **more: Any) -> TokenRecord:
    """Of a treated request that the adapter answered."""
    made = make_record(adapted(truth, share), k)
    return replace(made, **({"arm": Arm.TREATED, "adapter": version, "requested": version, "applied": version} | more))


def distances_of(truth: Truth, shares: Mapping[str, float]) -> dict[str, ExactDistances]:
    """Of the compressed model, and by version of one that is moved by this share towards the reference."""
    models = {IDENTITY: truth} | {version: adapted(truth, share) for version, share in shares.items()}
    return {version: exact_distances(model.reference, model.compressed) for version, model in models.items()}


def exact_distances(log_r: np.ndarray[Any, Any], log_c: np.ndarray[Any, Any]) -> ExactDistances:
    result = exact(log_r, log_c)
    return ExactDistances(
        kl=np.maximum(result["kl_rc"], 0.0),
        tv=np.clip(result["tv"], 0.0, 1.0),
        top1=log_r.argmax(-1) == log_c.argmax(-1),
    )


class FakeDistances:
    """A `DistanceSource` that answers when it is told to. found: of a record. takes: whether it accepts offers."""

    def __init__(self, compute: Callable[[TokenRecord], Mapping[str, ExactDistances]]) -> None:
        self.found = compute
        self.takes = True
        self.offers: list[tuple[TokenRecord, list[int], tuple[str, ...]]] = []
        self._waiting: list[tuple[TokenRecord, Callable[[Mapping[str, ExactDistances]], None]]] = []

    def offer(
        self,
        record: TokenRecord,
        prompt_ids: Ids,
        versions: tuple[str, ...],
        done: Callable[[Mapping[str, ExactDistances]], None],
    ) -> bool:
        if not self.takes:
            return False
        self.offers.append((record, prompt_ids.tolist(), versions))
        self._waiting.append((record, done))
        return True

    def answer(self) -> None:
        """All that wait."""
        waiting, self._waiting = self._waiting, []
        for record, done in waiting:
            done(self.found(record))
