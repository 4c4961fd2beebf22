"""Says what of a folder is not in the figures: segments that cannot be read, and journals."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path

from hemostat.scoring.spool.journal import SUFFIX, in_use
from hemostat.scoring.spool.keys import SpoolError
from hemostat.scoring.spool.segments import Location

log = logging.getLogger("hemostat.score")


def report_left_out(errors: Sequence[SpoolError], total: int) -> None:
    """Logs the segments of `total` that could not be read, each in a line. Raises the first error if it is all of
    them: then the key is another one, or the folder is."""
    if errors and len(errors) == total:
        raise errors[0]
    for error in errors:
        log.warning("left out: %s", error)
    if errors:
        log.warning("%d of %d segments cannot be read and were left out", len(errors), total)


def report_journals(source: Location) -> None:
    """Logs how many journals of a folder no process writes: an earlier process has left them. Raises OSError."""
    if not isinstance(source, Path) or not source.is_dir():
        return
    if left := sum(not in_use(path) for path in source.glob("*" + SUFFIX)):
        log.warning(
            "%s: %d journals were not scored; the control process makes segments of them once it is started again",
            source,
            left,
        )
