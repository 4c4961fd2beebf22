"""Back-pressure of the shadow path: a bounded queue, a token budget, a circuit breaker, and the part that is sampled.

Time is always an argument.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Final

from hemostat.ipc.messages import Capture
from hemostat.measurement.rates import SmoothedRate
from hemostat.metrics import names
from hemostat.metrics.samples import Sample

MAX_QUEUED_BYTES: Final = 256 * 1024 * 1024
TARGET_FILL: Final = 0.75
"""The part of the queue that is to be full if more requests could be sampled than can be scored."""
FILL_SECONDS: Final = 5.0
"""The time in which the queue's fill is to come to the target."""
MIN_CAPTURES_PER_SECOND: Final = 0.1
_MEAN_OF_CAPTURES: Final = 50
_CHANGE: Final = 1.25
"""The sampled part is not changed by a smaller factor, for each change is a policy that is sent to all relays."""


class ShadowQueue:
    """First in, first out, at most `limit` captures and `limit_bytes` bytes; a capture that does not fit is refused.

    A capture may pass the ones before it (`take`), but no two in a row do: with c captures before it, each waits for at
    most 2 c + 1 others.
    """

    def __init__(self, limit: int, limit_bytes: int = MAX_QUEUED_BYTES) -> None:
        self._items: deque[Capture] = deque()
        self.limit = limit
        self._limit_bytes = limit_bytes
        self._bytes = 0
        self._passed = False
        """It is True if the last capture that was taken had passed others."""

    def __len__(self) -> int:
        return len(self._items)

    def offer(self, capture: Capture) -> bool:
        """Adds a capture; returns False if the queue is full."""
        size = _size(capture)
        if len(self._items) >= self.limit or self._bytes + size > self._limit_bytes:
            return False
        self._items.append(capture)
        self._bytes += size
        return True

    def take(
        self,
        is_ready: Callable[[Capture], bool] = lambda _: True,
        may_pass: Callable[[Capture], bool] = lambda _: False,
    ) -> Capture | None:
        """Removes and returns the first capture that is ready; returns None if none is. Every second time, it is the
        first of those that are ready and may pass others, if there is one.
        """
        first = None
        for n, capture in enumerate(self._items):
            if not is_ready(capture):
                continue
            if first is None:
                first = n
                if self._passed:
                    break
            if may_pass(capture):
                return self._remove(n, passed=n > first)
        return None if first is None else self._remove(first, passed=False)

    def _remove(self, n: int, *, passed: bool) -> Capture:
        capture = self._items[n]
        del self._items[n]
        self._bytes -= _size(capture)
        self._passed = passed
        return capture

    @property
    def fill(self) -> float:
        """The part of the queue that is full. It is 0 if the queue is empty, and 1 if it is full."""
        return max(len(self._items) / self.limit, self._bytes / self._limit_bytes)

    def lag_seconds(self, now: float) -> float:
        """Returns the age of the oldest capture, 0 without any. now: monotonic seconds."""
        return max(0.0, now - self._items[0].captured_at) if self._items else 0.0

    def samples(self, now: float) -> Iterator[Sample]:
        yield Sample(names.SHADOW_QUEUE_DEPTH, (), len(self))
        yield Sample(names.SHADOW_LAG_SECONDS, (), self.lag_seconds(now))


def _size(capture: Capture) -> int:
    return (
        len(capture.prompt_token_ids)
        + len(capture.output_token_ids)
        + len(capture.candidate_ids)
        + len(capture.candidate_logprobs)
        + len(capture.emitted_logprobs)
        + sum(map(len, capture.logprobs))
    )


@dataclass(slots=True)
class TokenBudget:
    """A token bucket: `rate` tokens a second (0: no limit), at most `burst` saved up.

    A request larger than the burst may be spent once the bucket is full; the level is then negative until it has
    refilled, and the next request waits for that. Requests are served in the order in which they come (`take`): else
    small ones would keep the bucket from filling up, and a large one would wait without end.
    """

    rate: float
    burst: float
    _level: float = field(init=False)
    _at: float | None = field(init=False, default=None)
    _turn: asyncio.Lock = field(init=False, default_factory=asyncio.Lock, repr=False, compare=False)

    def __post_init__(self) -> None:
        self._level = self.burst

    async def take(self, tokens: int, clock: Callable[[], float]) -> None:
        """Waits until `tokens` may be spent, behind those who came before, and spends them. clock: monotonic
        seconds."""
        async with self._turn:
            while delay := self.delay(tokens, clock()):  # noqa: ASYNC110  waits for time, not an event
                await asyncio.sleep(delay)
            self.spend(tokens, clock())

    def delay(self, tokens: int, now: float) -> float:
        """Returns the seconds to wait before `tokens` may be spent; 0 if they may be spent now."""
        if self.rate <= 0:
            return 0.0
        self._refill(now)
        missing = min(float(tokens), self.burst) - self._level
        return max(0.0, missing / self.rate)

    def spend(self, tokens: int, now: float) -> None:
        if self.rate > 0:
            self._refill(now)
            self._level -= tokens

    def _refill(self, now: float) -> None:
        if self._at is not None:
            self._level = min(self.burst, self._level + (now - self._at) * self.rate)
        self._at = now


class CaptureSampling:
    """Decides which part of the requests that `shadow.rate` allows relays sample, so that they send about as many
    captures as the workers can score, however many relays and requests there are.

    Otherwise all that is beyond this would be computed by the engines, sent, and dropped. The part changes with time,
    not with what the requests are: a mean over the scored requests is then one in which times of little traffic weigh
    more.

    What may come is what the workers take, by their mean time for a capture, and what brings the queue to TARGET_FILL.
    What would come without this is counted from what comes; it is at most what is expected from the number of requests,
    by which alone it is estimated while nothing is scored.

    workers: the number of captures that are scored at a time. limit: the length of the queue.
    """

    def __init__(self, workers: int, limit: int) -> None:
        self._workers = workers
        self._limit = limit
        self.fraction = 1.0
        """The part of `shadow.rate` that is sampled."""
        self._total = 0.0
        """The number of captures that would have come with the fraction 1."""
        self._would_come: SmoothedRate | None = None
        """None while nothing is scored."""
        self._taken = 0
        self._seconds = 0.0
        """The mean time that a worker takes for one of the last captures."""

    def received(self) -> None:
        """Notes that a capture has come."""
        self._total += 1.0 / self.fraction

    def taken(self, seconds: float) -> None:
        """Notes that a worker has taken so long for a capture, its wait for the token budget included."""
        self._taken = min(self._taken + 1, _MEAN_OF_CAPTURES)
        self._seconds += (seconds - self._seconds) / self._taken

    def update(self, expected: float, fill: float, now: float, *, scoring: bool) -> None:
        """Updates the part. expected: sampled requests per second with the fraction 1. fill: of the queue, 0 to 1. now:
        monotonic seconds.
        """
        if not scoring:
            self._would_come = None
        elif self._would_come is None:
            self._would_come = SmoothedRate(expected)
        demand = expected
        if self._would_come is not None:
            self._would_come.update(self._total, now)
            demand = min(demand, self._would_come.per_second)
        capacity = self._workers / self._seconds if self._seconds > 0.0 else 0.0
        allowed = capacity + self._limit * (TARGET_FILL - fill) / FILL_SECONDS
        part = max(allowed, 0.1 * capacity, MIN_CAPTURES_PER_SECOND) / max(demand, MIN_CAPTURES_PER_SECOND)
        if part >= 1.0 or not 1.0 / _CHANGE < part / self.fraction < _CHANGE:
            self.fraction = min(part, 1.0)


class BreakerState(StrEnum):
    CLOSED = "closed"
    """The reference may be asked."""
    OPEN = "open"
    """It may not: its last scores failed."""
    HALF_OPEN = "half_open"
    """One call at a time may try it."""


@dataclass(slots=True)
class Breaker:
    """A circuit breaker: opens after `threshold` failures in a row, for `cooldown` seconds; then one trial decides.

    Whoever gets True from `allow` reports back by `succeeded`, `failed` or `released`.
    """

    threshold: int = 5
    cooldown: float = 10.0
    _failures: int = field(init=False, default=0)
    _opened_at: float | None = field(init=False, default=None)
    _trial: bool = field(init=False, default=False)
    """It is True if a call is under way that was allowed while half open."""

    def state(self, now: float) -> BreakerState:
        if self._opened_at is None:
            return BreakerState.CLOSED
        return BreakerState.HALF_OPEN if now - self._opened_at >= self.cooldown else BreakerState.OPEN

    def allow(self, now: float) -> bool:
        """Returns True if the reference may be asked. While half open, only one caller at a time may."""
        state = self.state(now)
        if state is BreakerState.HALF_OPEN and not self._trial:
            self._trial = True
            return True
        return state is BreakerState.CLOSED

    def succeeded(self) -> None:
        self._failures = 0
        self._opened_at = None
        self._trial = False

    def released(self) -> None:
        """Notes that the call ended without saying anything about the reference's health: the next caller may try."""
        self._trial = False

    def failed(self, now: float) -> None:
        self._failures += 1
        self._trial = False
        if self._opened_at is not None or self._failures >= self.threshold:
            self._opened_at = now


class Breakers:
    """A circuit breaker for each served base model: one whose reference fails does not stop the others' scores."""

    def __init__(self) -> None:
        self._breakers: dict[str, Breaker] = {}

    def of(self, name: str) -> Breaker:
        """Returns the breaker of a model. name: the model's first served name."""
        return self._breakers.setdefault(name, Breaker())

    def open(self, name: str, now: float) -> bool:
        """Returns True if the model's reference may not be asked."""
        return name in self._breakers and self._breakers[name].state(now) is BreakerState.OPEN
