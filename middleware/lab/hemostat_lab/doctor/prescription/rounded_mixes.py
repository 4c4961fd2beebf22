"""Mixes carried out in a model: its weights as `hemostat compress --plan` would round them. Torch."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import torch

from hemostat_lab.compression.plan import LayerPlan
from hemostat_lab.doctor.kl_meter import altered_weights
from hemostat_lab.doctor.pair import Ids
from hemostat_lab.doctor.prescription.candidates import planned_weight
from hemostat_lab.doctor.prescription.losses import TokenRows, token_statistics
from hemostat_lab.doctor.prescription.mixes import Mix
from hemostat_lab.models.parts import Parts


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
