"""Scores captures on the reference: takes them from the queue, has their stages done, and emits the records. If there
is a spool, a capture goes there first.

Whatever goes wrong ends one capture, is counted by reason, and has no other effect.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from typing import Protocol

from hemostat.engines.taps import TapResult
from hemostat.ipc.messages import Capture
from hemostat.metrics.reasons import Unscored
from hemostat.scoring.endings import EndingCounts, NotScored
from hemostat.scoring.intake import CaptureIntake
from hemostat.scoring.stages import ScoringStages
from hemostat_calibration.records import TokenRecord

log = logging.getLogger("hemostat.scorer")


class CaptureSpool(Protocol):
    """The part of `hemostat.scoring.spool.spool.Spool` that takes captures."""

    def update(self, capture: Capture, tap: TapResult | None) -> Unscored | None:
        """Writes a capture, and returns None; or why it is not written."""


class Scorer:
    """Owns the captures between the queue and their ending. Each is scored on the reference of its own model.

    stages: None if captures are only written to the spool. spool: None if there is none.
    emit: is handed every record with its capture. clock: monotonic seconds. taken: gets the seconds that a worker
        took for a capture.
    """

    def __init__(
        self,
        intake: CaptureIntake,
        stages: ScoringStages | None,
        endings: EndingCounts,
        *,
        spool: CaptureSpool | None = None,
        emit: Callable[[TokenRecord, Capture], None],
        clock: Callable[[], float],
        taken: Callable[[float], None] = lambda seconds: None,
    ) -> None:
        self._intake = intake
        self.stages = stages
        self._spool = spool
        self._endings = endings
        self._emit = emit
        self._taken = taken
        self._clock = clock
        self._in_progress = 0

    def offer(self, capture: Capture) -> None:
        """Queues a capture, or counts it as dropped."""
        self._intake.offer(capture)

    @property
    def pending(self) -> int:
        """The number of captures that have no ending yet."""
        return len(self._intake) + self._in_progress

    async def run(self, workers: int) -> None:
        """Scores `workers` captures at a time, until cancelled."""
        async with asyncio.TaskGroup() as group:
            for _ in range(workers):
                group.create_task(self._run_worker())
            group.create_task(self._intake.collect_answers())

    async def _run_worker(self) -> None:
        while True:
            capture = await self._intake.take()
            self._in_progress += 1
            started = self._clock()
            try:
                await self._score(capture)
            except NotScored as ending:
                self._endings.unscored(ending.reason, capture, ending.detail)
                if ending.message:
                    log.log(ending.level, "%s", ending.message)
            except Exception:
                self._endings.unscored(Unscored.INTERNAL_ERROR, capture)
                log.exception("score of %s failed", capture.request_id)
            finally:
                self._in_progress -= 1
                self._taken(self._clock() - started)

    async def _score(self, capture: Capture) -> None:
        """Emits one record and counts it. Raises NotScored if there is none."""
        tap, spooled = self._intake.tap(capture), Unscored.SPOOLED
        if self._spool is not None:
            spooled = self._spool.update(capture, tap) or spooled
        if self.stages is None:
            raise NotScored(spooled)
        record, complete = await self.stages.score(capture, tap)
        self._emit(record, complete)
        self._endings.scored(complete, left_out=record.position)
