"""Adapters on compressed checkpoints, beside the same bytes spent on more bits: is any on the front of bytes and KL?

An adapter is made as `hemostat adapt --shared-out` does, from the texts that the checkpoint was calibrated on. Those
that are trained (`--distil`) go on with live texts: of other prompts, written by the compressed checkpoint itself.
Bytes are those of the profile (int8); an engine keeps bfloat16, twice as many, and more where ranks differ. Repair
(norms and biases) adds none.
"""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from hemostat.adapters.building.build import BuildOptions, build
from hemostat.adapters.building.distil import distilled
from hemostat.adapters.building.pair import CheckpointPair
from hemostat.models.parts import Parts
from hemostat.models.texts import Text
from hemostat.models.work_folder import WorkFolder

from . import pruning, quantization
from .cases import Bench, Case, Must
from .figures import ADAPTER_FILE
from .texts import live

NAME = "adapters"
STARTS = (
    "W4A16 nearest",
    "W4A16 descent",
    "llmcompressor W4A16 gptq",
    "llmcompressor W4A16 awq",
    "3 bits descent",
    "50 % unstructured",
)
MORE_BITS = ("5 bits descent", "prescribed mix for any, bytes of 4 bits", "prescribed mix for any, bytes of 5 bits")
RANKS = (16, 64)
TRAINED_RANK = 16
LIVE_TEXTS = 480
_SCALE_BYTES = 4


def cases(bench: Bench) -> Sequence[Case]:
    known = {case.name: case for case in (*quantization.cases(bench), *pruning.cases(bench))}
    result = [known[name] for name in MORE_BITS]
    for name in STARTS:
        start = known[name]
        result += [start, Case(f"{name}, repaired", start.size, partial(pruning.repaired_copy, bench, start))]
        for rank, trained in (*((rank, False) for rank in RANKS), (TRAINED_RANK, True)):
            size = start.size + profile_bytes(bench, rank)
            result.append(Case(_name(name, rank, trained), size, partial(adapted, bench, start, rank, trained)))
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
    """The checkpoint with an adapter beside it. `start` is made once for all. learn: of the adapter; None: the same."""
    base = bench.folder / "adapters" / start.name
    if not base.exists():
        base.parent.mkdir(parents=True, exist_ok=True)
        start.make(base)
    pair = CheckpointPair.open(bench.reference, base)
    options = BuildOptions(rank=rank, shared_out=True, metric="kfac", seed=bench.seed)
    with WorkFolder(folder.with_name(f"{folder.name}.work"), {"rank": rank, "base": start.name}, "bench") as work:
        built = build(pair, learn or bench.learn, options, Parts(work))
        if trained:
            texts = live(base, bench.folder / "texts-live" / start.name, len(bench.learn), LIVE_TEXTS, bench.seed)
            built = distilled(pair, built, texts, Parts(work), bench.seed)
        work.remove()
    shutil.copytree(base, folder)
    (folder / ADAPTER_FILE).write_bytes(built.profile.to_bytes())
