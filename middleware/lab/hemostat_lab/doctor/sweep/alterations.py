"""The changes that a point of the sweep makes to a model in memory, for a while. Torch.

Its weights are pruned and rounded: only the linear layers inside of the decoder layers change, and scores are
magnitudes, so that no text is needed. Or it answers with the distribution that a decoding strategy draws from, or some
of its decoder layers are dropped, duplicated or inserted.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from hemostat_calibration.errors import HemostatError
from hemostat_lab.compression.rounding import pruned, rounded
from hemostat_lab.doctor.causes.units import decoder_layers, layer_list
from hemostat_lab.doctor.kl_meter import altered_weights
from hemostat_lab.doctor.options import DoctorError
from hemostat_lab.doctor.sweep.points import FULL_BITS, PLAIN, Change, Drawing, Point

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


def decode(logits: torch.Tensor, drawing: Drawing) -> torch.Tensor:
    """Logits [..., V] of the distribution that is drawn from, -inf where it is cut.

    Temperature, then top-k (with what ties with the last), then of these the fewest that hold top-p, as vLLM does.
    Greedy: the likeliest id alone.
    """
    if drawing == PLAIN:
        return logits
    if drawing.temperature == 0.0:
        best = logits.argmax(-1, keepdim=True)
        return torch.full_like(logits, -torch.inf).scatter(-1, best, 0.0)
    logits = logits / drawing.temperature
    if drawing.top_k:
        least = logits.topk(min(drawing.top_k, logits.shape[-1]), dim=-1).values[..., -1:]
        logits = logits.masked_fill(logits < least, -torch.inf)
    if drawing.top_p < 1.0:
        ordered, ids = logits.float().sort(dim=-1, descending=True, stable=True)
        p = torch.softmax(ordered, -1)
        before = p.cumsum(-1) - p
        cut = torch.zeros_like(logits, dtype=torch.bool).scatter(-1, ids, before >= drawing.top_p)
        logits = logits.masked_fill(cut, -torch.inf)
    return logits


@contextmanager
def drawn(model: Any, drawing: Drawing) -> Iterator[None]:
    """The model answers with the logits of the distribution that is drawn from."""
    if drawing == PLAIN:
        yield
        return

    def hook(module: Any, arguments: Any, output: Any) -> Any:
        output.logits = decode(output.logits, drawing)
        return output

    handle = model.register_forward_hook(hook)
    try:
        yield
    finally:
        handle.remove()


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
