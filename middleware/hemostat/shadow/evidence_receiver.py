"""Who is handed the evidence of scored requests where replicas share it."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Protocol

from hemostat_calibration.arrays import Floats
from hemostat_calibration.divergence.per_token import TokenDivergence
from hemostat_calibration.divergence.record_gains import RecordGains
from hemostat_calibration.records import TokenRecord


class EvidenceReceiver(Protocol):
    """Of `hemostat.control.evidence.exchange.EvidenceExchange`."""

    @property
    def counts_here(self) -> bool:
        """This replica judges by what it scores itself."""

    def unit(self) -> AbstractContextManager[None]:
        """Around `share_scored` and all that judges by that request: what is stored has all of it, or nothing."""

    def share_scored(
        self, record: TokenRecord, kind: str, figures: TokenDivergence | None, gains: RecordGains, *, fresh: bool
    ) -> None:
        """A scored request: of a follower, for the leader to judge by; of the leader, before it judges by it, in case
        that another replica comes to lead.

        kind: the full name of its kind. figures: None where the alarm does not count it.
        """

    def send_noise_floor(self, model: str, divergences: Floats) -> None: ...
