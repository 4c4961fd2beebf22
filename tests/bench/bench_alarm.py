"""How soon the alarm sees that another model is served, and how often it cries wolf: `make bench-alarm`.

A table, and build/bench/alarm.json. The reference (SmolLM2-135M-Instruct) is served by vLLM on this machine
and scored again by transformers: that is "null", the noise floor (decode against prefill, other batch shapes). The
changes are served in its place. All at temperature 1, top-20. Tokens are collected once, into build/bench/alarm/.

change     Hemostat's change test at 1 %, its baseline the null tokens of the calibration prompts.
budget     Hemostat's budget test at 1 %: KL(r‖c) (lower bound from top-20) more than BUDGET above the floor.
difr       Token-DiFR (arXiv 2511.20621): the clipped post-Gumbel margin of the emitted token under the reference, with
           the sampler's own noise; alarms when its mean over the last W tokens exceeds a threshold.
threshold  the same rule on the KL, or on the spread that the change test looks at.

The last two have no error rate of their own: their threshold is the one that 1 % of null runs exceed, runs of the very
prompts that they are then counted on, which flatters them (what comes of tuning on the calibration prompts is told,
too); their statistic and W are the ones that find W8A8 soonest on the calibration prompts. All else is told on the
other prompts. A null run is RUN_REQUESTS requests drawn with replacement; to detect a change, the requests of the
changed model follow on BEFORE null ones, and tokens are counted from the change.
"""

from __future__ import annotations

import argparse
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

from hemostat.models import vllm_server as vllm_process
from hemostat.models.reference_checkpoint import cached_checkpoints
from hemostat_calibration.alarm import BudgetTest, ChangeTest, fit_bets, spread
from hemostat_calibration.divergence.per_token import divergence
from hemostat_calibration.records import Candidates, TokenRecord, validate
from hemostat_calibration.statistics.confidence import ClippedMean

ROOT = Path(__file__).resolve().parents[2]
BUILD = ROOT / "build" / "bench"
DATA = BUILD / ("alarm" if vllm_process.dtype() == "bfloat16" else f"alarm-{vllm_process.dtype()}")
COLLECT = Path(__file__).parent / "alarm" / "collect.py"

ALPHA = 0.01
BUDGET = 0.02
CAP = 5.0
MARGIN_CAP = 5.0
NULL_RUNS = 2000
CHANGE_RUNS = 500
RUN_REQUESTS = 60
BEFORE = 20
AFTER = 150
SPLIT = 4
"""Every fourth prompt is for calibration; their number is a multiple of it, so that a prompt is on one side only."""
WINDOWS = (1, 4, 16, 64, 256)

PLAN: dict[str, tuple[str, str, int, int]] = {
    "null": ("reference", "auto", 0, 1260),
    "w8a8": ("w8a8", "auto", 100_000, 150),
    "w4a16": ("w4a16", "auto", 200_000, 84),
    "prune10": ("prune10", "auto", 400_000, 84),
    "kv_fp8": ("reference", "fp8", 300_000, 84),
    "prune30": ("prune30", "auto", 500_000, 60),
    "prune50": ("prune50", "auto", 600_000, 60),
}
"""Change -> checkpoint, KV cache, first request, requests."""


@dataclass(frozen=True)
class Request:
    """One request's tokens, all [T]."""

    calibration: bool
    kl: np.ndarray
    spread: np.ndarray
    margin: np.ndarray


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def collect(change: str) -> None:
    """Make the batches of a change that are missing. Raises CalledProcessError when vLLM does not serve it."""
    checkpoint, kv_cache, first, requests = PLAN[change]
    found = cached_checkpoints("w4a16" if checkpoint == "reference" else checkpoint, say)
    served = found.reference if checkpoint == "reference" else found.compressed
    folder = DATA / change
    options = ["--first", str(first), "--requests", str(requests), "--kv-cache", kv_cache]
    for step in (["decode", str(served), str(folder), *options], ["score", str(found.reference), str(folder)]):
        subprocess.run([sys.executable, str(COLLECT), *step], check=True)


def read(paths: Sequence[Path]) -> list[Request]:
    """Every request as a record, measured as Hemostat measures it."""
    requests = []
    for path in paths:
        data = dict(np.load(path))
        ends = data["lengths"].cumsum()
        for number, start, end in zip(data["number"], ends - data["lengths"], ends, strict=True):
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
            requests.append(Request(calibration, divergence(record).kl_rc, spread(record), margin))
    return requests


def draw(rng: np.random.Generator, requests: Sequence[Request], count: int) -> list[Request]:
    return [requests[n] for n in rng.integers(len(requests), size=count)]


Detector = Callable[[list[Request], int], int | None]
"""Stream, tokens before the change -> tokens from the change to the alarm, 0 or less before it; None: no alarm."""


def of_test(begin: Callable[[], Any], update: Callable[[Any, Request, slice], Any], by_token: bool) -> Detector:
    def detect(stream: list[Request], before: int) -> int | None:
        test, seen = begin(), 0
        for request in stream:
            after = update(test, request, slice(None))
            if after.crossing is not None:
                most = len(request.kl)
                least = 1 if by_token else most
                while least < most:  # the first token at which the alarm stood
                    middle = (least + most) // 2
                    if update(test, request, slice(middle)).crossing is None:
                        least = middle + 1
                    else:
                        most = middle
                return seen + most - before
            test, seen = after, seen + len(request.kl)
        return None

    return detect


def rolling(values: np.ndarray, window: int) -> np.ndarray:
    """Means of the last `window` values, from the `window`-th on."""
    total = np.concatenate([[0.0], values.cumsum()])
    means: np.ndarray = (total[window:] - total[:-window]) / window
    return means


def of_threshold(figure: str, window: int, threshold: float) -> Detector:
    def detect(stream: list[Request], before: int) -> int | None:
        values = np.concatenate([getattr(request, figure) for request in stream])
        over = np.flatnonzero(rolling(np.nan_to_num(values), window) > threshold)
        return int(over[0]) + window - before if len(over) else None

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
                values = np.concatenate([getattr(request, figure) for request in draw(rng, null, RUN_REQUESTS)])
                peaks.append(rolling(np.nan_to_num(values), window).max())
            threshold = float(np.quantile(peaks, 1.0 - ALPHA, method="higher"))
            detect = of_threshold(figure, window, threshold)
            delays = [
                delay if (delay := detect(draw(rng, null, 5) + draw(rng, changed, AFTER), 0)) is not None else math.inf
                for _ in range(100)
            ]
            middle = float(np.median(delays))
            if best is None or middle < best[0]:
                best = middle, detect, {"figure": figure, "window": window, "threshold": threshold}
    assert best is not None
    return best[1], best[2]


def null_row(name: str, detect: Detector, null: Sequence[Request]) -> dict[str, Any]:
    rng = np.random.default_rng(20)
    alarms = [detect(draw(rng, null, RUN_REQUESTS), 0) for _ in range(NULL_RUNS)]
    alarming = sum(alarm is not None for alarm in alarms)
    low, high = wilson(alarming, NULL_RUNS)
    return {
        **{"change": "null", "detector": name, "median_tokens": None, "p95_tokens": None},
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
    delays: dict[str, list[float]] = {name: [] for name in detectors}
    early = dict.fromkeys(detectors, 0)
    for _ in range(CHANGE_RUNS):
        before = draw(rng, null, BEFORE)
        stream, tokens = before + draw(rng, changed, AFTER), sum(len(request.kl) for request in before)
        for name, detect in detectors.items():
            delay = detect(stream, tokens)
            early[name] += delay is not None and delay <= 0
            delays[name].append(math.nan if delay is not None and delay <= 0 else math.inf if delay is None else delay)
    rows = []
    ours = np.array(delays["change"])
    for name, found in delays.items():
        values = np.array(found)
        told = np.sort(values[~np.isnan(values)])
        resampled = np.sort(rng.choice(told, (1000, len(told))), axis=1)[:, len(told) // 2]
        row: dict[str, Any] = {
            **{"change": change, "detector": name, "median_tokens": number(told[len(told) // 2])},
            **{"p95_tokens": number(told[int(0.95 * (len(told) - 1))]), "runs": len(told)},
            **{"alarming_runs": int(np.isfinite(told).sum()), "alarms_before_the_change": early[name]},
            "median_interval": [number(end) for end in np.quantile(resampled, [0.025, 0.975], method="nearest")],
        }
        if name != "change":
            both = np.isfinite(values) & np.isfinite(ours)
            later = ours[both] - values[both]
            medians = np.median(rng.choice(later, (1000, len(later))), axis=1) if len(later) else np.full(1, np.nan)
            row["change_test_later_by_tokens"] = {
                "median": number(float(np.median(later))) if len(later) else None,
                "interval": [number(end) for end in np.quantile(medians, [0.025, 0.975])],
                "runs_sooner": int((ours[~np.isnan(values)] < values[~np.isnan(values)]).sum()),
                "runs_later": int((ours > values).sum()),
            }
        rows.append(row)
    return rows


def number(value: float) -> float | None:
    """JSON has no infinity: None is "not within the run"."""
    return float(value) if math.isfinite(value) else None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--changes", default=",".join(PLAN), help="comma-separated; null and w8a8 are always there")
    parser.add_argument("--collected", action="store_true", help="only what is there: nothing is decoded or scored")
    given = parser.parse_args()
    wanted = [change for change in PLAN if change in {"null", "w8a8", *given.changes.split(",")}]
    requests: dict[str, list[Request]] = {}
    unavailable = {}
    for change in wanted:
        try:
            if not given.collected:
                collect(change)
            if found := read(sorted((DATA / change).glob("*.scored.npz"))):
                requests[change] = found
            else:
                unavailable[change] = "nothing is collected"
        except subprocess.CalledProcessError as error:
            if change in {"null", "w8a8"}:
                raise
            unavailable[change] = f"collecting ended with code {error.returncode}"
    began = time.monotonic()
    kept = {name: [r for r in found if not r.calibration] for name, found in requests.items()}
    calibration = [r for r in requests["null"] if r.calibration]
    learned = [r for r in requests["w8a8"] if r.calibration]
    floor = ClippedMean(0.0, CAP)
    for request in calibration:
        floor = floor.update(request.kl)
    limit = floor.get(ALPHA / 4).high
    bets = fit_bets([r.spread[~np.isnan(r.spread)] for r in calibration], ALPHA / 4)
    say("tuning thresholds on the calibration prompts")
    figures = {"difr": ["margin"], "threshold": ["kl", "spread"]}
    beforehand = {
        name: null_row(name, tuned(among, calibration, learned)[0], kept["null"]) for name, among in figures.items()
    }
    say("and on those that count")
    difr, difr_settings = tuned(figures["difr"], kept["null"], learned)
    threshold, threshold_settings = tuned(figures["threshold"], kept["null"], learned)
    detectors = {
        "change": of_test(
            lambda: ChangeTest.begin(bets, ALPHA), lambda test, r, part: test.update(r.spread[part]), by_token=True
        ),
        "budget": of_test(
            lambda: BudgetTest(BUDGET, CAP, 256, ALPHA), lambda test, r, part: test.update(r.kl, limit), by_token=False
        ),
        "difr": difr,
        "threshold": threshold,
    }
    rows = []
    for name, detect in detectors.items():
        say(f"null runs: {name}")
        rows.append(null_row(name, detect, kept["null"]))
    for change, found in kept.items():
        if change != "null":
            say(f"detecting {change}")
            rows += change_rows(change, detectors, kept["null"], found)
    report = {
        "rows": rows,
        "alpha": ALPHA,
        "budget_nats": BUDGET,
        "floor_nats": {"mean": floor.get().mean, "upper_limit": limit},
        "difr": {**difr_settings, "margin_cap": MARGIN_CAP},
        "threshold": threshold_settings,
        "null_runs_alarming_when_tuned_on_calibration_prompts": {
            name: row["alarming_runs"] / row["runs"] for name, row in beforehand.items()
        },
        "requests_per_null_run": RUN_REQUESTS,
        "null_requests_before_a_change": BEFORE,
        "strategies": len(bets.log_factors),
        "tokens": {
            name: {
                "calibration": sum(len(r.kl) for r in found if r.calibration),
                "evaluation": sum(len(r.kl) for r in found if not r.calibration),
                "evaluation_requests": len(kept[name]),
                "mean_kl_nats": float(np.concatenate([r.kl for r in found]).mean()),
                "median_spread_nats": float(np.nanmedian(np.concatenate([r.spread for r in found]))),
            }
            for name, found in requests.items()
        },
        "unavailable": unavailable,
        "model": f"SmolLM2-135M-Instruct, {vllm_process.dtype()}, vLLM on a CPU against transformers",
        "seconds": round(time.monotonic() - began),
    }
    BUILD.mkdir(parents=True, exist_ok=True)
    (BUILD / "alarm.json").write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    table(report)


def table(report: dict[str, Any]) -> None:
    print(f"{'change':<9}{'detector':<11}{'median':>8}{'95 %':>8}{'runs':>7}{'alarming':>10}   tokens until the alarm")
    for row in report["rows"]:
        middle, late = (
            "" if row["change"] == "null" else "never" if row[key] is None else f"{row[key]:.0f}"
            for key in ("median_tokens", "p95_tokens")
        )
        note = ""
        if row["change"] == "null":
            low, high = row["alarming_share_interval"]
            share = row["alarming_runs"] / row["runs"]
            note = f"   {share:.2%} of runs alarm wrongly ({low:.2%} to {high:.2%})"
        elif "change_test_later_by_tokens" in row:
            compared = row["change_test_later_by_tokens"]
            note = f"   change test sooner in {compared['runs_sooner']} runs, later in {compared['runs_later']}"
        print(
            f"{row['change']:<9}{row['detector']:<11}{middle:>8}{late:>8}{row['runs']:>7}{row['alarming_runs']:>10}{note}"
        )
    for name, share in report["null_runs_alarming_when_tuned_on_calibration_prompts"].items():
        print(f"{name}: tuned on the calibration prompts instead, {share:.1%} of null runs alarm")
    for change, reason in report["unavailable"].items():
        print(f"{change}: not measured, {reason}")


if __name__ == "__main__":
    main()
