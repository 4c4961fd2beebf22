"""The corrections of all linear layers: from both checkpoints and texts, one decoder layer at a time.

With the outputs' metric the model is run forwards once and then backwards (`LayerWalk`). Finished parts are stored:
what is killed goes on at the layer where it was.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from hemostat.models.adapters.activations import Batch, Moments, measured, output_key, run_layer
from hemostat.models.adapters.pair import CheckpointPair, LayerScales
from hemostat.models.adapters.parts import Parts
from hemostat.models.adapters.walk import LayerWalk
from hemostat_calibration.adapters.correction import low_rank
from hemostat_calibration.adapters.factors import LowRank
from hemostat_calibration.adapters.gram import DiagonalGram, FullGram, Gram, Metric, metric_for_budget

Progress = Callable[[str, int, int], None]
"""Called with a stage, finished steps and all steps."""
Floats = npt.NDArray[np.float64]

STATISTICS = "statistics"
_NOTES = "|notes"
BASE_BYTES = 700 << 20
"""Of a process with torch and transformers, before any weights."""


@dataclass(frozen=True, slots=True)
class Correction:
    """factors: of the largest rank that was asked for. errors: weighted squared error that is left by rank, [R + 1].
    metric: what it is weighed by, such as `full inputs, full outputs`."""

    factors: LowRank
    errors: Floats
    metric: str


class Solver:
    """One build. seed: of the tokens that the gradients are taken for. gradients: measure the outputs' metric, too.
    full: True: full statistics whatever memory they need, False: diagonals, None: as `memory_bytes` allows."""

    def __init__(
        self,
        pair: CheckpointPair,
        texts: Sequence[npt.NDArray[np.int32]],
        parts: Parts,
        *,
        rank: int,
        gradients: bool,
        full: bool | None,
        memory_bytes: int,
        seed: int,
        progress: Progress,
    ) -> None:
        self._pair = pair
        self._skeleton = pair.skeleton
        self._names = list(pair.skeleton.layers)
        self._parts = parts
        self._rank = rank
        self._gradients = gradients
        self._full = full
        self._memory_bytes = memory_bytes
        self._progress = progress
        steps = len(self._names) * (1 + gradients)
        self._walk = LayerWalk(
            pair.skeleton,
            pair.sources[0],
            texts,
            parts,
            seed=seed,
            passed=lambda n: progress(STATISTICS, n + 1, steps),
        )
        self._groups: dict[tuple[str, ...], dict[str, str]] = {}

    def run(self) -> dict[str, Correction]:
        """By linear layer. AdaptError, WorkFolderError."""
        count = len(self._names)
        found: dict[int, dict[str, Correction]] = {}
        for n in range(count - 1, -1, -1) if self._gradients else range(count):
            kept = self._parts.get(_layer(n))
            if kept is None:
                self._solve_layer(n)
                kept = self._parts.get(_layer(n))
                assert kept is not None, n
            self._pair.restore_notes(self._names[n], _notes(kept))
            found[n] = _unpack(kept)
            done = count - n if self._gradients else n + 1
            self._progress(STATISTICS, done + count * self._gradients, count * (1 + self._gradients))
        self._walk.drop()
        together = {name: correction for corrections in found.values() for name, correction in corrections.items()}
        return {name: together[name] for name in self._skeleton.linears}

    def _solve_layer(self, n: int) -> None:
        """Stores the corrections of decoder layer `n`, and what the next layer to be solved needs."""
        layer = self._names[n]
        walk = self._walk
        gradients = walk.gradient(n + 1) if self._gradients else None
        hidden = walk.hidden(n)
        moments = Moments()
        with walk.loaded(n):
            metrics = self._metrics(n, hidden)

            def measuring(batch: Batch) -> AbstractContextManager[None]:
                return measured(self._skeleton, layer, batch.valid, moments, metrics, self._gradients)

            if gradients is None:
                after = walk.forward(n, hidden, measuring)
                if n + 1 < len(self._names):
                    walk.store_hidden(n + 1, after)
            else:
                walk.store_gradient(n, walk.backward(n, hidden, gradients, measuring))
        corrections = {
            name: self._correct(name, moments, self._pair.scales(layer)) for name in self._skeleton.linears_of(layer)
        }
        self._parts.put(_layer(n), _pack(corrections, self._pair.notes_of(layer)))
        walk.drop_hidden(n + 1 if self._gradients else n)
        walk.drop_gradient(n + 1)

    def _correct(self, name: str, moments: Moments, scales: LayerScales) -> Correction:
        inputs = _scaled(moments.inputs(name), 1.0 / scales.inputs[name] if name in scales.inputs else None)
        outputs = moments.outputs(name)
        if outputs is not None:
            outputs = _scaled(outputs, scales.outputs.get(name))
        factors, errors = low_rank(self._pair.delta(name, scales), self._rank, inputs, outputs)
        metric = f"{_kind(inputs)} inputs" + ("" if outputs is None else f", {_kind(outputs)} outputs")
        return Correction(factors, errors, metric)

    def _metrics(self, n: int, hidden: Sequence[torch.Tensor]) -> dict[str, Metric]:
        """What is kept of each input and output of decoder layer `n`, which is loaded."""
        layer = self._names[n]
        linears = self._skeleton.linears_of(layer)
        same_kind = tuple(name.removeprefix(layer) for name in linears)
        if same_kind not in self._groups:
            # Which linear layers share their inputs is seen in a forward pass.
            moments = Moments()
            _, calls = self._walk.embeddings()
            with torch.no_grad(), measured(self._skeleton, layer, self._walk.batches[0].valid, moments, {}, False):
                run_layer(self._skeleton, n, hidden[0].to(self._skeleton.device), calls[0])
            self._groups[same_kind] = {
                name.removeprefix(layer): group.removeprefix(layer) for name, group in moments.groups.items()
            }
        groups = self._groups[same_kind]
        widths = {
            f"{layer}{name}": linears[f"{layer}{name}"].in_features for name, group in groups.items() if name == group
        }
        if self._gradients:
            widths |= {output_key(name): module.out_features for name, module in linears.items()}
        if self._full is not None:
            return dict.fromkeys(widths, Metric.FULL if self._full else Metric.DIAGONAL)
        # One layer is solved at a time: its error, three products of its size, and its statistics once more.
        workspace = max(
            8 * (4 * m.in_features * m.out_features + 3 * min(m.in_features, m.out_features) ** 2)
            + 8 * max(m.in_features, m.out_features) ** 2
            for m in linears.values()
        )
        weights = sum(p.numel() * p.element_size() for p in self._skeleton.layers[layer].parameters())
        states = sum(part.numel() * part.element_size() for part in hidden) * (3 if self._gradients else 2)
        return metric_for_budget(widths, max(0, self._memory_bytes - BASE_BYTES - weights - states - workspace))


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


def _layer(n: int) -> str:
    return f"layer-{n:04d}"


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
