"""What a cut of the lists costs: `make bench-bounds`, a table, build/bench/bounds.json and build/bench/bounds.svg.

Real models: text sampled from the compressed checkpoint at temperature 1, read by both at full vocabulary. From those
distributions the record is made that a top-K list of each side would have given, for K from 5 to everything, and its
bounds and estimates stand beside the exact figures of the same tokens. Intervals count requests. "coarse" is the lower
bound that the lists' ids and one bucket give, "lower" what the caps add (see `hemostat_calibration.divergence.bounds`).

floor   how often KL's assumption holds: positions at which no id at all is less likely under one model than `MIN_RATIO`
        times what the other gives it.
known   at K = 20, what more knowledge of one side gives: see `tests.bench.bounds_by_knowledge`.
speed   positions/s of CPU time of `bounds`, of `divergence`, which holds them, and of `divergences`, which is given 16
        requests, at K = 20 on one core; the median of rounds.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")  # numpy's; torch is told how many below

ROOT = Path(__file__).resolve().parents[2]
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))

import numpy as np  # noqa: E402
from tests.bench.bounds_by_knowledge import Knowledge  # noqa: E402
from tests.bench.bounds_by_knowledge import table as knowledge_table  # noqa: E402

from hemostat_calibration.divergence.bounds import MIN_RATIO, bounds  # noqa: E402
from hemostat_calibration.divergence.per_token import divergence  # noqa: E402
from hemostat_calibration.divergence.together import divergences  # noqa: E402
from hemostat_calibration.record_checks import validate  # noqa: E402
from hemostat_calibration.records import Candidates, TokenRecord  # noqa: E402
from hemostat_calibration.statistics.streaming import RatioEstimate  # noqa: E402
from hemostat_lab.demo import vllm_server as vllm_process  # noqa: E402
from hemostat_lab.demo.checkpoints import cached_checkpoints  # noqa: E402

BUILD = ROOT / "build" / "bench"
PROMPTS = ROOT / "middleware" / "hemostat" / "gate" / "prompts.jsonl"
LISTS = (5, 10, 20, 50, 100, 1000)
K_BY_KNOWLEDGE = 20
REQUESTS_BY_KNOWLEDGE = 16
"""Of these only: every position takes some 0.15 s of CPU time."""
FIGURES = ("kl_rc", "kl_cr", "js", "tv")
NAMES = {"kl_rc": "KL(r‖c)", "kl_cr": "KL(c‖r)", "js": "JS", "tv": "TV"}
TOKENS = 64
BATCH = 12
TOGETHER = 16
"""The requests of one call of `divergences`."""


@dataclass(frozen=True)
class Request:
    """log-probabilities of both models over the whole vocabulary, float32 [T, V], and the emitted ids [T]."""

    reference: np.ndarray
    compressed: np.ndarray
    emitted: np.ndarray

    @cached_property
    def ranked(self) -> tuple[np.ndarray, np.ndarray]:
        """Ids from the most likely on, of the reference and of the compressed model."""
        return np.argsort(-self.reference, axis=1), np.argsort(-self.compressed, axis=1)

    @cached_property
    def entropy(self) -> np.ndarray:
        result: np.ndarray = -(np.exp(self.reference) * self.reference).sum(1)
        return result


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def output_embedding(scheme: str) -> np.ndarray:
    """float32 [V, d], the reference's, which the engine's logits are recovered with."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(cached_checkpoints(scheme, say).reference)
    weight: np.ndarray = model.get_output_embeddings().weight.detach().float().numpy()
    return weight


def requests(scheme: str, count: int, seed: int) -> Iterator[Request]:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging

    logging.disable_progress_bar()
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    torch.manual_seed(seed)
    paths = cached_checkpoints(scheme, say)
    reference, compressed = (
        AutoModelForCausalLM.from_pretrained(path, dtype=vllm_process.dtype()).eval()
        for path in (paths.reference, paths.compressed)
    )
    tokenizer = AutoTokenizer.from_pretrained(paths.reference, padding_side="left")
    chats = [json.loads(line)["messages"] for line in PROMPTS.read_text().splitlines()]
    chats = sorted(chats, key=lambda chat: sum(len(m["content"]) for m in chat))[:count]
    for start in range(0, len(chats), BATCH):
        texts = [
            tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
            for chat in chats[start : start + BATCH]
        ]
        batch = tokenizer(texts, return_tensors="pt", padding=True, add_special_tokens=False)
        with torch.inference_mode():
            written = compressed.generate(
                **batch, do_sample=True, temperature=1.0, top_k=0, top_p=1.0, max_new_tokens=TOKENS, pad_token_id=0
            )[:, batch.input_ids.shape[1] :]
        for ids, mask, text in zip(batch.input_ids, batch.attention_mask, written, strict=True):
            prompt = ids[mask.bool()]
            ends = (text == tokenizer.eos_token_id).nonzero()
            output = text[: int(ends[0]) + 1] if len(ends) else text
            with torch.inference_mode():
                r, c = (
                    torch.log_softmax(m(torch.cat([prompt, output])[None]).logits[0, len(prompt) - 1 : -1].double(), -1)
                    for m in (reference, compressed)
                )
            yield Request(r.numpy(), c.numpy(), output.numpy())


def top(logprobs: np.ndarray, ranked: np.ndarray, k: int, emitted: np.ndarray | None = None) -> Candidates:
    """The k most likely, and behind them the emitted one where it is not among them, as vLLM's completions answer."""
    rows = np.arange(len(logprobs))
    ids = ranked[:, :k]
    values = np.take_along_axis(logprobs, ids, 1)
    if emitted is not None:
        outside = ~(ids == emitted[:, None]).any(1)
        ids = np.column_stack([ids, np.where(outside, emitted, -1)])
        values = np.column_stack([values, np.where(outside, logprobs[rows, emitted], -np.inf)])
    return Candidates(ids.astype(np.int32), values)


def record(request: Request, k: int) -> TokenRecord:
    """What a reference in process would have been asked for the compressed side's top k."""
    rows = np.arange(len(request.emitted))
    r, c = request.reference, request.compressed
    vocabulary = c.shape[1]
    candidates = top(c, request.ranked[1], k, request.emitted)
    at = np.take_along_axis(r, np.maximum(candidates.ids, 0).astype(np.int64), 1)
    return validate(
        TokenRecord(
            vocab_size=vocabulary,
            prompt_key=b"bench",
            output_ids=request.emitted.astype(np.int32),
            compressed=candidates,
            reference_at=np.where(candidates.ids >= 0, at, np.nan),
            reference=top(r, request.ranked[0], min(k + 1, vocabulary)),
            compressed_emitted=c[rows, request.emitted],
            reference_emitted=r[rows, request.emitted],
            reference_entropy=request.entropy,
        )
    )


def exact(request: Request) -> dict[str, np.ndarray]:
    """Over the whole vocabulary, by definition."""
    log_r, log_c = request.reference, request.compressed
    r, c = np.exp(log_r), np.exp(log_c)
    log_m = np.log(0.5 * (r + c))
    return {
        "kl_rc": (r * (log_r - log_c)).sum(1),
        "kl_cr": (c * (log_c - log_r)).sum(1),
        "js": 0.5 * (r * (log_r - log_m) + c * (log_c - log_m)).sum(1),
        "tv": 0.5 * np.abs(r - c).sum(1),
    }


class Sweep:
    """Means per token with intervals over requests, by K and column."""

    def __init__(self) -> None:
        self.means: dict[tuple[Any, ...], RatioEstimate] = {}
        self.outside = 0
        self.positions = 0
        self.requests = 0

    def add(self, key: tuple[Any, ...], values: np.ndarray) -> None:
        self.means[key] = self.means.get(key, RatioEstimate()).update(float(values.sum()), len(values))

    def see(self, request: Request, truth: dict[str, np.ndarray]) -> None:
        self.positions += len(request.emitted)
        self.requests += 1
        apart = np.abs(request.reference - request.compressed).max(1)
        self.add(("floor holds",), (apart <= -np.log(MIN_RATIO)).astype(np.float64))
        for k in (*LISTS, request.compressed.shape[1]):
            result = divergence(record(request, k))
            everything = k == request.compressed.shape[1]
            for name in FIGURES:
                interval = getattr(result.bounds, name)
                slack = 1e-5 * (1.0 + truth[name])
                self.outside += int((interval.lower > truth[name] + slack).sum())
                self.outside += int((interval.upper < truth[name] - slack).sum())
                row = ("all" if everything else k, name)
                self.add((*row, "exact"), truth[name])
                self.add((*row, "coarse"), getattr(result, name))
                self.add((*row, "lower"), interval.lower)
                self.add((*row, "upper"), interval.upper)
                self.add((*row, "width"), interval.upper - interval.lower)
            for name, values in (("kl_rc", result.estimate_rc), ("kl_cr", result.estimate_cr)):
                self.add(("all" if everything else k, name, "estimate"), values)
                self.add(("all" if everything else k, name, "error"), values - truth[name])
            self.add(("all" if everything else k, "covered"), result.covered_compressed)
            self.add(("all" if everything else k, "covered_reference"), result.covered_reference)

    def rows(self) -> list[dict[str, Any]]:
        result = []
        for k in (*LISTS, "all"):
            row: dict[str, Any] = {
                "k": k,
                "covered_mass_compressed": self._told(k, "covered"),
                "covered_mass_reference": self._told(k, "covered_reference"),
            }
            for name in FIGURES:
                columns = ["exact", "coarse", "lower", "upper", "width"]
                if name.startswith("kl"):
                    columns += ["estimate", "error"]
                row[name] = {column: self._told(k, name, column) for column in columns}
            result.append(row)
        return result

    def _told(self, *key: Any) -> dict[str, float]:
        ratio = self.means[key].get()
        return {"mean": ratio.mean, "low": ratio.low, "high": ratio.high}


def synthetic(tokens: int, k: int, seed: int = 0) -> TokenRecord:
    rng = np.random.default_rng(seed)
    z = 3.0 * rng.normal(size=(tokens, 2000))
    r = z - np.log(np.exp(z).sum(1, keepdims=True))
    z = z + 0.8 * rng.normal(size=z.shape)
    c = z - np.log(np.exp(z).sum(1, keepdims=True))
    emitted = (c + rng.gumbel(size=c.shape)).argmax(1)
    return record(Request(r, c, emitted), k)


def speed(k: int = 20, rounds: int = 15) -> dict[str, Any]:
    """Positions/s at one core, for requests of several lengths."""
    result: dict[str, Any] = {"k": k}
    for tokens in (64, 256, 1024):
        made = synthetic(tokens, k)
        several = [synthetic(tokens, k, seed) for seed in range(TOGETHER)]
        calls: list[tuple[str, Callable[[], object], int]] = [
            ("bounds", lambda made=made: bounds(made), tokens),
            ("divergence", lambda made=made: divergence(made), tokens),
            ("divergences", lambda several=several: divergences(several), TOGETHER * tokens),
        ]
        for name, call, positions in calls:
            rates, repeats = [], max(1, 4096 // positions)
            for _ in range(rounds):
                start = time.process_time()
                for _ in range(repeats):
                    call()
                rates.append(repeats * positions / (time.process_time() - start))
            result[f"{name}_{tokens}"] = {"median": statistics.median(rates), "best": max(rates)}
    return result


def table(scheme: str, report: dict[str, Any]) -> str:
    lines = [
        f"reference against {scheme}: {report['positions']} positions of {report['requests']} requests; "
        f"{report['outside']} figures outside their interval; floor {MIN_RATIO:.1e} holds at "
        f"{100 * report['floor_holds']['mean']:.1f} % of positions",
        f"{'K':>5} {'mass c':>6} {'r':>5}"
        + "".join(
            f"  {NAMES[n] + ' exact':>13} {'coarse':>7} {'lower':>7} {'estim.':>7} {'upper':>7}" for n in FIGURES[:2]
        )
        + "".join(f"  {n + ' exact':>9} {'lower':>6} {'upper':>6}" for n in ("JS", "TV")),
    ]
    for row in report["rows"]:
        line = (
            f"{row['k']:>5} {row['covered_mass_compressed']['mean']:6.3f} {row['covered_mass_reference']['mean']:5.3f}"
        )
        for name in FIGURES:
            figure = {column: value["mean"] for column, value in row[name].items()}
            if name.startswith("kl"):
                line += f"  {figure['exact']:13.4f} {figure['coarse']:7.4f} {figure['lower']:7.4f}"
                line += f" {figure['estimate']:7.4f} {figure['upper']:7.3f}"
            else:
                line += f"  {figure['exact']:9.4f} {figure['lower']:6.4f} {figure['upper']:6.4f}"
        lines.append(line)
    return "\n".join(lines)


WIDTH, HEIGHT, LEFT, TOP = 330, 250, 52, 34


def plot(reports: dict[str, Any]) -> str:
    """A row of panels a pair of models: exact, lower, estimate, upper by K; self-contained SVG."""
    panels = [
        _panel(x, y, f"{scheme}: {NAMES[name]}", report["rows"], name)
        for y, (scheme, report) in enumerate(reports.items())
        for x, name in enumerate(FIGURES)
    ]
    width, height = len(FIGURES) * WIDTH + 20, len(reports) * HEIGHT + 40
    key = "".join(
        f'<g transform="translate({20 + 190 * i} {height - 16})"><path d="M0 -4H24" class="{name}"/>'
        f'<text x="30">{text}</text></g>'
        for i, (name, text) in enumerate(
            (
                ("exact", "whole vocabulary"),
                ("lower", "lower bound"),
                ("coarse", "lower, one bucket"),
                ("upper", f"upper (KL: floor {MIN_RATIO:.0e})"),
                ("estimate", "estimate, 95 %"),
            )
        )
    )
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" '
        'font-family="sans-serif" font-size="11">'
        "<style>path{fill:none;stroke-width:1.6}.exact{stroke:#222;stroke-dasharray:5 3}.lower{stroke:#1f6fb4}"
        ".coarse{stroke:#8fbce6}.upper{stroke:#c23b22}.estimate{stroke:#2a8f4a}.axis{stroke:#999;stroke-width:1}"
        "text{fill:#222}.t{font-size:13px}</style>"
        f'<rect width="{width}" height="{height}" fill="#fff"/>{"".join(panels)}{key}</svg>\n'
    )


def _panel(column: int, line: int, title: str, rows: list[dict[str, Any]], name: str) -> str:
    logarithmic = name.startswith("kl")
    columns = ["exact", "coarse", "lower", "upper"] + (["estimate"] if logarithmic else [])
    values = [row[name][c]["mean"] for row in rows for c in columns]
    least, most = (min(values) * 0.8, max(values) * 1.25) if logarithmic else (0.0, max(values) * 1.1)
    width, height = WIDTH - LEFT - 16, HEIGHT - TOP - 30

    def x(i: float) -> float:
        return LEFT + width * i / (len(rows) - 1)

    def y(value: float) -> float:
        value = min(max(value, least), most)
        share = np.log(value / least) / np.log(most / least) if logarithmic else (value - least) / (most - least)
        return float(TOP + height * (1.0 - share))

    ticks = [t for t in (0.003, 0.01, 0.03, 0.1, 0.3, 1, 3, 10, 30) if least <= t <= most]
    if not logarithmic:
        step = next(step for step in (0.02, 0.05, 0.1, 0.2) if most / step < 6 or step == 0.2)
        ticks = [step * i for i in range(int(most / step) + 1)]
    parts = [
        f'<g transform="translate({10 + column * WIDTH} {line * HEIGHT})"><text class="t" x="{LEFT}" y="20">{title}'
    ]
    parts.append(f'</text><path class="axis" d="M{LEFT} {TOP}V{TOP + height}H{LEFT + width}"/>')
    parts += [f'<text x="{LEFT - 6}" y="{y(t) + 4:.1f}" text-anchor="end">{t:g}</text>' for t in ticks]
    parts += [
        f'<text x="{x(i):.1f}" y="{TOP + height + 15}" text-anchor="middle">{row["k"]}</text>'
        for i, row in enumerate(rows)
    ]
    for c in columns:
        points = " L".join(f"{x(i):.1f} {y(row[name][c]['mean']):.1f}" for i, row in enumerate(rows))
        parts.append(f'<path class="{c}" d="M{points}"/>')
    if logarithmic:
        parts += [
            f'<path class="estimate" d="M{x(i):.1f} {y(row[name]["estimate"]["low"]):.1f}'
            f'V{y(row[name]["estimate"]["high"]):.1f}"/>'
            for i, row in enumerate(rows)
        ]
    return "".join([*parts, "</g>"])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--requests", type=int, default=60, help="prompts, of the demo's (default 60: over 3,000 tokens)"
    )
    parser.add_argument("--schemes", nargs="+", default=["w4a16", "w8a8"])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--speed-only", action="store_true")
    options = parser.parse_args()
    BUILD.mkdir(parents=True, exist_ok=True)
    rates = speed()
    for what, rate in rates.items():
        if what != "k":
            print(f"{what.replace('_', ', T = '):>22}: {rate['median'] / 1e3:7.0f}k positions/s at K = {rates['k']}")
    if options.speed_only:
        return 0
    reports = {}
    for scheme in options.schemes:
        sweep, knowledge = Sweep(), Knowledge(output_embedding(scheme), options.seed)
        for request in requests(scheme, options.requests, options.seed):
            truth = exact(request)
            sweep.see(request, truth)
            if sweep.requests <= REQUESTS_BY_KNOWLEDGE:
                knowledge.see(record(request, K_BY_KNOWLEDGE), request.reference, request.compressed, truth)
            say(f"{scheme}: {sweep.requests}/{options.requests} requests, {sweep.positions} positions")
        holds = sweep.means["floor holds",].get()
        reports[scheme] = {
            "positions": sweep.positions,
            "requests": sweep.requests,
            "outside": sweep.outside,
            "floor_holds": {"mean": holds.mean, "low": holds.low, "high": holds.high},
            "rows": sweep.rows(),
            "by_knowledge": {"k": K_BY_KNOWLEDGE, **knowledge.report()},
        }
        print(table(scheme, reports[scheme]))
        print(knowledge_table(scheme, K_BY_KNOWLEDGE, reports[scheme]["by_knowledge"]))
    (BUILD / "bounds.json").write_text(
        json.dumps({"floor": MIN_RATIO, "speed": rates, "seed": options.seed, "pairs": reports}, indent=1) + "\n"
    )
    (BUILD / "bounds.svg").write_text(plot(reports))
    print(f"{BUILD / 'bounds.json'}, {BUILD / 'bounds.svg'}")
    return 1 if any(report["outside"] for report in reports.values()) else 0


if __name__ == "__main__":
    sys.exit(main())
