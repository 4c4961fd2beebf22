"""The grid: what is done to the reference at each point, and the curves that the points form."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from enum import StrEnum
from typing import Literal

from hemostat_lab.doctor.options import Axis

Pattern = Literal["unstructured", "n:4", "rows"]
FULL_BITS = 16
GROUP_SIZE = 64


class Change(StrEnum):
    """What is done to the list of layers."""

    NONE = "none"
    DROPPED = "dropped"
    DUPLICATED = "duplicated"
    INSERTED = "inserted"


@dataclass(frozen=True, slots=True)
class Drawing:
    """The decoding strategy. temperature 0: greedy. top_p 1, top_k 0: no cut."""

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0

    @property
    def name(self) -> str:
        """Empty for sampling at temperature 1."""
        if self.temperature == 0.0:
            return "greedy"
        parts = [] if self.temperature == 1.0 else [f"temperature {self.temperature:g}"]
        parts += [] if self.top_p == 1.0 else [f"top-p {self.top_p:g}"]
        return ", ".join([*parts, *([f"top-k {self.top_k}"] if self.top_k else [])])


PLAIN = Drawing()


@dataclass(frozen=True, slots=True)
class Point:
    """Pruned first, then rounded (zeros stay zero), then the layers are changed, then the decoding is.

    group: inputs that share a scale; None: a whole row. layers: how many are changed.
    """

    bits: int = FULL_BITS
    group: int | None = GROUP_SIZE
    sparsity: float = 0.0
    pattern: Pattern = "unstructured"
    change: Change = Change.NONE
    layers: int = 0
    drawing: Drawing = PLAIN

    @property
    def name(self) -> str:
        parts = []
        if self.bits < FULL_BITS:
            groups = "" if self.group == GROUP_SIZE else f", groups of {self.group}" if self.group else ", by row"
            parts.append(f"{self.bits} bits{groups}")
        if self.sparsity:
            pattern = f"{round(4 * (1 - self.sparsity))}:4" if self.pattern == "n:4" else self.pattern
            parts.append(f"{100 * self.sparsity:g} % {pattern}")
        if self.layers:
            parts.append(f"{self.layers} layer{'s' if self.layers > 1 else ''} {self.change.value}")
        return " + ".join([*parts, *([self.drawing.name] if self.drawing.name else [])]) or "unchanged"

    @property
    def changes_weights(self) -> bool:
        return self.bits < FULL_BITS or self.sparsity > 0.0

    @property
    def only_decoding(self) -> bool:
        """Such a point is compared with the reference sampled at temperature 1, others with the reference decoded in
        the same way."""
        return self.drawing != PLAIN and self == Point(drawing=self.drawing)


UNCHANGED = Point()


@dataclass(frozen=True, slots=True)
class Line:
    """Points of one kind, from the least to the most compressed. settings: their positions; the unchanged model's is
    0. shown: the same as people name them (`4` bits)."""

    name: str
    unit: str
    points: Sequence[Point]
    settings: Sequence[float]
    shown: Sequence[float]


BITS = (8, 7, 6, 5, 4, 3, 2)
UNSTRUCTURED = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)
N_OF_4 = (0.25, 0.5, 0.75)
ROWS = (0.1, 0.2, 0.3, 0.4, 0.4375, 0.5, 0.6, 0.7)
"""0.4375 has the bytes of 2:4."""
DRAWINGS = (
    Drawing(0.0), Drawing(0.5), Drawing(0.7), Drawing(1.3), Drawing(top_p=0.9), Drawing(top_p=0.5), Drawing(top_k=50),
    Drawing(top_k=5),
)  # fmt: skip
QUANTIZATION, UNSTRUCTURED_PRUNING, SEMI_STRUCTURED, STRUCTURED = (
    "quantization",
    "unstructured pruning",
    "semi-structured pruning",
    "structured pruning",
)


def lines(axes: Sequence[Axis], layers: int) -> list[Line]:
    """The curves of the chosen axes. layers: of the model."""
    result = []
    if Axis.BITS in axes:
        points = [Point(bits=bits) for bits in BITS]
        result.append(Line(QUANTIZATION, "bits", points, [float(FULL_BITS - bits) for bits in BITS], BITS))
    if Axis.SPARSITY in axes:
        patterns: tuple[tuple[str, Pattern, tuple[float, ...]], ...] = (
            (UNSTRUCTURED_PRUNING, "unstructured", UNSTRUCTURED),
            (SEMI_STRUCTURED, "n:4", N_OF_4),
            (STRUCTURED, "rows", ROWS),
        )
        for name, pattern, shares in patterns:
            points = [Point(sparsity=share, pattern=pattern) for share in shares]
            result.append(Line(name, "sparsity", points, shares, shares))
    if Axis.STRUCTURE in axes:
        counts = [n for n in (1, 2, 3, 4, 6, 8) if n <= layers // 2]
        for change in (Change.DROPPED, Change.DUPLICATED, Change.INSERTED):
            points = [Point(change=change, layers=n) for n in counts]
            shown = [float(n) for n in counts]
            result.append(Line(f"layers {change.value}", "layers", points, shown, shown))
    return result


def grid(axes: Sequence[Axis], layers: int) -> list[Point]:
    """Every point once, the unchanged model first."""
    result = [UNCHANGED, *(point for line in lines(axes, layers) for point in line.points)]
    if Axis.BITS in axes:
        result += [Point(bits=bits, group=group) for bits in (4, 3) for group in (32, 128, None)]
    if Axis.DECODING in axes:
        result += [Point(drawing=drawing) for drawing in DRAWINGS]
    if Axis.COMBINATIONS in axes:
        result += [Point(bits=bits, sparsity=share) for bits in (8, 4, 3) for share in (0.3, 0.5)]
        chosen = (Drawing(0.0), Drawing(0.7), Drawing(top_p=0.9), Drawing(top_k=50))
        result += [replace(at, drawing=d) for at in (Point(bits=4), Point(sparsity=0.3)) for d in chosen]
    return list(dict.fromkeys(result))
