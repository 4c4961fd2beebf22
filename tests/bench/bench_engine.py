"""What a contextual profile costs vLLM's decoding: `make bench-engine`, a table and build/bench/engine.json.

Two vLLM engines (V1, in process, no HTTP server) decode the same batch of W4A16 SmolLM2 on the CPU: one started without
the plugin, one with it and with the profile. One of them works at a time; the other sleeps in a read. A round is one
burst of decoding steps in each arm, in random order, so that whatever else the machine does hits all alike; ratios are
taken round by round.

without plugin   the engine that was started without it
no rows          the plugin is loaded and holds the profile; no request asks for it
all rows         every request asks for the profile
all rows tapped  the same, and every row's features and log-normalizers are handed out, as at a shadow rate of 100 %

Two processes of the same program differ by a percent or so on the same machine, for as long as they live (where their
memory lies): engines are started anew several times, and the bootstrap draws starts first, then rounds within them.
"all rows" against "no rows" is within one process and has no such noise: it is given as well.

Figures are tokens/s of whole bursts, the first step (the prompts) aside; medians over rounds. Where other programs
take the cores now and then, the fastest quarter of a burst's steps says more: ratios of that are given beside
(`fastest_quarter`). The transform alone is timed as well, and its parts, with what it does a row: bytes and floating
point operations.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import random
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import IO, Any

import numpy as np
import numpy.typing as npt

from hemostat.engines.reports import SILENCE_SECONDS
from hemostat_calibration.profiles.contextual import contextual_profile
from hemostat_calibration.profiles.profile import CalibrationProfile
from hemostat_engine.product import Product, multiplies_bfloat16, packs
from hemostat_lab.demo.checkpoints import cached_checkpoints
from hemostat_lab.demo.vllm_server import LOGITS_PROCESSOR, dtype, runnable

ROOT = Path(__file__).resolve().parents[2]
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))

from tests.bench.engine_child import (  # noqa: E402  the root is no package
    PROCESSOR_TIME,
    EngineChild,
    add_option,
    step_seconds,
    use_one_core,
)
from tests.support.engine_admin import TOKEN, EngineAdmin, accept_unsigned_keys  # noqa: E402  the root is no package

BUILD = ROOT / "build" / "bench"
LEARNED = BUILD / "w4a16.profile"
WITHOUT, NO_ROWS, ALL_ROWS, TAPPED = "without plugin", "no rows", "all rows", "all rows tapped"
ARMS = (WITHOUT, NO_ROWS, ALL_ROWS, TAPPED)
STARTS_WITHIN = 300.0
BOOTSTRAP = 10_000


def synthetic(
    vocab_size: int, *, anchors: int, features: int, rank: int, narrow: int, wide: int, seed: int = 1
) -> CalibrationProfile:
    """Of the shape that serves, with shifts of about a nat: what it costs does not depend on what it says. All but
    `wide` ids have `narrow` columns only."""
    rng = np.random.default_rng(seed)
    read = 0.25 / np.sqrt(features)
    up = rng.normal(0.0, 1.0 / np.sqrt(rank), (vocab_size, rank))
    up[rng.permutation(vocab_size)[wide:], narrow:] = 0.0
    return contextual_profile(
        model="",
        anchors=rng.permutation(vocab_size)[:anchors],
        linear=rng.normal(0.0, read, (rank, features)),
        offset=rng.normal(0.0, 0.1, rank),
        up=up,
        clamp_nats=4.0,
        fisher=np.eye(rank) / rank,
        kl_limit=4.0,
    )


def shape(profile: CalibrationProfile) -> dict[str, int]:
    rank, features = profile.parameters["linear"].shape
    up = Product(profile.parameters["up"])
    return {
        "rank": rank,
        "anchors": len(profile.parameters["anchors"]),
        "features": features,
        "narrow": up.narrow,
        "wide": up.wide,
    }


def per_row(vocab_size: int, rank: int, features: int, anchors: int, narrow: int, wide: int) -> dict[str, int]:
    """What one row takes: floating point operations, bytes of weights (read once a step, whatever the batch), bytes of
    its own logits (read and written), and bytes that a tapped row hands out. And the profile's size."""
    import torch

    parts = (narrow * vocab_size, (rank - narrow) * wide)
    up_bytes = sum(part * (2 if packs(part, torch.device("cpu")) else 4) for part in parts)
    operations = {
        "linear": 2 * features * rank,
        "trust_region": 2 * rank * (rank + 1),
        "up": 2 * sum(parts),
        "clamp_and_add": 3 * vocab_size,
    }
    return {
        "vocab_size": vocab_size,
        "rank": rank,
        "narrow": narrow,
        "wide": wide,
        "flops": sum(operations.values()),
        "weight_bytes_per_step": up_bytes + 4 * rank * (features + rank),
        "logit_bytes": 2 * 4 * vocab_size,
        "tap_feature_bytes": 2 * anchors,
        "profile_bytes": 2 * rank * vocab_size + 4 * (anchors + rank * (features + rank + 1)),
    }


class Engine(EngineChild):
    """Bursts of decoding steps."""

    def __init__(
        self, model: Path, admin: EngineAdmin | None, batch: int, log: Path, *, processor_time: bool = False
    ) -> None:
        environment: dict[str, str] = {}
        arguments = ["--child", str(model), "--batch", str(batch), *([PROCESSOR_TIME] if processor_time else [])]
        if admin is not None:
            environment |= {"HEMOSTAT_ADMIN_URL": admin.url, "HEMOSTAT_ENGINE_TOKEN": TOKEN}
            arguments.append("--plugin")
        super().__init__(Path(__file__).resolve(), arguments, environment, log)
        self.ask({})

    def burst(self, steps: int, version: str | None, tap: bool) -> list[float]:
        """Seconds of every decoding step."""
        answer = self.ask({"steps": steps, "version": version, "tap": tap})
        applied, wanted = answer["applied"], answer["rows"] if version else 0
        if applied != wanted:
            raise SystemExit(f"the engine applied the profile to {applied} rows instead of {wanted}: see {self.log}")
        seconds: list[float] = answer["seconds"]
        return seconds


def serve_bursts(model: str, batch: int, plugin: bool, processor_time: bool, answers: IO[str]) -> None:
    """The child: bursts that are asked for on stdin, one JSON line each."""
    from vllm import LLM, SamplingParams

    llm = LLM(
        model=str(runnable(Path(model))),
        enforce_eager=True,
        dtype=dtype(),
        max_model_len=2048,
        max_num_seqs=max(batch, 2),
        enable_prefix_caching=False,
        logits_processors=[LOGITS_PROCESSOR] if plugin else None,
    )
    engine = llm.llm_engine
    accept_unsigned_keys()
    counters = plugin_counters() if plugin else None
    admitted = 0
    for line in sys.stdin:
        question = json.loads(line)
        if not question:
            answers.write("{}\n")
            answers.flush()
            continue
        xargs = {"hemostat": question["version"]} if question["version"] else {}
        before = counters.read().get("rows_applied", 0) if counters else 0
        for i in range(batch):
            admitted += 1
            extra = xargs | ({"hemostat_tap": f"n{admitted}"} if question["tap"] else {})
            engine.add_request(
                str(admitted),
                {"prompt_token_ids": [1, 504 + i, 2837, 282, 4649, 314]},
                SamplingParams(
                    temperature=0, max_tokens=question["steps"] + 1, ignore_eos=True, extra_args=extra or None
                ),
            )
        engine.step()  # the prompts
        seconds = step_seconds(engine, processor_time=processor_time)
        applied = counters.read().get("rows_applied", 0) - before if counters else 0
        json.dump({"seconds": seconds, "applied": applied, "rows": batch * (len(seconds) + 1)}, answers)
        answers.write("\n")
        answers.flush()


def plugin_counters() -> Any:
    """The loaded processor's counters; vLLM has no way to ask for its processors."""
    from hemostat_engine.processor import LogitsProcessor

    gc.unfreeze()  # vLLM's start freezes what it made, and what is frozen is not listed
    (processor,) = (get_object for get_object in gc.get_objects() if type(get_object) is LogitsProcessor)
    return processor.core.counters


def measure(
    arguments: argparse.Namespace, model: Path, profile: CalibrationProfile, folder: Path
) -> npt.NDArray[np.float64]:
    """Seconds of every decoding step, float64 [starts, rounds, arms, steps]."""
    admin, processor_time = EngineAdmin(), arguments.processor_time
    order = random.Random(1)
    result = np.zeros((arguments.starts, arguments.rounds, len(ARMS), arguments.steps))
    admin.files[profile.version] = profile.to_bytes()
    admin.registry.set_wanted([profile.version])
    try:
        for start in range(arguments.starts):
            plain, loaded = (
                Engine(model, given, arguments.batch, folder / f"{name}-{start}.log", processor_time=processor_time)
                for name, given in (("plain", None), ("plugin", admin))
            )
            try:
                until_held(admin, profile.version)
                for number in range(-arguments.warmups, arguments.rounds):
                    progress(f"start {start + 1} of {arguments.starts}, round {number + 1} of {arguments.rounds}")
                    for arm in order.sample(range(len(ARMS)), len(ARMS)):
                        engine = plain if ARMS[arm] == WITHOUT else loaded
                        treated = ARMS[arm] in (ALL_ROWS, TAPPED)
                        version = profile.version if treated else None
                        seconds = engine.burst(arguments.steps, version, ARMS[arm] == TAPPED)
                        if number >= 0:
                            result[start, number, arm] = seconds
            finally:
                plain.stop()
                loaded.stop()
            admin.now += SILENCE_SECONDS + 1.0  # the engine that has ended is to be forgotten
    finally:
        admin.close()
    return result


def until_held(admin: EngineAdmin, version: str) -> None:
    give_up = time.monotonic() + STARTS_WITHIN
    while version not in admin.registry.acknowledged(admin.now):
        if time.monotonic() > give_up:
            raise SystemExit("the engine does not hold the profile: see its log")
        time.sleep(0.1)


def ratio(rates: npt.NDArray[np.float64], of: str, to: str) -> dict[str, Any]:
    """Median over rounds of one arm's tokens/s over another's, and a 95 % bootstrap interval: starts are drawn, then
    rounds within each."""
    quotients = rates[..., ARMS.index(of)] / rates[..., ARMS.index(to)]
    starts, rounds = quotients.shape
    rng = np.random.default_rng(1)
    drawn = rng.integers(0, starts, (BOOTSTRAP, starts, 1))
    medians = np.median(quotients[drawn, rng.integers(0, rounds, (BOOTSTRAP, starts, rounds))], axis=(1, 2))
    return {
        "ratio": float(np.median(quotients)),
        "ci95": [float(bound) for bound in np.quantile(medians, [0.025, 0.975])],
        "by_start": [float(value) for value in np.median(quotients, axis=1)],
    }


def transform_alone(
    shapes: dict[str, int], vocabularies: Sequence[int], batches: Sequence[int]
) -> list[dict[str, Any]]:
    """Milliseconds of the transform by itself, on as many threads as there are cores; medians."""
    import torch
    from tests.support.transform import apply_to_all

    from hemostat_engine.transform import HeldProfile, evaluate

    result = []
    for vocab_size in vocabularies:
        held = HeldProfile(synthetic(vocab_size, **shapes))
        for batch in batches:
            logits = torch.randn(batch, vocab_size) * 4
            rows = torch.arange(batch)
            work = logits.clone()

            def apply(work: torch.Tensor = work, held: HeldProfile = held) -> None:
                apply_to_all(held, work)

            def read(logits: torch.Tensor = logits, rows: torch.Tensor = rows, held: HeldProfile = held) -> None:
                evaluate((held,), logits, rows)

            result.append(
                {
                    "vocab_size": vocab_size,
                    "batch": batch,
                    "apply_ms": milliseconds(apply),
                    "tap_ms": milliseconds(read),
                }
            )
    return result


def parts(profile: CalibrationProfile, batch: int) -> dict[str, float]:
    """Returns the processor time in milliseconds of each part of the transform, on one thread as in vLLM's worker, with
    all of it out of the processor's own cache, as the model's weights leave it between two steps; medians. By these a
    lower rank can be judged: `code` and `clamp_and_add` stay."""
    import torch
    from tests.support.transform import apply_to_all

    from hemostat_engine.transform import HeldProfile

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    held = HeldProfile(profile)
    up = held.parameters.products["up"]
    logits = torch.randn(batch, profile.vocab_size) * 4
    delta = torch.randn(batch, profile.vocab_size)
    y = torch.randn(batch, len(profile.parameters["linear"]))
    weights = torch.randn(32 << 20)

    def cold(work: Any) -> float:
        spent = []
        for _ in range(21):
            weights.mul_(1.0)
            started = time.process_time()
            work()
            spent.append(time.process_time() - started)
        return 1e3 * sorted(spent)[len(spent) // 2]

    result = {
        "all": cold(lambda: apply_to_all(held, logits)),
        "up": cold(lambda: up(y)),
        "clamp_and_add": cold(lambda: logits.add_(delta.clamp_(-4.0, 4.0))),
    }
    torch.set_num_threads(threads)
    return result | {"code": result["all"] - result["up"] - result["clamp_and_add"]}


def milliseconds(work: Any, times: int = 60) -> float:
    for _ in range(10):
        work()
    spent = []
    for _ in range(times):
        started = time.perf_counter()
        work()
        spent.append(time.perf_counter() - started)
    return 1e3 * sorted(spent)[times // 2]


def progress(text: str) -> None:
    print(f"\r{text}   ", end="", file=sys.stderr, flush=True)


def table(result: dict[str, Any]) -> str:
    def cell(compared: dict[str, Any] | None) -> str:
        if compared is None:
            return ""
        low, high = compared["ci95"]
        return f"{compared['ratio']:.4f} ({low:.4f} to {high:.4f})"

    quarter = result["fastest_quarter"]
    lines = [f"{'':22}{'tokens/s':>10}{'step, ms':>10}  {'x without plugin (95 %)':26}  fastest quarter of the steps"]
    for arm in ARMS:
        rate = result["tokens_per_second"][arm]
        ratios = (cell(group.get(arm)) for group in (result["to_without_plugin"], quarter["to_without_plugin"]))
        lines.append(
            f"{arm:22}{rate:10.1f}{1e3 * result['batch'] / rate:10.2f}  {'  '.join(f'{r:26}' for r in ratios)}"
        )
    within = (cell(group["all_rows_to_no_rows"]) for group in (result, quarter))
    lines.append(f"{'all rows x no rows, in one process':42}  {'  '.join(f'{r:26}' for r in within)}")
    step = 1e3 * result["batch"] / result["tokens_per_second"][WITHOUT]
    shares = (f"{name} {ms:.2f} ({ms / step:.1%} of a step)" for name, ms in result["parts"].items())
    lines.append(f"its parts on one thread, ms: {', '.join(shares)}")
    if result["transform"]:
        lines.append("the transform alone, ms:")
    for row in result["transform"]:
        where = f"V {row['vocab_size']:7} batch {row['batch']:3}"
        lines.append(f"  {where}: apply {row['apply_ms']:7.3f}, tap {row['tap_ms']:7.3f}")
    for row in result["per_row"]:
        flops, weights, size = (row[name] / 1e6 for name in ("flops", "weight_bytes_per_step", "profile_bytes"))
        lines += [
            f"a row at V {row['vocab_size']}, rank {row['rank']}, {row['narrow']} for all but {row['wide']} ids:\n"
            f"  {flops:.1f} MFLOP; a step reads {weights:.1f} MB of weights; the profile is {size:.1f} MB"
        ]
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--profile",
        type=Path,
        default=LEARNED if LEARNED.exists() else None,
        help="a contextual profile; without it, the one that bench-recovery learned, or one of the same shape",
    )
    parser.add_argument("--rank", type=int, default=192)
    parser.add_argument("--narrow", type=int, default=64, help="rank of what is added to ids of the tail")
    parser.add_argument("--wide", type=int, default=8192, help="ids that are not of the tail")
    parser.add_argument("--anchors", type=int, default=1024)
    parser.add_argument("--features", type=int, default=576)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--steps", type=int, default=24, help="decoding steps of a burst")
    parser.add_argument("--rounds", type=int, default=16, help="of each start")
    parser.add_argument("--warmups", type=int, default=2, help="rounds that do not count")
    parser.add_argument("--starts", type=int, default=4, help="times that both engines are started")
    add_option(parser)
    parser.add_argument("--child", help=argparse.SUPPRESS)
    parser.add_argument("--plugin", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        # vLLM writes to stdout what it likes: answers get a descriptor of their own.
        answers = os.fdopen(os.dup(1), "w")
        os.dup2(2, 1)
        serve_bursts(arguments.child, arguments.batch, arguments.plugin, arguments.processor_time, answers)
        return 0
    checkpoint = cached_checkpoints("w4a16", lambda text: print(text, file=sys.stderr)).compressed
    vocab_size = json.loads((checkpoint / "config.json").read_text())["vocab_size"]
    if arguments.profile:
        profile = CalibrationProfile.from_bytes(arguments.profile.read_bytes())
        if profile.family != "contextual" or profile.vocab_size != vocab_size:
            print(f"{arguments.profile} is not a contextual profile of a vocabulary of {vocab_size}", file=sys.stderr)
            return 2
    else:
        names = ("rank", "anchors", "features", "narrow", "wide")
        profile = synthetic(vocab_size, **{name: getattr(arguments, name) for name in names})
    if arguments.processor_time:
        use_one_core()
    load_before = os.getloadavg()[0]
    with tempfile.TemporaryDirectory(prefix="hemostat-bench-") as folder:
        seconds = measure(arguments, checkpoint, profile, Path(folder))
    rates = arguments.batch / seconds.mean(axis=-1)
    fastest = arguments.batch / np.sort(seconds, axis=-1)[..., : max(1, arguments.steps // 4)].mean(axis=-1)
    compared = {arm: ratio(rates, arm, WITHOUT) for arm in ARMS[1:]}
    sizes = shape(profile)
    result = {
        "ratio_all_rows": compared[ALL_ROWS]["ratio"],
        "ci95_all_rows": compared[ALL_ROWS]["ci95"],
        "ratio_no_rows": compared[NO_ROWS]["ratio"],
        "ci95_no_rows": compared[NO_ROWS]["ci95"],
        "dtype": dtype(),
        "batch": arguments.batch,
        **sizes,
        "profile": profile.version if arguments.profile else "synthetic",
        "tokens_per_second": {arm: float(np.median(rates[..., i])) for i, arm in enumerate(ARMS)},
        "to_without_plugin": compared,
        "all_rows_to_no_rows": ratio(rates, ALL_ROWS, NO_ROWS),
        "fastest_quarter": {
            "to_without_plugin": {arm: ratio(fastest, arm, WITHOUT) for arm in ARMS[1:]},
            "all_rows_to_no_rows": ratio(fastest, ALL_ROWS, NO_ROWS),
        },
        "parts": parts(profile, arguments.batch),
        # Its times are of the clock, and its threads more than the one core that is left.
        "transform": [] if arguments.processor_time else transform_alone(sizes, (vocab_size, 128_256), (1, 8, 32)),
        "per_row": [
            per_row(vocab_size, **sizes),
            per_row(128_256, **sizes),
            per_row(128_256, **sizes | {"rank": 64, "narrow": 64, "wide": 0}),
        ],
        "bfloat16": multiplies_bfloat16(),
        "settings": {name: getattr(arguments, name) for name in ("steps", "rounds", "starts", "processor_time")}
        | {"cores": os.cpu_count(), "load_before": load_before},
    }
    BUILD.mkdir(parents=True, exist_ok=True)
    path = BUILD / "engine.json"
    path.write_text(json.dumps(result, indent=2) + "\n")
    print(file=sys.stderr)
    print(table(result))
    print(f"written to {path.relative_to(ROOT)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
