"""Weights of a model pruned and rounded in memory, for a while. Torch.

Only the linear layers inside of the decoder layers change. Scores are magnitudes, so that no text is needed.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from hemostat_calibration.errors import HemostatError
from hemostat_lab.compression.rounding import pruned, rounded
from hemostat_lab.doctor.causes.units import decoder_layers
from hemostat_lab.doctor.kl_meter import altered_weights
from hemostat_lab.doctor.sweep.points import FULL_BITS, Change, Point

SCALE_BITS = 16


class NotApplicableError(HemostatError):
    """The point does not exist for this architecture; the text says why."""


def linears(model: Any) -> dict[str, Any]:
    """The linear layers inside of the decoder layers, by name."""
    inside = {id(module) for module in decoder_layers(model).modules() if isinstance(module, torch.nn.Linear)}
    return {name: module for name, module in model.named_modules() if id(module) in inside}


@contextmanager
def compressed(model: Any, point: Point) -> Iterator[None]:
    """The model's weights at this point; the original tensors are put back afterwards. NotApplicableError."""
    check(model, point)
    modules = linears(model) if point.changes_weights else {}
    removed = removed_rows(model, point.sparsity) if point.pattern == "rows" and point.sparsity else {}
    with altered_weights(modules, lambda name, weight: _changed(name, weight, point, removed.get(name))):
        yield


def check(model: Any, point: Point) -> None:
    """Raises NotApplicableError."""
    for name, module in linears(model).items() if point.changes_weights else ():
        inputs = module.weight.shape[1]
        if point.bits < FULL_BITS and point.group is not None and inputs % point.group:
            raise NotApplicableError(f"{name} has {inputs} inputs, not a multiple of {point.group}")
        if point.sparsity and point.pattern == "n:4" and inputs % 4:
            raise NotApplicableError(f"{name} has {inputs} inputs, not a multiple of 4")
    if point.sparsity and point.pattern == "rows":
        for layer in decoder_layers(model):
            _neurons(model, layer, [m for m in layer.modules() if isinstance(m, torch.nn.Linear)])


def _changed(name: str, weight: torch.Tensor, point: Point, removed: torch.Tensor | None) -> torch.Tensor:
    if point.sparsity:
        if point.pattern == "unstructured":
            weight = pruned(weight, point.sparsity)
        elif point.pattern == "n:4":
            weight = keep_n_of_4(weight, round(4 * (1.0 - point.sparsity)))
        elif removed is not None:
            weight = weight.masked_fill(removed, 0.0)
    return weight if point.bits == FULL_BITS else rounded(name, weight, point.bits, point.group)


def keep_n_of_4(weight: torch.Tensor, n: int) -> torch.Tensor:
    """A copy of [out, in] in which only the n largest of every 4 neighbouring inputs are kept, by magnitude."""
    groups = weight.unflatten(1, (-1, 4))
    smallest = groups.abs().float().topk(4 - n, dim=-1, largest=False).indices
    return groups.scatter(-1, smallest, 0.0).flatten(1)


def removed_rows(model: Any, share: float) -> Mapping[str, torch.Tensor]:
    """Masks (bool, broadcast to [out, in]) of what structured pruning removes, by linear layer.

    In each decoder layer the `share` of the MLP's neurons and of the attention heads (rounded down) whose weights have
    the least sum of squares, each matrix scaled to mean 1 (the group magnitude of LLM-Pruner, arXiv 2305.11627). Keys
    and values go with the last head that reads them. Raises NotApplicableError where the neurons are not found.
    """
    names = {id(module): name for name, module in linears(model).items()}
    removed: dict[str, torch.Tensor] = {}
    for layer in decoder_layers(model):
        modules = [module for module in layer.modules() if id(module) in names]
        read, write = _neurons(model, layer, modules)
        width = read[0].weight.shape[0]
        gone = _smallest([_sizes(m, 0, width) for m in read] + [_sizes(m, 1, width) for m in write], share)
        removed |= {names[id(m)]: gone[:, None] for m in read} | {names[id(m)]: gone[None] for m in write}
        heads = _removed_heads(layer, model.config.get_text_config(), share)
        removed |= {names[id(m)]: mask for m, mask in heads}
    return removed


def _neurons(model: Any, layer: Any, modules: Sequence[Any]) -> tuple[list[Any], list[Any]]:
    """The MLP's linear layers with a row for each neuron, and those with a column. Raises NotApplicableError."""
    config = model.config.get_text_config()
    hidden, width = config.hidden_size, int(getattr(config, "intermediate_size", None) or 0)
    read = [m for m in modules if m.weight.shape == (width, hidden)]
    write = [m for m in modules if m.weight.shape == (hidden, width)]
    if not read or not write or width == hidden:
        raise NotApplicableError(f"{type(layer).__name__} has no MLP with {width} neurons")
    return read, write


def _removed_heads(layer: Any, config: Any, share: float) -> list[tuple[Any, torch.Tensor]]:
    """Only of attention with projections of the usual names; otherwise no head is removed."""
    result = {name.rpartition(".")[2]: module for name, module in layer.named_modules()}
    if not {"q_proj", "k_proj", "v_proj", "o_proj"} <= result.keys():
        return []
    heads, groups = config.num_attention_heads, config.num_key_value_heads or config.num_attention_heads
    q, o = result["q_proj"], result["o_proj"]
    gone = _smallest([_sizes(q, 0, heads), _sizes(o, 1, heads)], share)
    unread = gone.view(groups, -1).all(-1)
    rows = gone.repeat_interleave(q.weight.shape[0] // heads)
    keys = unread.repeat_interleave(result["k_proj"].weight.shape[0] // groups)
    return [(q, rows[:, None]), (o, rows[None]), (result["k_proj"], keys[:, None]), (result["v_proj"], keys[:, None])]


def _sizes(module: Any, dimension: int, parts: int) -> torch.Tensor:
    """Sum of squares of each of the `parts` of a weight along a dimension, scaled to mean 1; [parts]."""
    squares = module.weight.data.float().square().sum(1 - dimension).view(parts, -1).sum(1)
    return squares / squares.mean()


def _smallest(sizes: list[torch.Tensor], share: float) -> torch.Tensor:
    """bool [parts]: the share with the least total size, rounded down."""
    total = torch.stack(sizes).sum(0)
    mask = torch.zeros_like(total, dtype=torch.bool)
    mask[total.argsort(stable=True)[: int(share * len(total) + 1e-9)]] = True
    return mask


def stored_share(model: Any, point: Point) -> float:
    """Bytes of the linear layers at this point, as a share of 16 bits for each of the unchanged model's weights.

    A weight that is kept has `bits` bits, each group a scale of 16 bits. Unstructured: one more bit per weight (a
    bitmask). n:4: 2 bits for each weight that is kept, at most the bitmask. Rows: what is removed is not stored. A
    layer that is duplicated is stored once; one that is dropped is not, one that is inserted is stored.
    """
    modules = linears(model)
    removed = removed_rows(model, point.sparsity) if point.pattern == "rows" and point.sparsity else {}
    bits = total = 0.0
    for name, module in modules.items():
        rows, columns = module.weight.shape
        size = rows * columns
        total += size
        stored = size - (int(removed[name].expand(rows, columns).sum()) if name in removed else 0)
        scales = SCALE_BITS / (point.group or columns) if point.bits < FULL_BITS else 0.0
        dense = point.pattern == "rows" or not point.sparsity
        kept = 1.0 if dense else 1.0 - point.sparsity
        index = 0.0 if dense else min(1.0, 2.0 * kept) if point.pattern == "n:4" else 1.0
        bits += stored * (kept * point.bits + index + scales)
    layers = len(decoder_layers(model))
    changed = {Change.DROPPED: -point.layers, Change.INSERTED: point.layers}.get(point.change, 0)
    return bits / (FULL_BITS * total) * (layers + changed) / layers
