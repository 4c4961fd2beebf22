"""Low-rank products of a step on a CPU: one for each adapter over the rows that use it.

vLLM 0.32 copies an adapter's factors once for every row (`vllm/lora/ops/torch_ops/lora_ops.py`), and takes the last
slot's for rows without an adapter. Here rows are grouped by adapter once a step, rows without one are not touched, and
the zeros with which vLLM pads factors to --max-lora-rank are not multiplied.

With few rows the calls take the time, or reading the factors does, but not the arithmetic. So the slices of a fused
layer (q, k, v; gate, up) are copied side by side, and small layers are multiplied in float32: a bfloat16 product of
oneDNN takes about 15 µs whatever its size, a float32 product of MKL 3 to 10. Larger layers are multiplied in bfloat16
where the processor can, which reads half of the bytes; second factors are the blocks of one matrix, whose zeros cost
less than further calls. Everything else is multiplied in the factors' own type, in place.

Rounding: float32 sums in all forms; vLLM rounds the hidden values and the change to the model's type before it adds, as
the packed form does; the float32 form rounds once, after the addition.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from hemostat_engine.product import multiplies_bfloat16, packed, times_packed

MAX_JOINED_ROWS = 24
MAX_JOINED_ELEMENTS = 1 << 19
"""The largest number of elements in a layer's factors that are copied side by side: above it reading them takes longer
than the calls.
"""
MIN_PACKED_ELEMENTS = 1 << 17
"""The least number of elements in a layer's factors that are multiplied in packed bfloat16."""


@dataclass(frozen=True, slots=True)
class Group:
    """The rows that use the adapter in `slot`: `start` to `stop`, or `index` (int64) where they are not consecutive."""

    slot: int
    start: int
    stop: int
    index: torch.Tensor | None = None

    def of(self, x: torch.Tensor) -> torch.Tensor:
        """Returns these rows of [N, …]: a view, or a copy where they are not consecutive."""
        if self.index is not None:
            return x.index_select(0, self.index)
        return x if self.stop - self.start == x.shape[0] else x[self.start : self.stop]


@dataclass(frozen=True, slots=True)
class Plan:
    """The grouping of `rows` rows; no group: no row uses an adapter."""

    groups: tuple[Group, ...] = ()
    rows: int = 0


def plan(slots: Sequence[int]) -> Plan:
    """Returns the groups of rows by adapter. slots: the slot of every row; below 0: it has no adapter.

    >>> [(g.slot, g.start, g.stop, g.index) for g in plan([1, 1, -1]).groups]
    [(1, 0, 2, None)]
    >>> plan([-1, -1]).groups
    ()
    """
    by_slot: dict[int, list[int]] = {}
    for row, slot in enumerate(slots):
        if slot >= 0:
            by_slot.setdefault(slot, []).append(row)
    groups = []
    for slot, rows in by_slot.items():
        consecutive = rows[-1] - rows[0] + 1 == len(rows)
        index = None if consecutive else torch.tensor(rows, dtype=torch.int64)
        groups.append(Group(slot, rows[0], rows[-1] + 1, index))
    return Plan(tuple(groups), len(slots))


@dataclass(frozen=True, slots=True)
class Slice:
    """One slice of a layer without its padding. a: [r, inputs]; b: [outputs, r]; columns `start` to `stop` of y."""

    a: torch.Tensor
    b: torch.Tensor
    start: int
    stop: int


@dataclass(frozen=True, slots=True)
class Float32:
    """A layer's slices side by side. a: [inputs, Σ r]; b: [r, outputs] of each slice; columns `start` to `stop`."""

    a: torch.Tensor
    b: tuple[torch.Tensor, ...]
    ranks: tuple[int, ...]
    start: int
    stop: int

    def change(self, rows: torch.Tensor, scale: float) -> torch.Tensor:
        """Returns scale · rows · a · b, float32 [R, stop − start]."""
        hidden = torch.mm(rows.float(), self.a)
        if scale != 1.0:
            hidden.mul_(scale)
        if len(self.b) == 1:
            return torch.mm(hidden, self.b[0])
        parts = hidden.split(self.ranks, 1)
        return torch.cat([torch.mm(part, b) for part, b in zip(parts, self.b, strict=True)], 1)


@dataclass(frozen=True, slots=True)
class Packed:
    """A layer's slices side by side, as packed matrices: a is [Σ r, inputs], b is [Σ outputs, Σ r]; columns `start` to
    `stop`.
    """

    a: torch.Tensor
    b: torch.Tensor
    start: int
    stop: int

    def change(self, rows: torch.Tensor, scale: float) -> torch.Tensor:
        """Returns scale · rows · a · b, bfloat16 [R, stop − start]."""
        hidden = times_packed(rows.bfloat16(), self.a)
        if scale != 1.0:
            hidden.mul_(scale)
        return times_packed(hidden, self.b)


@dataclass(frozen=True, slots=True)
class Factors:
    """One adapter's factors of one layer. It has no slices if the adapter has none here. joined: for few rows."""

    slices: tuple[Slice, ...] = ()
    joined: Float32 | Packed | None = None


@dataclass(slots=True)
class _Entry:
    source: Any
    """The tensors that the entry was made of. Keeping them alive lets their id stay theirs."""
    first: torch.Tensor
    version: int
    factors: Factors


@dataclass(slots=True)
class FactorCache:
    """The factors by layer and slot, read again when vLLM has written to its buffers."""

    _entries: dict[tuple[int, int], _Entry] = field(default_factory=dict)

    def get(self, a: Any, b: Any, slot: int, output_slices: Sequence[int]) -> Factors:
        """Returns the factors of one slot.

        a, b: tuples of a layer's buffers [slots, 1, r, inputs] and [slots, 1, outputs, r], or without the second
        dimension; they must be the same objects at every call.
        """
        entry = self._entries.get((id(a), slot))
        if entry is not None and entry.version == entry.first._version:
            return entry.factors
        factors = read_factors(a, b, slot, output_slices)
        first = a[0]
        # vLLM writes every slice of a slot at once, so the first one's counter is that of all. Without a counter
        # (tensors made in inference mode) nothing is kept.
        if not first.is_inference():
            self._entries[id(a), slot] = _Entry(a, first, first._version, factors)
        return factors


def true_rank(a: torch.Tensor, b: torch.Tensor) -> int:
    """Returns the rank without the zeros at the end; a: [r, inputs], b: [outputs, r]."""
    used = (a != 0).any(dim=1) & (b != 0).any(dim=0)
    result = used.nonzero()
    return int(result[-1]) + 1 if len(result) else 0


def read_factors(a: Any, b: Any, slot: int, output_slices: Sequence[int]) -> Factors:
    """Returns the factors of the adapter in `slot`."""
    slices, start = [], 0
    for a_slots, b_slots, outputs in zip(a, b, output_slices, strict=True):
        slot_a, slot_b = matrix(a_slots, slot), matrix(b_slots, slot)
        rank = true_rank(slot_a, slot_b)
        if rank:
            slices.append(Slice(slot_a[:rank], slot_b[:outputs, :rank], start, start + outputs))
        start += outputs
    if not slices:
        return Factors()
    elements = sum(s.a.numel() + s.b.numel() for s in slices)
    # Side by side only where the slices with factors are neighbours, so that one addition does for all.
    adjacent = all(left.stop == right.start for left, right in itertools.pairwise(slices))
    joined = _join(slices, elements) if elements <= MAX_JOINED_ELEMENTS and adjacent else None
    return Factors(tuple(slices), joined)


def _join(slices: Sequence[Slice], elements: int) -> Float32 | Packed:
    a, start, stop = torch.cat([s.a for s in slices]), slices[0].start, slices[-1].stop
    if elements >= MIN_PACKED_ELEMENTS and a.dtype is torch.bfloat16 and multiplies_bfloat16():
        return Packed(packed(a), packed(torch.block_diag(*(s.b for s in slices))), start, stop)
    return Float32(
        a.T.float().contiguous(),
        tuple(s.b.T.float().contiguous() for s in slices),
        tuple(len(s.a) for s in slices),
        start,
        stop,
    )


def matrix(slots: torch.Tensor, slot: int) -> torch.Tensor:
    """Returns one slot of [slots, 1, m, n] or [slots, m, n]."""
    result = slots[slot]
    return result[0] if result.ndim == 3 else result


def add_product(y: torch.Tensor, x: torch.Tensor, group: Group, factors: Factors, scale: float) -> None:
    """Adds scale · x[rows] aᵀ bᵀ to y[rows], in place. x: [N, inputs]; y: [N, all outputs]."""
    if not factors.slices:
        return
    rows = group.of(x)
    joined = factors.joined
    if joined is not None and rows.shape[0] <= MAX_JOINED_ROWS:
        add_rows(y, joined.change(rows, scale), group, joined.start, joined.stop)
        return
    for part in factors.slices:
        hidden = torch.mm(rows, part.a.T)
        if scale != 1.0:
            hidden.mul_(scale)
        if group.index is None:
            y[group.start : group.stop, part.start : part.stop].addmm_(hidden.to(y.dtype), part.b.T.to(y.dtype))
        else:
            add_rows(y, torch.mm(hidden, part.b.T), group, part.start, part.stop)


def add_rows(y: torch.Tensor, change: torch.Tensor, group: Group, start: int, stop: int) -> None:
    """Adds `change` to y[rows, start:stop], in place."""
    target = y if stop - start == y.shape[1] else y[:, start:stop]
    if group.index is not None:
        target.index_add_(0, group.index, change.to(y.dtype))
    elif group.stop - group.start == y.shape[0]:
        target.add_(change)
    else:
        target[group.start : group.stop].add_(change)
