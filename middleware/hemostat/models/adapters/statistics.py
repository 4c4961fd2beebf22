"""Second moments of what each linear layer reads and of the gradients at its outputs, one decoder layer at a time.

With gradients the model is run forwards once, storing the hidden states before each layer, and then backwards from the
last layer to the first, each layer being computed again. So the memory is that of one layer and of the hidden states at
one depth. Finished parts are stored: what is killed goes on at the layer where it was.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

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
from hemostat.models.adapters.parts import Parts
from hemostat.models.adapters.skeleton import Skeleton, WeightSource
from hemostat_calibration.adapters.gram import Metric, metric_for_budget

Progress = Callable[[str, int, int], None]
"""Called with a stage, finished steps and all steps."""
Finish = Callable[[str, Moments], Mapping[str, torch.Tensor]]
"""Makes what is stored of a decoder layer from its name and its statistics."""

STATISTICS = "statistics"
BASE_BYTES = 700 << 20
"""Of a process with torch and transformers, before any weights."""


class LayerStatistics:
    """The statistics of one model on texts.

    source: its weights. seed: of the tokens that the gradients are taken for. gradients: measure the outputs' metric,
    too. full: True: full statistics whatever memory they need, False: diagonals, None: as `memory_bytes` allows.
    """

    def __init__(
        self,
        skeleton: Skeleton,
        source: WeightSource,
        texts: Sequence[npt.NDArray[np.int32]],
        parts: Parts,
        *,
        gradients: bool,
        full: bool | None,
        memory_bytes: int,
        seed: int,
        progress: Progress,
    ) -> None:
        self._skeleton = skeleton
        self._source = source
        self._names = list(skeleton.layers)
        self._batches: list[Batch] = make_batches(texts, skeleton.device)
        self._parts = parts
        self._gradients = gradients
        self._full = full
        self._memory_bytes = memory_bytes
        self._seed = seed
        self._progress = progress
        self._embedded: tuple[list[torch.Tensor], list[Calls]] | None = None
        self._groups: dict[tuple[str, ...], dict[str, str]] = {}

    def run(self, finish: Finish) -> dict[str, dict[str, torch.Tensor]]:
        """What `finish` makes of each decoder layer, by its name. AdaptError, WorkFolderError."""
        count = len(self._names)
        found: dict[str, dict[str, torch.Tensor]] = {}
        for n in range(count - 1, -1, -1) if self._gradients else range(count):
            kept = self._parts.get(_layer(n))
            if kept is None:
                self._measure_layer(n, finish)
                kept = self._parts.get(_layer(n))
                assert kept is not None, n
            found[self._names[n]] = kept
            done = count - n if self._gradients else n + 1
            self._progress(STATISTICS, done + count * self._gradients, count * (1 + self._gradients))
        for n in range(count + 1):
            self._parts.drop(_hidden(n))
            self._parts.drop(_gradient(n))
        return {name: found[name] for name in self._names}

    def _measure_layer(self, n: int, finish: Finish) -> None:
        """Stores what is made of decoder layer `n`, and what the next layer to be measured needs."""
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
        self._parts.put(_layer(n), finish(layer, moments))
        self._parts.drop(_hidden(n + 1 if self._gradients else n))
        self._parts.drop(_gradient(n + 1))

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


def _hidden(n: int) -> str:
    return f"hidden-{n:04d}"


def _gradient(n: int) -> str:
    return f"gradient-{n:04d}"


def _layer(n: int) -> str:
    return f"layer-{n:04d}"
