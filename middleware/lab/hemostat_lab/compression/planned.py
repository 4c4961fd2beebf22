"""A plan (`plan.json`) as a method of compression."""

from __future__ import annotations

from collections import defaultdict

from hemostat_lab.compression.calibrated import Calibrated, Calibration
from hemostat_lab.compression.formats import WeightFormat
from hemostat_lab.compression.frame import Source
from hemostat_lab.compression.plan import DENSE_BITS, PACKED_BITS, LayerPlan, Plan, check_plan, fused_name
from hemostat_lab.compression.pruning.masks import Pattern


def planned(plan: Plan, source: Source, calibration: Calibration) -> tuple[Calibrated, list[str]]:
    """The method, and notes for people: what is written dense, and why. CompressError unless it is for `source`."""
    check_plan(plan, source.checkpoint.digest(), source.shapes)
    layers = {name: plan.layers[name] for name in source.shapes}
    rounded = {n: WeightFormat(p.bits, p.group_size, p.kind) for n, p in layers.items() if p.bits != DENSE_BITS}
    sparse = {n: (p.sparsity, Pattern(p.pattern)) for n, p in layers.items() if p.sparsity}
    mixed = mixed_fused(layers)
    widths = sorted({p.bits for p in layers.values()} - {*PACKED_BITS, DENSE_BITS})
    packed = frozenset(
        name for name in rounded if layers[name].bits in PACKED_BITS and name not in sparse and name not in mixed
    )
    notes = []
    if widths:
        notes.append(
            f"layers of {', '.join(map(str, widths))} bits are written dense: vLLM packs {PACKED_BITS} bits only"
        )
    if sparse:
        notes.append(f"{len(sparse)} layers with zeros are written dense: vLLM has no format for them")
    if mixed:
        notes.append(
            f"{len(mixed)} layers are written dense: vLLM fuses them with others that have another format, such as "
            f"{min(mixed)}; give q, k and v, and gate and up, the same bits and group size to have them packed"
        )
    return Calibrated(rounded, calibration, packed, sparse), notes


def mixed_fused(layers: dict[str, LayerPlan]) -> set[str]:
    """The layers that vLLM fuses with one of another format."""
    groups: dict[str, list[str]] = defaultdict(list)
    for name in layers:
        groups[fused_name(name)].append(name)
    return {name for names in groups.values() if len({layers[n] for n in names}) > 1 for name in names}
