"""Compression of a checkpoint, one decoder layer at a time.

A `Method` decides what becomes of each layer; this module loads the layers, passes texts through the compressed ones
where the method needs them, and stores each finished layer, from which an interrupted run goes on.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

import msgspec
import numpy as np
import numpy.typing as npt
import torch

from hemostat_calibration.adapters.gram import Metric
from hemostat_lab.compression.formats import PARTS, Quantized, WeightFormat, restored, stored
from hemostat_lab.models.activations import Moments, measured, run_layer
from hemostat_lab.models.checkpoint import Checkpoint
from hemostat_lab.models.checkpoint_folders import CompressError
from hemostat_lab.models.copies import device_of, dtype_of, weights_of
from hemostat_lab.models.experts import routers
from hemostat_lab.models.parts import Parts, json_tensor, json_value
from hemostat_lab.models.second_moments import Progress
from hemostat_lab.models.skeleton import EXACT, CopyLinear, Inputs, Skeleton
from hemostat_lab.models.walk import Around, LayerWalk, nearest_stored

Ids = npt.NDArray[np.int32]

STAGE = "compressed layers"
GRADIENTS = "gradients"
NEEDS_TEXTS = "this method needs texts: give --prompts or --records"
_REPORT = "|report"
_FORMATS = "|formats"


@dataclass(frozen=True, slots=True)
class Source:
    """The checkpoint that is compressed. skeleton: its model, without weights."""

    checkpoint: Checkpoint
    skeleton: Skeleton

    @classmethod
    def open(cls, folder: Path, device: str = "cpu") -> Source:
        """Raises HemostatError unless it is a dense checkpoint of an architecture that can be walked through."""
        checkpoint = Checkpoint(folder, "SOURCE")
        if checkpoint.quantized:
            raise CompressError(f"{folder} is quantized already: start from the original checkpoint")
        on = device_of(device)
        skeleton = Skeleton(checkpoint.config, dtype_of(checkpoint, "auto", on), on, "SOURCE")
        missing = sorted(skeleton.places.keys() - checkpoint.names)
        if missing:
            raise CompressError(
                f"{folder} has no tensor {missing[0]}: it is incomplete, or its architecture stores weights in another "
                "form than transformers computes with, which is not supported"
            )
        if not skeleton.linears:
            raise CompressError(f"{folder} has no linear layers besides its head: nothing to compress")
        return cls(checkpoint, skeleton)

    @property
    def shapes(self) -> dict[str, tuple[int, int]]:
        """(outputs, inputs) of every linear layer but the head."""
        return {name: (m.out_features, m.in_features) for name, m in self.skeleton.linears.items()}

    def parameter(self, name: str) -> torch.Tensor:
        """Returns a parameter by its name. Raises CompressError if it is not finite: no method could make a useful
        layer of it."""
        weight = weights_of(self.checkpoint)(name)
        if not bool(weight.isfinite().all()):
            raise CompressError(f"{name} holds values that are not finite: SOURCE is damaged; copy it again")
        return weight

    def heads(self) -> list[str]:
        """Names of the output embeddings."""
        head = self.skeleton.model.get_output_embeddings()
        return [name for name, module in self.skeleton.model.named_modules() if module is head]

    def dense_layers(self, quantized: Collection[str]) -> list[str]:
        """The linear layers that are not `quantized`, without the heads; also those that no method compresses, and
        routers, which engines compute as linear layers."""
        heads = self.heads()
        linears = [name for name, module in self.skeleton.model.named_modules() if isinstance(module, torch.nn.Linear)]
        named = [*linears, *routers(self.skeleton.model)]
        return [name for name in named if name not in quantized and name not in heads]


@dataclass(frozen=True, slots=True)
class LayerResult:
    """The result for a decoder layer.

    weights: the new weights by the name of a parameter; a tensor of the parameter's shape is stored dense, in the
    source's dtype. Parameters that are missing stay as they are. report: the report on this layer, for JSON.
    """

    weights: Mapping[str, torch.Tensor | Quantized]
    report: Mapping[str, Any] = field(default_factory=dict)


class Run:
    """One compression. walk: the source's own hidden states and gradients on the texts; without texts, None.

    parts: where a method stores what it has measured, under names of its own.
    """

    def __init__(self, source: Source, texts: Sequence[Ids], parts: Parts, seed: int, progress: Progress) -> None:
        self.source = source
        self.skeleton = source.skeleton
        self.parts = parts
        self.progress = progress
        self.walk = LayerWalk(source.skeleton, source.parameter, texts, parts, seed=seed) if texts else None

    @property
    def texts_walk(self) -> LayerWalk:
        """Raises CompressError where there are no texts."""
        if self.walk is None:
            raise CompressError(NEEDS_TEXTS)
        return self.walk

    def measure_backwards(
        self, part: Callable[[int], str], measure: Callable[[int], Mapping[str, torch.Tensor]]
    ) -> None:
        """Stores the result of `measure` for each decoder layer, from the last to the first; a result that is stored
        already is kept.

        part: returns the name under which the result of a layer is stored, from its index. measure: passes the texts
        through the layer backwards (`LayerWalk.measure`).
        """
        walk, count = self.texts_walk, len(self.skeleton.layers)
        for n in reversed(range(count)):
            if self.parts.get(part(n)) is None:
                self.parts.put(part(n), measure(n))
                walk.leave(n, backwards=True)
                if n == 0:
                    walk.drop()
            self.progress(GRADIENTS, count - n, count)


class LayerData:
    """A decoder layer of the source, whose weights are loaded, and the texts as the compressed layers before it pass
    them on.

    index, name: of the decoder layer. linears: its linear layers, by their full names.
    """

    def __init__(self, run: Run, index: int, hidden: Sequence[torch.Tensor] | None) -> None:
        self.run = run
        self.index = index
        self.name = list(run.skeleton.layers)[index]
        self.linears: Mapping[str, CopyLinear] = run.skeleton.linears_of(self.name)
        self._hidden = hidden

    def parameter(self, name: str) -> torch.Tensor:
        """Returns a parameter as it is loaded: in the source's dtype."""
        weight: torch.Tensor = self.run.skeleton.model.get_parameter(name).detach()
        return weight

    def weight(self, name: str) -> torch.Tensor:
        """A float32 copy [outputs, inputs] of the weight of the linear layer `name`."""
        return self.parameter(f"{name}.weight").to(torch.float32, copy=True)

    def set_parameter(self, name: str, value: torch.Tensor) -> None:
        """For this layer, while it is loaded: later calls of `forward` see it."""
        self.run.skeleton.load([name], lambda _: value)

    def forward(self, context: Around | None = None) -> list[torch.Tensor]:
        """The layer's outputs for the texts, by batch; `context` around each batch, such as hooks."""
        if self._hidden is None:
            raise CompressError(NEEDS_TEXTS)
        return self.run.texts_walk.forward(self.index, self._hidden, context)

    def first_outputs(self) -> torch.Tensor:
        """The layer's outputs for the first batch."""
        if self._hidden is None:
            raise CompressError(NEEDS_TEXTS)
        _, calls = self.run.texts_walk.embeddings()
        with torch.no_grad():
            return run_layer(self.run.skeleton, self.index, self._hidden[0].to(self.run.skeleton.device), calls[0])

    @cached_property
    def groups(self) -> Mapping[str, str]:
        """`Moments.groups` of the texts: by linear layer, the first one that reads the same tensor. In the order in
        which the layers are computed; one that no text reaches, such as an expert, is left out."""
        return self.moments({}).groups

    def moments(self, metrics: Mapping[str, Metric]) -> Moments:
        """Second moments of what the linear layers read; metrics: by the name of a linear layer. A layer that reads the
        same tensor as one before it shares its moments: `Moments.groups`."""
        moments = Moments()
        self.forward(lambda batch: measured(self.run.skeleton, self.name, batch.valid, moments, metrics, False))
        return moments


class Method(Protocol):
    """A way to compress. Deterministic: an interrupted run must end with the same bytes."""

    @property
    def settings(self) -> Mapping[str, Any]:
        """Everything that the result depends on, for JSON: of the manifest, and of the key of stored parts."""

    @property
    def needs_texts(self) -> bool: ...

    def prepare(self, run: Run) -> None:
        """Before the first layer; also where the run was interrupted. Statistics of the whole model are collected here,
        and stored in `run.parts`."""

    def compress_layer(self, layer: LayerData) -> LayerResult: ...


@dataclass(slots=True)
class Compressed:
    """All layers, stored in parts. formats: of the quantized layers, by name. reports: by decoder layer."""

    source: Source
    parts: Parts
    formats: dict[str, WeightFormat] = field(default_factory=dict)
    reports: dict[str, dict[str, Any]] = field(default_factory=dict)

    def tensors(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Every tensor of the checkpoint, by its name, one at a time."""
        checkpoint, skeleton = self.source.checkpoint, self.source.skeleton
        inside = tuple(f"{layer}." for layer in skeleton.layers)
        for name in sorted(checkpoint.names):
            if not name.startswith(inside):
                yield name, checkpoint.tensor(name)
        for index, layer in enumerate(skeleton.layers):
            kept = self.parts.get(_layer(index))
            assert kept is not None, layer
            replaced = {_parameter(name) for name in kept}
            for name in sorted(checkpoint.names):
                if name.startswith(f"{layer}.") and name not in replaced:
                    yield name, checkpoint.tensor(name)
            # Sorted: safetensors returns them in another order each time.
            for name in sorted(kept):
                if not name.startswith("|"):
                    yield name, kept[name]


def compress_layers(run: Run, method: Method) -> Compressed:
    """Every decoder layer, in order. Raises HemostatError; what is finished then is in `run.parts`."""
    skeleton = run.skeleton
    method.prepare(run)
    result = Compressed(run.source, run.parts)
    count = len(skeleton.layers)
    for index, name in enumerate(skeleton.layers):
        kept = run.parts.get(_layer(index))
        if kept is None:
            kept = _compress_layer(run, method, index, last=index + 1 == count)
            run.parts.put(_layer(index), kept)
        result.formats |= _formats(kept)
        result.reports[name] = json_value(kept[_REPORT])
        run.parts.drop(_hidden(index))
        run.progress(STAGE, index + 1, count)
    return result


def _compress_layer(run: Run, method: Method, index: int, last: bool) -> dict[str, torch.Tensor]:
    """The part of one layer. Its outputs for the texts are stored, for the next layer."""
    hidden = _hidden_before(run, index) if method.needs_texts else None
    names = run.skeleton.parameters_of(list(run.skeleton.layers)[index])
    with run.skeleton.loaded(names, run.source.parameter):
        data = LayerData(run, index, hidden)
        result = method.compress_layer(data)
        part = _part(result, run)
        if hidden is not None and not last:
            run.parts.put_list(_hidden(index + 1), _outputs(data, part))
    return part


def _part(result: LayerResult, run: Run) -> dict[str, torch.Tensor]:
    part: dict[str, torch.Tensor] = {}
    formats: dict[str, Any] = {}
    for name, weight in result.weights.items():
        if isinstance(weight, Quantized):
            module = name.removesuffix(".weight")
            formats[module] = msgspec.to_builtins(weight.format)
            part |= {f"{module}.{key}": tensor for key, tensor in stored(weight).items()}
        else:
            part[name] = weight.to(run.source.checkpoint.tensor(name).dtype)
    return part | {_FORMATS: json_tensor(formats), _REPORT: json_tensor(dict(result.report))}


def _outputs(data: LayerData, part: Mapping[str, torch.Tensor]) -> list[torch.Tensor]:
    """Returns the outputs of the layer, which is loaded, with the weights of its part, as an engine computes them."""
    formats = _formats(part)
    for name in data.run.skeleton.parameters_of(data.name):
        module = name.removesuffix(".weight")
        if module in formats:
            tensors = {own: part[f"{module}.{own}"] for own in (*PARTS, "weight") if f"{module}.{own}" in part}
            data.set_parameter(name, restored(formats[module], tensors))
        else:
            data.set_parameter(name, part[name] if name in part else data.run.source.parameter(name))
    for name, module in data.linears.items():
        module.inputs = Inputs(formats[name].inputs) if name in formats else EXACT
    try:
        return data.forward()
    finally:
        for module in data.linears.values():
            module.inputs = EXACT


def _hidden_before(run: Run, index: int) -> list[torch.Tensor]:
    """Returns the hidden states of the compressed model before the layer `index`: stored ones, or computed again from
    the finished layers."""
    start, states = nearest_stored(run.parts, _hidden, index)
    if states is None:
        states, _ = run.texts_walk.embeddings()
    for n in range(start, index):
        part = run.parts.get(_layer(n))
        assert part is not None, n
        names = run.skeleton.parameters_of(list(run.skeleton.layers)[n])
        with run.skeleton.loaded(names, run.source.parameter):
            states = _outputs(LayerData(run, n, states), part)
        run.parts.put_list(_hidden(n + 1), states)
    return states


def _formats(part: Mapping[str, torch.Tensor]) -> dict[str, WeightFormat]:
    return {name: msgspec.convert(value, WeightFormat) for name, value in json_value(part[_FORMATS]).items()}


def _parameter(name: str) -> str:
    """`a.weight` for `a.weight_packed`."""
    module, _, part = name.rpartition(".")
    return f"{module}.weight" if part in PARTS else name


def _layer(index: int) -> str:
    return f"compressed-{index:04d}"


def _hidden(index: int) -> str:
    return f"compressed-hidden-{index:04d}"
