"""The list of a model's decoder layers with some of them dropped, duplicated or inserted, for a while. Torch."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from hemostat_lab.doctor.causes.units import layer_list
from hemostat_lab.doctor.options import DoctorError
from hemostat_lab.doctor.sweep.points import Change, Point


@contextmanager
def restructured(model: Any, point: Point) -> Iterator[None]:
    """The layers before the last one are changed, as many as the point says: the deepest layers but the last one are
    those that matter least (arXiv 2403.17887).

    Dropped: left out. Duplicated: each is followed by itself, with the same weights (depth up-scaling, arXiv
    2312.15166). Inserted: each is followed by a new layer with the mean of its weights and of the next layer's.
    """
    if point.change is Change.NONE:
        yield
        return
    parent, name, layers = layer_list(model)
    config = model.config.get_text_config()
    first, end = len(layers) - 1 - point.layers, len(layers) - 1
    order: list[tuple[int, Any]] = []  # index of the layer that it stands for, and the module
    for n, layer in enumerate(layers):
        if not (point.change is Change.DROPPED and first <= n < end):
            order.append((n, layer))
        if first <= n < end and point.change is Change.DUPLICATED:
            order.append((n, layer))
        if first <= n < end and point.change is Change.INSERTED:
            order.append((n, _between(layer, layers[n + 1])))
    types = getattr(config, "layer_types", None)
    count = config.num_hidden_layers
    try:
        setattr(parent, name, torch.nn.ModuleList([_at(place, layer) for place, (_, layer) in enumerate(order)]))
        config.num_hidden_layers = len(order)
        if types is not None:
            config.layer_types = [types[n] for n, _ in order]
        yield
    finally:
        setattr(parent, name, layers)
        config.num_hidden_layers = count
        if types is not None:
            config.layer_types = types


def _at(place: int, layer: Any) -> Any:
    """The layer with another index, which its cache needs; the copy has the same weights in memory."""
    shared: dict[int, Any] = {id(tensor): tensor for tensor in (*layer.parameters(), *layer.buffers())}
    shared |= {id(m.config): m.config for m in layer.modules() if hasattr(m, "config")}
    twin = copy.deepcopy(layer, shared)
    for module in twin.modules():
        if hasattr(module, "layer_idx"):
            module.layer_idx = place
    return twin


def _between(before: Any, after: Any) -> Any:
    """A layer whose parameters are the means of two layers' parameters. Raises DoctorError where they do not match."""
    twin, others = copy.deepcopy(before), dict(after.named_parameters())
    for name, parameter in twin.named_parameters():
        if name not in others or others[name].shape != parameter.shape:
            raise DoctorError(
                "REFERENCE: its layers differ in shape, so that none can be inserted; leave out structure"
            )
        parameter.data = (0.5 * (parameter.data.float() + others[name].data.float())).to(parameter.dtype)
    return twin
