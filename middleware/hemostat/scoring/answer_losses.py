"""Decides if the engine's plugin is asked for tokens that the response itself could contain, by how many answers get
lost.

To ask the plugin costs less CPU time than logprobs in the response, but an answer can be lost on its way: a queue is
full, too many generations are recorded at a time, or an engine has no plugin or reports to another middleware.
"""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Iterator

from hemostat.metrics import names
from hemostat.metrics.samples import Sample
from hemostat_calibration.backoff import Backoff

MAX_LOST = 10
RECENT_ANSWERS = 50
"""The number of an engine's last answers that are looked at. If MAX_LOST of them are lost (a fifth, or all of the first
ten), logprobs in the response are asked for instead.
"""
PAUSE_SECONDS = (600.0, 1200.0, 2400.0, 4800.0, 9600.0, 14400.0)
"""The pauses after which the plugin is asked again. After an engine's RECENT_ANSWERS came without a pause, the next one
is the first one again.
"""
MAX_ENGINES = 256
"""The largest number of engines that are remembered; the one that has answered nothing for longest is forgotten
first."""


class AnswerLosses:
    """Owns the recent answers of each engine, and until when the plugin is not asked.

    The loss is watched by engine, since one engine that hands out nothing would otherwise be missing from all figures
    while the share of all answers looks small. Time is passed in, monotonic seconds.
    """

    def __init__(self) -> None:
        self._recent: OrderedDict[str, deque[bool]] = OrderedDict()
        """The last answers of each engine, as a truth value each: True if the answer was lost."""
        self._pause = Backoff(PAUSE_SECONDS)

    def update(self, engine: str, now: float, *, lost: bool) -> bool:
        """Counts a request whose answer came, or did not come whole. Returns whether a pause begins with it."""
        if self.paused(now):
            return False  # it was asked for before the relays knew
        recent = self._of(engine)
        recent.append(lost)
        if sum(recent) >= MAX_LOST:
            self._recent.clear()
            self._pause.failed(now)
            return True
        if len(recent) == RECENT_ANSWERS:
            self._pause.reset()
        return False

    def paused(self, now: float) -> bool:
        """Returns True if logprobs in the response are asked for, where it can have them."""
        return not self._pause.may_try(now)

    def samples(self, now: float) -> Iterator[Sample]:
        yield Sample(names.ENGINE_ANSWERS_PAUSED, (), float(self.paused(now)))

    def _of(self, engine: str) -> deque[bool]:
        if engine not in self._recent and len(self._recent) >= MAX_ENGINES:
            self._recent.popitem(last=False)
        recent = self._recent.setdefault(engine, deque(maxlen=RECENT_ANSWERS))
        self._recent.move_to_end(engine)
        return recent
