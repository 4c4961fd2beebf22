"""The corrections of all linear layers: from both checkpoints and texts, one decoder layer at a time.

With the outputs' metric the model is run forwards once, storing the hidden states before each layer, and then backwards
from the last layer to the first, each layer being computed again. So the memory is that of one layer and of the hidden
states at one depth. Finished parts are stored: what is killed goes on at the layer where it was.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from hemostat.models.adapters.activations import (
    Batch,
    Calls,
    Moments,
    embed,
    make_batches,
    measured,
    output_gradients,
    output_key,
    run_layer,
)
from hemostat.models.adapters.pair import CheckpointPair, LayerScales
from hemostat.models.adapters.parts import Parts
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
        self._source = pair.sources[0]
        self._names = list(pair.skeleton.layers)
        self._batches: list[Batch] = make_batches(texts, pair.skeleton.device)
        self._parts = parts
        self._rank = rank
        self._gradients = gradients
        self._full = full
        self._memory_bytes = memory_bytes
        self._seed = seed
        self._progress = progress
        self._embedded: tuple[list[torch.Tensor], list[Calls]] | None = None
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
        for n in range(count + 1):
            self._parts.drop(_hidden(n))
            self._parts.drop(_gradient(n))
        together = {name: correction for corrections in found.values() for name, correction in corrections.items()}
        return {name: together[name] for name in self._skeleton.linears}

    def _solve_layer(self, n: int) -> None:
        """Stores the corrections of decoder layer `n`, and what the next layer to be solved needs."""
        layer = self._names[n]
        gradients = self._gradient(n + 1) if self._gradients else None
        hidden = self._hidden(n)
        moments = Moments()
        with self._skeleton.loaded(self._skeleton.parameters_of(layer), self._source):
            metrics = self._metrics(n, hidden)
            if gradients is None:
                after = self._forward(n, hidden, moments, metrics)
                if n + 1 < len(self._names):
                    self._parts.put_list(_hidden(n + 1), after)
            else:
                before = self._backward(n, hidden, gradients, moments, metrics)
                self._parts.put_list(_gradient(n), before)
        corrections = {
            name: self._correct(name, moments, self._pair.scales(layer)) for name in self._skeleton.linears_of(layer)
        }
        self._parts.put(_layer(n), _pack(corrections, self._pair.notes_of(layer)))
        self._parts.drop(_hidden(n + 1 if self._gradients else n))
        self._parts.drop(_gradient(n + 1))

    def _correct(self, name: str, moments: Moments, scales: LayerScales) -> Correction:
        inputs = _scaled(moments.inputs(name), 1.0 / scales.inputs[name] if name in scales.inputs else None)
        outputs = moments.outputs(name)
        if outputs is not None:
            outputs = _scaled(outputs, scales.outputs.get(name))
        factors, errors = low_rank(self._pair.delta(name, scales), self._rank, inputs, outputs)
        metric = f"{_kind(inputs)} inputs" + ("" if outputs is None else f", {_kind(outputs)} outputs")
        return Correction(factors, errors, metric)

    def _forward(
        self, n: int, hidden: Sequence[torch.Tensor], moments: Moments | None, metrics: Mapping[str, Metric]
    ) -> list[torch.Tensor]:
        """The hidden states after layer `n`, which is loaded, by batch."""
        after = []
        _, calls = self._embeddings()
        for batch, states, call in zip(self._batches, hidden, calls, strict=True):
            on_device = states.to(self._skeleton.device)
            with torch.no_grad():
                if moments is None:
                    output = run_layer(self._skeleton, n, on_device, call)
                else:
                    with measured(self._skeleton, self._names[n], batch.valid, moments, metrics, gradients=False):
                        output = run_layer(self._skeleton, n, on_device, call)
            after.append(output.cpu())
        return after

    def _backward(
        self,
        n: int,
        hidden: Sequence[torch.Tensor],
        gradients: Sequence[torch.Tensor],
        moments: Moments,
        metrics: Mapping[str, Metric],
    ) -> list[torch.Tensor]:
        """The gradient at the inputs of layer `n`, which is loaded, of that at its outputs, by batch."""
        before = []
        _, calls = self._embeddings()
        for batch, states, gradient, call in zip(self._batches, hidden, gradients, calls, strict=True):
            leaf = states.to(self._skeleton.device).requires_grad_(True)
            with measured(self._skeleton, self._names[n], batch.valid, moments, metrics, gradients=True):
                output = run_layer(self._skeleton, n, leaf, call)
                torch.autograd.backward(output, gradient.to(output.device))
            assert leaf.grad is not None
            before.append(leaf.grad.cpu())
        return before

    def _hidden(self, n: int) -> list[torch.Tensor]:
        """Before layer `n`, by batch: stored, or computed from the nearest layer below that is."""
        start = n
        states = self._parts.get_list(_hidden(start))
        while states is None and start > 0:
            start -= 1
            states = self._parts.get_list(_hidden(start))
        if states is None:
            states, _ = self._embeddings()
            self._parts.put_list(_hidden(0), states)
        for m in range(start, n):
            with self._skeleton.loaded(self._skeleton.parameters_of(self._names[m]), self._source):
                states = self._forward(m, states, None, {})
            self._parts.put_list(_hidden(m + 1), states)
            self._progress(STATISTICS, m + 1, len(self._names) * (1 + self._gradients))
        return states

    def _gradient(self, n: int) -> list[torch.Tensor]:
        """At the hidden states before layer `n` (after the last one: at the model's end), by batch."""
        found = self._parts.get_list(_gradient(n))
        if found is not None:
            return found
        if n == len(self._names):
            found = output_gradients(self._skeleton, self._source, self._batches, self._hidden(n), self._seed)
        else:
            later = self._gradient(n + 1)
            hidden = self._hidden(n)
            with self._skeleton.loaded(self._skeleton.parameters_of(self._names[n]), self._source):
                found = self._backward(n, hidden, later, Moments(), {})
        self._parts.put_list(_gradient(n), found)
        return [gradient.cpu() for gradient in found]

    def _embeddings(self) -> tuple[list[torch.Tensor], list[Calls]]:
        if self._embedded is None:
            hidden, calls = embed(self._skeleton, self._source, self._batches)
            self._embedded = [states.cpu() for states in hidden], calls
        return self._embedded

    def _metrics(self, n: int, hidden: Sequence[torch.Tensor]) -> dict[str, Metric]:
        """What is kept of each input and output of decoder layer `n`, which is loaded."""
        layer = self._names[n]
        linears = self._skeleton.linears_of(layer)
        same_kind = tuple(name.removeprefix(layer) for name in linears)
        if same_kind not in self._groups:
            # Which linear layers share their inputs is seen in a forward pass.
            moments = Moments()
            _, calls = self._embeddings()
            with torch.no_grad(), measured(self._skeleton, layer, self._batches[0].valid, moments, {}, False):
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


def _hidden(n: int) -> str:
    return f"hidden-{n:04d}"


def _gradient(n: int) -> str:
    return f"gradient-{n:04d}"


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
