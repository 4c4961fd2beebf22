"""What is gained by knowing more of one side than a top-K list: a part of `make bench-bounds`.

All at the same K. "lists": both sides gave their K likeliest ids. "whole r": the reference is known whole. "best": the
least that any compressed distribution has which the list allows, with all of r known, and what one that is far from r
has: no further fact about r can give more than this. "anchors": the compressed model's distribution is recovered from
its logits at N anchors (`hemostat_calibration.state_recovery`), as the engine hands them out.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
from tests.support.admissible import far, nearest, tail
from tests.support.state_recovery import compare, variances

from hemostat_calibration.divergence.bounds import MIN_RATIO, bounds
from hemostat_calibration.learning.contextual.anchors import choose_anchors
from hemostat_calibration.records import TokenRecord
from hemostat_calibration.state_recovery import recover_states
from hemostat_calibration.statistics.streaming import RatioEstimate

EXTRA_ANCHORS = (-64, 0, 16, 64, 448)
"""More anchors than the hidden state has numbers."""
MAX_CHOICES = 20_000
"""Ids that anchors are chosen from."""


class Knowledge:
    """Means per token with intervals over requests, for one pair of models. weight: W, float32 [V, d]."""

    def __init__(self, weight: np.ndarray, seed: int = 0) -> None:
        among = np.random.default_rng(seed).permutation(len(weight))[:MAX_CHOICES]
        width = weight.shape[1]
        chosen = choose_anchors(weight, width + max(EXTRA_ANCHORS), among=among)
        self._weight, self._origin = weight, weight.mean(axis=0)
        self._sets = {}
        for extra in EXTRA_ANCHORS:
            ids = chosen[: width + extra]
            recovery = recover_states(weight[ids])
            self._sets[extra] = (ids, recovery, variances(recovery, weight, self._origin))
        self._means: dict[tuple[Any, ...], RatioEstimate] = {}
        self.requests = self.positions = 0

    def _add(self, key: tuple[Any, ...], values: np.ndarray) -> None:
        self._means[key] = self._means.get(key, RatioEstimate()).update(float(values.sum()), len(values))

    def see(self, record: TokenRecord, log_r: np.ndarray, log_c: np.ndarray, truth: dict[str, np.ndarray]) -> None:
        """record: with the reference known whole. log_r, log_c: [T, V]."""
        self.requests, self.positions = self.requests + 1, self.positions + record.tokens
        given = (record.compressed.ids[:, :, None] == record.reference.ids[:, None, :]).any(-1)
        lists = replace(record, reference_at=np.where(given, record.reference_at, np.nan), reference_entropy=None)
        for name, source in (("lists", lists), ("whole r", record)):
            result = bounds(source).kl_rc
            self._add((name, "lower"), result.lower)
            self._add((name, "upper"), result.upper)
        best = np.empty((2, record.tokens))
        for row in range(record.tokens):
            known = tail(record, log_r[row], row)
            r = np.exp(log_r[row])
            for end, log_q in zip(best, (nearest(known)[0], far(known, MIN_RATIO)[0]), strict=True):
                end[row] = (r * (log_r[row] - log_q)).sum()
        self._add(("best", "lower"), best[0])
        self._add(("best", "upper"), best[1])
        self._add(("exact",), truth["kl_rc"])
        for ids, recovery, of_rows in self._sets.values():
            z = log_c[:, ids]
            features = (z - z.mean(axis=1, keepdims=True)).astype(np.float16).astype(np.float32)
            z = (recovery.states(features) @ self._weight.T).astype(np.float64)
            z -= z.max(axis=1, keepdims=True)
            log_q = z - np.log(np.exp(z).sum(axis=1, keepdims=True))
            result = compare(log_r, log_q, of_rows, record.compressed.ids, record.compressed.logprobs)
            error = (np.exp(log_c) * (log_c - log_q)).sum(axis=1)
            figures = {
                "kl_rc": result.kl_rc,
                "tv": result.tv,
                "difference": result.kl_rc - truth["kl_rc"],
                "absolute difference": np.abs(result.kl_rc - truth["kl_rc"]),
                "error": error,
                "predicted": result.predicted,
                "observed": result.observed,
                "usable": result.usable.astype(np.float64),
            }
            for name, values in figures.items():
                self._add((len(ids), name), values)

    def report(self) -> dict[str, Any]:
        def told(*key: Any) -> dict[str, float]:
            interval = self._means[key].get()
            return {"mean": interval.mean, "low": interval.low, "high": interval.high}

        return {
            "requests": self.requests,
            "positions": self.positions,
            "exact": told("exact"),
            "bounds": {
                name: {end: told(name, end) for end in ("lower", "upper")} for name in ("lists", "whole r", "best")
            },
            "anchors": {
                str(number): {name: told(*key) for key in self._means if key[0] == number for name in key[1:]}
                for number in (len(ids) for ids, _, _ in self._sets.values())
            },
        }


def table(scheme: str, k: int, report: dict[str, Any]) -> str:
    lines = [
        f"{scheme}, K = {k}, {report['positions']} positions of {report['requests']} requests: "
        f"KL(r‖c) {report['exact']['mean']:.4f}"
    ]
    for name, ends in report["bounds"].items():
        lines.append(f"  {name:>8}: {ends['lower']['mean']:.4f} to {ends['upper']['mean']:.3f}")
    for number, figures in report["anchors"].items():
        mean = {name: value["mean"] for name, value in figures.items()}
        lines.append(
            f"  {number:>5} anchors: KL(c‖ĉ) {mean['error']:.4f} (predicted {mean['predicted']:.4f}, observed "
            f"{mean['observed']:.4f}), KL(r‖ĉ) − KL(r‖c) {mean['difference']:+.4f} (absolute "
            f"{mean['absolute difference']:.4f}), usable {100 * mean['usable']:.1f} %"
        )
    return "\n".join(lines)
