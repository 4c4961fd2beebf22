"""The requests that wait for the judge's process, which are answered one after the other.

Profiles that a request needs are sent before it. The length of a record is limited: it may be as long as its answer is
expected in time, given the speed of earlier answers.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
import time
from collections import OrderedDict, deque
from collections.abc import Callable
from dataclasses import dataclass

from hemostat.adapters.live import judge_messages
from hemostat.ipc.child_process import ChildExited, FramedChild
from hemostat.learner.learner_messages import parts
from hemostat_calibration.profiles.profile import IDENTITY, CalibrationProfile

log = logging.getLogger("hemostat.adapters")

MAX_WAITING = 16
"""Records that wait; further ones are refused."""
MAX_WAITING_BYTES = 256 * 1024 * 1024
"""The largest total size in bytes of the hidden states of the records that wait."""
MAX_HELD = 8
"""Profiles that the judge holds; the ones that were used last stay."""
MAX_ANSWER_SECONDS = 120.0
"""A judge that does not answer for so long is ended, and started again; longer answers are not asked for then."""
TARGET_SECONDS = 40.0
"""An answer that is expected to take longer is not asked for."""
MEASURED_SECONDS = 1.0
"""A quicker answer says little of the speed: it only shows that it is not less."""
SMOOTHING = 0.2
"""Weight of the last answer in the mean speed."""
RECOVERY = 1.01
"""The factor by which the limit grows with every record that is too long, so that a machine that was busy for a while
is tried again."""
BACK_OFF = 4.0
"""The factor by which the speed is below what would have been in time, after an answer that was not."""


class AnswerLimit:
    """Owns the speed, tokens that a model is run on a second; nothing is too long before it is known.

    What is too long is decided by a record's length alone, not by what would be found.

    >>> limit = AnswerLimit()
    >>> limit.allows(10**6), limit.max_tokens
    (True, None)
    >>> limit.answered(1000, 2.0)
    >>> limit.max_tokens, limit.allows(20_000), limit.allows(20_001)
    (20000, True, False)
    """

    def __init__(self) -> None:
        self._speed: float | None = None

    @property
    def max_tokens(self) -> int | None:
        """None: not known yet."""
        return None if self._speed is None else int(self._speed * TARGET_SECONDS)

    def allows(self, tokens: int) -> bool:
        """Returns True if a request of so many tokens, each counted for every pass over it, may be made."""
        limit = self.max_tokens
        if self._speed is None or limit is None or tokens <= limit:
            return True
        self._speed *= RECOVERY
        return False

    def answered(self, tokens: int, seconds: float) -> None:
        speed = tokens / max(seconds, 1e-3)
        if seconds < MEASURED_SECONDS:
            self._speed = None if self._speed is None else max(self._speed, speed)
        else:
            self._speed = speed if self._speed is None else (1.0 - SMOOTHING) * self._speed + SMOOTHING * speed

    def late(self, tokens: int, seconds: float) -> None:
        """No answer came within so many seconds."""
        speed = tokens / max(seconds, 1e-3) / BACK_OFF
        self._speed = speed if self._speed is None else min(speed, self._speed)


@dataclass(slots=True)
class JudgeRequest:
    """One request, from when it is made until it is answered."""

    versions: tuple[str, ...]
    request: Callable[[int], judge_messages.Request]
    """A function that returns the message with this id."""
    answered: Callable[[judge_messages.Answer | None], None]
    """A function that takes the answer; None: the judge ended first."""
    bytes: int = 0
    tokens: int = 0
    """The number of tokens that models are run on, each counted for every pass over it."""


class JudgeRequests:
    """Owns the requests that wait, and which profiles the process holds.

    profile: a version's profile; None where it is not known any more.
    """

    def __init__(self, profile: Callable[[str], CalibrationProfile | None]) -> None:
        self._profile = profile
        self.limit = AnswerLimit()
        self._waiting: deque[JudgeRequest] = deque()
        self._bytes = 0
        self._held: OrderedDict[str, None] = OrderedDict()
        """Versions that the process holds, the one used last at the end."""
        self._answer: asyncio.Future[judge_messages.Answer] | None = None
        self._asked = -1
        """Id of the request that is being answered."""
        self._numbers = itertools.count()

    def __len__(self) -> int:
        return len(self._waiting)

    @property
    def full(self) -> bool:
        """It is True if no further record may wait."""
        return len(self._waiting) >= MAX_WAITING or self._bytes > MAX_WAITING_BYTES

    def put(self, request: JudgeRequest) -> None:
        self._waiting.append(request)
        self._bytes += request.bytes

    async def ask(self, child: FramedChild) -> bool:
        """Asks the process what waits first, and hands on its answer. Returns False if nothing waits.

        The first of those that wait stays there until it is answered, so that `reset` ends it, too.
        """
        if not self._waiting:
            return False
        first = self._waiting[0]
        self._answer = asyncio.get_running_loop().create_future()
        self._asked = next(self._numbers)
        began = time.monotonic()
        try:
            async with asyncio.timeout(MAX_ANSWER_SECONDS):
                await self._hold(child, first.versions)
                began = time.monotonic()
                child.send(judge_messages.REQUESTS.encode(first.request(self._asked)))
                await child.drain()
                answer = await self._answer
        except TimeoutError:
            self.limit.late(first.tokens, time.monotonic() - began)
            raise ChildExited(f"it did not answer within {MAX_ANSWER_SECONDS:.0f} s") from None
        self.limit.answered(first.tokens, time.monotonic() - began)
        self._waiting.popleft()
        self._bytes -= first.bytes
        _call(first, answer)
        return True

    async def _hold(self, child: FramedChild, versions: tuple[str, ...]) -> None:
        """Send what the process does not hold yet. A version that is not known any more fails at the process."""
        for version in versions:
            if version in self._held:
                self._held.move_to_end(version)
                continue
            profile = self._profile(version) if version != IDENTITY else None
            if profile is None:
                continue
            for part, last in parts(await asyncio.to_thread(profile.to_bytes)):
                child.send(judge_messages.REQUESTS.encode(judge_messages.Hold(version, part, last)))
                await child.drain()
            self._held[version] = None
        old = [v for v in self._held if v not in versions][: max(0, len(self._held) - MAX_HELD)]
        if old:
            child.send(judge_messages.REQUESTS.encode(judge_messages.Evict(old)))
            for version in old:
                del self._held[version]

    def answer(self, answer: judge_messages.Judged | judge_messages.Scored | judge_messages.Failed) -> None:
        """Takes an answer of the process; one to an earlier request is ignored."""
        if self._answer is not None and not self._answer.done() and answer.id == self._asked:
            self._answer.set_result(answer)

    def exited(self, why: ChildExited) -> None:
        """Ends the request that is being answered: the process has ended."""
        if self._answer is not None and not self._answer.done():
            self._answer.set_exception(why)
            self._answer.exception()  # it may have no waiter

    def reset(self) -> None:
        """Ends all that wait, in their order: the process has ended, and they go on without it."""
        self._answer = None
        self._held.clear()
        self._bytes = 0
        ended, self._waiting = self._waiting, deque()
        for request in ended:
            _call(request, None)


def _call(request: JudgeRequest, answer: judge_messages.Answer | None) -> None:
    try:
        request.answered(answer)
    except Exception:
        log.exception("a record's distances could not be used")
