"""The figures of scored rows: the live code takes them in the order of time and by client."""

from __future__ import annotations

import secrets
from collections import Counter
from collections.abc import Iterator, Sequence
from itertools import islice
from typing import Any

from hemostat.config.schema import Calibration, Evidence, Shadow
from hemostat.ipc.messages import Capture
from hemostat.measurement.by_model import OtherModels
from hemostat.measurement.dependence import Cycle
from hemostat.measurement.measurements import Measurements
from hemostat.profiles.manager import ProfileManager
from hemostat.reference.protocol import ReferenceInfo
from hemostat.scored_record import RecordConsumer
from hemostat.scoring.consumers import Each, Figures
from hemostat.scoring.offline.left_out import report_left_out
from hemostat.scoring.offline.stages import OfflineModels, offline_stages
from hemostat.scoring.record_reader import RecordReader
from hemostat.scoring.score_rows import VERSIONS, ScoredRow, StoredReference, scored_rows
from hemostat.scoring.spool.keys import SpoolError, SpoolKey, UnreadableSegmentError
from hemostat.scoring.spool.segments import Location, began, read_segment, segments
from hemostat.store.protocol import BlobKey, StateKey, StoredProfile
from hemostat_calibration.records import TokenRecord
from hemostat_calibration.statistics.templates import TemplateTable

TOGETHER = 32
"""The number of rows whose figures are computed together."""
FIRST_TIME = 1e9
"""The Unix time before which no row was served: what is before it is the number of a JSON line without a time."""


class NoWrites:
    """Implements `StoreWrites`, and keeps nothing."""

    def put_profile(self, profile: StoredProfile) -> None:
        return

    def delete_profile(self, version: str) -> None:
        return

    def append_event(self, event: dict[str, Any]) -> None:
        return

    def set_state(self, key: StateKey, value: str | None) -> None:
        return

    def put_blob(self, key: BlobKey, data: bytes) -> None:
        return

    def queued(self) -> int:
        return 0

    def has_written(self, write: int) -> bool:
        return True


def rows_in_order(folder: Location, key: SpoolKey | None, left_out: list[SpoolError]) -> Iterator[ScoredRow]:
    """Yields the scored rows of a folder by time, and rows of one moment by client. left_out: gets an error for each
    segment that cannot be read. Raises OSError.

    Segments overlap in time if several processes wrote them. A row is held back until the next segment begins later.
    """
    paths = segments(folder)
    held: list[ScoredRow] = []
    for number, path in enumerate(paths):
        try:
            held += scored_rows(read_segment(path, key, VERSIONS))
        except UnreadableSegmentError as error:
            left_out.append(error)
        held.sort(key=lambda row: (row.spooled.at, row.spooled.capture.client))
        starts = began(paths[number + 1]) if number + 1 < len(paths) else float("inf")
        ready = 0
        while starts is not None and ready < len(held) and held[ready].spooled.at < starts:
            ready += 1
        yield from held[:ready]
        del held[:ready]
    yield from held


class Evidenced:
    """Owns the figures of the rows so far. All times are times of the rows. cycle_hours: see `evidence.cycle_hours`."""

    def __init__(self, cycle_hours: float) -> None:
        self.now = 0.0
        self.began = 0.0
        self.captures = 0
        self.improbable = 0
        """The number of captures that were admitted with a probability below 1."""
        self.unscored: Counter[str] = Counter()
        self.reference: ReferenceInfo | None = None
        self.model = ""
        self._stored = StoredReference()
        self._models = OfflineModels(self._stored)
        self._stages = offline_stages(self._models, TemplateTable(secrets.token_bytes(32)).assign)
        evidence = Evidence(cycle_hours=cycle_hours)
        profiles = ProfileManager(Calibration(mode="off"), NoWrites(), self._clock, evidence=evidence)
        self.measurements = Measurements(Shadow().max_tokens, Cycle(evidence.cycle_seconds, self._clock))
        self._reader = RecordReader(self._models, profiles)
        consumers: Sequence[RecordConsumer] = [Figures(self.measurements, OtherModels())]
        self._consumer = Each(consumers)

    def _clock(self) -> float:
        return self.now

    async def update(self, rows: Sequence[ScoredRow]) -> None:
        """Adds rows. Raises SpoolError if one is of another model, or of another reference, than those before."""
        made: list[tuple[float, float, TokenRecord, Capture]] = []
        for row in rows:
            self.now = max(self.now, row.spooled.at)
            scored = await self._record(row)
            if scored is not None:
                made.append((self.now, row.spooled.probability, *scored))
        last = self.now
        figures = self._reader.figures([record for _, _, record, _ in made])
        for (moment, probability, record, capture), each in zip(made, figures, strict=True):
            self.now = moment
            self._consumer.update(self._reader.read(record, capture, probability, each))
        self.now = last

    async def _record(self, row: ScoredRow) -> tuple[TokenRecord, Capture] | None:
        """Returns the record of a row, and its capture; None if it was not scored."""
        self.began = self.began or row.spooled.at
        self.captures += 1
        self.improbable += row.spooled.probability < 1.0
        if row.info is None:
            self.unscored[row.unscored or ""] += 1
            return None
        capture, tap = row.spooled.capture, row.spooled.tap
        if self.reference is None:
            self.reference, self.model = row.info, capture.model
            self._models.set_pair(self.model, row.info)
        elif (row.info.digest, capture.model) != (self.reference.digest, self.model):
            raise SpoolError(
                f"the folder has scores of {self.model} by {self.reference.model} and of {capture.model} by "
                f"{row.info.model}; score each pair into a folder of its own"
            )
        if capture.adapter is not None:
            self._models.adapters.add(capture.adapter)
        self._stored.row = row
        if row.scores is not None:
            self._stages.max_scored = len(row.scores.emitted)  # an output may have been scored in part
        return await self._stages.score(capture, None if tap is None else tap.result())

    def report(self) -> dict[str, Any]:
        """Returns the report, JSON-ready."""
        info, measurements = self.reference, self.measurements
        return {
            "report": "hemostat report",
            "period": {"from": self.began, "to": self.now} if self.began >= FIRST_TIME else None,
            "model": self.model,
            "reference": None if info is None else {"model": info.model, "digest": info.digest, "dtype": info.dtype},
            "captures": self.captures,
            "scored": self.captures - self.unscored.total(),
            "not_scored": dict(self.unscored.most_common()),
            "admitted_below_1": self.improbable,
            "tokens": measurements.tokens,
            "raw": measurements.summary(None),
            "conditional": measurements.conditional.report(),
            "survival": measurements.survival.report(),
            "by_kind": measurements.by_kind.report(),
            "where": measurements.where(),
        }


async def read_evidence(folder: Location, key: SpoolKey | None, cycle_hours: float) -> dict[str, Any]:
    """Returns the report of a folder of scored segments, without those that cannot be read. Raises SpoolError if there
    is none that can be, and OSError."""
    total = len(segments(folder))
    if not total:
        raise SpoolError(f"{folder} has no scored segments; write them by: hemostat score SPOOL --out {folder}")
    evidence = Evidenced(cycle_hours)
    left_out: list[SpoolError] = []
    rows = rows_in_order(folder, key, left_out)
    while together := list(islice(rows, TOGETHER)):
        await evidence.update(together)
    report_left_out(left_out, total)
    return evidence.report() | {"segments": total, "segments_left_out": len(left_out)}
