"""Scores captures on the machines of a Ray cluster, by Ray Data: one task for each part, each written whole.

A task that is tried again writes the same file, and a run that goes on lists what is there. Each actor holds a
reference of its own, and reads and writes by itself: no capture travels between tasks.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from hemostat.reference.protocol import Reference, ReferenceFailure
from hemostat.scoring.offline.folder import PartScorer, Progress, parts_of
from hemostat.scoring.offline.left_out import report_journals, report_left_out
from hemostat.scoring.spool.keys import SpoolError, UnreadableSegmentError, read_key
from hemostat.scoring.spool.segments import Location, segments, write_segment

WORKER_CPUS = 0.5
"""The processors that Ray counts for an actor: actors that take all of them would starve the tasks that read."""


@dataclass(frozen=True, slots=True)
class Job:
    """The work that is to be done. It travels to each machine, which has to see both folders and the key by these
    names.

    key: as in `spool.key`; it is the name of the key, which stays where it is. reference: makes the reference, not
    started. compressed, max_scored: see `score_folder`.
    """

    source: Location
    out: Location
    key: str
    model: str | None
    reference: Callable[[], Reference]
    compressed: Callable[[], Reference] | None = None
    max_scored: int | None = None


class _Actor:
    """Scores parts, in a process of Ray's. An error that the user can correct is a row: Ray would try it again."""

    def __init__(self, job: Job) -> None:
        self._job, self._key = job, read_key(job.key)
        self._loop = asyncio.new_event_loop()
        self._compressed = None if job.compressed is None else job.compressed()
        if self._compressed is not None:
            self._loop.run_until_complete(self._compressed.start())
        self._scorer = PartScorer(job.reference(), job.model, job.max_scored)
        self._parts = {part.name: part for part in parts_of(job.source, self._key, self._compressed)}

    def __call__(self, batch: dict[str, Any]) -> dict[str, list[Any]]:
        scored, errors, left_out = [], [], []
        for name in batch["name"]:
            count, error, unreadable = 0, "", ""
            try:
                count = self._loop.run_until_complete(self._score(str(name)))
            except UnreadableSegmentError as failure:
                unreadable = str(failure)
            except (SpoolError, ReferenceFailure, OSError) as failure:
                error = str(failure)
            scored.append(count)
            errors.append(error)
            left_out.append(unreadable)
        return {"scored": scored, "error": errors, "left_out": left_out}

    async def _score(self, name: str) -> int:
        rows = await self._scorer.score(await self._parts[name].read(), name)
        write_segment(self._job.out / name, rows, self._key)
        return len(rows)


def score_on_ray(job: Job, *, address: str | None, workers: int, gpus: float, progress: Progress) -> int:
    """Returns the number of captures that were scored now. Raises SpoolError, OSError and ReferenceFailure.

    address: of the cluster; None: one of this machine, for this call. workers: the number of actors. gpus: of each.
    """
    import ray  # noqa: PLC0415  an extra

    names = [part.name for part in parts_of(job.source, read_key(job.key), None)]
    done = {path.name for path in segments(job.out)}
    todo = [name for name in names if name not in done]
    progress(len(names) - len(todo), len(names), 0.0)
    if not todo:
        return 0
    own = not ray.is_initialized()
    if own:
        ray.init(address=address, include_dashboard=False, log_to_driver=False, logging_level=logging.ERROR)
    try:
        ray.data.DataContext.get_current().enable_progress_bars = False
        data = ray.data.from_items([{"name": name} for name in todo], override_num_blocks=len(todo))
        results = data.map_batches(
            _Actor,
            fn_constructor_args=(job,),
            batch_size=1,
            num_cpus=WORKER_CPUS,
            num_gpus=gpus or None,
            compute=ray.data.ActorPoolStrategy(size=min(workers, len(todo))),
        )
        left_out: list[SpoolError] = []
        scored, finished, began = 0, len(names) - len(todo), time.monotonic()
        for row in results.iter_rows():
            if row["error"]:
                raise SpoolError(f"{row['error']}; run the same command again to go on")
            if row["left_out"]:
                left_out.append(SpoolError(row["left_out"]))
                continue
            scored, finished = scored + int(row["scored"]), finished + 1
            progress(finished, len(names), scored / max(time.monotonic() - began, 1e-9))
    finally:
        if own:
            ray.shutdown()
    report_left_out(left_out, len(names))
    report_journals(job.source)
    return scored
