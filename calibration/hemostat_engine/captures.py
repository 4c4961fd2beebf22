"""Loads onto a GPU do not happen while vLLM captures a CUDA graph.

During a capture an allocation or a synchronization by any other thread makes the capture fail, and with it vLLM's start
(vllm-project/vllm#48053). Profiles arrive at any time, on a thread of their own.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

MAX_WAIT_SECONDS = 10.0
"""The longest time that a load waits for a capture, which takes less than a second, and a capture for a load."""


class Captures:
    """Owns the lock that a capture holds, and a load."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._watched: type | None = None
        self._holds = False
        """It is True if the capture that is in progress has the lock."""

    def watch(self, graphs: type) -> None:
        """Makes captures of this class, `torch.cuda.CUDAGraph`, hold the lock from now on."""
        if self._watched is graphs:
            return
        self._watched = graphs
        begin, end = graphs.capture_begin, graphs.capture_end  # type: ignore[attr-defined]

        @functools.wraps(begin)
        def capture_begin(*arguments: Any, **options: Any) -> None:
            # One that raised may not have been ended.
            self._holds = self._holds or self._lock.acquire(timeout=MAX_WAIT_SECONDS)
            try:
                begin(*arguments, **options)
            except BaseException:
                self._ended()
                raise

        @functools.wraps(end)
        def capture_end(*arguments: Any, **options: Any) -> None:
            try:
                end(*arguments, **options)
            finally:
                self._ended()

        graphs.capture_begin, graphs.capture_end = capture_begin, capture_end  # type: ignore[attr-defined]

    def _ended(self) -> None:
        if self._holds:
            self._holds = False
            self._lock.release()

    @contextmanager
    def none(self) -> Iterator[None]:
        """Keeps captures from beginning inside the context, which begins when none is in progress. Raises TimeoutError
        after MAX_WAIT_SECONDS."""
        if not self._lock.acquire(timeout=MAX_WAIT_SECONDS):
            raise TimeoutError("vLLM captures a CUDA graph")
        try:
            yield
        finally:
            self._lock.release()


captures = Captures()
"""The captures of this process, as vLLM's graphs belong to it."""
