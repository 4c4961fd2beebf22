"""The measurements of the dense model that pruning needs: gradients, predicted losses, and the layers' inputs.

The second moments of the gradients at the layers' outputs, and the loss that is predicted for each layer, take one walk
backwards, with the memory of one layer. Finished layers are stored in the run's parts.

A pruned linear layer is fitted so that W' x̂, on its own input x̂, is W x, where W is the dense weight and x the dense
model's input. So it makes up for a part of the loss of the layers before it (as Li et al. 2025, arXiv 2504.02692, do
for rounding).
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from hemostat_calibration.adapters.gram import Metric
from hemostat_lab.compression.error_compensation import damped
from hemostat_lab.compression.frame import LayerData, Run
from hemostat_lab.compression.pruning.compensation import shrunk
from hemostat_lab.compression.pruning.weights import Pattern, pruned_by_blocks
from hemostat_lab.models.activations import (
    GRAM_ROWS,
    Batch,
    Hook,
    Moments,
    forward_hooks,
    measured,
    output_key,
    valid_rows,
)
from hemostat_lab.models.experts import is_expert
from hemostat_lab.models.parts import json_tensor, json_value

PROBED = 0.5
"""The sparsity at which losses are predicted."""
Gradients = Mapping[str, torch.Tensor]
"""By linear layer G = Σ g gᵀ over tokens, float32 [out, out]; a layer that no text reached is left out."""


def measure_gradients(run: Run) -> dict[str, float]:
    """Store G of every linear layer, and return its predicted loss, nats per token: ½ E[eᵀ G e] with the error e at its
    outputs when it alone is pruned to `PROBED`.

    The loss is of tokens behind the first of each text: the first one's inputs may be hundreds of times as large, and
    the model is hardly sensitive to them (attention sinks), which a product of S and G does not show.
    """
    run.measure_backwards(_losses, partial(_measure_layer, run))
    losses: dict[str, float] = {}
    for n in reversed(range(len(run.skeleton.layers))):
        part = run.parts.get(_losses(n))
        assert part is not None, n
        losses |= json_value(part[""])
    return losses


def stored_gradients(run: Run, index: int) -> Gradients:
    """Returns the measurements of the decoder layer `index`; empty if nothing is stored."""
    return run.parts.get(_gradients(index)) or {}


def _measure_layer(run: Run, n: int) -> Mapping[str, torch.Tensor]:
    """The losses of a decoder layer, for JSON; its gradients are stored."""
    walk = run.texts_walk
    layer, tokens = walk.names[n], sum(int(batch.valid.sum()) for batch in walk.batches)
    moments, first = Moments(), Moments()
    walk.measure(n, partial(_measured, run, layer, moments, first), backwards=True)
    gradients, losses = {}, {}
    for name in run.skeleton.linears_of(layer):
        outputs = moments.outputs(name)
        if outputs is None:
            continue
        inputs, own = moments.inputs(name), torch.from_numpy(outputs.total.copy())
        weight = run.source.parameter(f"{name}.weight").float()
        second = damped(shrunk(torch.from_numpy(inputs.total.copy()), inputs.count))
        new, _ = pruned_by_blocks(weight, PROBED, Pattern.UNSTRUCTURED, second, damped(own))
        change = (new - weight).double()
        others = first.inputs(name)
        judged = inputs.total - others.total * (others.count < inputs.count)
        error = float(((own @ change @ torch.from_numpy(judged)) * change).sum())
        losses[name] = 0.5 * error / (inputs.count * tokens)
        gradients[name] = own.float()
    run.parts.put(_gradients(n), gradients)
    return {"": json_tensor(losses)}


@contextmanager
def _measured(run: Run, layer: str, moments: Moments, first: Moments, batch: Batch) -> Iterator[None]:
    """first: of the first token of each text."""
    names = list(run.skeleton.linears_of(layer))
    inputs = dict.fromkeys(names, Metric.FULL)
    outputs = dict.fromkeys(map(output_key, names), Metric.FULL)
    beginning = torch.zeros_like(batch.valid)
    beginning[:, 0] = True
    with (
        measured(run.skeleton, layer, batch.valid, moments, inputs | outputs, True),
        measured(run.skeleton, layer, beginning, first, inputs, False),
    ):
        yield


def _gradients(index: int) -> str:
    return f"output-gradients-{index:04d}"


def _losses(index: int) -> str:
    return f"pruning-losses-{index:04d}"


@dataclass(slots=True)
class PairedMoments:
    """The moments of a linear layer's inputs, float64 [inputs, inputs]: second = Σ x̂ x̂ᵀ, gap = Σ (x − x̂) x̂ᵀ, over
    `tokens`."""

    second: torch.Tensor
    gap: torch.Tensor
    tokens: int = 0


class DenseInputs:
    """The dense model's inputs to one decoder layer's linear layers: in memory, for all texts, in the model's dtype.
    Only `second` is known for an expert, and the gap is 0: the tokens that it reads change with the outputs of the
    layers before it.

    groups: by the first linear layer that reads a tensor, all that do, in the order in which they are computed.
    """

    def __init__(self, layer: LayerData) -> None:
        """layer: with the dense weights. It passes on the dense model's hidden states to the next one."""
        self.groups: dict[str, list[str]] = {}
        self._layer = layer
        self._dense: dict[str, list[torch.Tensor]] = {}
        """By group, for each batch."""
        walk = layer.run.texts_walk
        if layer.index:  # finished and stored
            walk.leave(layer.index - 1, backwards=False)
        walk.pass_on(layer.index, self._reading)

    @property
    def stages(self) -> Collection[list[str]]:
        """The groups whose layers are pruned at once, one after the other; all experts are one stage."""
        stages: dict[str, list[str]] = {}
        for group in self.groups:
            stages.setdefault("experts" if is_expert(group) else group, []).append(group)
        return stages.values()

    def moments(self, groups: Collection[str]) -> Mapping[str, PairedMoments]:
        """Returns the moments with the weights that the layer has now, by group. A group that no text reaches any more
        is left out."""
        result: dict[str, PairedMoments] = {}
        dense = {group: iter(self._dense.pop(group, ())) for group in groups}

        def pairing(batch: Batch) -> AbstractContextManager[None]:
            def hook(group: str) -> Hook:
                def see(module: Any, arguments: tuple[Any, ...], output: torch.Tensor) -> None:
                    own = valid_rows(arguments[0], batch.valid)
                    _add(result, group, own, own if is_expert(group) else next(dense[group]))

                return see

            return forward_hooks((self._layer.linears[group], hook(group)) for group in groups)

        self._layer.forward(pairing)
        return result

    @contextmanager
    def _reading(self, batch: Batch) -> Iterator[None]:
        # Kept meanwhile, so that another tensor does not get the same identity.
        read: dict[int, tuple[str, torch.Tensor]] = {}

        def hook(name: str) -> Hook:
            def see(module: Any, arguments: tuple[Any, ...], output: torch.Tensor) -> None:
                given = arguments[0]
                group, _ = read.setdefault(id(given), (name, given))
                names = self.groups.setdefault(group, [])
                if name not in names:
                    names.append(name)
                if group == name and not is_expert(name):
                    self._dense.setdefault(name, []).append(valid_rows(given, batch.valid))

            return see

        with forward_hooks((module, hook(name)) for name, module in self._layer.linears.items()):
            yield
        read.clear()


def _add(moments: dict[str, PairedMoments], group: str, own: torch.Tensor, dense: torch.Tensor) -> None:
    """Rows [n, inputs] of x̂ and x."""
    width = own.shape[1]
    if group not in moments:
        moments[group] = PairedMoments(*(torch.zeros(width, width, dtype=torch.float64) for _ in range(2)))
    total = moments[group]
    total.tokens += len(own)
    for part, other in zip(own.float().split(GRAM_ROWS), dense.float().split(GRAM_ROWS), strict=True):
        total.second += (part.T @ part).to("cpu", torch.float64)
        if dense is not own:
            total.gap += ((other - part).T @ part).to("cpu", torch.float64)
