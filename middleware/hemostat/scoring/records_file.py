"""`records.path`: scored requests as JSON lines, from which the figures can be recomputed. Off by default."""

from __future__ import annotations

import json
import logging
import math
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

from hemostat.ipc.messages import Capture
from hemostat.metrics import names
from hemostat.metrics.samples import Sample
from hemostat.scored_record import ScoredRecord
from hemostat_calibration.backoff import Backoff
from hemostat_calibration.divergence.per_token import TokenDivergence
from hemostat_calibration.errors import HemostatError
from hemostat_calibration.profiles.profile import IDENTITY
from hemostat_calibration.records import ExactDistances, TokenRecord

log = logging.getLogger("hemostat.records")


RETRY_SECONDS = (1.0, 2.0, 5.0, 10.0, 30.0, 60.0)
"""The pauses after the first, second, … attempt that failed; the last one repeats."""


class RecordsFile:
    """Appends records to a file. After an error, such as a full disk, writing is tried again after a pause.

    The file holds whole lines only: the part of a line that was written before an error is cut off again. Only the
    owner may read it, since texts can be decoded from token ids. Raises HemostatError if it cannot be opened.
    """

    def __init__(self, path: Path, clock: Callable[[], float] = time.monotonic) -> None:
        """clock: monotonic seconds."""
        try:
            self._descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
        except OSError as error:
            raise HemostatError(f"records.path: cannot write {path} ({error.strerror}); change it") from error
        self._clock = clock
        self._backoff = Backoff(RETRY_SECONDS)
        self._part_left = False
        """It is True if a part of a line could not be cut off again."""
        self.written = 0
        self.lost = 0
        """The number of records that could not be written."""

    def samples(self) -> Iterator[Sample]:
        yield Sample(names.RECORDS_LOST, (), self.lost)

    def update(self, scored: ScoredRecord) -> None:
        self.write(scored.capture, scored.record, scored.figures)

    def write(self, capture: Capture, record: TokenRecord, figures: TokenDivergence) -> None:
        """Appends a record, or counts it as lost."""
        if not self._backoff.may_try(self._clock()):
            self.lost += 1
            return
        line = {
            "request_id": capture.request_id,
            "prompt_token_ids": np.frombuffer(capture.prompt_token_ids, "<i4").tolist(),
            "output_token_ids": np.frombuffer(capture.output_token_ids, "<i4").tolist(),
            "kl_nats": [value if math.isfinite(value) else None for value in figures.kl_rc.tolist()],
            "covered_mass": figures.covered_compressed.tolist(),
            "temperature": capture.temperature if math.isfinite(capture.temperature) else None,
            "label": capture.label,
            "kind": capture.kind,
            "conversation": capture.conversation.hex(),
            "arm": str(record.arm),
            "profile": record.applied or IDENTITY,
            # With an adapter, kl_nats and covered_mass are of the adapted model.
            "adapter": record.adapter,
            # With one, kl_nats and covered_mass are conditional on what it allows.
            "constraint": record.constraint,
            "distances": {version: _means(distance) for version, distance in record.distances.items()},
        }
        try:
            self._append(json.dumps(line, allow_nan=False).encode() + b"\n")
        except OSError as error:
            self._failed(error)
            return
        if self._backoff.failures:
            log.warning("records.path: written again; %d records were lost so far", self.lost)
        self._backoff.reset()
        self.written += 1

    def _append(self, line: bytes) -> None:
        """Appends the whole of it, or raises OSError and appends nothing of it."""
        if self._part_left:
            line = b"\n" + line
        size = os.fstat(self._descriptor).st_size
        rest = memoryview(line)
        try:
            while rest:
                rest = rest[os.write(self._descriptor, rest) :]
        except OSError:
            if len(rest) < len(line):
                self._cut_off(size)
            raise
        self._part_left = False

    def _cut_off(self, size: int) -> None:
        try:
            os.ftruncate(self._descriptor, size)
        except OSError:  # no regular file, for example
            self._part_left = True

    def _failed(self, error: OSError) -> None:
        if not self._backoff.failures:
            log.error("records.path: cannot write (%s); records are lost until it can be written again", error.strerror)
        self._backoff.failed(self._clock())
        self.lost += 1

    def close(self) -> None:
        os.close(self._descriptor)


def _means(distances: ExactDistances) -> dict[str, float | None]:
    """Returns the means over the tokens; KL is None if it is infinite at one."""
    kl = float(distances.kl.mean())
    return {
        "kl_nats": kl if math.isfinite(kl) else None,
        "total_variation": float(distances.tv.mean()),
        "top1_agreement": float(distances.top1.mean()),
    }
