"""The captures that wait for the engine's answers, in the queue, or for the engine's tap.

A capture whose tap is not complete yet (the engine reports about once a second) stays in the queue, and those behind it
go first. A request whose response has no token ids becomes captures when the engine's plugin has handed out its tokens.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections import deque
from collections.abc import Callable

import msgspec
import numpy as np

from hemostat.engines.answer_buffer import AnswerBuffer
from hemostat.engines.messages import TapAnswer
from hemostat.engines.reports import PluginReports
from hemostat.engines.taps import TapResult
from hemostat.ipc.messages import ID_BYTES, Capture
from hemostat.metrics.reasons import Unscored
from hemostat.scoring.answer_losses import AnswerLosses
from hemostat.scoring.endings import EndingCounts
from hemostat.scoring.limits import ShadowQueue

log = logging.getLogger("hemostat.scorer")

MAX_TAP_SECONDS = 4.0
"""The longest time after the response's end for which the engine's numbers and answers are waited for; without the
numbers the figures are bounds.
"""
TAP_POLL_SECONDS = 0.1


class UnusableAnswer(Exception):
    """The request cannot be scored from its answers."""

    def __init__(self, reason: Unscored) -> None:
        super().__init__(reason)
        self.reason = reason


def captures_from_tap(capture: Capture, answers: list[TapAnswer], max_tokens: int) -> list[Capture]:
    """Returns one capture for each choice of the request that `capture` stands for.

    answers: all that came, by call and choice. max_tokens: the limit for prompt and output together. Raises
    UnusableAnswer if the answers are not the whole request's.
    """
    if not answers:
        raise UnusableAnswer(Unscored.NO_ANSWER)
    generated = sum(answer.tokens for answer in answers)
    # With the server's own tools, a request of /v1/responses generates several times.
    if len(answers) != capture.choices or capture.generated not in (-1, generated):
        raise UnusableAnswer(Unscored.ANSWER_MISMATCH)
    if not all(answer.tokens and answer.prompt_ids for answer in answers):
        raise UnusableAnswer(Unscored.EMPTY)
    if max(len(answer.prompt_ids) // 4 + answer.tokens for answer in answers) > max_tokens:
        raise UnusableAnswer(Unscored.TOO_LONG)
    answers = [shortened(answer, capture.top_k) for answer in answers]
    return [
        msgspec.structs.replace(
            capture,
            from_tap=False,
            choice=number,
            prompt_token_ids=answer.prompt_ids,
            output_token_ids=answer.token_ids,
            top_k=answer.top_k,
            candidate_ids=answer.candidate_ids,
            candidate_logprobs=answer.candidate_logprobs,
            emitted_logprobs=answer.emitted_logprobs,
            finish_reason=answer.finish_reason,
        )
        for number, answer in enumerate(answers)
    ]


def shortened(answer: TapAnswer, top_k: int) -> TapAnswer:
    """Returns an answer with at most `top_k` + 1 candidates at each position, as a client may have asked for more: the
    most likely ones; if the emitted token is not among them, it takes the place of the last.
    """
    if answer.top_k <= top_k:
        return answer
    shape = answer.tokens, answer.top_k + 1
    ids = np.frombuffer(answer.candidate_ids, "<i4").reshape(shape)
    logprobs = np.frombuffer(answer.candidate_logprobs, "<f4").reshape(shape)
    rank = (ids == np.frombuffer(answer.token_ids, "<i4")[:, None]).argmax(axis=1)
    kept = np.tile(np.arange(top_k + 1), (answer.tokens, 1))
    kept[:, top_k] = np.maximum(rank, top_k)
    return msgspec.structs.replace(
        answer,
        top_k=top_k,
        candidate_ids=np.take_along_axis(ids, kept, axis=1).tobytes(),
        candidate_logprobs=np.take_along_axis(logprobs, kept, axis=1).tobytes(),
    )


class AwaitedAnswers:
    """Owns the captures whose answers have not come yet, at most `limit`, in the order of their responses' ends.

    They do not wait in the shadow queue: there a capture may wait for longer than answers are kept.

    max_seconds: how long after the response's end its answers are waited for.
    """

    def __init__(self, buffer: AnswerBuffer, limit: int, max_seconds: float) -> None:
        self._buffer = buffer
        self._limit = limit
        self._max_seconds = max_seconds
        self._captures: deque[Capture] = deque()

    def __len__(self) -> int:
        return len(self._captures)

    def offer(self, capture: Capture) -> bool:
        """Adds a capture. Returns False if there is no room."""
        if len(self._captures) >= self._limit:
            return False
        self._captures.append(capture)
        return True

    def take(self, now: float) -> list[tuple[Capture, list[TapAnswer]]]:
        """Removes and returns the captures whose answers have come, or whose time is up, each with what came. now:
        monotonic seconds."""
        ready, waiting = [], deque[Capture]()
        for capture in self._captures:
            late = now - capture.captured_at > self._max_seconds
            if late or self._buffer.complete(capture.nonce, capture.choices):
                ready.append((capture, self._buffer.take(capture.nonce)))
            else:
                waiting.append(capture)
        self._captures = waiting
        return ready


class CaptureIntake:
    """Owns the captures between the relay and the scorer.

    It gets each capture by `offer`, and gives each, when it can be scored, by `take`. A capture that has no room, or
    whose answers cannot be used, ends here.

    max_tokens: the limit for prompt and output, where only the engine's plugin reports them. clock: monotonic seconds.
    may_pass: of a capture that may be taken before those that came earlier.
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
        may_pass: Callable[[Capture], bool] = lambda _: False,
    ) -> None:
        self._queue = queue
        self._may_pass = may_pass
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
        """Removes and returns the next capture whose tap is complete (`ShadowQueue.take`); waits until there is one."""
        while (capture := self._queue.take(self._tap_is_complete, self._may_pass)) is None:
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
