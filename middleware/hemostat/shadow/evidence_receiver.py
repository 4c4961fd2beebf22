"""Who is handed the evidence of scored requests where another replica judges by it."""

from __future__ import annotations

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

    def note_own(self) -> None:
        """A scored request was judged by here."""

    def send_scored(
        self, record: TokenRecord, kind: str, figures: TokenDivergence | None, gains: RecordGains, *, fresh: bool
    ) -> None:
        """kind: the full name of its kind. figures: None where the alarm does not count it."""

    def send_noise_floor(self, model: str, divergences: Floats) -> None: ...
