"""Pruned and repaired checkpoints: ours, what they replaced, and llmcompressor's SparseGPT and Wanda."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from tests.bench.llmcompressor import PRUNE
from tests.bench.recovery.log import say

from hemostat_lab.compression.calibrated import CALIBRATIONS, Calibrated
from hemostat_lab.compression.formats import WeightFormat
from hemostat_lab.compression.frame import LayerData, LayerResult, Run
from hemostat_lab.compression.methods import EachWeight, prune_by_magnitude, without_texts
from hemostat_lab.compression.plan import LayerPlan
from hemostat_lab.compression.pruning.dense_model import measure_gradients
from hemostat_lab.compression.pruning.method import PruneMethod, PruneOptions
from hemostat_lab.compression.pruning.weights import Pattern
from hemostat_lab.compression.repair import write_repaired_copy
from hemostat_lab.models.checkpoint_folders import REPAIR
from hemostat_lab.models.training import summary_line

from .cases import Bench, Case, Must

NAME = "pruning"
SPARSITIES = (0.3, 0.5, 0.6)
SPARSITIES_OF_ROWS = (0.2, 0.3)
SEEDS = (1, 2)
"""Of other texts to calibrate on, besides the benchmark's own."""
PEERS = ("sparsegpt", "wanda")
PEERS_AT = ((0.5, Pattern.UNSTRUCTURED), (0.6, Pattern.UNSTRUCTURED), (0.5, Pattern.TWO_OF_FOUR))
W4A16 = "W4A16 nearest"
GROUP_SIZE = 64
HALF = PruneOptions(0.5)
TWO_OF_FOUR = PruneOptions(0.5, Pattern.TWO_OF_FOUR)
UNIFORM, QUERIES = "50 % unstructured, in every layer", "50 % unstructured, q_proj only"
MORE_TEXTS = "50 % unstructured, repaired, more texts"
KL_AT_HALF, KL_OF_QUERIES = 0.62, 0.03
"""At most."""
GAIN_AT_HALF = 0.10
"""At least, of gradients."""


class Uniform(PruneMethod):
    """Every layer whose name ends with `kinds` has the sparsity; the others stay as they are."""

    kinds: tuple[str, ...] = ("",)

    def prepare(self, run: Run) -> None:
        measure_gradients(run)

    def compress_layer(self, layer: LayerData) -> LayerResult:
        result = super().compress_layer(layer)
        names = [name for name in layer.linears if name.endswith(self.kinds)]
        weights = {f"{name}.weight": result.weights[f"{name}.weight"] for name in names}
        return LayerResult(weights, {name: result.report[name] for name in names})


class Queries(Uniform):
    """Layer 18 has two heads whose attention is saturated: their rows have no gradients."""

    kinds = ("q_proj",)


def cases(bench: Bench) -> Sequence[Case]:
    result = []
    for options in (*map(PruneOptions, SPARSITIES), TWO_OF_FOUR):
        result += [_case(bench, options), _case(bench, options, by_inputs=True)]
    result += [_case(bench, PruneOptions(sparsity, Pattern.ROWS)) for sparsity in SPARSITIES_OF_ROWS]
    for seed, options, by_inputs in itertools.product(SEEDS, (HALF, TWO_OF_FOUR), (False, True)):
        result.append(_case(bench, options, by_inputs, seed))
    size = bench.size(LayerPlan(16, None, 0.5))
    result.append(Case(UNIFORM, size, lambda folder: bench.ours(Uniform(HALF), folder)))
    result.append(Case(QUERIES, size, lambda folder: bench.ours(Queries(HALF), folder), KL_OF_QUERIES))
    for sparsity in SPARSITIES:
        magnitude = EachWeight({"magnitude": sparsity}, prune_by_magnitude(sparsity))
        size = bench.size(LayerPlan(16, None, sparsity))
        result.append(Case(_magnitude(sparsity), size, partial(bench.ours, magnitude)))
    for peer, (sparsity, pattern) in itertools.product(PEERS, PEERS_AT):
        size = bench.size(LayerPlan(16, None, sparsity, pattern.value))
        result.append(Case(_peer(peer, sparsity, pattern), size, partial(_by_peer, bench, peer, sparsity, pattern)))
    rounded = without_texts(WeightFormat(4, GROUP_SIZE))
    w4a16 = Case(W4A16, bench.size(LayerPlan(4, GROUP_SIZE)), lambda folder: bench.ours(rounded, folder))
    half = _case(bench, HALF)
    repaired = [
        Case(f"{case.name}, repaired", case.size, partial(repaired_copy, bench, case), of=case.name)
        for case in (w4a16, half)
    ]
    make = partial(repaired_copy, bench, half, more_texts=True)
    more = Case(MORE_TEXTS, half.size, make, of=half.name, live=bench.live)
    return [*result, w4a16, *repaired, more]


def musts() -> Sequence[Must]:
    """Gradients are below inputs alone, and those below magnitude; zeros that are shared out are below as many in every
    layer; ours below the peers; repaired below what it was."""
    result = []
    for seed, (options, gain) in itertools.product((0, *SEEDS), ((HALF, GAIN_AT_HALF), (TWO_OF_FOUR, 0.0))):
        result.append(Must(_name(options, seed=seed), _name(options, by_inputs=True, seed=seed), gain))
    others = (PruneOptions(0.3), PruneOptions(0.6))
    result += [Must(_name(options), _name(options, by_inputs=True)) for options in others]
    result += [Must(UNIFORM, _name(HALF, by_inputs=True)), Must(_name(HALF), UNIFORM)]
    result += [Must(_name(PruneOptions(s), by_inputs=True), _magnitude(s)) for s in SPARSITIES]
    for peer, (sparsity, pattern) in itertools.product(PEERS, PEERS_AT):
        result.append(Must(_name(PruneOptions(sparsity, pattern)), _peer(peer, sparsity, pattern)))
    result += [Must(f"{name}, repaired", name) for name in (W4A16, _name(HALF))]
    return [*result, Must(MORE_TEXTS, f"{_name(HALF)}, repaired")]


def _case(bench: Bench, options: PruneOptions, by_inputs: bool = False, seed: int = 0) -> Case:
    """by_inputs: without gradients, as `--plan` prunes. seed: not 0: of other texts to calibrate on."""
    size = bench.size(LayerPlan(16, None, options.sparsity, options.pattern.value))
    limit = KL_AT_HALF if options == HALF and not by_inputs else None

    def make(folder: Path) -> None:
        seeded = bench if seed == 0 else bench.with_texts(seed)
        sparse = dict.fromkeys(bench.shapes, (options.sparsity, options.pattern))
        seeded.ours(Calibrated({}, CALIBRATIONS["clip"], sparse=sparse) if by_inputs else PruneMethod(options), folder)

    return Case(_name(options, by_inputs, seed), size, make, limit)


def _name(options: PruneOptions, by_inputs: bool = False, seed: int = 0) -> str:
    parts = [f"{100 * options.sparsity:.0f} % {options.pattern}"]
    return ", ".join([*parts, *["inputs alone"] * by_inputs, *[f"other texts {seed}"] * (seed != 0)])


def _magnitude(sparsity: float) -> str:
    return f"{100 * sparsity:.0f} % unstructured, magnitude"


def _peer(peer: str, sparsity: float, pattern: Pattern) -> str:
    return f"llmcompressor {100 * sparsity:.0f} % {pattern}, {peer}"


def _by_peer(bench: Bench, peer: str, sparsity: float, pattern: Pattern, folder: Path) -> None:
    bench.peer(PRUNE, folder, peer, str(sparsity), pattern.value)


def repaired_copy(bench: Bench, case: Case, folder: Path, more_texts: bool = False) -> None:
    """Of the case's checkpoint, from the texts that it was calibrated on. more_texts: and from live ones of the
    reference."""
    start, more = bench.made(case), bench.live_texts("reference", bench.reference) if more_texts else []
    with bench.environment(folder) as environment:
        report = write_repaired_copy(bench.reference, start, folder, [*bench.learn, *more], environment=environment)
    say(summary_line(report, REPAIR))
