"""The private folder with the adapters' files, which vLLM loads by path.

Every process has a folder of its own, removed when it ends; what a killed process left is removed by the next one. An
adapter appears in it complete, by a rename, or not at all.
"""

from __future__ import annotations

import atexit
import fcntl
import os
import shutil
import tempfile
from collections import OrderedDict
from collections.abc import Collection, Mapping
from pathlib import Path

PREFIX = "hemostat-adapters-"
LOCK = ".lock"
MAX_ADAPTERS = 32
MAX_BYTES = 8 << 30
KEEP_SECONDS = 600.0
"""An adapter that was asked for within this time is kept: a request that runs may have to load it again."""


class AdapterFolder:
    """Written by one thread. `now` is in monotonic seconds.

    parent: where this process's folder is made, at the first `write`; None: the folder for temporary files.
    """

    def __init__(
        self, parent: Path | None = None, max_adapters: int = MAX_ADAPTERS, max_bytes: int = MAX_BYTES
    ) -> None:
        self._parent = parent or Path(tempfile.gettempdir())
        self._max_adapters, self._max_bytes = max_adapters, max_bytes
        self._own: Path | None = None
        self._lock: int | None = None
        self._registered = False
        """It is True once `close` is registered to be called at the end of the process."""
        self._held: OrderedDict[str, tuple[int, float]] = OrderedDict()
        """The adapters' folders by version, each as its bytes and when it was last asked for, the least recently used
        first.
        """

    def find(self, version: str, now: float) -> Path | None:
        """Returns the path of an adapter that this process has written."""
        if version not in self._held or self._own is None or not (self._own / version).is_dir():
            return None
        self._held[version] = self._held[version][0], now
        self._held.move_to_end(version)
        return self._own / version

    def write(self, version: str, files: Mapping[str, bytes], listed: Collection[str], now: float) -> Path:
        """Writes an adapter's files, and returns the path of their folder. listed: versions that the server lists; they
        are never removed to make room.

        Raises OSError if the disk is full, or if no room can be made within the limits.
        """
        own = self._make()
        size = sum(map(len, files.values()))
        self._make_room(size, listed, now)
        partial = Path(tempfile.mkdtemp(prefix=f".{version}-", dir=own))
        try:
            for name, data in files.items():
                (partial / name).write_bytes(data)
            shutil.rmtree(own / version, ignore_errors=True)
            partial.rename(own / version)
        except OSError:
            shutil.rmtree(partial, ignore_errors=True)
            raise
        self._held[version] = size, now
        self._held.move_to_end(version)
        return own / version

    def close(self) -> None:
        """Removes the folder."""
        if self._own is not None:
            shutil.rmtree(self._own, ignore_errors=True)
        if self._lock is not None:
            os.close(self._lock)
        self._own = self._lock = None
        self._held.clear()

    def _make(self) -> Path:
        if self._own is not None and not (self._own / LOCK).exists():
            self.close()  # the folder for temporary files was cleaned
        if self._own is None:
            self._parent.mkdir(parents=True, exist_ok=True)
            self._remove_stale()
            self._own = Path(tempfile.mkdtemp(prefix=PREFIX, dir=self._parent))  # mode 0700
            self._lock = os.open(self._own / LOCK, os.O_CREAT | os.O_RDWR, 0o600)
            fcntl.flock(self._lock, fcntl.LOCK_EX)
            if not self._registered:
                atexit.register(self.close)
                self._registered = True
        return self._own

    def _remove_stale(self) -> None:
        """Removes folders of this user whose processes have ended: their locks are free."""
        for folder in self._parent.glob(f"{PREFIX}*"):
            try:
                if folder.is_symlink() or folder.stat().st_uid != os.getuid():
                    continue
                lock = os.open(folder / LOCK, os.O_RDWR)
            except OSError:
                continue
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(folder, ignore_errors=True)
            except OSError:
                pass
            finally:
                os.close(lock)

    def _make_room(self, size: int, listed: Collection[str], now: float) -> None:
        while len(self._held) >= self._max_adapters or sum(s for s, _ in self._held.values()) + size > self._max_bytes:
            victim = next(
                (v for v, (_, used) in self._held.items() if v not in listed and now - used >= KEEP_SECONDS), None
            )
            if victim is None:
                raise OSError(
                    f"{len(self._held)} adapters are in use, and an adapter of {size} bytes more is above the limits "
                    f"({self._max_adapters} adapters, {self._max_bytes} bytes)"
                )
            del self._held[victim]
            if self._own is not None:
                shutil.rmtree(self._own / victim, ignore_errors=True)
