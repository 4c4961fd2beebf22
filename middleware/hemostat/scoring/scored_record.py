"""A scored record as its consumers get it: with its figures, and with what it may be used for."""

from __future__ import annotations

from dataclasses import dataclass, replace
from enum import Flag, auto
from typing import Protocol

from hemostat.ipc.messages import Capture
from hemostat.profiles.manager import ProfileManager
from hemostat.reference.pair import ModelPair, ServedModels
from hemostat.scoring.capture_arrays import prompt_ids
from hemostat.scoring.seen_units import SeenUnits
from hemostat_calibration.arrays import Ids
from hemostat_calibration.divergence.per_token import TokenDivergence, divergence
from hemostat_calibration.divergence.record_gains import RecordGains
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


def uses_of(record: TokenRecord, *, calibrated: bool, scored_again: bool = False) -> Use:
    """Returns what a record may be used for.

    calibrated: it is from the model that profiles are for, or from an adapter on it. scored_again: its
    log-probabilities come from a prefill (`Capture.ids_only`).
    """
    floor = NO_USE if record.adapter is not None or scored_again else Use.NOISE_FLOOR
    if not calibrated:
        if record.partial:
            return NO_USE
        return Use.OTHER_FIGURES if record.constraint else Use.OTHER_FIGURES | floor
    if record.constraint:
        return Use.CONDITIONAL_FIGURES if record.partial else Use.CONDITIONAL_FIGURES | Use.PROFILES
    return Use.PART_FIGURES if record.partial else Use.FIGURES | Use.PROFILES | floor


@dataclass(frozen=True, slots=True)
class ScoredRecord:
    """A scored record with its figures and its uses.

    record: its kind is one that is followed, or `REST_KIND`. pair: the pair of the record's model; None while none is
    known.
    """

    record: TokenRecord
    capture: Capture
    pair: ModelPair | None
    uses: Use
    fresh: bool
    """It is True if the record is an observation of its own: see `seen_units`."""
    held_out: bool
    """It is True if nothing is learned from the record's unit."""
    profile: CalibrationProfile | None
    """The profile that was served, or would have been."""
    applied: CalibrationProfile | None
    figures: TokenDivergence
    """The raw figures; for a record of an adapter, the figures of what was served."""
    gains: RecordGains

    @property
    def prompt(self) -> Ids:
        """The token ids of the prompt, int32 [P]."""
        return prompt_ids(self.capture)


class RecordConsumer(Protocol):
    """Whoever uses scored records."""

    def use(self, scored: ScoredRecord) -> None: ...


class ServedModelsSource(Protocol):
    """The part of `hemostat.reference.monitor.ReferenceMonitor` that is used here."""

    @property
    def served(self) -> ServedModels: ...


class RecordReader:
    """Makes scored records of what the scorer hands on. Owns which conversations were scored."""

    def __init__(self, models: ServedModelsSource, profiles: ProfileManager) -> None:
        self._models = models
        self._profiles = profiles
        self._seen = SeenUnits()

    def read(self, record: TokenRecord, capture: Capture) -> ScoredRecord:
        served, profiles = self._models.served, self._profiles
        pair = served.of(record.model) or served.calibrated
        calibrated = pair is served.calibrated
        uses = uses_of(record, calibrated=calibrated, scored_again=capture.ids_only)
        profile = applied = None
        if calibrated:
            record = replace(record, kind=profiles.kinds.see(record.kind))
            profile, applied = profiles.calibrated_profile(record), profiles.catalogue.get(record.applied)
        return ScoredRecord(
            record=record,
            capture=capture,
            pair=pair,
            uses=uses,
            # A part that counts in no mean takes no place of an observation.
            fresh=uses not in (NO_USE, Use.CONDITIONAL_FIGURES) and self._seen.add(record, prompt_ids(capture)),
            held_out=calibrated and profiles.is_held_out(record),
            profile=profile,
            applied=applied,
            figures=divergence(record, applied),
            gains=RecordGains(record),
        )
