"""The corrections of all linear layers: from both checkpoints and texts, one decoder layer at a time."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from hemostat_calibration.adapters.correction import low_rank
from hemostat_calibration.adapters.factors import LowRank
from hemostat_calibration.adapters.gram import DiagonalGram, FullGram, Gram
from hemostat_lab.adapters.pair import CheckpointPair, LayerScales
from hemostat_lab.models.activations import Moments
from hemostat_lab.models.second_moments import LayerStatistics

Floats = npt.NDArray[np.float64]

_NOTES = "|notes"


@dataclass(frozen=True, slots=True)
class Correction:
    """factors: of the largest rank that was asked for. errors: weighted squared error that is left by rank, [R + 1].
    metric: what it is weighed by, such as `full inputs, full outputs`."""

    factors: LowRank
    errors: Floats
    metric: str


class Solver:
    """The corrections of `pair`, of rank `rank` or less."""

    def __init__(self, pair: CheckpointPair, rank: int) -> None:
        self._pair = pair
        self._rank = rank

    def run(self, statistics: LayerStatistics) -> dict[str, Correction]:
        """By linear layer, from the reference's statistics. AdaptError, WorkFolderError."""
        corrections: dict[str, Correction] = {}
        for layer, kept in statistics.run(self._solve_layer, Moments).items():
            self._pair.restore_notes(layer, _notes(kept))
            corrections |= _unpack(kept)
        return {name: corrections[name] for name in self._pair.skeleton.adaptable}

    def _solve_layer(self, layer: str, moments: Moments) -> Mapping[str, torch.Tensor]:
        corrections = {
            name: self._correct(name, moments, self._pair.scales(layer))
            for name in self._pair.skeleton.linears_of(layer)
            if name in self._pair.skeleton.adaptable
        }
        return _pack(corrections, self._pair.notes_of(layer))

    def _correct(self, name: str, moments: Moments, scales: LayerScales) -> Correction:
        inputs = _scaled(moments.inputs(name), 1.0 / scales.inputs[name] if name in scales.inputs else None)
        outputs = moments.outputs(name)
        if outputs is not None:
            outputs = _scaled(outputs, scales.outputs.get(name))
        factors, errors = low_rank(self._pair.delta(name, scales), self._rank, inputs, outputs)
        metric = f"{_kind(inputs)} inputs" + ("" if outputs is None else f", {_kind(outputs)} outputs")
        return Correction(factors, errors, metric)


def _scaled(gram: Gram, scale: torch.Tensor | None) -> Gram:
    """Statistics of the vectors times `scale`, entry by entry."""
    if scale is None:
        return gram
    factors = scale.double().numpy()
    if isinstance(gram, FullGram):
        return FullGram(gram.count, gram.total * factors[:, None] * factors[None, :])
    return DiagonalGram(gram.count, gram.total * factors**2)


def _kind(gram: Gram) -> str:
    return "full" if isinstance(gram, FullGram) else "diagonal"


def _pack(corrections: Mapping[str, Correction], notes: Sequence[str]) -> dict[str, torch.Tensor]:
    tensors = {_NOTES: _characters("\n".join(notes))} if notes else {}
    for name, correction in corrections.items():
        tensors[f"{name}|a"] = torch.from_numpy(correction.factors.a)
        tensors[f"{name}|b"] = torch.from_numpy(np.ascontiguousarray(correction.factors.b))
        tensors[f"{name}|errors"] = torch.from_numpy(correction.errors)
        tensors[f"{name}|metric"] = _characters(correction.metric)
    return tensors


def _characters(text: str) -> torch.Tensor:
    return torch.frombuffer(bytearray(text.encode()), dtype=torch.uint8)


def _notes(tensors: Mapping[str, torch.Tensor]) -> list[str]:
    return bytes(tensors[_NOTES].tolist()).decode().split("\n") if _NOTES in tensors else []


def _unpack(tensors: Mapping[str, torch.Tensor]) -> dict[str, Correction]:
    names = [name.removesuffix("|a") for name in tensors if name.endswith("|a")]
    return {
        name: Correction(
            LowRank(tensors[f"{name}|a"].numpy(), tensors[f"{name}|b"].numpy()),
            tensors[f"{name}|errors"].numpy(),
            bytes(tensors[f"{name}|metric"].tolist()).decode(),
        )
        for name in names
    }
