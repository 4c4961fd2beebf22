"""How soon the alarm finds that another model is served, and its false alarms: `make bench-alarm`.

A table, and build/bench/alarm.json. The reference (SmolLM2-135M-Instruct) is served by vLLM on this machine
and scored again by transformers: that is "null", the noise floor (decode against prefill, other batch shapes). The
changes are served in its place. All at temperature 1, top-20. Tokens are collected once, into build/bench/alarm/.

change     Hemostat's change test at 1 %: a baseline of BASELINE requests of each form of answers (prose, code, JSON),
           which are its kinds, drawn anew for every run.
budget     Hemostat's budget test at 1 %: KL(r‖c) (lower bound from top-20) more than BUDGET above the floor.
difr       Token-DiFR (arXiv 2511.20621): the clipped post-Gumbel margin of the emitted token under the reference, with
           the sampler's own noise; alarms when its mean over the last W tokens exceeds a threshold.
threshold  the same rule on the KL, or on the spread that the change test looks at.

The last two have no error rate of their own: their threshold is the one that 1 % of null runs exceed, runs of the very
requests that they are then counted on, which flatters them (what comes of tuning on a quarter of the prompts and
counting on the others is told, too); their statistic and W are the ones that find W8A8 soonest. A null run is
RUN_REQUESTS requests drawn with replacement; to detect a change, the requests of the changed model follow on BEFORE
null ones, and requests and tokens are counted from the change.

--write-levels writes what the simulations of `make bench-guard` use of it, tests/bench/guard/alarm_levels.csv.
"""

from __future__ import annotations

import argparse
import csv
import json
import math
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from hemostat_calibration.alarm import (
    BudgetTest,
    ChangeTest,
    RequestSpread,
    Settings,
    fit_baseline,
    request_spread,
    spread,
)
from hemostat_calibration.divergence.per_token import divergence
from hemostat_calibration.record_checks import validate
from hemostat_calibration.records import Candidates, TokenRecord
from hemostat_calibration.statistics.confidence import ClippedMean
from hemostat_lab.demo import vllm_server as vllm_process
from hemostat_lab.demo.checkpoints import cached_checkpoints

ROOT = Path(__file__).resolve().parents[2]
BUILD = ROOT / "build" / "bench"
DATA = BUILD / ("alarm" if vllm_process.dtype() == "bfloat16" else f"alarm-{vllm_process.dtype()}")
COLLECT = Path(__file__).parent / "alarm" / "collect.py"
LEVELS = Path(__file__).parent / "guard" / "alarm_levels.csv"

ALPHA = 0.01
BUDGET = 0.02
CAP = 5.0
MARGIN_CAP = 5.0
NULL_RUNS = 1000
CHANGE_RUNS = 300
RUN_REQUESTS = 500
TUNING_REQUESTS = 60
BASELINE = Settings().baseline_requests
BEFORE = 20
AFTER = 150
SECONDS = 180.0
"""From one request to the next."""
SPLIT = 4
"""Every fourth prompt is for calibration; their number is a multiple of it, so that a prompt is on one side only."""
WINDOWS = (1, 4, 16, 64, 256)

PLAN: dict[str, tuple[str, str, int, int]] = {
    "null": ("reference", "auto", 0, 520),
    "w8a8": ("w8a8", "auto", 100_000, 84),
    "w4a16": ("w4a16", "auto", 200_000, 376),
    "prune10": ("prune10", "auto", 400_000, 84),
    "kv_fp8": ("reference", "fp8", 300_000, 84),
    "prune30": ("prune30", "auto", 500_000, 48),
    "prune50": ("prune50", "auto", 600_000, 48),
}
"""Change -> checkpoint, KV cache, first request, requests."""


@dataclass(frozen=True)
class Request:
    """One request's tokens, all [T]; form: of the answer that was asked for."""

    calibration: bool
    form: str
    kl: np.ndarray
    spread: np.ndarray
    margin: np.ndarray
    level: RequestSpread


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def collect(change: str) -> None:
    """Make the batches of a change that are missing. Raises CalledProcessError when vLLM does not serve it."""
    checkpoint, kv_cache, first, requests = PLAN[change]
    result = cached_checkpoints("w4a16" if checkpoint == "reference" else checkpoint, say)
    served = result.reference if checkpoint == "reference" else result.compressed
    folder = DATA / change
    options = ["--first", str(first), "--requests", str(requests), "--kv-cache", kv_cache]
    for step in (["decode", str(served), str(folder), *options], ["score", str(result.reference), str(folder)]):
        subprocess.run([sys.executable, str(COLLECT), *step], check=True)


def read(paths: Sequence[Path]) -> list[Request]:
    """Every request as a record, measured as Hemostat measures it."""
    requests = []
    for path in paths:
        data = dict(np.load(path))
        ends = data["lengths"].cumsum()
        given = zip(data["number"], data["form"], ends - data["lengths"], ends, strict=True)
        for number, form, start, end in given:
            rows = slice(start, end)
            ids = data["ids"][rows]
            record = validate(
                TokenRecord(
                    vocab_size=49152,
                    prompt_key=b"",
                    output_ids=data["output"][rows],
                    compressed=Candidates(ids, data["logprobs"][rows].astype(np.float64)),
                    reference_at=data["at"][rows].astype(np.float64),
                    reference=Candidates(data["r_ids"][rows], data["r_logprobs"][rows].astype(np.float64)),
                    compressed_emitted=data["emitted"][rows].astype(np.float64),
                    reference_emitted=data["r_emitted"][rows].astype(np.float64),
                )
            )
            margin = np.minimum(data["margin"][rows].astype(np.float64), MARGIN_CAP)
            calibration = bool(number % SPLIT == 0)
            spreads = spread(record)
            level = request_spread(spreads)
            if level is not None:
                kl = divergence(record).kl_rc
                requests.append(Request(calibration, str(form), kl, spreads, margin, level))
    return requests


def draw(rng: np.random.Generator, requests: Sequence[Request], count: int) -> list[Request]:
    return [requests[n] for n in rng.integers(len(requests), size=count)]


Detector = Callable[[np.random.Generator, list[Request]], tuple[int, int] | None]
"""Stream -> requests and tokens until the alarm, that of the alarm included; None: no alarm."""


def of_change(null: Sequence[Request]) -> Detector:
    """The change test with a baseline of its own in every run, from the requests of `null`."""
    settings = Settings(alpha=ALPHA)
    forms = sorted({request.form for request in null})
    rows = {form: np.array([request.level.row() for request in null if request.form == form]) for form in forms}

    def detect(rng: np.random.Generator, stream: list[Request]) -> tuple[int, int] | None:
        baselines = {
            form: fit_baseline(rows[form][rng.integers(len(rows[form]), size=BASELINE)], 1.0 / (n * (n + 1)))
            for n, form in enumerate(forms, 1)
        }
        test = ChangeTest(settings.change_alpha, settings.tolerance)
        for at, request in enumerate(stream):
            test = test.update(baselines[request.form], request.level, SECONDS * at)
            if test.crossing is not None:
                return test.wealth.requests, test.wealth.tokens
        return None

    return detect


def of_budget(limit: float) -> Detector:
    """The budget test, alone in its process. limit: of the noise floor."""

    def detect(_: np.random.Generator, stream: list[Request]) -> tuple[int, int] | None:
        test = BudgetTest(BUDGET, CAP, 256, ALPHA / 4.0)
        for request in stream:
            test = test.update(request.kl, limit)
            if test.crossing is not None:
                return test.wealth.requests, test.wealth.tokens
        return None

    return detect


def rolling(values: np.ndarray, window: int) -> np.ndarray:
    """Means of the last `window` values, from the `window`-th on."""
    total = np.concatenate([[0.0], values.cumsum()])
    means: np.ndarray = (total[window:] - total[:-window]) / window
    return means


def of_threshold(figure: str, window: int, threshold: float) -> Detector:
    def detect(_: np.random.Generator, stream: list[Request]) -> tuple[int, int] | None:
        values = np.concatenate([getattr(request, figure) for request in stream])
        over = np.flatnonzero(rolling(np.nan_to_num(values), window) > threshold)
        if not len(over):
            return None
        tokens = int(over[0]) + window
        ends = np.cumsum([len(request.kl) for request in stream])
        return int(np.searchsorted(ends, tokens)) + 1, tokens

    return detect


def tuned(
    figures: Sequence[str], null: Sequence[Request], changed: Sequence[Request]
) -> tuple[Detector, dict[str, Any]]:
    """Of all figures and windows the one that finds `changed` soonest with a threshold that 1 % of null runs exceed."""
    best: tuple[float, Detector, dict[str, Any]] | None = None
    for figure in figures:
        for window in WINDOWS:
            rng = np.random.default_rng(10)
            peaks = []
            for _ in range(NULL_RUNS):
                values = np.concatenate([getattr(request, figure) for request in draw(rng, null, TUNING_REQUESTS)])
                peaks.append(rolling(np.nan_to_num(values), window).max())
            threshold = float(np.quantile(peaks, 1.0 - ALPHA, method="higher"))
            detect = of_threshold(figure, window, threshold)
            result = [detect(rng, draw(rng, null, 5) + draw(rng, changed, AFTER)) for _ in range(100)]
            middle = float(np.median([alarm[1] if alarm is not None else math.inf for alarm in result]))
            if best is None or middle < best[0]:
                best = middle, detect, {"figure": figure, "window": window, "threshold": threshold}
    assert best is not None
    return best[1], best[2]


def null_row(name: str, detect: Detector, null: Sequence[Request], requests: int) -> dict[str, Any]:
    rng = np.random.default_rng(20)
    alarming = sum(detect(rng, draw(rng, null, requests)) is not None for _ in range(NULL_RUNS))
    low, high = wilson(alarming, NULL_RUNS)
    return {
        **{"change": "null", "detector": name, "requests_per_run": requests},
        **{"runs": NULL_RUNS, "alarming_runs": alarming, "alarming_share_interval": [low, high]},
    }


def wilson(hits: int, runs: int) -> tuple[float, float]:
    """95 % interval of a share, of Monte Carlo error only."""
    z, share = 1.96, hits / runs
    middle = (share + z * z / (2 * runs)) / (1 + z * z / runs)
    half = z * math.sqrt(share * (1 - share) / runs + (z / (2 * runs)) ** 2) / (1 + z * z / runs)
    return max(middle - half, 0.0), middle + half


def change_rows(
    change: str, detectors: dict[str, Detector], null: Sequence[Request], changed: Sequence[Request]
) -> list[dict[str, Any]]:
    """The same streams for all detectors; delays of the runs without an alarm before the change."""
    rng = np.random.default_rng(30)
    delays: dict[str, list[tuple[float, float]]] = {name: [] for name in detectors}
    early = dict.fromkeys(detectors, 0)
    for _ in range(CHANGE_RUNS):
        before = draw(rng, null, BEFORE)
        stream, tokens = before + draw(rng, changed, AFTER), sum(len(request.kl) for request in before)
        for name, detect in detectors.items():
            result = detect(rng, stream)
            if result is None:
                delays[name].append((math.inf, math.inf))
            elif result[0] <= BEFORE:
                early[name] += 1
            else:
                delays[name].append((result[0] - BEFORE, result[1] - tokens))
    return [
        {
            **{"change": change, "detector": name, "runs": len(delay), "alarms_before_the_change": early[name]},
            **{"alarming_runs": sum(math.isfinite(requests) for requests, _ in delay)},
            **{
                f"{share}_{unit}": number(float(np.quantile(values, q, method="higher")))
                for unit, values in zip(("requests", "tokens"), np.array(delay).T, strict=True)
                for share, q in (("median", 0.5), ("p95", 0.95))
            },
        }
        for name, delay in delays.items()
    ]


def number(value: float) -> float | None:
    """JSON has no infinity: None is "not within the run"."""
    return float(value) if math.isfinite(value) else None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--changes", default=",".join(PLAN), help="comma-separated; null and w8a8 are always there")
    parser.add_argument("--collected", action="store_true", help="only what is there: nothing is decoded or scored")
    parser.add_argument("--write-levels", action="store_true", help="write the levels for bench-guard, nothing else")
    given = parser.parse_args()
    wanted = [change for change in PLAN if change in {"null", "w8a8", *given.changes.split(",")}]
    requests: dict[str, list[Request]] = {}
    unavailable = {}
    for change in wanted:
        try:
            if not given.collected:
                collect(change)
            if records := read(sorted((DATA / change).glob("*.scored.npz"))):
                requests[change] = records
            else:
                unavailable[change] = "nothing is collected"
        except subprocess.CalledProcessError as error:
            if change in {"null", "w8a8"}:
                raise
            unavailable[change] = f"collecting ended with code {error.returncode}"
    if given.write_levels:
        write_levels(requests)
        return
    began = time.monotonic()
    null, w8a8 = requests["null"], requests["w8a8"]
    calibration = [r for r in null if r.calibration]
    floor = ClippedMean(0.0, CAP)
    for request in calibration:
        floor = floor.update(request.kl)
    limit = floor.get(ALPHA / 4).high
    say("tuning thresholds on a quarter of the prompts")
    figures = {"difr": ["margin"], "threshold": ["kl", "spread"]}
    others = [r for r in null if not r.calibration]
    beforehand = {
        name: null_row(name, tuned(among, calibration, w8a8)[0], others, TUNING_REQUESTS)
        for name, among in figures.items()
    }
    say("and on those that count")
    difr, difr_settings = tuned(figures["difr"], null, w8a8)
    threshold, threshold_settings = tuned(figures["threshold"], null, w8a8)
    detectors = {"change": of_change(null), "budget": of_budget(limit), "difr": difr, "threshold": threshold}
    rows = []
    for name, detect in detectors.items():
        say(f"null runs: {name}")
        rows.append(null_row(name, detect, null, RUN_REQUESTS if name in {"change", "budget"} else TUNING_REQUESTS))
    for change, records in requests.items():
        if change != "null":
            say(f"detecting {change}")
            rows += change_rows(change, detectors, null, records)
    report = {
        "rows": rows,
        "alpha": ALPHA,
        "budget_nats": BUDGET,
        "baseline_requests": BASELINE,
        "floor_nats": {"mean": floor.get().mean, "upper_limit": limit},
        "difr": {**difr_settings, "margin_cap": MARGIN_CAP},
        "threshold": threshold_settings,
        "null_runs_alarming_when_tuned_on_a_quarter": {
            name: row["alarming_runs"] / row["runs"] for name, row in beforehand.items()
        },
        "null_requests_before_a_change": BEFORE,
        "collected": {
            name: {
                "requests": len(records),
                "tokens": sum(len(r.kl) for r in records),
                "mean_kl_nats": float(np.concatenate([r.kl for r in records]).mean()),
                "spread_nats_by_form": {
                    form: {
                        "geometric_mean": math.exp(float(np.mean([r.level.level for r in records if r.form == form]))),
                        "log_sd_of_requests": float(np.std([r.level.level for r in records if r.form == form])),
                    }
                    for form in sorted({r.form for r in records})
                },
            }
            for name, records in requests.items()
        },
        "unavailable": unavailable,
        "model": f"SmolLM2-135M-Instruct, {vllm_process.dtype()}, vLLM on a CPU against transformers",
        "seconds": round(time.monotonic() - began),
    }
    BUILD.mkdir(parents=True, exist_ok=True)
    (BUILD / "alarm.json").write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    table(report)


def write_levels(requests: dict[str, list[Request]]) -> None:
    with LEVELS.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["change", "form", "tokens", "level", "contrast"])
        for change, records in requests.items():
            for request in records:
                level = request.level
                writer.writerow([change, request.form, level.tokens, f"{level.level:.4f}", f"{level.contrast:.4f}"])


def table(report: dict[str, Any]) -> None:
    print(f"{'change':<9}{'detector':<11}{'requests':>9}{'95 %':>7}{'tokens':>8}{'95 %':>8}{'runs':>7}{'alarming':>10}")
    for row in report["rows"]:
        if row["change"] == "null":
            low, high = row["alarming_share_interval"]
            told = f"{row['alarming_runs'] / row['runs']:.2%} of runs alarm wrongly ({low:.2%} to {high:.2%})"
            print(
                f"{'null':<9}{row['detector']:<11}{row['runs']:>7} runs of {row['requests_per_run']} requests: {told}"
            )
            continue
        middle, late, tokens, late_tokens = (
            "never" if row[key] is None else f"{row[key]:.0f}"
            for key in ("median_requests", "p95_requests", "median_tokens", "p95_tokens")
        )
        counts = f"{row['runs']:>7}{row['alarming_runs']:>10}"
        print(f"{row['change']:<9}{row['detector']:<11}{middle:>9}{late:>7}{tokens:>8}{late_tokens:>8}{counts}")
    for name, share in report["null_runs_alarming_when_tuned_on_a_quarter"].items():
        print(f"{name}: tuned on a quarter of the prompts, {share:.1%} of the null runs on the others alarm")
    for change, reason in report["unavailable"].items():
        print(f"{change}: not measured, {reason}")


if __name__ == "__main__":
    main()
