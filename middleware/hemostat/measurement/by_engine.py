"""The figures of each engine, and which of several is not like the others.

The test is `hemostat_calibration.alarm.odd_engine`; a stratum is a kind of traffic with what was applied to it. A
request counts in the test only if it is an observation of its own, in the sums always. Without the name of an engine (a
record of an earlier version) it counts in neither.
"""

from __future__ import annotations

import logging
import math
from collections import OrderedDict
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from hemostat.ipc.messages import REST_KIND
from hemostat.measurement.figures import finite
from hemostat.metrics import names
from hemostat.metrics.samples import Sample
from hemostat.store.protocol import StoreWrites
from hemostat_calibration.alarm import odd_engine
from hemostat_calibration.alarm.serialization import load_engines, save_engines
from hemostat_calibration.divergence.per_token import TokenDivergence
from hemostat_calibration.errors import InvalidArgumentError
from hemostat_calibration.records import TokenRecord

log = logging.getLogger("hemostat.alarm")

STATE_KEY = "engines"
"""Of the state in the store."""
SAVE_SECONDS = 60.0
"""Pause between writes of the state."""


class ByEngine:
    """Lives in the control process's event loop.

    alpha: probability that any engine is ever named that does not differ. writes, wall: as in `alarms.Alarms`.
    """

    def __init__(self, alpha: float, writes: StoreWrites, wall: Callable[[], float]) -> None:
        self._test = odd_engine.init(alpha)
        self._totals: OrderedDict[str, tuple[int, float]] = OrderedDict()
        """By engine, the one that answered last at the end: tokens with a finite KL, and their KL."""
        self._raised: frozenset[str] = frozenset()
        self._writes = writes
        self._wall = wall
        self._saved_at = wall()

    def count(self, record: TokenRecord, figures: TokenDivergence) -> None:
        """One request that was scored here, its raw figures, in the sums."""
        if not record.engine:
            return
        kl = figures.kl_rc[np.isfinite(figures.kl_rc)]
        tokens, nats = self._totals.pop(record.engine, (0, 0.0))
        self._totals[record.engine] = (tokens + len(kl), nats + float(kl.sum()))
        if len(self._totals) > odd_engine.MAX_ENGINES:
            self._totals.popitem(last=False)

    def observe(self, record: TokenRecord, figures: TokenDivergence) -> None:
        """One scored request that is an observation of its own, its raw figures, in the test."""
        kl = figures.kl_rc[np.isfinite(figures.kl_rc)]
        if not record.engine or not len(kl):
            return
        now, stratum = self._wall(), f"{record.kind or REST_KIND} {record.applied or ''}"
        unit = odd_engine.Unit(record.engine, float(kl.mean()), len(kl))
        self._test = odd_engine.update(self._test, stratum, unit, now)
        self._note()
        if now - self._saved_at >= SAVE_SECONDS:
            self.save()

    @property
    def odd(self) -> frozenset[str]:
        """The engines that are not like the others."""
        return self._raised

    def _note(self) -> None:
        raised = frozenset(one.engine for one in odd_engine.readings(self._test) if one.raised is not None)
        for engine in sorted(raised ^ self._raised):
            like = "is not like the others" if engine in raised else "is like the others again"
            why = f"engine {engine} {like}"
            log.warning("%s", why)
            evidence = next((row for row in self.report() if row["engine"] == engine), {})
            event = {"at": self._wall(), "decision": "alarm", "version": "", "why": why, "evidence": evidence}
            self._writes.append_event(event)
        changed, self._raised = raised != self._raised, raised
        if changed:
            self.save()

    # --- restarts --------------------------------------------------------------------------------------------------

    def save(self) -> None:
        """Queue a write of the test's state."""
        self._saved_at = self._wall()
        self._writes.set_state(STATE_KEY, save_engines(self._test).decode())

    def restore(self, stored: str | None) -> None:
        """Go on from what an earlier run stored: alpha that it spent is not spent again."""
        if stored is None:
            return
        try:
            self._test = load_engines(stored.encode(), self._test.alpha)
        except InvalidArgumentError as error:
            log.error("stored test of the engines: %s", error)
            return
        self._raised = frozenset(one.engine for one in odd_engine.readings(self._test) if one.raised is not None)

    def forget(self) -> None:
        """Other models are served or compared. Spent alpha stays spent."""
        self._test = odd_engine.init(self._test.alpha, self._test.begun)
        self._raised = frozenset()
        self.save()

    # --- what is shown ---------------------------------------------------------------------------------------------

    def report(self) -> list[dict[str, Any]]:
        """By engine; JSON-ready. tokens, kl_nats: of what was scored since the start. farther: its
        divergence is higher than the others', where it is odd. evidence: in parts of what raises the alarm. on_tokens:
        of its own, on which it was raised."""
        tests = {one.engine: one for one in odd_engine.readings(self._test)}
        found = []
        for engine in sorted(tests.keys() | self._totals.keys()):
            tokens, nats = self._totals.get(engine, (0, 0.0))
            test = tests.get(engine)
            raised = test.raised if test is not None else None
            found.append(
                {
                    "engine": engine,
                    "tokens": tokens,
                    "kl_nats": finite(nats / tokens) if tokens else None,
                    "requests": test.units if test is not None else 0,
                    "odd": raised is not None,
                    "farther": test.farther if test is not None and raised is not None else None,
                    "evidence": _part(test) if test is not None else 0.0,
                    "since": raised.since if raised is not None else None,
                    "on_tokens": raised.tokens if raised is not None else None,
                }
            )
        return found

    def samples(self) -> Iterator[Sample]:
        for engine, (tokens, nats) in self._totals.items():
            yield Sample(names.ENGINE_KL_NATS, (engine,), nats)
            yield Sample(names.ENGINE_KL_TOKENS, (engine,), tokens)
        for test in odd_engine.readings(self._test):
            yield Sample(names.ENGINE_ODD, (test.engine,), float(test.raised is not None))
            yield Sample(names.ENGINE_ODD_EVIDENCE_RATIO, (test.engine,), _part(test))


def _part(test: odd_engine.EngineReading) -> float:
    return max(test.log_evidence, 0.0) / -math.log(test.alpha)
