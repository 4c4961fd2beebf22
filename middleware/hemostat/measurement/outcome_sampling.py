"""Decides which conversations' outcomes relays report, so that the control process gets a bounded number of reports per
second.

Every conversation has a number in [0, 1), a keyed hash of its digest (`interception.assignment`): independent of its
arm. Relays report its answers while the number is below `reported`, which comes with the policy, and units of a test
are the conversations whose number is below `counted`. Both probabilities are the same in both arms at any time, and
follow from numbers of requests alone. So the units are assigned to the arms like all conversations, and the tests need
no weights.

When `reported` rises, conversations that have been going on for long begin to be reported, with a later answer than
their first one. If a profile makes conversations longer, more of these are treated, and later answers may be worse in
both arms: they must not count. So `counted` follows only WAIT_SECONDS later, and what is reported in the meantime is
remembered as seen (`Outcomes`). Left are conversations that pause for longer than that, which are forgotten anyway.
"""

from __future__ import annotations

MAX_REPORTS_PER_SECOND = 50.0
"""The largest number of reports per second of all relays together, on average."""
WAIT_SECONDS = 1000.0
"""The least time for which a conversation is remembered while there are that many reports."""
MAX_SEEN = int(MAX_REPORTS_PER_SECOND * WAIT_SECONDS)
"""The largest number of conversations of each kind that are remembered as seen; the one that has paused for longest is
forgotten.
"""
_ROOM = 4.0
"""The factor that has to be left: `reported` is doubled if so many times its reports are within the limit. A margin of
2 remains, so that small changes of the traffic have no effect.
"""


class OutcomeSampling:
    """Owns both probabilities, which are powers of two."""

    def __init__(self) -> None:
        self.reported = 1.0
        """The share of conversations whose answers relays report."""
        self.counted = 1.0
        """The share of conversations that are units: at most `reported`."""
        self._changed_at: float | None = None
        """The time at which `reported` was changed, or else first updated."""

    def update(self, requests_per_second: float, now: float) -> bool:
        """Updates both shares, and returns True if anything has changed.

        requests_per_second: of all relays; no more than these can be reported. now: monotonic seconds.
        """
        before = self.reported, self.counted
        self._changed_at = now if self._changed_at is None else self._changed_at
        while requests_per_second * self.reported > MAX_REPORTS_PER_SECOND:
            self.reported *= 0.5
            self._changed_at = now
        self.counted = min(self.counted, self.reported)
        if now - self._changed_at >= WAIT_SECONDS:
            self.counted = self.reported
            if self.reported < 1.0 and requests_per_second * self.reported * _ROOM <= MAX_REPORTS_PER_SECOND:
                self.reported *= 2.0
                self._changed_at = now
        return (self.reported, self.counted) != before

    def restore(self, reported: float, counted: float) -> None:
        """Goes on from what an earlier process stored. Raises ValueError unless 0 < counted ≤ reported ≤ 1."""
        if not 0.0 < counted <= reported <= 1.0:
            raise ValueError(f"probabilities {reported}, {counted}")
        self.reported, self.counted, self._changed_at = reported, counted, None
