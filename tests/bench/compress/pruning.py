"""Pruned and repaired checkpoints: ours, and llmcompressor's SparseGPT and Wanda."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path

from tests.bench.llmcompressor import PRUNE
from tests.bench.recovery.log import say

from hemostat.compression.checkpoint_writer import BuildEnvironment
from hemostat.compression.formats import WeightFormat
from hemostat.compression.methods import without_texts
from hemostat.compression.other_files import REPAIR
from hemostat.compression.plan import LayerPlan
from hemostat.compression.pruning.masks import Pattern, Score
from hemostat.compression.pruning.method import Budget, PruneOptions, prune_method
from hemostat.compression.repair import write_repaired_copy
from hemostat.models.training import summary_line

from .cases import Bench, Case, Must

NAME = "pruning"
SPARSITIES = (0.3, 0.5, 0.6)
SPARSITIES_OF_ROWS = (0.2, 0.3)
PEERS = ("sparsegpt", "wanda")
W4A16 = "W4A16 nearest"
GROUP_SIZE = 64


def cases(bench: Bench) -> Sequence[Case]:
    found = [_case(bench, options) for options in _options()]
    for method, pattern in itertools.product(PEERS, (Pattern.UNSTRUCTURED, Pattern.TWO_OF_FOUR)):
        size = bench.size(LayerPlan(16, None, 0.5, pattern.value))
        found.append(Case(_peer(method, pattern), size, partial(_by_peer, bench, method, pattern)))
    rounded = without_texts(WeightFormat(4, GROUP_SIZE), packed=True)
    w4a16 = Case(W4A16, bench.size(LayerPlan(4, GROUP_SIZE)), lambda folder: bench.ours(rounded, folder))
    pruned = _case(bench, PruneOptions(0.5))
    repaired = [Case(f"{case.name}, repaired", case.size, partial(_repaired, bench, case)) for case in (w4a16, pruned)]
    return [*found, w4a16, *repaired]


def musts() -> Sequence[Must]:
    """The default is below magnitude, and at 50 % not above the best of the peers; repaired is below what it was."""
    best = {sparsity: _name(PruneOptions(sparsity)) for sparsity in SPARSITIES}
    found = [Must(best[s], _name(PruneOptions(s, Score.MAGNITUDE, compensate=False))) for s in SPARSITIES]
    found += [Must(best[0.5], _peer(method, Pattern.UNSTRUCTURED), not_above=True) for method in PEERS]
    return [*found, *(Must(f"{name}, repaired", name) for name in (W4A16, best[0.5]))]


def _options() -> Iterator[PruneOptions]:
    """At 50 % every score with and without compensation; elsewhere magnitude as it is, and compensated scores."""
    for score, compensate in itertools.product(Score, (False, True)):
        yield PruneOptions(0.5, score, compensate=compensate)
    for sparsity in (sparsity for sparsity in SPARSITIES if sparsity != 0.5):
        yield PruneOptions(sparsity, Score.MAGNITUDE, compensate=False)
        yield PruneOptions(sparsity)
    for score in (Score.MAGNITUDE, Score.TAYLOR, Score.FISHER):
        yield PruneOptions(0.5, score, budget=Budget.GLOBAL)
    for pattern, sparsity in (
        (Pattern.TWO_OF_FOUR, 0.5),
        *((Pattern.ROWS, sparsity) for sparsity in SPARSITIES_OF_ROWS),
    ):
        yield PruneOptions(sparsity, Score.MAGNITUDE, pattern, compensate=False)
        for score in Score:
            yield PruneOptions(sparsity, score, pattern)


def _case(bench: Bench, options: PruneOptions) -> Case:
    size = bench.size(LayerPlan(16, None, options.sparsity, options.pattern.value))
    return Case(_name(options), size, lambda folder: bench.ours(prune_method(options), folder))


def _name(options: PruneOptions) -> str:
    parts = [f"{100 * options.sparsity:.0f} % {options.pattern}", options.score.value]
    if options.budget is Budget.GLOBAL:
        parts.append("global")
    return ", ".join([*parts, "compensated"] if options.compensate else parts)


def _peer(method: str, pattern: Pattern) -> str:
    return f"llmcompressor 50 % {pattern}, {method}"


def _by_peer(bench: Bench, method: str, pattern: Pattern, folder: Path) -> None:
    bench.peer(PRUNE, folder, method, "0.5", pattern.value)


def _repaired(bench: Bench, case: Case, folder: Path) -> None:
    """Of a checkpoint that is made for it, from the same texts."""
    start = folder.with_name(f"{folder.name}.start")
    if not start.exists():
        case.make(start)
    around = BuildEnvironment(work=folder.with_name(f"{folder.name}.work"), log=say, overwrite=True)
    say(summary_line(write_repaired_copy(bench.reference, start, folder, bench.learn, environment=around), REPAIR))
