"""`records.path`: scored requests as JSON lines, for whoever wants to recompute the figures. Off unless asked for."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import numpy as np

from hemostat.messages import Capture
from hemostat_calibration.divergence import TokenDivergence

log = logging.getLogger("hemostat.records")


class RecordsFile:
    """Appends; a disk that refuses is logged once and writing ends, scoring does not."""

    def __init__(self, path: Path) -> None:
        self._file = path.open("a", encoding="utf-8")
        self._failed = False
        self.written = 0

    def write(self, capture: Capture, figures: TokenDivergence) -> None:
        if self._failed:
            return
        line = {
            "request_id": capture.request_id,
            "prompt_token_ids": np.frombuffer(capture.prompt_token_ids, "<i4").tolist(),
            "output_token_ids": np.frombuffer(capture.output_token_ids, "<i4").tolist(),
            "kl_nats": figures.kl_rc.tolist(),
            "covered_mass": figures.covered_compressed.tolist(),
            "arm": capture.arm,
            "profile": capture.requested or "identity",
        }
        try:
            self._file.write(json.dumps(line) + "\n")
            self._file.flush()
            self.written += 1
        except OSError as error:
            self._failed = True
            log.error("records.path: cannot write (%s); no more records are kept", error.strerror)

    def close(self) -> None:
        self._file.close()
