"""The receivers of what exchanges that the relay intercepts report: captures, and the counts of sampled requests."""

from __future__ import annotations

import secrets
import time
from collections.abc import Callable
from typing import Final, Protocol

from hemostat.interception.profile_choice import ArmReason, Reason
from hemostat.interception.refusals import SamplingPause, ServerErrorRepeats
from hemostat.ipc.messages import Capture, Policy
from hemostat.ipc.sampled import counted
from hemostat.metrics import names
from hemostat.metrics.reasons import Outcome, RepeatReason, Unscored
from hemostat.openai.requests import Uncalibrated

# Python computes the value of an enumeration's member anew each time, in two functions that are interpreted.
_SHADOWED: Final = (Outcome.SHADOWED.value, "")
_REASONS: Final[dict[str, str]] = {
    reason: reason.value for reasons in (ArmReason, Uncalibrated, Unscored) for reason in reasons
}


class SampledCounter(Protocol):
    """The signature of `hemostat.ipc.sampled.SampledTally.add`."""

    def __call__(self, kind: str, outcome: str, reason: str, tokens: int | None, requests: float = 1.0) -> None: ...


def uncounted(kind: str, outcome: str, reason: str, tokens: int | None, requests: float = 1.0) -> None:
    """Counts nothing: it is the `SampledCounter` if the coverage is not measured."""


class Reports:
    """Passes on the captures and counts of one relay's exchanges, and remembers what the engine does not return.

    pause: of sampling. server_errors: whether a request that got one is repeated.

    emit: hands a capture on; returns False when there is no room for it.
    count: adds one to a metric, by its name and label values.
    sampled: counts a sampled request that never becomes a capture, with its generated tokens.
    clock: monotonic seconds.
    nonce: returns an unguessable name for a request among the engine's taps.
    """

    def __init__(
        self,
        emit: Callable[[Capture], bool],
        count: Callable[[str, tuple[str, ...]], None],
        sampled: SampledCounter,
        clock: Callable[[], float] = time.monotonic,
        nonce: Callable[[], str] = lambda: secrets.token_hex(16),
    ) -> None:
        self._emit = emit
        self._count = count
        self._sampled = sampled
        self._nonce = nonce
        self.pause = SamplingPause(clock)
        self.server_errors = ServerErrorRepeats(clock)
        self._lost_generation: int | None = None

    def not_sampled(self, reason: Unscored) -> None:
        """Counts a request as skipped that was not drawn either."""
        self._count(names.SHADOW_REQUESTS, reason.labels)

    def skipped(self, reason: Unscored, kind: str = "", tokens: int | None = None) -> None:
        """Counts a sampled request that has ended as skipped.

        kind: full name, "" if its body was not read. tokens: what was generated; None: not known.
        """
        self._count(names.SHADOW_REQUESTS, reason.labels)
        self._sampled(kind, *reason.labels, tokens)

    def captured(self, capture: Capture) -> None:
        """Hands a capture on, and counts its request."""
        if self._emit(capture):
            self._count(names.SHADOW_REQUESTS, _SHADOWED)
        else:
            dropped = Unscored.LINK_FULL.labels
            self._count(names.SHADOW_REQUESTS, dropped)
            requests, tokens = counted(capture)
            self._sampled(capture.kind, *dropped, tokens, requests)

    def calibrated(self, arm: str, reason: Reason) -> None:
        """Counts a request that could get a profile. arm: its value."""
        self._count(names.CALIBRATION_REQUESTS, (arm, _REASONS[reason]))

    def repeated(self, reason: RepeatReason) -> None:
        """Counts a request that is sent again as the client wrote it."""
        self._count(names.REPEATED_REQUESTS, (reason.value,))

    def tool_tokens_lost(self, policy: Policy) -> None:
        """Notes that the engine left out ids of a streamed tool call."""
        self._lost_generation = policy.generation

    def loses_tool_tokens(self, policy: Policy) -> bool:
        """Returns True if ids of a streamed tool call were lost under this generation of the policy: such ids are then
        asked of the plugin.
        """
        return self._lost_generation == policy.generation

    def tap_name(self, policy: Policy) -> str:
        """Returns a new name for one request among the engine's taps."""
        return f"{policy.nonce_prefix}-{self._nonce()}" if policy.nonce_prefix else self._nonce()
