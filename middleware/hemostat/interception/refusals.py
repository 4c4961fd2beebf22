"""The memory of a relay of upstreams that do not accept what Hemostat adds to requests."""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

MIN_REFUSALS: Final = 3
"""The least number of refusals in a row, without a sampled answer in between, before sampling pauses: one may be
chance."""
FIRST_PAUSE_SECONDS: Final = 30.0
MAX_PAUSE_SECONDS: Final = 3600.0
VAIN_REPEAT_PAUSE_SECONDS: Final = 10.0
"""The time for which server errors are passed on as they are, after one that the client's own request got too."""


class SamplingPause:
    """Pauses sampling while the engine refuses what it adds, such as more logprobs than `--max-logprobs`.

    After a pause sampling is tried again; if it is refused again, the next pause is twice as long. Another
    `shadow.top_k` is another question to the engine, and begins anew.
    """

    def __init__(self, clock: Callable[[], float]) -> None:
        """clock: monotonic seconds."""
        self._clock = clock
        self._top_k = -1
        self._refusals = 0
        self._pause = FIRST_PAUSE_SECONDS
        self._until = 0.0

    def refused(self, top_k: int) -> None:
        """Notes that the engine refused what was added to a request, and would not have refused the request itself."""
        self._ask_about(top_k)
        self._refusals += 1
        if self._refusals >= MIN_REFUSALS and self._clock() >= self._until:
            self._until = self._clock() + self._pause
            self._pause = min(2 * self._pause, MAX_PAUSE_SECONDS)

    def accepted(self, top_k: int) -> None:
        """Notes that the engine answered with what was asked for."""
        self._ask_about(top_k)
        self._refusals = 0
        self._pause = FIRST_PAUSE_SECONDS

    def active(self, top_k: int) -> bool:
        """Returns True if nothing is sampled now."""
        return top_k == self._top_k and self._clock() < self._until

    def _ask_about(self, top_k: int) -> None:
        if top_k != self._top_k:
            self._top_k, self._refusals, self._pause, self._until = top_k, 0, FIRST_PAUSE_SECONDS, 0.0


class ServerErrorRepeats:
    """Decides if a request that got a server error is worth being sent again without what was added to it.

    A repeat of a request that is not to blame costs the upstream a second generation, when it may be overloaded.
    """

    def __init__(self, clock: Callable[[], float]) -> None:
        """clock: monotonic seconds."""
        self._clock = clock
        self._not_before = 0.0

    @property
    def allowed(self) -> bool:
        return self._clock() >= self._not_before

    def in_vain(self) -> None:
        """Notes that the client's own request got an error, too."""
        self._not_before = self._clock() + VAIN_REPEAT_PAUSE_SECONDS
