"""The figures by position in the output, by length of the context, and by phase (thinking, answer).

They are figures of the compressed model itself: without records of an adapter, and without records under a grammar,
whose distances are conditional. Records of which only the last tokens are scored count here too, and in no other
figure: they are no sample of all their tokens, but they are of the tokens of a bucket.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np

from hemostat.measurement.dependence import NO_CYCLE, Cycle
from hemostat.measurement.figures import RequestFigures, StageFigures
from hemostat.metrics import names
from hemostat.metrics.samples import Sample
from hemostat_calibration.arrays import Bools
from hemostat_calibration.divergence.places import (
    CONTEXT_EDGES,
    PHASES,
    POSITION_EDGES,
    bucket_labels,
    by_context,
    by_phase,
    by_position,
)
from hemostat_calibration.records import TokenRecord

FIGURES_BY_PLACE = ("kl_nats", "kl_nats_estimate", "total_variation", "top1_agreement")
POSITIONS, CONTEXTS = bucket_labels(POSITION_EDGES), bucket_labels(CONTEXT_EDGES)


class _Group:
    """The figures of each bucket of one division."""

    def __init__(
        self,
        labels: tuple[str, ...],
        divide: Callable[[TokenRecord], Mapping[str, Bools]],
        cycle: Cycle,
    ):
        self._divide = divide
        self._cycle = cycle
        self._figures = {label: StageFigures(FIGURES_BY_PLACE, cycle) for label in labels}
        self._totals: dict[str, tuple[int, float]] = dict.fromkeys(labels, (0, 0.0))
        """The number of tokens with a finite KL, and the sum of their KL, over all records."""

    def update(self, record: TokenRecord, raw: RequestFigures, *, fresh: bool) -> None:
        for label, at in self._divide(record).items():
            finite = raw.tokens.kl_rc[at & np.isfinite(raw.tokens.kl_rc)]
            tokens, nats = self._totals[label]
            self._totals[label] = tokens + len(finite), nats + float(finite.sum())
            if fresh:
                self._figures[label].update(raw.sums_at(at), record.client)

    def forget(self) -> None:
        """Begins the figures anew. Totals go on."""
        self._figures = {label: StageFigures(FIGURES_BY_PLACE, self._cycle) for label in self._figures}

    def report(self) -> list[dict[str, Any]]:
        """Returns the figures of the places with a request, in the places' order."""
        return [{"place": label, **figure.summary()} for label, figure in self._figures.items() if figure.requests]

    def samples(self, division: str) -> Iterator[Sample]:
        for label, (count, nats) in self._totals.items():
            yield Sample(names.PLACE_KL_NATS, (division, label), nats)
            yield Sample(names.PLACE_KL_TOKENS, (division, label), count)


class ByPlace:
    """The figures by place. cycle: of the traffic."""

    def __init__(self, cycle: Cycle = NO_CYCLE) -> None:
        self._divisions = {
            "position": _Group(POSITIONS, by_position, cycle),
            "context": _Group(CONTEXTS, by_context, cycle),
            "phase": _Group(PHASES, by_phase, cycle),
        }

    def update(self, record: TokenRecord, raw: RequestFigures, *, fresh: bool) -> None:
        """Adds a record of the compressed model itself; a record under a grammar is left out. fresh: it is an
        observation of its own.
        """
        if record.constraint:
            return
        for group in self._divisions.values():
            group.update(record, raw, fresh=fresh)

    def forget(self) -> None:
        """Begins the figures of all places anew. Totals go on."""
        for group in self._divisions.values():
            group.forget()

    def report(self) -> dict[str, Any]:
        """Returns the figures by `position`, `context` and `phase`, for the places with a request, in their order;
        JSON-ready.
        """
        return {division: group.report() for division, group in self._divisions.items()}

    def samples(self) -> Iterator[Sample]:
        for division, group in self._divisions.items():
            yield from group.samples(division)
