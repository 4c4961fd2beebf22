"""`records.path`: scored requests as JSON lines, from which the figures can be recomputed. Off by default."""

from __future__ import annotations

import contextlib
import json
import logging
import math
import os
from pathlib import Path

import numpy as np

from hemostat.ipc.messages import Capture
from hemostat_calibration.divergence.per_token import TokenDivergence
from hemostat_calibration.errors import HemostatError
from hemostat_calibration.profiles.profile import IDENTITY
from hemostat_calibration.records import ExactDistances, TokenRecord

log = logging.getLogger("hemostat.records")


class RecordsFile:
    """Appends records to a file. The first error is logged and ends the writing; scoring continues.

    Only the owner may read the file, since texts can be decoded from token ids. HemostatError when it cannot be opened.
    """

    def __init__(self, path: Path) -> None:
        try:
            descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
        except OSError as error:
            raise HemostatError(f"records.path: cannot write {path} ({error.strerror}); change it") from error
        self._file = os.fdopen(descriptor, "a", encoding="utf-8")
        self._failed = False
        self.written = 0

    def write(self, capture: Capture, record: TokenRecord, figures: TokenDivergence) -> None:
        if self._failed:
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
            "distances": {version: _means(found) for version, found in record.distances.items()},
        }
        try:
            self._file.write(json.dumps(line, allow_nan=False) + "\n")
            self._file.flush()
            self.written += 1
        except OSError as error:
            self._failed = True
            log.error("records.path: cannot write (%s); no more records are kept", error.strerror)

    def close(self) -> None:
        with contextlib.suppress(OSError):  # an error of writing was logged before
            self._file.close()


def _means(found: ExactDistances) -> dict[str, float | None]:
    """Over the tokens; KL is None where it is infinite at one."""
    kl = float(found.kl.mean())
    return {
        "kl_nats": kl if math.isfinite(kl) else None,
        "total_variation": float(found.tv.mean()),
        "top1_agreement": float(found.top1.mean()),
    }
