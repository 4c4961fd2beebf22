"""What is built and measured: compressions, texts, and the variants of adapters for each."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Texts:
    """How many prompts are answered by the compressed model itself, at temperature 1."""

    heldout: int
    learning: int


_TEXTS: Mapping[str, Texts] = {
    "w4a16": Texts(240, 1200),
    "gptq": Texts(160, 160),
    "awq": Texts(160, 160),
    # Three bits leave of this model one that soon has nothing more to say.
    "int3": Texts(480, 480),
    "prune50": Texts(160, 160),
    "w8a8": Texts(160, 160),
}


@dataclass(frozen=True, slots=True)
class Variant:
    """One adapter. metric: of `hemostat adapt`. shared_out: rank's bytes are shared out between layers by what each
    byte wins. tokens: learned from, prompts included. distilled: trained on so many tokens afterwards; 0: not. mixed:
    learned from texts of all kinds, not from open questions alone."""

    rank: int
    tokens: int
    metric: str
    shared_out: bool = False
    distilled: int = 0
    mixed: bool = False

    @property
    def method(self) -> str:
        sharing = "shared out" if self.shared_out else "uniform"
        distilled = f", distilled on {self.distilled}" if self.distilled else ""
        return f"{self.metric}, {sharing}{distilled}{', from all kinds' if self.mixed else ''}"

    @property
    def label(self) -> str:
        return f"rank {self.rank}, {self.method}, {self.tokens} tokens"


def _variants(*rows: tuple[int, int, str, bool]) -> tuple[Variant, ...]:
    return tuple(Variant(rank, tokens, metric, shared) for rank, tokens, metric, shared in rows)


FEW, SOME = 2_000, 10_000

_VARIANTS: Mapping[str, tuple[Variant, ...]] = {
    "w4a16": (
        *_variants(
            (16, FEW, "full", False),
            (1, SOME, "full", False),
            (16, SOME, "full", False),
            (64, SOME, "full", False),
            (16, FEW, "kfac", True),
            (16, FEW, "kfac", False),
            (64, FEW, "kfac", True),
        ),
        Variant(16, FEW, "kfac", distilled=80_000),
        # Beside what is asked of the adapters:
        *_variants(
            (1, FEW, "kfac", True),
            (4, FEW, "kfac", True),
            (4, SOME, "full", False),
            (8, SOME, "full", False),
            (32, SOME, "full", False),
            (16, FEW, "diagonal", False),
        ),
    ),
    "gptq": _variants((16, FEW, "kfac", True), (64, FEW, "kfac", True), (16, FEW, "full", False)),
    "awq": _variants(
        (16, FEW, "full", False), (64, FEW, "full", False), (16, FEW, "kfac", True), (64, FEW, "kfac", True)
    ),
    **{scheme: _variants((16, FEW, "full", False), (16, FEW, "kfac", True)) for scheme in ("int3", "prune50", "w8a8")},
}

SERVED = (
    Variant(16, FEW, "kfac", shared_out=True),
    Variant(64, FEW, "kfac", shared_out=True),
    Variant(16, FEW, "kfac", distilled=80_000),
    Variant(16, FEW, "kfac", shared_out=True, mixed=True),
)
"""The adapters that the engine serves, one after the other; all is said of the first."""
BEST = Variant(64, FEW, "kfac", shared_out=True)
"""The one that a map is learned on top of."""


@dataclass(frozen=True, slots=True)
class Plan:
    """heldout_tokens: of topics that nothing is learned from. served: by the engine. mixed: texts of all kinds to learn
    from. best: that a contextual map is learned on top of, from `map_tokens` tokens. pareto: also measure the same
    bytes spent on more bits."""

    texts: Mapping[str, Texts]
    variants: Mapping[str, tuple[Variant, ...]]
    heldout_tokens: int
    served: tuple[Variant, ...]
    mixed: int
    best: Variant | None
    map_tokens: int
    pareto: bool


FULL = Plan(_TEXTS, _VARIANTS, 10_000, SERVED, 60, BEST, 40_000, pareto=True)
QUICK = Plan(
    {"w4a16": Texts(30, 60)}, {"w4a16": _variants((16, FEW, "full", False))}, 1_000, (), 0, None, 0, pareto=False
)
