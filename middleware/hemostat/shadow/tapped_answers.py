"""Captures of requests whose response has no token ids, from the answers that the engine's plugin hands out. No IO."""

from __future__ import annotations

import msgspec

from hemostat.engines.messages import TapAnswer
from hemostat.ipc.messages import Capture
from hemostat.shadow.endings import ScoringSkipReason


class UnusableAnswer(Exception):
    """The request cannot be scored from its answers."""

    def __init__(self, reason: ScoringSkipReason) -> None:
        super().__init__(reason)
        self.reason = reason


def captures_from_tap(capture: Capture, answers: list[TapAnswer], max_tokens: int) -> list[Capture]:
    """One capture for each choice of the request that `capture` stands for.

    answers: all that came, by call and choice. max_tokens: of prompt and output together. UnusableAnswer where they are
    not those of the whole request.
    """
    if not answers:
        raise UnusableAnswer(ScoringSkipReason.NO_ANSWER)
    generated = sum(answer.tokens for answer in answers)
    # With the server's own tools, a request of /v1/responses generates several times.
    if len(answers) != capture.choices or capture.generated not in (-1, generated):
        raise UnusableAnswer(ScoringSkipReason.ANSWER_MISMATCH)
    if not all(answer.tokens and answer.prompt_ids for answer in answers):
        raise UnusableAnswer(ScoringSkipReason.EMPTY_ANSWER)
    if max(len(answer.prompt_ids) // 4 + answer.tokens for answer in answers) > max_tokens:
        raise UnusableAnswer(ScoringSkipReason.ANSWER_TOO_LONG)
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
