"""Whole answers of tapped requests, from when vLLM's API server sends them until the scorer takes them.

The buffer is not thread-safe: it lives in the control process's event loop. Time is passed in, monotonic seconds.
Requests and bytes are bounded.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass, field

from hemostat.engines.messages import AnswerMessage, TapAnswer
from hemostat.metrics import names
from hemostat.metrics.samples import Sample

MAX_WAITING_REQUESTS = 4096
MAX_WAITING_BYTES = 256 << 20
"""The largest size of all answers that wait to be taken; above it the requests that have waited longest are dropped."""
MAX_ANSWERS_PER_REQUEST = 64
"""The largest number of answers of one nonce; further ones are dropped: a client may have set one of its own for all of
its requests."""
ANSWER_SECONDS = 120.0
"""The time after the last new answer of a request after which its answers are dropped if they were not used."""
MAX_SENDERS = 256
"""The largest number of API servers whose counts of dropped answers are kept."""


@dataclass(slots=True)
class _Waiting:
    received_at: float
    answers: dict[tuple[int, int], TapAnswer] = field(default_factory=dict)
    """The answers by call and choice."""

    def bytes(self) -> int:
        return sum(answer.size for answer in self.answers.values())


class AnswerBuffer:
    """Owns the answers of tapped requests."""

    def __init__(self) -> None:
        self._waiting: OrderedDict[str, _Waiting] = OrderedDict()
        self._bytes = 0
        self.received = 0
        self.dropped = 0
        """The number of answers that were not used in time, or that there was no room for here."""
        self._dropped_by_sender: OrderedDict[str, int] = OrderedDict()
        self._dropped_at_senders = 0

    def update(self, message: AnswerMessage, now: float) -> None:
        """Keeps the answers of a message until they are taken."""
        self.expire(now)
        # A sender that was forgotten would count again from zero on.
        before = self._dropped_by_sender.pop(message.boot_id, 0)
        self._dropped_at_senders += max(0, message.dropped - before)
        self._dropped_by_sender[message.boot_id] = max(before, message.dropped)
        while len(self._dropped_by_sender) > MAX_SENDERS:
            self._dropped_by_sender.popitem(last=False)
        for answer in message.answers:
            self.received += 1
            waiting = self._waiting.setdefault(answer.nonce, _Waiting(now))
            key = answer.call, answer.choice
            replaced = waiting.answers.get(key)
            if replaced is None:
                if len(waiting.answers) >= MAX_ANSWERS_PER_REQUEST:
                    self.dropped += 1
                    continue
                # Only here, so that a nonce that is used again and again expires, too.
                waiting.received_at = now
                self._waiting.move_to_end(answer.nonce)
            self._bytes += answer.size - (replaced.size if replaced else 0)
            waiting.answers[key] = answer
        while len(self._waiting) > MAX_WAITING_REQUESTS or self._bytes > MAX_WAITING_BYTES:
            self._drop(next(iter(self._waiting)))

    def complete(self, nonce: str, choices: int) -> bool:
        """Returns True if as many answers have come as the request has choices."""
        waiting = self._waiting.get(nonce)
        return waiting is not None and len(waiting.answers) >= choices

    def take(self, nonce: str) -> list[TapAnswer]:
        """Returns the request's answers, by call and choice, which are removed."""
        waiting = self._pop(nonce)
        return [] if waiting is None else [waiting.answers[key] for key in sorted(waiting.answers)]

    def expire(self, now: float) -> None:
        """Drops what was not taken within ANSWER_SECONDS."""
        while self._waiting:
            nonce, waiting = next(iter(self._waiting.items()))
            if now - waiting.received_at <= ANSWER_SECONDS:
                break
            self._drop(nonce)

    def samples(self) -> Iterator[Sample]:
        yield Sample(names.ENGINE_ANSWERS, ("received",), self.received)
        yield Sample(names.ENGINE_ANSWERS, ("dropped",), self.dropped)
        yield Sample(names.ENGINE_ANSWERS, ("dropped_at_engine",), self._dropped_at_senders)

    def _pop(self, nonce: str) -> _Waiting | None:
        waiting = self._waiting.pop(nonce, None)
        if waiting is not None:
            self._bytes -= waiting.bytes()
        return waiting

    def _drop(self, nonce: str) -> None:
        waiting = self._pop(nonce)
        self.dropped += 0 if waiting is None else len(waiting.answers)
