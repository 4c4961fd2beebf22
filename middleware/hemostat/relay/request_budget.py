"""The limits of what the requests that are not complete, or that wait, may take of one relay: memory and upstream
connections.
"""

from __future__ import annotations

from itertools import islice
from typing import Final

from hemostat.relay.shares import Holding, Shares

MEMORY_EXHAUSTED: Final = "the proxy's memory for requests is exhausted"
UPLOADS_EXHAUSTED: Final = "too many requests with long bodies at a time"
UPLOAD_SHARE: Final = 4
"""One of so many upstream connections may wait for the rest of a request's body."""
MAX_EXAMINED_UPLOADS: Final = 128
"""The number of uploads that are examined at a time when a slow one is looked for: as many as there are with
`upstream.max_connections` at its default.
"""
FREED_SHARE: Final = 8
"""The divisor of the limit which gives the size that has to be given back before memory is returned."""


class RequestBudget:
    """Owns how many bytes of requests each client keeps in a relay, and how many requests with an incomplete body each
    sends.

    What has been read of a head or a body counts, and so does a request that waits for a connection. Beyond the limit
    the client that holds most gives back first, see `Shares`. Copies, which are kept to send a request once more, count
    too; they are made only while memory is to spare, and are not asked back.
    """

    __slots__ = ("_bytes", "_copies", "_enforcing", "_limit", "_max_uploads", "_peak", "_uploading", "_uploads")

    def __init__(self, limit: int, max_connections: int) -> None:
        """limit: in bytes. max_connections: to the upstream."""
        self._bytes = Shares()
        self._copies = 0
        self._enforcing = False
        self._limit = limit
        self._peak = 0
        """The largest number of bytes that were held since `take_freed` was true."""
        self._max_uploads = max(1, max_connections // UPLOAD_SHARE)
        self._uploads = Shares()
        self._uploading: dict[Holding, None] = {}
        """The holdings with an upload; the one that has not been looked at for longest is the first."""

    @property
    def held_bytes(self) -> int:
        return self._bytes.size + self._copies

    @property
    def scarce(self) -> bool:
        """It is True if half of the bytes are in use: what is not needed is not kept."""
        return 2 * self.held_bytes > self._limit

    def spares(self, size: int) -> bool:
        """Returns True if three quarters of the limit are left free with `size` bytes more: a copy that is seldom
        needed makes nothing scarce."""
        return 4 * (self.held_bytes + size) <= self._limit

    def copy(self, size: int) -> None:
        """Counts `size` bytes more that are kept as copies; a negative size means fewer."""
        self._copies += size

    def hold(self, holding: Holding, size: int) -> None:
        """Counts `size` bytes more that are held; a negative size means fewer. After a positive size, `enforce` has to
        follow.
        """
        self._bytes.add(holding, size)

    def enforce(self) -> None:
        """Keeps to the limit; `give_way` of any owner may be called."""
        self._peak = max(self._peak, self.held_bytes)
        if self._enforcing:
            return  # whoever gives way may begin its next request: the loop further up goes on
        self._enforcing = True
        try:
            while self.held_bytes > self._limit:
                holding = self._bytes.largest()
                if holding is None or holding.owner is None:
                    return
                holding.owner.give_way()
        finally:
            self._enforcing = False

    def take_freed(self) -> bool:
        """Returns True if much less is held than was, so that memory can be returned. It is True once for each time."""
        freed = FREED_SHARE * (self._peak - self.held_bytes) >= self._limit
        if freed:
            self._peak = self.held_bytes
        return freed

    def begin_upload(self, upload: Holding, now: float) -> bool:
        """Returns True if one more request may send a body that is not complete; `end_upload` has to follow.

        upload: a new one. Where no place is left, the oldest upload of the client that has most of them gives way, or
        one that is slow, whoever sends it. now: event-loop time.
        """
        if self._uploads.size >= self._max_uploads:
            credential = b"" if upload.owner is None else upload.owner.credential()
            other = self._uploads.larger(upload.network, credential) or self._slow_upload(now)
            if other is None or other.owner is None:
                return False
            other.owner.give_way_upload()
        self._uploads.add(upload, 1)
        self._uploading[upload] = None
        return True

    def end_upload(self, upload: Holding) -> None:
        self._uploads.add(upload, -1)
        del self._uploading[upload]

    def _slow_upload(self, now: float) -> Holding | None:
        for upload in tuple(islice(self._uploading, MAX_EXAMINED_UPLOADS)):
            if upload.owner is not None and upload.owner.uploads_slowly(now):
                return upload
            del self._uploading[upload]
            self._uploading[upload] = None  # to the end
        return None
