"""A scored record as everything behind the scorer gets it: with its figures, and with what it may be used for."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Flag, auto
from typing import Protocol

from hemostat.ipc.messages import Capture
from hemostat.reference.pair import ModelPair
from hemostat_calibration.divergence.gain import Gain, gain
from hemostat_calibration.divergence.per_token import TokenDivergence
from hemostat_calibration.errors import InvalidArgumentError
from hemostat_calibration.profiles.profile import CalibrationProfile
from hemostat_calibration.records import TokenRecord


class Use(Flag):
    """The purposes that a record may be used for; a record file and a trace hold every record."""

    FIGURES = auto()
    """All that is about whole distributions of the calibrated model over a whole output: figures, alarm, tests."""
    PART_FIGURES = auto()
    """The figures by place alone: the last tokens of an output are no sample of its tokens."""
    CONDITIONAL_FIGURES = auto()
    """The figures that are conditional on what a grammar allows, apart from all others."""
    OTHER_FIGURES = auto()
    """The figures of another served model than the calibrated one, apart from all others."""
    NOISE_FLOOR = auto()
    """The noise floor, which is of a model itself: without adapters and ours, and of whole outputs; not of what its
    engine has scored again already."""
    PROFILES = auto()
    """The record judges profiles, or they are learned from it."""


NO_USE = Use(0)
MAX_WEIGHT = 10.0
"""The largest weight of a record: a few heavy ones would make figures that nothing else confirms."""


@dataclass(frozen=True, slots=True)
class ScoredRecord:
    """One unit of evidence: a scored record with its figures and its uses.

    `scoring.record_reader.RecordReader` makes it. The consumers of `scoring.consumers` read it, and behind them the
    measurements, the tests of profiles and the learners.

    record: its kind is one that is followed, or `REST_KIND`. pair: the pair of the record's model; None while none is
    known.
    """

    record: TokenRecord
    capture: Capture
    pair: ModelPair | None
    uses: Use
    fresh: bool
    """It is True if the record is an observation of its own: see `scoring.record_reader`."""
    held_out: bool
    """It is True if nothing is learned from the record's unit."""
    profile: CalibrationProfile | None
    """The profile that was served, or would have been."""
    applied: CalibrationProfile | None
    figures: TokenDivergence
    """The raw figures; for a record of an adapter, the figures of what was served."""
    weight: float = 1.0
    """The number of requests that the record stands for: 1 / the probability with which the spool has admitted it, at
    most `MAX_WEIGHT`. Figures weigh by it. Tests take records as they are, as no admission depends on an outcome."""
    _gains: dict[str, Gain] = field(default_factory=dict, repr=False, compare=False)
    """The gains that were computed, by version."""

    def gain(self, profile: CalibrationProfile) -> Gain:
        """Returns the gain of a profile on the record, nats [T], as an interval. It is computed when it is first asked
        for: measurement and the judge of profiles ask for the same ones.

        Raises InvalidArgumentError if the record is of an adapter, or the profile is one: what a record's lists show of
        a change of the logits is about the model that they are of, and of a change of the weights they show nothing.
        """
        if self.record.adapter is not None or profile.changes_weights:
            raise InvalidArgumentError("the gain of or with an adapter does not follow from a record's lists")
        if profile.version not in self._gains:
            self._gains[profile.version] = gain(self.record, profile)
        return self._gains[profile.version]


class RecordConsumer(Protocol):
    """Whoever uses scored records."""

    def update(self, scored: ScoredRecord) -> None: ...
