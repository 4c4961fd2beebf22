"""Captures of requests whose tokens are in no response, from the answers that the engine's plugin hands out. No IO."""

from __future__ import annotations

from collections import deque

import msgspec
import numpy as np

from hemostat.engines.answer_buffer import AnswerBuffer
from hemostat.engines.messages import TapAnswer
from hemostat.ipc.messages import Capture
from hemostat.metrics.reasons import Unscored


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
