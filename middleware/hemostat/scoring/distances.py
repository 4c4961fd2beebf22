"""The source of exact distances of models from the reference, computed on copies of its own, and the records that wait
for them.

A record whose test or watch needs distances is judged when they are back. Records come back in the order in which they
were offered, so that which counts first does not depend on what is found. A refused record is used at once, without.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Mapping
from enum import StrEnum
from typing import Protocol

from hemostat_calibration.arrays import Ids
from hemostat_calibration.errors import InvalidRecordError
from hemostat_calibration.record_checks import with_distances
from hemostat_calibration.records import ExactDistances, TokenRecord

log = logging.getLogger("hemostat.distances")

MAX_WAITING = 256
"""The largest number of records that wait for their distances; more are used without."""


class DistanceSource(Protocol):
    """The part of `hemostat.adapters.live.judge.AdapterJudge` that computes distances."""

    def offer(
        self,
        record: TokenRecord,
        prompt_ids: Ids,
        versions: tuple[str, ...],
        done: Callable[[Mapping[str, ExactDistances]], None],
    ) -> bool:
        """Computes the distances of these versions (`IDENTITY`: the compressed model itself) on the record's tokens.

        Returns False if this is refused: then `done` is never called. Otherwise it is called once, later, in the event
        loop, in the order of the offers: with the distances, empty if they could not be computed. Of a model whose
        logits are not finite at a position, the KL is infinite there, the total variation 1: to leave the record out
        would be a selection by its outcome.
        """


class Outcome(StrEnum):
    """The outcomes of records that need distances: `distances` of the status."""

    COMPUTED = "computed"
    FAILED = "failed"
    """No distances were computed."""
    INVALID = "invalid"
    """The distances do not fit the record."""
    REFUSED = "refused"
    """There is no process to compute the distances, or its queue is full."""


class DistanceWaits:
    """Owns the records between the offer and the answer. source: None, no distances are computed."""

    def __init__(self, source: DistanceSource | None = None) -> None:
        self.source = source
        self._waiting: dict[int, Callable[[Mapping[str, ExactDistances]], None]] = {}
        self._offered = 0
        self.outcomes: Counter[Outcome] = Counter(dict.fromkeys(Outcome, 0))

    @property
    def waiting(self) -> int:
        return len(self._waiting)

    def request(
        self, record: TokenRecord, prompt_ids: Ids, versions: tuple[str, ...], then: Callable[[TokenRecord], None]
    ) -> None:
        """Hands the record to `then`, with its distances if they can be had; at once if they are refused."""
        number = self._offered = self._offered + 1

        def done(distances: Mapping[str, ExactDistances]) -> None:
            if self._waiting.pop(number, None) is not None:
                then(self._with(record, distances))

        if self.source is not None and len(self._waiting) < MAX_WAITING:
            self._waiting[number] = done
            if self.source.offer(record, prompt_ids, versions, done):
                return
            del self._waiting[number]
        self.outcomes[Outcome.REFUSED] += 1
        then(record)

    def _with(self, record: TokenRecord, distances: Mapping[str, ExactDistances]) -> TokenRecord:
        if not distances:
            self.outcomes[Outcome.FAILED] += 1
            return record
        try:
            checked = with_distances(record, distances)
        except InvalidRecordError as error:
            self.outcomes[Outcome.INVALID] += 1
            log.warning("distances of %s refused: %s", record.request_id, error)
            return record
        self.outcomes[Outcome.COMPUTED] += 1
        return checked

    def flush(self) -> None:
        """Uses all records that wait without distances, oldest first; it is called at the end."""
        for done in list(self._waiting.values()):
            try:
                done({})
            except Exception:
                log.exception("a record could not be used without its distances")
