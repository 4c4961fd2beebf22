"""Scores the segments of a folder, or a file of JSON lines, each part into a file of the same name in another folder.

A file is written whole, and what is there already is not scored again. So a run goes on where an earlier one stopped,
and each capture counts once.
"""

from __future__ import annotations

import asyncio
import functools
import logging
import time
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import pyarrow as pa
import pyarrow.compute as pc

from hemostat.reference.protocol import Reference, ReferenceInfo
from hemostat.scoring.endings import NotScored
from hemostat.scoring.offline.left_out import report_journals, report_left_out
from hemostat.scoring.offline.lines import LinesPart, captures_of, parts
from hemostat.scoring.offline.stages import OfflineModels, offline_stages
from hemostat.scoring.score_rows import SCORED_SCHEMA, score_rows
from hemostat.scoring.spool.columns import SCHEMA_VERSION, VERSION_KEY, to_rows
from hemostat.scoring.spool.keys import SpoolError, SpoolKey, UnreadableSegmentError
from hemostat.scoring.spool.segments import SUFFIX, Location, read_segment, segments, write_segment

log = logging.getLogger("hemostat.score")

BATCH_ROWS = 256
"""The number of rows that are scored between two reports of progress."""
Progress = Callable[[int, int, float], None]
"""It gets the finished segments, all of them, and the captures that were scored in a second."""


def model_of(rows: pa.Table, wanted: str | None, name: str) -> str:
    """Returns the served name of the rows. wanted: the only name that is scored; None: there is one.

    Raises SpoolError if there are several: a reference belongs to one model.
    """
    names = sorted(pc.unique(rows["model"]).to_pylist())
    if wanted is not None:
        return wanted
    if len(names) > 1:
        raise SpoolError(f"{name} has requests to several models: {', '.join(names[:8])}; name one by --model")
    return str(names[0])


class Part(NamedTuple):
    """Captures that become one file of scored captures. name: the name of the file."""

    name: str
    read: Callable[[], Awaitable[pa.Table]]


def parts_of(source: Location, key: SpoolKey | None, compressed: Reference | None) -> list[Part]:
    """Returns the parts of a spool, or of a file of JSON lines, in the order of time. Raises SpoolError and OSError."""
    if source.is_dir():
        return [Part(path.name, functools.partial(_read_segment, path, key)) for path in segments(source)]
    if not isinstance(source, Path):
        raise SpoolError(f"{source} is no folder; copy a file of JSON lines to this machine")
    made = [
        Part(part.name + SUFFIX, functools.partial(_read_lines, source, part, compressed)) for part in parts(source)
    ]
    return sorted(made, key=lambda part: part.name)


async def _read_segment(path: Location, key: SpoolKey | None) -> pa.Table:
    return await asyncio.to_thread(read_segment, path, key, {VERSION_KEY: SCHEMA_VERSION})


async def _read_lines(source: Path, part: LinesPart, compressed: Reference | None) -> pa.Table:
    captures, left_out = await captures_of(source, part, compressed)
    if left_out:
        log.warning(
            "%s: %d lines of %s were left out, as a profile or an adapter has answered", source, left_out, part.name
        )
    return to_rows(captures)


class PartScorer:
    """Scores the captures of parts on one reference, part by part. model: see `model_of`. max_scored: see
    `offline_stages`."""

    def __init__(self, reference: Reference, model: str | None, max_scored: int | None = None) -> None:
        self._reference, self._model = reference, model
        self._models = OfflineModels(reference)
        self._stages = offline_stages(self._models, max_scored=max_scored)
        self._info: ReferenceInfo | None = None

    async def score(self, rows: pa.Table, name: str, scored: Callable[[int], None] = lambda rows: None) -> pa.Table:
        """Returns scored rows. name: of the part, for errors. scored: gets the number of rows of each batch once they
        are scored. Raises SpoolError and ReferenceFailure."""
        if self._info is None:
            self._info = await self._reference.start()
        if len(rows):
            self._models.set_pair(model_of(rows, self._model, name), self._info)
            self._models.adapters |= set(pc.unique(rows["adapter"]).to_pylist()) - {None}
        done = [SCORED_SCHEMA.empty_table()]
        for start in range(0, len(rows), BATCH_ROWS):
            try:
                done.append(await score_rows(rows.slice(start, BATCH_ROWS), self._stages))
            except NotScored as ending:
                raise SpoolError(f"{name}: {ending}; run the same command again to go on") from None
            scored(len(done[-1]))
        return pa.concat_tables(done)


async def score_folder(
    source: Location,
    out: Location,
    reference: Reference,
    *,
    key: SpoolKey | None,
    model: str | None,
    progress: Progress,
    compressed: Reference | None = None,
    max_scored: int | None = None,
    others: Sequence[Reference] = (),
) -> int:
    """Returns the number of captures that were scored now. Raises SpoolError, OSError and ReferenceFailure.

    source: a spool, or a file of JSON lines. reference, others: the same model on several devices; each takes the next
    part. key: of both folders; None: they are not encrypted. model: see `model_of`.
    compressed: computes the log-probabilities of the compressed model that JSON lines do not have. max_scored: see
    `offline_stages`. A segment that cannot be read is left out, with a line in the log; if none can be, it is an error.
    """
    done = {path.name for path in segments(out)}
    todo = await asyncio.to_thread(parts_of, source, key, compressed)
    if compressed is not None:
        await compressed.start()
    began = time.monotonic()
    left_out: list[UnreadableSegmentError] = []
    scored, finished = 0, len([part for part in todo if part.name in done])

    def count(rows: int) -> None:
        nonlocal scored
        scored += rows
        progress(finished, len(todo), scored / max(time.monotonic() - began, 1e-9))

    count(0)
    waiting = iter([part for part in todo if part.name not in done])

    async def work(scorer: PartScorer) -> None:
        nonlocal finished
        for part in waiting:
            try:
                captures = await part.read()
            except UnreadableSegmentError as error:
                left_out.append(error)
                continue
            rows = await scorer.score(captures, part.name, count)
            await asyncio.to_thread(write_segment, out / part.name, rows, key)
            finished += 1
            count(0)

    tasks = [asyncio.ensure_future(work(PartScorer(each, model, max_scored))) for each in (reference, *others)]
    try:
        await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
    report_left_out(left_out, len(todo))
    report_journals(source)
    return scored
