"""Scores the segments of a folder, each into a file of the same name in another folder.

A file is written whole, and what is there already is not scored again. So a run goes on where an earlier one stopped,
and each capture counts once.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc

from hemostat.reference.protocol import Reference
from hemostat.scoring.endings import NotScored
from hemostat.scoring.offline.stages import OfflineModels, offline_stages
from hemostat.scoring.score_rows import score_rows
from hemostat.scoring.spool.columns import SCHEMA_VERSION, VERSION_KEY
from hemostat.scoring.spool.keys import SpoolError, SpoolKey
from hemostat.scoring.spool.segments import read_segment, segments, write_segment

BATCH_ROWS = 256
"""The number of rows that are scored between two reports of progress."""
Progress = Callable[[int, int, float], None]
"""It gets the finished segments, all of them, and the captures that were scored in a second."""


def model_of(rows: pa.Table, wanted: str | None, path: Path) -> str:
    """Returns the served name of the rows. wanted: the only name that is scored; None: there is one.

    Raises SpoolError if there are several: a reference belongs to one model.
    """
    names = sorted(pc.unique(rows["model"]).to_pylist())
    if wanted is not None:
        return wanted
    if len(names) > 1:
        raise SpoolError(f"{path} has requests to several models: {', '.join(names[:8])}; name one by --model")
    return str(names[0])


async def score_folder(
    source: Path,
    out: Path,
    reference: Reference,
    *,
    key: SpoolKey | None,
    model: str | None,
    progress: Progress,
) -> int:
    """Returns the number of captures that were scored now. Raises SpoolError, OSError and ReferenceFailure.

    key: of both folders; None: they are not encrypted. model: see `model_of`.
    """
    todo, done = segments(source), {path.name for path in segments(out)}
    info = await reference.start()
    models = OfflineModels(reference)
    stages = offline_stages(models)
    began, scored, finished = time.monotonic(), 0, len([path for path in todo if path.name in done])
    progress(finished, len(todo), 0.0)
    for path in todo:
        if path.name in done:
            continue
        rows = read_segment(path, key, {VERSION_KEY: SCHEMA_VERSION})
        models.set_pair(model_of(rows, model, path), info)
        models.adapters |= set(pc.unique(rows["adapter"]).to_pylist()) - {None}
        parts = []
        for start in range(0, len(rows), BATCH_ROWS):
            try:
                parts.append(await score_rows(rows.slice(start, BATCH_ROWS), stages))
            except NotScored as ending:
                raise SpoolError(f"{path.name}: {ending}; run the same command again to go on") from None
            scored += len(parts[-1])
            progress(finished, len(todo), scored / max(time.monotonic() - began, 1e-9))
        write_segment(out / path.name, pa.concat_tables(parts), key)
        finished += 1
        progress(finished, len(todo), scored / max(time.monotonic() - began, 1e-9))
    return scored
