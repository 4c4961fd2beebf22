"""Scores what is in the spool in the hours of `spool.score`, on the reference of the control process.

Rows are scored in the order of time, and handed on in it. The number of rows of a segment that were handed on is on the
disk before they are, in a file next to the segment: whenever the process ends, a row is handed on once or not at all.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

from hemostat.ipc.messages import Capture
from hemostat.scoring.endings import NotScored
from hemostat.scoring.offline.evidence_time import EvidenceTime
from hemostat.scoring.score_rows import AT_ONCE, answers
from hemostat.scoring.spool.columns import SCHEMA_VERSION, VERSION_KEY, from_rows
from hemostat.scoring.spool.keys import SpoolError, SpoolKey
from hemostat.scoring.spool.segments import read_segment, segments, set_taken, taken
from hemostat.scoring.spool.spooled import Spooled
from hemostat.scoring.stages import Answered, ScoringStages
from hemostat_calibration.records import TokenRecord

log = logging.getLogger("hemostat.spool")

LOOK_SECONDS = 10.0
"""The pause between two looks for segments."""
BATCH_ROWS = 8 * AT_ONCE
"""The number of rows that are handed on together. A crash loses at most so many."""


def is_open(window: tuple[int, int], at: float) -> bool:
    """Returns True if a time is in the window. window: its first minute of the day, UTC, and the one behind its last.
    at: Unix time.

    >>> [is_open((120, 300), 3600.0 * hour) for hour in (1.9, 2.0, 4.9, 5.0)]
    [False, True, True, False]
    >>> [is_open((1320, 60), 3600.0 * hour) for hour in (0.5, 12.0, 23.0)]
    [True, False, True]
    """
    minute, (began, ended) = at % 86_400.0 / 60.0, window
    return began <= minute < ended if began < ended else minute >= began or minute < ended


class SpoolScoring:
    """Owns which rows of a spool were handed on.

    emit: is handed every record with its capture, and the probability with which that was admitted. save: stores what
    was made of the records. evidence_time: is set to the time of each row before. may_score: returns True while the
    window is open, and this process is the active one and has a reference. wall: Unix time.
    """

    def __init__(
        self,
        folder: Path,
        key: SpoolKey | None,
        stages: ScoringStages,
        *,
        emit: Callable[[TokenRecord, Capture, float], None],
        save: Callable[[], None],
        evidence_time: EvidenceTime,
        may_score: Callable[[], bool],
        wall: Callable[[], float],
    ) -> None:
        self._folder, self._key, self._stages = folder, key, stages
        self._emit, self._save, self._may_score, self._wall = emit, save, may_score, wall
        self.evidence_time = evidence_time
        self._refused: set[Path] = set()
        """The segments that could not be read, or not be scored for an error of Hemostat's own."""
        self.scored = 0
        self.unscored: Counter[str] = Counter()
        """The number of rows that could not be scored, by reason."""

    @property
    def left_out(self) -> int:
        """The number of segments that could not be read."""
        return len(self._refused)

    async def run(self) -> None:
        """Scores in the window of each day, until cancelled."""
        while True:
            await asyncio.sleep(LOOK_SECONDS)
            try:
                await self.look()
            except OSError as error:
                log.error("spool.score: cannot go on (%s); it is tried again", error.strerror)

    async def look(self) -> None:
        """Scores what is there, until the window closes. Raises OSError."""
        before = self.scored
        for path in await asyncio.to_thread(segments, self._folder):
            if not self._may_score():
                break
            if path not in self._refused and not await self._score(path):
                break
        if self.scored > before:
            self._save()
            until = self.evidence_time.now()
            when = time.strftime("%Y-%m-%d %H:%M", time.gmtime(until))
            hours = (self._wall() - until) / 3600.0
            log.info("spool.score: figures and alarms are of requests up to %s UTC, %.1f hours ago", when, hours)

    async def _score(self, path: Path) -> bool:
        """Scores the rows of a segment that were not handed on. Returns False if the window or the reference ends it
        before."""
        try:
            done = taken(path)
            rows = await asyncio.to_thread(read_segment, path, self._key, {VERSION_KEY: SCHEMA_VERSION})
        except FileNotFoundError:  # its time was over
            return True
        except SpoolError as error:
            self._refused.add(path)
            log.error("spool.score: left out: %s", error)
            return True
        while done < len(rows):
            if not self._may_score():
                return False
            batch = list(from_rows(rows.slice(done, BATCH_ROWS)))
            try:
                results = await answers(batch, self._stages)
            except NotScored:
                return False
            except Exception:
                self._refused.add(path)
                log.exception("spool.score: left out from row %d on: %s", done, path)
                return True
            done += len(batch)
            await asyncio.to_thread(set_taken, path, done)
            for spooled, result in zip(batch, results, strict=True):
                self._hand_on(spooled, result)
        self._save()
        return True

    def _hand_on(self, spooled: Spooled, result: Answered | str) -> None:
        self.evidence_time.update(spooled.at)
        if isinstance(result, str):
            self.unscored[result] += 1
            return
        self.scored += 1
        try:
            self._emit(result.record, result.capture, spooled.probability)
        except RuntimeError:  # the log has it
            self.unscored["internal_error"] += 1
