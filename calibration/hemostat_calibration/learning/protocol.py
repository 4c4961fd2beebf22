"""The contract of learners: `init`, `update`, `propose`, all pure.

`tests/core/test_conformance.py` checks it for every learner.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Protocol, TypeVar

from hemostat_calibration.profiles.profile import CalibrationProfile
from hemostat_calibration.records import TokenRecord

State = TypeVar("State")


class Learner(Protocol[State]):
    """One way to learn a profile from records. No clock, no randomness, no IO.

    States are frozen values: no method changes one that it was given. `update` takes a batch of records, so that what
    is as large as the vocabulary is copied once for each batch, not once for each record.
    """

    def init(self, model: str, vocab_size: int) -> State:
        """Returns the state before the first record. model: name or digest of the compressed model."""

    def update(self, state: State, records: Iterable[TokenRecord]) -> State:
        """Returns the state after learning from validated records of the learning side of the split, of whatever arm:
        records hold the compressed model's own distribution, before any profile. Raises InvalidArgumentError if one
        does not fit."""

    def propose(self, state: State) -> CalibrationProfile | None:
        """Returns the profile to try now; None while there is too little to learn from."""
