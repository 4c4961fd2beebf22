"""What a follower sends of a scored request, and of an answer's outcome.

A unit of a request of 50 tokens takes about 0.6 kB: two numbers a token for the alarm, and the gains of the profiles
that are compared. Arrays are little-endian float32.
"""

from __future__ import annotations

from collections.abc import Mapping

import msgspec
import numpy as np

from hemostat.ipc.codec import MessageCodec
from hemostat.ipc.messages import OutcomeReport
from hemostat.learner import wire
from hemostat_calibration.arrays import Floats, frozen
from hemostat_calibration.learning.temperature_bias import TemperatureBiasState
from hemostat_calibration.records import ExactDistances


class AlarmPart(msgspec.Struct, frozen=True, array_like=True):
    """What the alarm needs: see `alarm.Observation`."""

    divergences: bytes
    """[T], nats"""
    spreads: bytes
    """[T], nats"""


class EnginePart(msgspec.Struct, frozen=True, array_like=True):
    """What the test of the engines needs: see `odd_engine.Unit`."""

    engine: str
    applied: str
    """Version of the profile, "" for identity."""
    figure: float
    tokens: int


class JudgedPart(msgspec.Struct, frozen=True, array_like=True):
    """What tests of profiles need of a held-out request."""

    scope: str
    constraint: str
    gains: dict[str, tuple[float, float]]
    """By version: `judging.gain_interval`; a version of which nothing is known is absent."""
    distances: dict[str, tuple[bytes, bytes]]
    """By version: KL and total variation, [T] each."""


class ScoredUnit(msgspec.Struct, tag="scored", frozen=True, array_like=True):
    """One scored request."""

    kind: str
    """Its full name, whichever kinds are followed."""
    unit: bytes
    """`TokenRecord.unit`"""
    recognized: bool
    """The unit is a conversation, of which later turns may come."""
    client: bytes
    tokens: int
    fresh: bool
    """The first of its conversation and kind at the replica that scored it."""
    adapted: bool
    """Its lists are of an adapter, not of the compressed model itself."""
    alarm: AlarmPart | None
    """None where the alarm does not count it."""
    engine: EnginePart | None
    """None where the test of the engines does not count it."""
    judged: JudgedPart | None
    """None where it is of the learning side, or of another model."""


class NoiseFloorUnit(msgspec.Struct, tag="floor", frozen=True, array_like=True):
    """A request with `model` on both sides. divergences: [T], nats."""

    model: str
    divergences: bytes


class OutcomeUnit(msgspec.Struct, tag="outcome", frozen=True, array_like=True):
    report: OutcomeReport


class LearnedUnit(msgspec.Struct, tag="learned", frozen=True, array_like=True):
    """What temperature and bias have learned from some requests: what each sum has grown by
    (`learning.temperature_bias.TemperatureBiasState`).

    ids: int32 [n], those whose masses have grown. reference_mass, compressed_mass: [n].
    """

    scope: str
    model: str
    vocab_size: int
    ids: bytes
    reference_mass: bytes
    compressed_mass: bytes
    sums: tuple[float, float, float, float, float]
    """information, moment, depth, deep_tokens, weight"""
    tokens: int
    requests: int


class ContextualUnit(msgspec.Struct, tag="contextual", frozen=True, array_like=True):
    """What the contextual learner has learned from some requests."""

    shared: wire.Shared


Unit = ScoredUnit | NoiseFloorUnit | OutcomeUnit | LearnedUnit | ContextualUnit


class SentUnit(msgspec.Struct, frozen=True, array_like=True):
    """As it is in the stream. models: that it is about, `model_identity.brief`."""

    models: str
    unit: Unit


UNITS: MessageCodec[SentUnit] = MessageCodec(SentUnit)
BATCHES: MessageCodec[list[SentUnit]] = MessageCodec(list[SentUnit])


def packed(values: Floats) -> bytes:
    """
    >>> unpacked(packed(np.array([0.5, np.nan]))).tolist()
    [0.5, nan]
    """
    return values.astype("<f4").tobytes()


def unpacked(data: bytes) -> Floats:
    """ValueError where it is no array."""
    return np.frombuffer(data, "<f4").astype(np.float64)


SUMS = ("information", "moment", "depth", "deep_tokens", "weight")
"""Fields of `TemperatureBiasState`, in the order of `LearnedUnit.sums`."""


def learned_unit(scope: str, growth: TemperatureBiasState) -> LearnedUnit:
    ids = np.flatnonzero((growth.reference_mass != 0.0) | (growth.compressed_mass != 0.0))
    return LearnedUnit(
        scope=scope,
        model=growth.model,
        vocab_size=growth.vocab_size,
        ids=ids.astype("<i4").tobytes(),
        reference_mass=packed(growth.reference_mass[ids]),
        compressed_mass=packed(growth.compressed_mass[ids]),
        sums=tuple(getattr(growth, name) for name in SUMS),
        tokens=growth.tokens,
        requests=growth.requests,
    )


def growth_of(unit: LearnedUnit) -> TemperatureBiasState:
    """ValueError, IndexError where the unit is damaged.

    >>> grown = TemperatureBiasState("m", 3, np.array([0.0, 0.5, 0.0]), np.array([0.0, 0.25, 0.0]), tokens=7)
    >>> growth_of(learned_unit("", grown)).reference_mass.tolist()
    [0.0, 0.5, 0.0]
    """
    ids = np.frombuffer(unit.ids, "<i4")
    reference, compressed = np.zeros(unit.vocab_size), np.zeros(unit.vocab_size)
    reference[ids], compressed[ids] = unpacked(unit.reference_mass), unpacked(unit.compressed_mass)
    return TemperatureBiasState(
        unit.model,
        unit.vocab_size,
        frozen(reference),
        frozen(compressed),
        tokens=unit.tokens,
        requests=unit.requests,
        **dict(zip(SUMS, unit.sums, strict=True)),
    )


def packed_distances(distances: Mapping[str, ExactDistances]) -> dict[str, tuple[bytes, bytes]]:
    return {version: (packed(found.kl), packed(found.tv)) for version, found in distances.items()}


def unpacked_distances(distances: Mapping[str, tuple[bytes, bytes]]) -> dict[str, ExactDistances]:
    """Without the agreement of the most likely ids, by which nothing is judged."""
    return {
        version: ExactDistances(unpacked(kl), unpacked(tv), np.zeros(len(tv) // 4, np.bool_))
        for version, (kl, tv) in distances.items()
    }
