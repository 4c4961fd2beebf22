"""The spool of a control process: sampled captures go to disk before they are scored.

Captures wait in memory for at most a second, or until they are some hundred KiB. Then they are appended to the journal
together, which takes half of the time, and the journal is synced. Once the journal is full or old enough, a segment is
made of it, and the journal goes: so is a journal that an earlier process left. A segment has the name of its journal,
and is written whole: whenever a process ends, a capture is in one segment, in one journal, or nowhere. Captures that
cannot be written wait on, and no others are taken meanwhile.

Above half of its limit the spool admits captures with a probability that falls to 0 at the limit. It depends on how
full the spool is, and never on what a capture is, and each row has its own.

Segments may be in an object store. Journals are always on this machine. While the store cannot be reached, they stay.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import math
from collections.abc import Callable, Sequence
from pathlib import Path

import msgspec

from hemostat.engines.taps import TapResult
from hemostat.ipc.messages import Capture
from hemostat.metrics.reasons import Unscored
from hemostat.scoring.capture_arrays import UnreadableLogprobsError, decode_capture
from hemostat.scoring.spool import journal
from hemostat.scoring.spool.columns import COMPRESSION, in_parts
from hemostat.scoring.spool.journal import Journal, in_use, read_journal
from hemostat.scoring.spool.keys import SpoolError, SpoolKey
from hemostat.scoring.spool.segments import (
    SUFFIX,
    TAKEN_SUFFIX,
    Location,
    began,
    segment_name,
    segments,
    size_of,
    write_segment,
)
from hemostat.scoring.spool.spooled import Spooled, SpooledTap
from hemostat_calibration.backoff import Backoff
from hemostat_calibration.errors import InvalidRecordError

log = logging.getLogger("hemostat.spool")

SYNC_SECONDS = 1.0
WAITING_BYTES = 384 << 10
"""The size of captures that are appended together: more of them leave the processor's caches."""
SHORT_BYTES = 800
"""About the bytes of all short parts of a capture in a journal, with their names."""
LOOK_SECONDS = 60.0
"""The longest pause between two looks at all files: there may be thousands of them."""
SEGMENT_SECONDS = 60.0
"""The age at which a journal becomes a segment."""
SEGMENT_BYTES = 32 << 20
"""The size at which a journal becomes a segment."""
RETRY_SECONDS = (1.0, 2.0, 5.0, 10.0, 30.0, 60.0)
"""The pauses after the first, second, … attempt to write that failed; the last one repeats."""


def admission(fill: float) -> float:
    """Returns the probability with which a capture is admitted. fill: the part of the limit that is used.

    >>> [admission(fill) for fill in (0.0, 0.5, 0.75, 1.0, 1.2)]
    [1.0, 1.0, 0.5, 0.0, 0.0]
    """
    return min(1.0, max(0.0, 2.0 * (1.0 - fill)))


def close_journal(path: Path, folder: Location, key: SpoolKey | None, captures: Sequence[Spooled] | None = None) -> int:
    """Makes a segment of a journal in a folder, and removes the journal. Returns how many captures could not be read.

    captures: the ones of the journal, if they are known; else they are read. A segment that is there already was made
    of the same journal, so nothing is counted twice. Raises OSError and SpoolError.
    """
    segment, unreadable = folder / (path.stem + SUFFIX), 0
    if not segment.exists():
        read = list(read_journal(path, key)) if captures is None else captures
        whole = [spooled for spooled in read if spooled is not None]
        if read and not whole:
            raise SpoolError(f"{path} is damaged or was changed, so that nothing of it can be read; move it elsewhere")
        decoded = [made for spooled in whole if (made := _decoded(spooled)) is not None]
        unreadable = len(read) - len(decoded)
        if decoded:
            write_segment(segment, in_parts(decoded), key, COMPRESSION)
    path.unlink()
    return unreadable


def _decoded(spooled: Spooled) -> Spooled | None:
    """Returns a capture with its candidates as arrays; None if they cannot be read."""
    try:
        capture = decode_capture(spooled.capture)
    except (UnreadableLogprobsError, InvalidRecordError):
        return None
    return spooled if capture is spooled.capture else msgspec.structs.replace(spooled, capture=capture)


def _size(spooled: Spooled) -> int:
    """Returns about the bytes that a capture takes in a journal."""
    capture, tap = spooled.capture, spooled.tap
    arrays = [capture.prompt_token_ids, capture.output_token_ids, capture.candidate_ids, capture.candidate_logprobs]
    size = SHORT_BYTES + sum(map(len, arrays)) + len(capture.emitted_logprobs) + sum(map(len, capture.logprobs))
    return size if tap is None else size + tap.size


class Spool:
    """Owns the folder `spool.path`.

    journals: the folder of this machine for journals, which may be the same. max_bytes: the limit of all files.
    max_age: the seconds after which a segment is removed. clock: monotonic seconds. wall: Unix time. draw: returns a
    random number from 0 to 1. Raises SpoolError if the folder cannot be used.
    """

    def __init__(
        self,
        folder: Location,
        key: SpoolKey | None,
        *,
        journals: Path,
        max_bytes: int,
        max_age: float,
        clock: Callable[[], float],
        wall: Callable[[], float],
        draw: Callable[[], float],
    ) -> None:
        for made in (folder, journals):
            if isinstance(made, Path):
                try:
                    made.mkdir(mode=0o700, parents=True, exist_ok=True)
                except OSError as error:
                    raise SpoolError(f"spool.path: cannot make {made} ({error.strerror}); change it") from None
        self._folder, self._journals, self._key = folder, journals, key
        self._max_bytes, self._max_age = max_bytes, max_age
        self._clock, self._wall, self._draw = clock, wall, draw
        self._waiting: list[Spooled] = []
        """The captures that are not in the journal yet."""
        self._waiting_bytes = 0
        self._journal: Journal | None = None
        self._closed: Journal | None = None
        """The journal that was closed last, until a segment was made of it or failed: its captures are still known."""
        self._opened_at = 0.0
        self._detached = False
        """True if there is a journal to make a segment of."""
        self._looked_at = -math.inf
        self._closed_bytes = 0
        """The size of all files but the open journal."""
        self._segment_bytes = 0
        self._left = set[str]()
        """The names of the journals that no segment could be made of."""
        self._backoff = Backoff(RETRY_SECONDS)
        self.written = 0
        self.lost = 0
        """The number of captures that could not be written."""
        self.refused = 0
        """The number of captures that were not admitted."""
        if isinstance(folder, Path):
            self.look()  # an object store may be slow, and is looked at by `run`

    @property
    def left(self) -> int:
        """The number of journals that no segment could be made of: they stay as they are."""
        return len(self._left)

    @property
    def bytes(self) -> int:
        """The size of all files, and of what waits to be written."""
        return self._closed_bytes + self._waiting_bytes + (0 if self._journal is None else self._journal.bytes)

    def update(self, capture: Capture, tap: TapResult | None) -> Unscored | None:
        """Takes a capture, and returns None; or why it is not taken."""
        if capture.ids_only:
            return Unscored.NO_LOGPROBS
        probability = admission(self.bytes / self._max_bytes)
        if probability < 1.0 and self._draw() >= probability:
            self.refused += 1
            return Unscored.SPOOL_FULL
        if self._backoff.failures and not self.flush():
            self.lost += 1
            return Unscored.SPOOL_FAILED
        spooled = Spooled(capture, self._wall(), probability, None if tap is None else SpooledTap.of(tap))
        self._waiting.append(spooled)
        self._waiting_bytes += _size(spooled)
        if self._waiting_bytes >= WAITING_BYTES:
            self.flush()
        return None

    def flush(self) -> bool:
        """Appends to the journal what waits for it. Returns True if nothing waits any more."""
        if not self._waiting:
            return True
        if not self._backoff.may_try(self._clock()):
            return False
        try:
            self._open().append(self._waiting)
        except OSError as error:
            self._failed(error)
            return False
        if self._backoff.failures:
            log.warning("spool.path: written again; %d captures were lost so far", self.lost)
        self._backoff.reset()
        self.written += len(self._waiting)
        self._waiting, self._waiting_bytes = [], 0
        return True

    def _open(self) -> Journal:
        if self._journal is None:
            name = segment_name(self._wall()) + journal.SUFFIX
            self._journal, self._opened_at = Journal(self._journals / name, self._key), self._clock()
        return self._journal

    def _failed(self, error: OSError) -> None:
        if not self._backoff.failures:
            log.error("spool.path: cannot write (%s); captures are lost until it can be written again", error.strerror)
        self._backoff.failed(self._clock())

    async def run(self) -> None:
        """Syncs, closes and removes files, until cancelled. An object store that is slow does not delay the syncs."""
        await asyncio.gather(self._sync_loop(), self._tidy_loop())

    async def _sync_loop(self) -> None:
        while True:
            await asyncio.sleep(SYNC_SECONDS)
            await self._sync()

    async def _tidy_loop(self) -> None:
        await asyncio.to_thread(self.recover)
        while True:
            await asyncio.sleep(SYNC_SECONDS)
            await self._tidy()

    async def _sync(self) -> None:
        self.flush()
        if (open_journal := self._journal) is None:
            return
        try:
            await asyncio.to_thread(open_journal.sync)
        except OSError as error:
            self._failed(error)
        old = self._clock() - self._opened_at >= SEGMENT_SECONDS
        if old or open_journal.bytes >= SEGMENT_BYTES:
            self._detach()
            self._detached = True

    async def _tidy(self) -> None:
        try:
            if self._detached:
                self._detached, self._looked_at = False, -math.inf
                await asyncio.to_thread(self.recover)
            if self._clock() - self._looked_at >= LOOK_SECONDS:
                await asyncio.to_thread(self.look)
        except OSError as error:
            self._failed(error)

    def _detach(self) -> None:
        if self._journal is not None:
            self._closed_bytes += self._journal.bytes
            self._journal.close()
            self._closed, self._journal = self._journal, None

    def recover(self) -> None:
        """Makes segments of all journals that no process writes any more."""
        closed, self._closed = self._closed, None
        left = set[str]()
        for path in sorted(self._journals.glob("*" + journal.SUFFIX)):
            known = closed.captures if closed is not None and closed.path == path else None
            try:
                if in_use(path):
                    continue
                unreadable = close_journal(path, self._folder, self._key, known)
            except (OSError, SpoolError) as error:
                left.add(path.name)
                if path.name not in self._left:
                    log.error("spool.path: %s stays as it is: %s", path.name, error)
                continue
            if unreadable:
                self.lost += unreadable
                log.warning("spool.path: %d captures of %s cannot be read", unreadable, path.name)
        self._left = left

    def look(self) -> None:
        """Removes the segments that are too old, and adds up the sizes of the others."""
        self._looked_at = self._clock()
        try:
            self._segment_bytes = self._look_at_segments()
        except OSError as error:
            if isinstance(self._folder, Path):
                raise
            # Captures still go to journals.
            log.warning("spool.path: cannot look at %s (%s); it is tried again", self._folder, str(error)[:200])
        total = self._segment_bytes
        open_path = None if self._journal is None else self._journal.path
        for path in self._journals.glob("*" + journal.SUFFIX):
            with contextlib.suppress(FileNotFoundError):
                total += 0 if path == open_path else path.stat().st_size
        self._closed_bytes = total

    def _look_at_segments(self) -> int:
        """Removes the segments that are too old, and returns the size of the others. Raises OSError."""
        now, total = self._wall(), 0
        for path in segments(self._folder):
            at = began(path)
            with contextlib.suppress(FileNotFoundError):
                if at is not None and now - at > self._max_age:
                    path.unlink()
                    if isinstance(path, Path):
                        path.with_suffix(TAKEN_SUFFIX).unlink(missing_ok=True)
                else:
                    total += size_of(path)
        return total

    def close(self) -> None:
        """Makes a segment of the open journal. What cannot be written is lost."""
        if not self.flush():
            log.error("spool.path: %d captures could not be written", len(self._waiting))
            self.lost += len(self._waiting)
            self._waiting, self._waiting_bytes = [], 0
        self._detach()
        self.recover()
