"""The figures of each engine, and which of several is an outlier.

The test is `hemostat_calibration.alarm.outlier_engine`; a stratum is a kind of traffic with what was applied to it. A
request counts in the test only if it is an observation of its own, and Hemostat drew its engine at random; in the sums
always. Where anything else decides which engine gets which request, such as the conversation, a cache-aware router or
the client, engines differ because their traffic does: then the test is off.
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
from hemostat.store.protocol import StateKey, StoreWrites, alarm_event
from hemostat.store.spent_alpha import OTHERS, SpentAlpha
from hemostat_calibration.alarm import outlier_engine
from hemostat_calibration.alarm.serialization import begun_tests, load_engines, save_engines
from hemostat_calibration.divergence.per_token import TokenDivergence
from hemostat_calibration.elapsed import TimeBreak
from hemostat_calibration.errors import InvalidArgumentError
from hemostat_calibration.records import TokenRecord

log = logging.getLogger("hemostat.alarm")

STATE_KEY = StateKey("engines")
"""The key of the test's state in the store."""
SPENT_KEY = StateKey("engines.tests")
"""The store's key of the number of tests that have begun (`SpentAlpha`)."""
ACTIVE_SECONDS = 86_400.0
"""The test is off where no engine was drawn for so long."""
SAVE_SECONDS = 60.0
"""The longest pause between writes of the state. A test that begins is written at once: no alpha is spent twice."""


class ByEngine:
    """Lives in the control process's event loop.

    alpha: probability that any engine is ever named that does not differ. affinity: `upstream.affinity`. writes, wall:
    as in `alarms.Alarms`.
    """

    def __init__(self, alpha: float, affinity: bool, writes: StoreWrites, wall: Callable[[], float]) -> None:
        self._affinity = affinity
        self._drawn_at = -math.inf
        """The time when a scored request's engine was drawn last."""
        self._test = outlier_engine.init(alpha)
        self._totals: OrderedDict[str, tuple[int, float]] = OrderedDict()
        """The totals by engine, the one that answered last at the end: tokens with a finite KL, and their KL."""
        self._raised: frozenset[str] = frozenset()
        self._writes = writes
        self._spent = SpentAlpha(SPENT_KEY, writes)
        self._wall = wall
        self._saved_at = wall()

    def update_totals(self, record: TokenRecord, figures: TokenDivergence) -> None:
        """Adds one request that was scored here, with its raw figures, to the sums."""
        if not record.engine:
            return
        kl = figures.kl_rc[np.isfinite(figures.kl_rc)]
        tokens, nats = self._totals.pop(record.engine, (0, 0.0))
        self._totals[record.engine] = (tokens + len(kl), nats + float(kl.sum()))
        if len(self._totals) > outlier_engine.MAX_ENGINES:
            self._totals.popitem(last=False)

    def update(self, record: TokenRecord, figures: TokenDivergence) -> None:
        """Adds one scored request that is an observation of its own, with its raw figures, to the test."""
        kl = figures.kl_rc[np.isfinite(figures.kl_rc)]
        if not record.engine or not record.engine_drawn or not len(kl):
            return
        now, stratum = self._wall(), f"{record.kind or REST_KIND} {record.applied or ''}"
        self._drawn_at = now
        unit, begun = outlier_engine.Unit(record.engine, float(kl.mean()), len(kl)), self._test.begun
        self._test = outlier_engine.update(self._test, stratum, unit, now)
        self._spent.spend({OTHERS: self._test.begun})
        if self._spent.is_stored(self._test.begun):
            self._note()
        if self._test.begun > begun or now - self._saved_at >= SAVE_SECONDS:
            self.save()

    def after_break(self, time_break: TimeBreak) -> None:
        """Notes that the clock was set."""
        self._test = outlier_engine.after_break(self._test, time_break)
        self._drawn_at, self._saved_at = time_break.seen(self._drawn_at), time_break.seen(self._saved_at)

    @property
    def off(self) -> str:
        """The reason why engines are not compared; "" if they are."""
        if self._wall() - self._drawn_at < ACTIVE_SECONDS:
            return ""
        if self._affinity:
            return (
                "upstream.affinity: the conversation decides which engine answers; with upstream.affinity: false the "
                "engines of sampled requests are drawn at random"
            )
        return (
            "no scored request's engine was drawn at random in the last day: Hemostat knows one engine, or a router "
            "behind its address chooses"
        )

    @property
    def outliers(self) -> frozenset[str]:
        """The engines that are outliers."""
        return frozenset() if self.off else self._raised

    def _note(self) -> None:
        raised = frozenset(
            reading.engine for reading in outlier_engine.readings(self._test) if reading.raised is not None
        )
        for engine in sorted(raised ^ self._raised):
            state = "is an outlier" if engine in raised else "is no outlier any more"
            evidence = next((row for row in self.report() if row["engine"] == engine), {})
            self._record(f"engine {engine} {state}", evidence)
        changed, self._raised = raised != self._raised, raised
        if changed:
            self.save()

    def _record(self, why: str, evidence: dict[str, Any]) -> None:
        log.warning("%s", why)
        self._writes.append_event(alarm_event(self._wall(), why, evidence))

    # --- restarts --------------------------------------------------------------------------------------------------

    def save(self) -> None:
        """Queues a write of the test's state."""
        self._saved_at = self._wall()
        self._writes.set_state(STATE_KEY, save_engines(self._test).decode())

    def restore(self, stored: str | None, spent: str | None = None) -> None:
        """Goes on from what an earlier run stored: alpha that it spent is not spent again. spent: under SPENT_KEY,
        which versions before it have not written."""
        self._spent.restore(spent)
        if stored is None:
            self._test = outlier_engine.init(self._test.alpha, self._spent.get())
            return
        self._spent.spend({OTHERS: begun_tests(stored.encode())})
        try:
            self._test = load_engines(stored.encode(), self._test.alpha)
        except InvalidArgumentError as error:
            self._test = outlier_engine.init(self._test.alpha, self._spent.get())
            self._record(f"the stored test of the engines cannot be continued: {error}", {})
            self.save()
            return
        self._raised = frozenset(
            reading.engine for reading in outlier_engine.readings(self._test) if reading.raised is not None
        )
        self._drawn_at = max((test.last for test in self._test.tests.values()), default=-math.inf)

    def forget(self) -> None:
        """Forgets all, since other models are served or compared. Spent alpha stays spent."""
        self._test = outlier_engine.init(self._test.alpha, self._test.begun)
        self._raised, self._drawn_at = frozenset(), -math.inf
        self.save()

    # --- what is shown ---------------------------------------------------------------------------------------------

    def report(self) -> list[dict[str, Any]]:
        """Returns the figures by engine, JSON-ready.

        tokens, kl_nats: of what was scored since the start. requests: the number of compared ones. farther: its
        divergence is higher than the others', if it is an outlier. evidence: in parts of what raises the alarm.
        on_tokens: the number of its own tokens on which the alarm was raised.
        """
        tests = {reading.engine: reading for reading in self._readings()}
        result = []
        for engine in sorted(tests.keys() | self._totals.keys()):
            tokens, nats = self._totals.get(engine, (0, 0.0))
            test = tests.get(engine)
            raised = test.raised if test is not None else None
            result.append(
                {
                    "engine": engine,
                    "tokens": tokens,
                    "kl_nats": finite(nats / tokens) if tokens else None,
                    "requests": test.units if test is not None else 0,
                    "outlier": raised is not None,
                    "farther": test.farther if test is not None and raised is not None else None,
                    "evidence": _part(test) if test is not None else 0.0,
                    "since": raised.since if raised is not None else None,
                    "on_tokens": raised.tokens if raised is not None else None,
                }
            )
        return result

    def status(self) -> dict[str, Any]:
        """Returns if engines are compared, JSON-ready."""
        return {"state": "off" if self.off else "on", "detail": self.off or None}

    def _readings(self) -> list[outlier_engine.EngineReading]:
        return [] if self.off else outlier_engine.readings(self._test)

    def samples(self) -> Iterator[Sample]:
        for engine, (tokens, nats) in self._totals.items():
            yield Sample(names.ENGINE_KL_NATS, (engine,), nats)
            yield Sample(names.ENGINE_KL_TOKENS, (engine,), tokens)
        for test in self._readings():
            yield Sample(names.ENGINE_OUTLIER, (test.engine,), float(test.raised is not None))
            yield Sample(names.ENGINE_OUTLIER_EVIDENCE_RATIO, (test.engine,), _part(test))


def _part(test: outlier_engine.EngineReading) -> float:
    return max(test.log_evidence, 0.0) / -math.log(test.alpha)
