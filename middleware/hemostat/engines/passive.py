"""Passive mode: what plugins that sample requests themselves are told, and what they count.

A control process that no relay can connect to hands its plugins a policy. One process of vLLM's API server then stands
where a relay stands otherwise: its counts become the figures of a relay (`RelayLink.update`).

It is pure: the time is passed in (monotonic seconds).
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping

from hemostat.engines.messages import AnswerMessage, TapAnswer
from hemostat.ipc.ends import OK
from hemostat.ipc.messages import OVERHEAD_BUCKETS, SampledCount, Stats
from hemostat.metrics import names
from hemostat.metrics.reasons import Outcome, Unscored
from hemostat.openai.routes import SCORED
from hemostat_calibration.passive import PassiveCounts, PassivePolicy

MAX_SERVERS = 256
"""The largest number of processes of API servers whose last counts are kept."""
SILENCE_SECONDS = 15.0
"""The time without a message after which a process counts as gone."""
_REASONS: Mapping[str, Unscored] = {reason.value: reason for reason in Unscored}

PLUGIN_ALONE = (
    "measuring with the plugin alone: profiles and adapters by request, limits and balancing need the proxy "
    "(hemostat serve)"
)
"""The sentence that says what passive mode does not do."""


class PassivePlugins:
    """Owns the policy of passive mode, and the last counts of each process of an API server."""

    def __init__(self) -> None:
        self.enabled = False
        """It is True if this control process has no relays, so that plugins sample."""
        self.policy: PassivePolicy | None = None
        """The policy that plugins are told; None: they sample nothing."""
        self.on_answer: Callable[[TapAnswer], None] = lambda answer: None
        """A function that is called with each choice that a plugin has sampled; whoever uses these sets it."""
        self.on_stats: Callable[[str, Stats], None] = lambda process, stats: None
        """A function that is called with the figures of a process, likewise."""
        self.on_sampled: Callable[[SampledCount], None] = lambda count: None
        """A function that is called with each count of sampled requests that are not scored, likewise."""
        self._counts: OrderedDict[str, tuple[PassiveCounts, float]] = OrderedDict()

    def told(self) -> PassivePolicy | None:
        """Returns the policy for plugins."""
        return self.policy if self.enabled else None

    def update(self, message: AnswerMessage, now: float) -> None:
        """Takes what a plugin has sampled and counted."""
        counts = message.passive
        if not self.enabled or counts is None:
            return
        before = self._counts.pop(message.boot_id, (None, 0.0))[0]
        self._counts[message.boot_id] = counts, now
        while len(self._counts) > MAX_SERVERS:
            self._counts.popitem(last=False)
        for reason, number in counts.unscored.items():
            known = _REASONS.get(reason)
            new = number - (0 if before is None else before.unscored.get(reason, 0))
            if known is not None and new > 0:
                self.on_sampled(SampledCount("", *known.labels, new, new, 0))
        self.on_stats(message.boot_id, _stats(counts))
        for answer in message.answers:
            if answer.request is not None:
                self.on_answer(answer)

    def live(self, now: float) -> int:
        """Returns the number of processes that report."""
        return sum(now - at <= SILENCE_SECONDS for _, at in self._counts.values())

    def reads_headers(self, now: float) -> bool:
        """Returns True if every process that reports has the middleware for clients' headers in force."""
        live = [counts for counts, at in self._counts.values() if now - at <= SILENCE_SECONDS]
        return bool(live) and all(counts.headers for counts in live)


def _stats(counts: PassiveCounts) -> Stats:
    """Returns the figures of an API server's process in the form of a relay's."""
    requests: dict[tuple[str, ...], float] = {
        (route, OK): float(number) for route, number in counts.requests.items() if route in SCORED
    }
    sampled: dict[tuple[str, ...], float] = {(Outcome.SHADOWED.value, ""): float(counts.sampled)}
    sampled.update(_unscored(counts))
    counters: dict[str, dict[tuple[str, ...], float]] = {names.REQUESTS: requests, names.SHADOW_REQUESTS: sampled}
    return Stats(counters, [0] * (len(OVERHEAD_BUCKETS) + 1), 0.0, ready=True)


def _unscored(counts: PassiveCounts) -> Iterator[tuple[tuple[str, str], float]]:
    for reason, number in counts.unscored.items():
        if (known := _REASONS.get(reason)) is not None:
            yield known.labels, float(number)
