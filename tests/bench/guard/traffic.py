"""Simulated traffic, and what the guard makes of it. Every unit passes `admit`, `update` and `decide`, as in
production."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from hemostat_calibration.guard.decisions import Action, Admission, Decision, Role
from hemostat_calibration.guard.guard import Guard

Floats = npt.NDArray[np.float64]

CLIENTS = 20
SHARES = 1.0 / np.arange(5, CLIENTS + 5) / (1.0 / np.arange(5, CLIENTS + 5)).sum()
"""Of the traffic: the busiest client has 12 %, the last one 2.5 %."""
WIDTH = 1.0
"""Of profiles, nats: the demo's profile of gain 0.08 is proven by about 55 units at this width."""
SPREAD = 0.2
"""Standard deviation of a unit's gain, nats: 2.5 times a mean of 0.08, as in recorded data."""


@dataclass(frozen=True, slots=True)
class Unit:
    kind: str
    key: bytes
    client: bytes
    gain: float
    tokens: int = 60


def draw_clients(rng: np.random.Generator, n: int) -> list[bytes]:
    return [b"client %d" % c for c in rng.choice(CLIENTS, n, p=SHARES)]


def normal(rng: np.random.Generator, mean: float, n: int, spread: float = SPREAD) -> Floats:
    """Gains [n] with this mean, of normal distribution but for what is outside of ±WIDTH, which is drawn again about
    the mean symmetrically."""
    reach = WIDTH - abs(mean)
    noise = rng.normal(0.0, spread, n)
    while (np.abs(noise) > reach).any():
        noise = np.where(np.abs(noise) > reach, rng.normal(0.0, spread, n), noise)
    gains: Floats = mean + noise
    return gains


def units(
    rng: np.random.Generator, kinds: Sequence[str], gains: Floats, tokens: Floats | None = None, first: int = 0
) -> list[Unit]:
    """Units of different conversations. kinds: of each. gains, tokens: [N]."""
    n = len(gains)
    lengths = rng.integers(40, 200, n) if tokens is None else tokens
    return [
        Unit(kind, (first + i).to_bytes(8, "big"), client, gain, int(length))
        for i, (kind, client, gain, length) in enumerate(
            zip(kinds, draw_clients(rng, n), gains.tolist(), lengths, strict=True)
        )
    ]


def show(guard: Guard, name: str, unit: Unit) -> tuple[Admission, Decision | None]:
    """Show one unit to a test. The decision is None where it does not count."""
    admission = guard.admit(name, unit.kind, unit.key, unit.client)
    if admission is Admission.CLIENT_SHARE and guard.evidence(name, unit.kind).role is Role.CANDIDATE:
        guard.oppose(name, unit.kind, unit.gain)
    if admission is not Admission.ADMITTED:
        return admission, None
    guard.update(name, unit.kind, unit.key, unit.client, unit.gain, unit.gain, unit.tokens)
    return admission, guard.decide(name, unit.kind)


def decided(guard: Guard, name: str, unit: Unit) -> Decision | None:
    """Show one unit to a test; what is done then: promotion or roll back, else None."""
    decision = show(guard, name, unit)[1]
    return decision if decision is not None and decision.action in (Action.PROMOTE, Action.ROLL_BACK) else None


def promotions(guard: Guard, name: str, stream: Sequence[Unit]) -> dict[str, int]:
    """Kinds that are promoted, with the units that counted there until then."""
    result = {}
    for unit in stream:
        if decided(guard, name, unit) is not None:
            result[unit.kind] = guard.evidence(name, unit.kind).units
            guard.freeze(name, unit.kind)
    return result
