"""Makes a scored record of a token record: with its figures, and with what it may be used for.

Turns of one conversation are alike, so each conversation is one observation in each kind of traffic. The first scored
turn counts for figures with intervals, the alarm and learning; later ones only add to token counters and histograms.
There is no waiting for the end of a conversation, so which ones end early cannot bias a figure. A turn belongs to the
conversation of the request that it goes on with, whatever it begins with (`continuations`).
"""

from __future__ import annotations

import secrets
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Final

from hemostat.ipc.messages import Capture
from hemostat.profiles.manager import ProfileManager
from hemostat.reference.pair import ServedModelsSource
from hemostat.scored_record import MAX_WEIGHT, NO_USE, ScoredRecord, Use
from hemostat.scoring.capture_arrays import prompt_ids
from hemostat_calibration.arrays import Ids
from hemostat_calibration.divergence.per_token import TokenDivergence, divergence
from hemostat_calibration.divergence.together import divergences
from hemostat_calibration.records import TokenRecord
from hemostat_calibration.statistics.continuations import Continuations

MAX_UNITS = 50_000
"""The largest number of units that are remembered; the oldest is forgotten first, after which its conversation counts
once more.
"""
MAX_AGE_SECONDS: Final = 600.0
"""The greatest age of evidence for or against profiles, from the end of a request to its record. What is older counts
in figures and alarms only: the engine may serve something else by now."""


class SeenUnits:
    """Remembers which units have been scored. limit: the number of units that are remembered, about 200 bytes each."""

    def __init__(self, limit: int = MAX_UNITS) -> None:
        self._limit = limit
        self._seen: OrderedDict[tuple[bytes, str], None] = OrderedDict()
        self._continuations = Continuations(secrets.token_bytes(32))

    def update(self, record: TokenRecord, prompt: Ids) -> bool:
        """Adds a record, and returns True if it is the first of its conversation and kind. A record without a
        conversation always is. prompt: int32 [P], its token ids.
        """
        if not record.conversation:
            return True
        conversation = self._continuations.conversation(prompt, record.conversation)
        if not record.partial:  # else its first output ids are not those that follow the prompt
            self._continuations.update(prompt, record.output_ids, conversation)
        key = conversation, record.kind
        if key in self._seen:
            return False
        self._seen[key] = None
        if len(self._seen) > self._limit:
            self._seen.popitem(last=False)
        return True


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


class RecordReader:
    """Makes scored records of what the scorer hands on. Owns which conversations were scored.

    age: gives the seconds since the end of a capture's request; see `MAX_AGE_SECONDS`.
    """

    def __init__(
        self, models: ServedModelsSource, profiles: ProfileManager, *, age: Callable[[Capture], float] = lambda _: 0.0
    ) -> None:
        self._age = age
        self._models = models
        self._profiles = profiles
        self._seen = SeenUnits()

    def figures(self, records: Sequence[TokenRecord]) -> list[TokenDivergence]:
        """Returns the figures of several records, which cost less together."""
        served, catalogue = self._models.served, self._profiles.catalogue
        own = [(served.of(record.model) or served.calibrated) is served.calibrated for record in records]
        applied = [
            catalogue.get(record.applied) if is_own else None for record, is_own in zip(records, own, strict=True)
        ]
        return divergences(records, applied)

    def read(
        self, record: TokenRecord, capture: Capture, probability: float = 1.0, figures: TokenDivergence | None = None
    ) -> ScoredRecord:
        """Returns the scored record. probability: with which the spool has admitted its capture. figures: of `figures`;
        None: they are computed here."""
        served, profiles = self._models.served, self._profiles
        pair = served.of(record.model) or served.calibrated
        calibrated = pair is served.calibrated
        uses = uses_of(record, calibrated=calibrated, scored_again=capture.ids_only)
        if self._age(capture) > MAX_AGE_SECONDS:
            uses &= ~Use.PROFILES
        profile = applied = None
        if calibrated:
            record = replace(record, kind=profiles.kinds.update(record.kind))
            profile, applied = profiles.calibrated_profile(record), profiles.catalogue.get(record.applied)
        return ScoredRecord(
            record=record,
            capture=capture,
            pair=pair,
            uses=uses,
            # A part that counts in no mean takes no place of an observation.
            fresh=uses not in (NO_USE, Use.CONDITIONAL_FIGURES) and self._seen.update(record, prompt_ids(capture)),
            held_out=calibrated and profiles.is_held_out(record),
            profile=profile,
            applied=applied,
            figures=divergence(record, applied) if figures is None else figures,
            weight=min(1.0 / probability, MAX_WEIGHT),
        )
