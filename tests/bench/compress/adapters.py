"""Adapters on compressed checkpoints, beside the same bytes spent on more bits: is any on the front of bytes and KL?

An adapter is made as `hemostat adapt --shared-out` does, from the texts that the checkpoint was calibrated on. Those
that are trained (`--distil`) go on with live texts: of other prompts, written by the compressed checkpoint itself.
Bytes are those of the profile (int8); an engine keeps bfloat16, twice as many, and more where ranks differ. Repair
adds none.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from tests.bench.recovery.log import say

from hemostat.checkpoints.texts import Text
from hemostat_lab.adapters.build import BuildOptions, build
from hemostat_lab.adapters.distil import distilled
from hemostat_lab.adapters.pair import CheckpointPair
from hemostat_lab.models.parts import Parts
from hemostat_lab.models.training import summary_line
from hemostat_lab.models.work_folder import WorkFolder

from . import pruning, quantization
from .cases import Bench, Case, Must
from .figures import ADAPTER_FILE

NAME = "adapters"
STARTS = (  # those that are trained, too
    "W4A16 nearest",
    "W4A16 descent",
    "llmcompressor W4A16 gptq",
    "llmcompressor W4A16 awq",
    "3 bits descent",
    "50 % unstructured",
)
FIVE_BITS = "5 bits descent"
W8A8 = "W8A8 nearest"
MIXES = ("prescribed mix for any, bytes of 4 bits", "prescribed mix for any, bytes of 5 bits")
RANKS = (16, 64)
TRAINED_RANK = 16
LARGEST_RANK = 4 * max(RANKS)
"""Solved for once; components are sorted, so that the first ones are those of a smaller rank."""
_SCALE_BYTES = 4


def cases(bench: Bench) -> Sequence[Case]:
    known = {case.name: case for case in (*quantization.cases(bench), *pruning.cases(bench))}
    result = [known[name] for name in MIXES]
    for name in (*STARTS, FIVE_BITS, W8A8):
        start = known[name]
        repaired = f"{name}, repaired"
        result += [
            Case(name, start.size, partial(bench.copied, start)),
            Case(repaired, start.size, partial(pruning.repaired_copy, bench, start), of=name),
        ]
        ranks = () if name == W8A8 else RANKS
        for rank, trained in (*((rank, False) for rank in ranks), *[(TRAINED_RANK, True)] * (name in STARTS)):
            make = partial(adapted, bench, start, rank, trained)
            live_texts = bench.live if trained else 0
            size = start.size + profile_bytes(bench, rank)
            result.append(Case(_name(name, rank, trained), size, make, of=name, live=live_texts))
    return result


def musts() -> Sequence[Must]:
    return [Must(_name(name, TRAINED_RANK, True), _name(name, TRAINED_RANK, False)) for name in STARTS]


def _name(start: str, rank: int, trained: bool) -> str:
    return f"{start}, rank {rank}" + (", trained" if trained else "")


def profile_bytes(bench: Bench, rank: int) -> int:
    """At most: of `rank` everywhere, which is the budget where ranks are shared out. A row of either factor has a
    scale."""
    one_rank = [inputs + _SCALE_BYTES + outputs for outputs, inputs in bench.shapes.values()]
    return rank * sum(one_rank) + _SCALE_BYTES * sum(outputs for outputs, _ in bench.shapes.values())


def adapted(
    bench: Bench, start: Case, rank: int, trained: bool, folder: Path, learn: Sequence[Text] | None = None
) -> None:
    """The checkpoint with an adapter beside it. learn: of the adapter; None: the same."""
    base, learn = bench.made(start), learn or bench.learn
    pair = CheckpointPair.open(bench.reference, base)
    options = BuildOptions(rank=rank, max_rank=4 * rank, shared_out=True, metric="kfac", seed=bench.seed)
    with WorkFolder(bench.kept(f"{start.name} corrections", learn), {"largest": LARGEST_RANK}, "bench") as work:
        parts = Parts(work)
        # Of the largest rank, whichever is wanted now.
        largest = build(pair, learn, replace(options, rank=LARGEST_RANK, max_rank=None, shared_out=False), parts)
        built = build(pair, learn, options, parts)
        say(f"{start.name}: corrections, {largest.report['tokens']} tokens, {_cost(largest.report)}")
    if trained:
        built = distilled(pair, built, bench.live_texts(start.name, base), Parts(None), bench.seed)
        say(f"{start.name}: {summary_line(built.report['distilled'])}; {_trials(built.report['distilled'])}")
    bench.copied(start, folder, {ADAPTER_FILE: built.profile.to_bytes()})


def _cost(report: Mapping[str, Any]) -> str:
    return f"{report['cpu_seconds']:.0f} CPU-seconds in this run, {report['peak_mib']:.0f} MiB at most"


def _trials(report: Mapping[str, Any]) -> str:
    return ", ".join(
        f"rate {trial['rate']:g}: {trial['kl'] or float('nan'):.4f} after {trial['steps']} steps"
        for trial in report["trials"]
    )
