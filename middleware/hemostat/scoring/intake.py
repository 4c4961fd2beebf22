"""The captures that wait for the engine's answers, in the queue, or for the engine's tap.

A capture whose tap is not complete yet (the engine reports about once a second) stays in the queue, and those behind it
go first.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Callable

from hemostat.engines.messages import TapAnswer
from hemostat.engines.reports import PluginReports
from hemostat.engines.taps import TapResult
from hemostat.ipc.messages import Capture
from hemostat.metrics.reasons import Unscored
from hemostat.scoring.answer_losses import AnswerLosses
from hemostat.scoring.endings import EndingCounts
from hemostat.scoring.limits import ShadowQueue
from hemostat.scoring.tapped_answers import AwaitedAnswers, UnusableAnswer, captures_from_tap

log = logging.getLogger("hemostat.scorer")

MAX_TAP_SECONDS = 4.0
"""The longest time after the response's end for which the engine's numbers and answers are waited for; without the
numbers the figures are bounds.
"""
TAP_POLL_SECONDS = 0.1
ID_BYTES = 4


class CaptureIntake:
    """Owns the captures between the relay and the scorer.

    It gets each capture by `offer`, and gives each, when it can be scored, by `take`. A capture that has no room, or
    whose answers cannot be used, ends here.

    max_tokens: the limit for prompt and output, where only the engine's plugin reports them. clock: monotonic seconds.
    """

    def __init__(
        self,
        queue: ShadowQueue,
        engines: PluginReports,
        endings: EndingCounts,
        answer_losses: AnswerLosses,
        *,
        max_tokens: int,
        clock: Callable[[], float],
    ) -> None:
        self._queue = queue
        self._taps = engines.taps
        self._awaited = AwaitedAnswers(engines.answers, queue.limit, MAX_TAP_SECONDS)
        self._endings = endings
        self._answer_losses = answer_losses
        self._max_tokens = max_tokens
        self._clock = clock
        self._wake = asyncio.Event()
        self._answer_awaited = asyncio.Event()

    def __len__(self) -> int:
        return len(self._awaited) + len(self._queue)

    def offer(self, capture: Capture) -> None:
        """Queues a capture, or counts it as dropped."""
        has_room = self._awaited.offer(capture) if capture.from_tap else self._queue.offer(capture)
        if not has_room:
            self._endings.unscored(Unscored.QUEUE_FULL, capture)
        (self._answer_awaited if capture.from_tap else self._wake).set()

    async def take(self) -> Capture:
        """Removes and returns the first capture whose tap is complete; waits until there is one."""
        while (capture := self._queue.take(self._tap_is_complete)) is None:
            await self._wait_for_work()
        return capture

    def tap(self, capture: Capture) -> TapResult | None:
        """Removes and returns what the engine has reported of a capture; None if it has reported nothing."""
        if not capture.nonce:
            return None
        return self._taps.take(capture.nonce, _output_tokens(capture), _ids_among_choices(capture))

    async def collect_answers(self) -> None:
        """Queues the captures that wait for their answers as these come, until cancelled."""
        while True:
            await self._answer_awaited.wait()
            for capture, answers in self._awaited.take(self._clock()):
                self._offer_choices(capture, answers)
            if len(self._awaited):
                await asyncio.sleep(TAP_POLL_SECONDS)
            else:
                self._answer_awaited.clear()

    async def _wait_for_work(self) -> None:
        """Waits until a capture comes; while others wait for their taps, at most TAP_POLL_SECONDS."""
        self._wake.clear()
        if not len(self._queue):
            await self._wake.wait()
            return
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(TAP_POLL_SECONDS):
                await self._wake.wait()

    def _tap_is_complete(self, capture: Capture) -> bool:
        """Returns True if the engine has reported every position of the output, or the time to wait for that is up."""
        if not capture.nonce or self._clock() - capture.captured_at > MAX_TAP_SECONDS:
            return True
        return self._taps.covered(capture.nonce, _ids_among_choices(capture)) >= _output_tokens(capture)

    def _offer_choices(self, capture: Capture, answers: list[TapAnswer]) -> None:
        """Queues the captures of a request whose response has no token ids, or counts why there are none."""
        choices, reason = list[Capture](), None
        try:
            choices = captures_from_tap(capture, answers, self._max_tokens)
        except UnusableAnswer as unusable:
            reason = unusable.reason
            self._endings.unscored(reason, capture)
        except Exception:
            self._endings.unscored(Unscored.INTERNAL_ERROR, capture)
            log.exception("answers of %s cannot be used", capture.request_id)
        if capture.also_in_response:
            lost = reason in (Unscored.NO_ANSWER, Unscored.ANSWER_MISMATCH)
            if self._answer_losses.update(capture.engine, self._clock(), lost=lost):
                log.warning("answers of engine %s get lost: logprobs in responses are asked for", capture.engine)
        for choice in choices:
            self.offer(choice)


def _output_tokens(capture: Capture) -> int:
    return len(capture.output_token_ids) // ID_BYTES


def _ids_among_choices(capture: Capture) -> bytes | None:
    """Returns what distinguishes the choice's numbers from the numbers of the request's other choices; None if it is
    the only one.
    """
    return capture.output_token_ids if capture.choices > 1 else None
