"""Compressed checkpoints of equal bytes, ours and llmcompressor's, on held-out topics: `make bench-compress`.

The demo's reference writes texts at temperature 1. All methods calibrate on the same ones; KL(r‖c) in nats per token
and the same top-1, at full vocabulary, are of texts on topics that no method has seen, with 95 % intervals by topic.
A table, and build/bench/compress.json (`rows`). Modules are in tests/bench/compress/. A line "A < B" is the mean
difference of KL, text by text; the exit status is 1 where one does not hold, or a case is above its limit. Of a line
"A - B" the difference is the result.

`--only NAME` runs one module, `--case TEXT` only the cases with this in their names, and what they improve; finished
texts, checkpoints and figures are kept below build/bench/compress/, so that a run that is stopped goes on.
"""

from __future__ import annotations

import argparse
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType

import numpy as np
import torch

ROOT = Path(__file__).resolve().parents[2]
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))

from tests.bench.compress import adapters, domain, families, profiles, pruning, quantization  # noqa: E402  the root is no package
from tests.bench.compress.cases import Bench, Case, Must, slug  # noqa: E402
from tests.bench.compress.figures import Floats, Meter  # noqa: E402
from tests.bench.compress.texts import Domain, Texts, written  # noqa: E402
from tests.bench.recovery.log import say  # noqa: E402
from tests.bench.recovery.stages import Stages  # noqa: E402
from tests.bench.rows import Rows, publish  # noqa: E402

from hemostat_calibration.records import ExactDistances  # noqa: E402
from hemostat_lab.demo.checkpoints import cached_checkpoints  # noqa: E402

RESULT = ROOT / "build" / "bench" / "compress.json"
FOLDER = ROOT / "build" / "bench" / "compress"
_MODULES = (quantization, families, pruning, adapters, profiles, domain)
MODULES: dict[str, ModuleType] = {module.NAME: module for module in _MODULES}
COLUMNS = ("bytes", "kl", "low", "high", "top1")


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", action="append", choices=list(MODULES), help="run this module only")
    parser.add_argument("--case", action="append", default=[], help="run only cases with this text in their names")
    parser.add_argument("--learn", type=int, default=120, help="texts to calibrate on")
    parser.add_argument("--heldout", type=int, default=150, help="texts to judge on")
    parser.add_argument("--live", type=int, default=480, help="texts that a checkpoint writes to be trained on")
    parser.add_argument("--judge", choices=[str(d) for d in Domain], default="open", help="prompts to judge on")
    parser.add_argument("--keep", action="store_true", help="keep the checkpoints once they are measured")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args(argv)
    reference = cached_checkpoints("w4a16", say).reference
    judge = Domain(arguments.judge)
    texts = written(reference, FOLDER / "texts", arguments.learn, arguments.heldout, arguments.seed, judge)
    bench = Bench(reference, FOLDER, texts.learn, arguments.seed, arguments.live)
    meter = Meter(reference, texts)
    chosen = arguments.only or list(MODULES)
    rows: Rows = []
    for name in chosen:
        rows += _module(name, bench, meter, arguments.case, arguments.keep)
    more = {
        "reference": "SmolLM2-135M-Instruct",
        "calibration_tokens": sum(map(len, texts.learn)),
        **_counts(texts),
        "torch": torch.__version__,
    }
    return publish(RESULT, chosen, rows, COLUMNS, more)


def _counts(texts: Texts) -> dict[str, int]:
    return {
        "heldout_tokens": len(texts.topics),
        "heldout_texts": len(texts.heldout),
        "heldout_topics": len(np.unique(texts.topics)),
    }


def _module(name: str, bench: Bench, meter: Meter, wanted: Sequence[str], keep: bool) -> Rows:
    rows: Rows = []
    kl: dict[str, Floats] = {}
    for case in _chosen(MODULES[name].cases(bench), wanted):
        distances = _measured(case, bench, meter, keep)
        mean, low, high = meter.mean(distances.kl, case.name)
        figures = {"kl": mean, "low": low, "high": high, "top1": float(distances.top1.mean())}
        holds = case.limit is None or mean <= case.limit
        rows.append({"module": name, "case": case.name, "bytes": case.size, **figures, "holds": holds})
        kl[case.name] = distances.kl
        recovered = ""
        if case.of in kl:
            share = rows[-1]["recovered"] = meter.recovered(kl[case.of], distances.kl, case.name)
            recovered = ", recovered {:.1%} [{:.1%}, {:.1%}]".format(*share)
        top1 = f"top-1 {figures['top1']:.1%}"
        say(f"{case.name}: {case.size} bytes, KL {mean:.4f} [{low:.4f}, {high:.4f}]{recovered}, {top1}")
    return rows + [
        _judged(name, must, meter, kl) for must in MODULES[name].musts() if {must.better, must.worse} <= kl.keys()
    ]


def _chosen(cases: Sequence[Case], wanted: Sequence[str]) -> list[Case]:
    """Those with one of the texts in their names, and what they improve; all without a text."""
    named = [case for case in cases if any(text in case.name for text in wanted or [""])]
    names = {case.name for case in named} | {case.of for case in named}
    return [case for case in cases if case.name in names]


def _measured(case: Case, bench: Bench, meter: Meter, keep: bool) -> ExactDistances:
    folder = bench.folder / slug(case.name)

    def measure() -> ExactDistances:
        if not folder.exists():
            say(f"{case.name}: compressing")
            case.make(folder)
        return meter.distances(folder)

    made_from = [case.name, bench.seed, [ids.tolist() for ids in bench.ids], meter.key, *[case.live] * (case.live > 0)]
    figures = Stages(bench.folder / "figures").kept("case", made_from, measure)
    if not keep:
        shutil.rmtree(folder, ignore_errors=True)
    return figures


def _judged(module: str, must: Must, meter: Meter, kl: dict[str, Floats]) -> dict[str, object]:
    sign = "-" if must.asked else "<=" if must.not_above else "<"
    case = f"{must.better} {sign} {must.worse}" + (f" - {must.by}" if must.by else "")
    mean, low, high = meter.mean(kl[must.better] - kl[must.worse], case)
    holds = must.asked or (low <= 0.0 if must.not_above else high < 0.0 and mean <= -must.by)
    figures = {"bytes": "", "kl": mean, "low": low, "high": high, "top1": ""}
    return {"module": module, "case": case, **figures, "holds": holds}


if __name__ == "__main__":
    sys.exit(main())
