"""`plan.json`: bits, group size and sparsity of each linear layer, for one source checkpoint.

`hemostat doctor --plan` writes it, `hemostat compress --plan` carries it out.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final, Literal

import msgspec

from hemostat_lab.models.checkpoint_folders import CompressError

SCHEMA: Final = "hemostat-plan"
VERSION: Final = 1

Pattern = Literal["unstructured", "2:4", "rows"]
DENSE_BITS = 16
BITS = (2, 3, 4, 5, 6, 7, 8, DENSE_BITS)
PACKED_BITS = (4, 8)
"""The widths that vLLM serves packed; layers of other widths are written dense, rounded."""
SCALE_BYTES = 2
"""The bytes of one scale: bfloat16 or float16, as in the source. A scale of 4-bit floats takes 1."""
FP4_GROUPS = {"nvfp4": 16, "mxfp4": 32}
"""Inputs that share a scale."""

_FUSED = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))


class LayerPlan(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The plan of one linear layer.

    bits: 2 to 8, or 16: not quantized. group_size: the number of inputs that share a scale; None: one scale per output
    channel. kind: integers, or 4-bit floats in groups of 16 (`nvfp4`) or 32 (`mxfp4`). sparsity: the part of the
    weights that is set to zero, 0 to below 1. pattern: the pattern of the zeros; `2:4` has sparsity 0.5.
    """

    bits: int
    group_size: int | None = None
    sparsity: float = 0.0
    pattern: Pattern = "unstructured"
    kind: Literal["int", "nvfp4", "mxfp4"] = "int"

    @property
    def name(self) -> str:
        """Such as `4 bits, groups of 64`."""
        if self.kind != "int":
            return self.kind.upper()
        grouping = "by channel" if self.group_size is None else f"groups of {self.group_size}"
        parts = ["16 bits" if self.bits == DENSE_BITS else f"{self.bits} bits, {grouping}"]
        if self.sparsity:
            parts.append(f"{100 * self.sparsity:g} % zeros, {self.pattern}")
        return ", ".join(parts)


class Plan(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """source: `checkpoint_digest` of the folder that it is for. layers: every linear layer but the head, by its name
    in the model. bytes: of these layers' weights and scales when stored (`stored_bytes`). made_from: how it was chosen,
    for people."""

    source: str
    layers: dict[str, LayerPlan]
    bytes: int
    made_from: dict[str, Any]
    schema: Literal["hemostat-plan"] = SCHEMA
    version: Literal[1] = VERSION


class _Read(msgspec.Struct, forbid_unknown_fields=True):
    """A plan as it is read. It is like `Plan`, but the layers are decoded one by one, so that an error can name the
    layer."""

    schema: str
    version: int
    source: str
    layers: dict[str, msgspec.Raw]
    bytes: int
    made_from: dict[str, Any]


def read_plan(path: Path) -> Plan:
    """Raises CompressError, with the field and the layer, for everything that is no plan."""
    where = f"--plan: {path}"
    try:
        read = msgspec.json.decode(path.read_bytes(), type=_Read)
    except OSError as error:
        raise CompressError(
            f"{where} cannot be read ({error.strerror}); name a file that doctor --plan wrote"
        ) from None
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise CompressError(f"{where} is no plan: {error}; let doctor --plan write it") from None
    if (read.schema, read.version) != (SCHEMA, VERSION):
        raise CompressError(
            f"{where}: schema is {read.schema!r}, version {read.version}: this Hemostat reads {SCHEMA!r}, version "
            f"{VERSION}; let doctor --plan write it again"
        )
    if not read.layers:
        raise CompressError(f"{where}: layers is empty; let doctor --plan write it again")
    layers = {name: _read_layer(raw, f"{where}: layer {name}") for name, raw in read.layers.items()}
    return Plan(read.source, layers, read.bytes, read.made_from)


def encode_plan(plan: Plan) -> str:
    """The content of the file."""
    return msgspec.json.format(msgspec.json.encode(plan), indent=1).decode() + "\n"


def check_plan(plan: Plan, source: str, shapes: Mapping[str, tuple[int, int]]) -> None:
    """Raises CompressError unless the plan is for this checkpoint.

    source: its `checkpoint_digest`. shapes: (outputs, inputs) of every linear layer but the head.
    """
    if plan.source != source:
        raise CompressError(
            f"--plan: source is {plan.source}, SOURCE has the digest {source}: the plan is for another checkpoint; let "
            "doctor --plan write one for this"
        )
    for name in [*(shapes.keys() - plan.layers.keys()), *(plan.layers.keys() - shapes.keys())]:
        problem = "is not in layers" if name in shapes else "is in layers, and SOURCE does not have it"
        raise CompressError(f"--plan: layer {name} {problem}; let doctor --plan write the plan for this checkpoint")
    for name, layer in plan.layers.items():
        inputs = shapes[name][1]
        if layer.group_size is not None and inputs % layer.group_size:
            raise CompressError(
                f"--plan: layer {name}: group_size is {layer.group_size}, which does not divide its {inputs} inputs"
            )
        if layer.sparsity and layer.pattern == "2:4" and inputs % 4:
            raise CompressError(f"--plan: layer {name}: pattern is 2:4, and its {inputs} inputs are no multiple of 4")
    total = sum(stored_bytes(*shapes[name], layer) for name, layer in plan.layers.items())
    if total != plan.bytes:
        raise CompressError(f"--plan: bytes is {plan.bytes}, its layers have {total}; let doctor --plan write it again")


def stored_bytes(outputs: int, inputs: int, layer: LayerPlan) -> int:
    """Returns the size of a weight [outputs, inputs] and its scales: `bits` per kept weight, `SCALE_BYTES` per scale.

    A sparse weight also needs one bit per weight for the places of the zeros (`rows`: nothing, its rows are absent).
    This is the size in a format made for the width: widths that vLLM does not pack are written dense, and take more.
    """
    rows = outputs - round(outputs * layer.sparsity) if layer.pattern == "rows" else outputs
    weights = rows * inputs
    bits = weights * layer.bits
    if layer.sparsity and layer.pattern != "rows":
        bits = (weights - int(weights * layer.sparsity)) * layer.bits + weights
    groups = 0 if layer.bits == DENSE_BITS else 1 if layer.group_size is None else inputs // layer.group_size
    return math.ceil(bits / 8) + rows * groups * (SCALE_BYTES if layer.kind == "int" else 1)


def fused_name(layer: str) -> str:
    """The module in which vLLM fuses a layer with others, which must all have one scheme; else the layer's own name.

    >>> fused_name("model.layers.0.self_attn.k_proj"), fused_name("model.layers.0.mlp.down_proj")
    ('model.layers.0.self_attn.q_proj+k_proj+v_proj', 'model.layers.0.mlp.down_proj')
    """
    parent, dot, kind = layer.rpartition(".")
    return next((f"{parent}{dot}{'+'.join(kinds)}" for kinds in _FUSED if kind in kinds), layer)


def _read_layer(raw: msgspec.Raw, where: str) -> LayerPlan:
    try:
        layer = msgspec.json.decode(raw, type=LayerPlan)
    except msgspec.MsgspecError as error:
        raise CompressError(f"{where} is none ({error}); let doctor --plan write it again") from None
    if layer.bits not in BITS:
        raise CompressError(f"{where}: bits is {layer.bits}: it must be 2 to 8, or 16")
    if layer.group_size is not None and (layer.group_size < 1 or layer.bits == DENSE_BITS):
        problem = "with 16 bits there are no groups" if layer.bits == DENSE_BITS else "it must be positive, or null"
        raise CompressError(f"{where}: group_size is {layer.group_size}: {problem}")
    if layer.kind != "int" and (layer.bits, layer.group_size, layer.sparsity) != (4, FP4_GROUPS[layer.kind], 0.0):
        raise CompressError(
            f"{where}: kind is {layer.kind}: it has 4 bits, group_size {FP4_GROUPS[layer.kind]} and no sparsity"
        )
    if not 0.0 <= layer.sparsity < 1.0:
        raise CompressError(f"{where}: sparsity is {layer.sparsity:g}: it must be from 0 to below 1")
    if layer.pattern == "2:4" and layer.sparsity not in (0.0, 0.5):
        raise CompressError(f"{where}: sparsity is {layer.sparsity:g}: with the pattern 2:4 it is 0.5")
    return layer
