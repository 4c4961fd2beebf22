"""Whole neurons and heads: rows and columns of several linear layers that are useless without each other.

A neuron of an MLP is a row of gate_proj and of up_proj and the column of down_proj that reads it; a head of attention
is its rows of q_proj and its columns of o_proj. Rows of k_proj and v_proj that no head reads any more are dropped, too.
The shapes stay: what is dropped is 0, since vLLM builds all layers of a model with one width.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from hemostat_calibration.allocation.sparsity import share_units
from hemostat_lab.models.checkpoint_folders import CompressError
from hemostat_lab.models.skeleton import CopyLinear, Skeleton


@dataclass(frozen=True, slots=True)
class Units:
    """Units of one kind in a decoder layer.

    writers: the linear layers of which a unit has rows. reader: the one of which it has columns. width: the number of
    rows, and of columns, of a unit. weights: the number of weights of a unit, without the weights of `shared`. shared:
    layers of which `sharing` consecutive units read the same rows.
    """

    writers: tuple[str, ...]
    reader: str
    width: int
    count: int
    weights: int
    shared: tuple[str, ...] = ()
    sharing: int = 1


def find_units(skeleton: Skeleton, layer: str) -> list[Units]:
    """Returns the units of a decoder layer. Raises CompressError if its linear layers have no known names."""
    linears = skeleton.linears_of(layer)
    all_units: list[Units] = []
    for name in linears:
        parent, _, kind = name.rpartition(".")
        if kind == "down_proj":
            all_units.append(_neurons(linears, parent))
        elif kind == "o_proj":
            all_units.append(_heads(skeleton, linears, parent))
    covered = {name for units in all_units for name in (*units.writers, units.reader, *units.shared)}
    if covered != set(linears):
        other = sorted(set(linears) - covered) or [layer]
        raise CompressError(
            f"--pattern rows: what reads the rows of {other[0]} is not known; it works with gate_proj, up_proj, "
            "down_proj and q_proj, k_proj, v_proj, o_proj: use another pattern"
        )
    return all_units


def _neurons(linears: Mapping[str, CopyLinear], parent: str) -> Units:
    writers = tuple(name for kind in ("gate_proj", "up_proj") if (name := f"{parent}.{kind}") in linears)
    reader = f"{parent}.down_proj"
    count = linears[reader].in_features
    _check(reader, count, [linears[name].out_features for name in writers])
    weights = sum(linears[name].in_features for name in writers) + linears[reader].out_features
    return Units(writers, reader, 1, count, weights)


def _heads(skeleton: Skeleton, linears: Mapping[str, CopyLinear], parent: str) -> Units:
    query, reader = f"{parent}.q_proj", f"{parent}.o_proj"
    shared = tuple(name for kind in ("k_proj", "v_proj") if (name := f"{parent}.{kind}") in linears)
    width = getattr(skeleton.model.get_submodule(parent), "head_dim", None)
    if query not in linears or len(shared) != 2 or not isinstance(width, int):
        raise CompressError(f"--pattern rows: the heads of {parent} are not known: use another pattern")
    count = linears[reader].in_features // width
    _check(reader, count * width, [linears[query].out_features])
    groups = linears[shared[0]].out_features // width
    weights = width * (linears[query].in_features + linears[reader].out_features)
    return Units((query,), reader, width, count, weights, shared, count // groups)


def _check(reader: str, wanted: int, output_counts: list[int]) -> None:
    if not output_counts or any(outputs != wanted for outputs in output_counts):
        raise CompressError(f"--pattern rows: {reader} does not read each row of the layers before it: not supported")


def unit_scores(units: Units, weight: torch.Tensor, squares: torch.Tensor) -> torch.Tensor:
    """Float32 [count]: by unit the sum of w² Σ x² of its columns (Wanda, Sun et al. 2023, arXiv 2306.11695). weight: of
    the reader, [out, in]. squares: Σ x² of its inputs, [in]."""
    by_input = (weight.square() * squares.float()).sum(0)
    scores: torch.Tensor = by_input.unflatten(0, (units.count, units.width)).sum(1)
    return scores


def dropped_units(units: Sequence[Units], scores: Sequence[torch.Tensor], sparsity: float) -> Sequence[torch.Tensor]:
    """By kind which units of a decoder layer are dropped, bool [count], so that the part `sparsity` of its weights is.
    scores: by kind."""
    sizes = np.concatenate([np.full(kind.count, kind.weights, np.int64) for kind in units])
    lost = share_units(torch.cat(list(scores)).double().numpy(), sizes, sparsity)
    by_kind: Sequence[torch.Tensor] = torch.from_numpy(lost).split([kind.count for kind in units])
    return by_kind


def dropped_weights(
    units: Units, dropped: torch.Tensor, linears: Mapping[str, CopyLinear]
) -> Iterator[tuple[str, torch.Tensor]]:
    """By linear layer, which weights [out, in] are kept, bool, without the units `dropped`, bool [count]."""
    lost = dropped.repeat_interleave(units.width)
    unread = dropped.unflatten(0, (-1, units.sharing)).all(1).repeat_interleave(units.width)
    for name in (*units.writers, *units.shared, units.reader):
        shape = (linears[name].out_features, linears[name].in_features)
        if name == units.reader:
            yield name, (~lost).expand(shape)
        else:
            yield name, (~(unread if name in units.shared else lost))[:, None].expand(shape)
