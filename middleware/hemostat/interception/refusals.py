"""The memory of a relay of upstreams that do not accept what Hemostat adds to requests."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Final

from hemostat_calibration.backoff import Backoff

MIN_REFUSALS: Final = 3
"""The least number of refusals in a row, without a sampled answer in between, before sampling pauses: one may be
chance."""
PAUSE_SECONDS: Final[Sequence[float]] = (30.0, 60.0, 120.0, 240.0, 480.0, 960.0, 1920.0, 3600.0)
VAIN_REPEAT_PAUSE_SECONDS: Final = 10.0
"""The time for which server errors are passed on as they are, after one that the client's own request got too."""


class SamplingPause:
    """Pauses sampling while the engine refuses what it adds, such as more logprobs than `--max-logprobs`.

    After a pause sampling is tried again; if it is refused again, the next pause is longer. What engines say during a
    pause is about requests that began before it, and neither ends it nor makes it longer. Another `shadow.top_k` is
    another question to the engine, and begins anew.
    """

    def __init__(self, clock: Callable[[], float]) -> None:
        """clock: monotonic seconds."""
        self._clock = clock
        self._top_k = -1
        self._refusals = 0
        self._backoff = Backoff(PAUSE_SECONDS)

    def refused(self, top_k: int) -> None:
        """Notes that the engine refused what was added to a request, and would not have refused the request itself."""
        if self._answers_count(top_k):
            self._refusals += 1
            if self._refusals >= MIN_REFUSALS:
                self._backoff.failed(self._clock())

    def accepted(self, top_k: int) -> None:
        """Notes that the engine answered with what was asked for."""
        if self._answers_count(top_k):
            self._begin_anew()

    def active(self, top_k: int) -> bool:
        """Returns True if nothing is sampled now."""
        return top_k == self._top_k and not self._backoff.may_try(self._clock())

    def _answers_count(self, top_k: int) -> bool:
        """Returns False during a pause. top_k: what the engine was asked for."""
        if top_k != self._top_k:
            self._top_k = top_k
            self._begin_anew()
        return not self.active(top_k)

    def _begin_anew(self) -> None:
        self._refusals = 0
        self._backoff.reset()


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
