"""The mixes of candidates: one for each layer, prescribed for a budget, or the same for all. A mix is carried out in a
model: its weights are as `hemostat compress --plan` would round them. Torch."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from hemostat_calibration.allocation.knapsack import Options, allocate
from hemostat_lab.compression.plan import DENSE_BITS, LayerPlan, stored_bytes
from hemostat_lab.doctor.kl_meter import altered_weights
from hemostat_lab.doctor.options import DoctorError, Target
from hemostat_lab.doctor.pair import Ids
from hemostat_lab.doctor.prescription.candidates import planned_weight, unit_name
from hemostat_lab.doctor.prescription.losses import LayerLosses, TokenRows, token_statistics
from hemostat_lab.models.parts import Parts


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


class RoundedMixes:
    """Owns the rounded weights of all layers, in `parts`, by decoder layer. `drop` removes them.

    Errors are compensated on the texts; each layer reads what it reads in the reference.
    """

    def __init__(
        self, reference: Path, texts: Sequence[Ids], mixes: Sequence[Mix], device: str, parts: Parts,
        steps: Callable[[int, int], None],
    ) -> None:  # fmt: skip
        """Rounds them, one decoder layer after the other; finished ones are kept in `parts`. AdaptError."""
        self._parts = parts
        self._plans: dict[str, list[LayerPlan]] = {
            name: list(dict.fromkeys(mix.layers[name] for mix in mixes)) for name in mixes[0].layers
        }
        checkpoint, skeleton, self._statistics = token_statistics(
            reference, texts, device, parts, steps, gradients=False
        )
        self._layers = {name: layer for layer in skeleton.layers for name in skeleton.linears_of(layer)}

        def store(layer: str, moments: TokenRows) -> Mapping[str, torch.Tensor]:
            result = {}
            for name in skeleton.linears_of(layer):
                weight = checkpoint.weight(name)
                inputs = moments.input_moments(name) if moments.reached(name) else None
                for n, plan in enumerate(self._plans[name]):
                    result[f"{name}|{n}"] = planned_weight(name, weight, plan, inputs)
            # Not what is returned, which is held in memory for all layers.
            parts.put(_weights(layer), result)
            return {}

        self._statistics.run(store, TokenRows)

    def carried_out(self, model: Any, mix: Mix) -> AbstractContextManager[None]:
        """Inside of the context the linear layers of `model`, the reference, have the mix's weights."""
        modules = {name: model.get_submodule(name) for name in mix.layers}
        loaded: dict[str, dict[str, torch.Tensor]] = {}

        def weight(name: str, original: torch.Tensor) -> torch.Tensor:
            layer = self._layers[name]
            if layer not in loaded:
                result = self._parts.get(_weights(layer))
                assert result is not None, layer
                loaded.clear()
                loaded[layer] = result
            return loaded[layer][f"{name}|{self._plans[name].index(mix.layers[name])}"].to(original)

        return altered_weights(modules, weight)

    def drop(self) -> None:
        self._statistics.drop()
        for layer in dict.fromkeys(self._layers.values()):
            self._parts.drop(_weights(layer))


def _weights(layer: str) -> str:
    return f"weights-{layer}"
