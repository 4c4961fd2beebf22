"""The measurements of the dense model that pruning needs: the second moments of the gradients at its layers' outputs,
and the loss that is predicted for each layer. They take one walk backwards, with the memory of one layer. Finished
layers are stored in the run's parts."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial

import torch

from hemostat_calibration.adapters.gram import Metric
from hemostat_lab.compression.error_compensation import damped
from hemostat_lab.compression.frame import Run
from hemostat_lab.compression.pruning.compensation import shrunk
from hemostat_lab.compression.pruning.masks import Pattern
from hemostat_lab.compression.pruning.weights import pruned_by_blocks
from hemostat_lab.models.activations import Batch, Moments, measured, output_key
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
