"""Which candidate each layer gets: prescribed for a budget, or the same for all."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from hemostat_calibration.allocation.knapsack import Options, allocate
from hemostat_lab.compression.plan import DENSE_BITS, LayerPlan, stored_bytes
from hemostat_lab.doctor.options import DoctorError, Target
from hemostat_lab.doctor.prescription.candidates import unit_name
from hemostat_lab.doctor.prescription.losses import LayerLosses


@dataclass(frozen=True, slots=True)
class Mix:
    """layers: by linear layer. size: bytes of all. predicted: KL(r‖c), nats per token, to second order."""

    layers: Mapping[str, LayerPlan]
    size: int
    predicted: float


def dense_bytes(losses: Mapping[str, LayerLosses]) -> int:
    """Of all layers at 16 bits."""
    return sum(stored_bytes(loss.outputs, loss.inputs, LayerPlan(DENSE_BITS)) for loss in losses.values())


def prescribe(losses: Mapping[str, LayerLosses], target: Target, budget: int) -> tuple[Mix, float]:
    """The mix with the least predicted loss within `budget` bytes, and a lower bound of every mix's.

    Raises DoctorError where the smallest candidates need more.
    """
    units: dict[str, list[str]] = {}
    for name in losses:
        units.setdefault(unit_name(target, name), []).append(name)
    options = {}
    for unit, names in units.items():
        members = [losses[name] for name in names]
        sizes = [
            sum(stored_bytes(member.outputs, member.inputs, plan) for member in members) for plan in members[0].plans
        ]
        options[unit] = Options(np.array(sizes, np.int64), np.sum([member.losses for member in members], axis=0))
    least = sum(int(option.sizes.min()) for option in options.values())
    if budget < least:
        raise DoctorError(
            f"--budget: {budget:,} bytes are too few: the smallest plan for {target} needs {least:,}"
            + ("" if target == "any" else "; give more, or --plan-for any")
        )
    result = allocate(options, budget)
    layers = {name: losses[name].plans[result.chosen[unit]] for unit, names in units.items() for name in names}
    return Mix({name: layers[name] for name in losses}, result.size, result.loss), result.lower_bound


def uniform_mixes(losses: Mapping[str, LayerLosses], budget: int) -> list[tuple[LayerPlan, Mix]]:
    """The same candidate for all layers, where all have it and it fits in `budget`; least predicted loss first."""
    mixes = []
    for plan in next(iter(losses.values())).plans:
        if not all(plan in loss.plans for loss in losses.values()):
            continue
        size = sum(stored_bytes(loss.outputs, loss.inputs, plan) for loss in losses.values())
        predicted = sum(float(loss.losses[loss.plans.index(plan)]) for loss in losses.values())
        if size <= budget:
            mixes.append((plan, Mix(dict.fromkeys(losses, plan), size, predicted)))
    return sorted(mixes, key=lambda item: item[1].predicted)
