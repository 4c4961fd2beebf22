"""How often a profile that the guard promotes is in truth harmful: many small runs, drawn from real records.

One run draws prompts to learn from (500 to 2,000 tokens), has the contextual family propose, shows the guard other
prompts one by one, and, where it promotes, compares the true gain, on all prompts that were not learned from. To make
a thousand runs affordable the vocabulary is cut to the likeliest ids, both models' distributions renormalised on them,
and a request is cut to its first tokens.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import multiprocessing
import os
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from hemostat_calibration.guard.decisions import Action
from hemostat_calibration.guard.guard import Guard
from hemostat_calibration.learning.contextual.anchors import choose_anchors
from hemostat_calibration.learning.contextual.choose import ProfileLimits
from hemostat_calibration.learning.contextual.hidden_states import softmax
from hemostat_calibration.learning.contextual.learner import ContextualLearner
from hemostat_calibration.profiles.profile import CalibrationProfile
from hemostat_calibration.profiles.transform import code
from hemostat_calibration.records import Candidates, Features, TokenRecord

from .engine import CORES, Written
from .figures import Recovery, stacked
from .learning import ALPHA
from .log import say

VOCABULARY = 2048
ANCHORS = 128
TOKENS_A_REQUEST = 24
JUDGED_AT_MOST = 300
"""Requests that the guard is shown."""
LEARNING = (500, 2000)

Singles = npt.NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class World:
    """Real records on a small vocabulary. prompt: of each token, int [T]; h_r, h_c: [T, d]; weight: [V', d];
    log_r, log_c: [T, V'], nats."""

    weight: Singles
    anchors: npt.NDArray[np.int32]
    prompt: npt.NDArray[np.integer]
    h_r: Singles
    log_r: Singles
    log_c: Singles
    clamp_nats: float


def world(weight: Singles, recovery: Recovery, texts: Sequence[Written], requests: int, clamp_nats: float) -> World:
    chosen = texts[:requests]
    h_r, h_c = stacked(chosen, recovery)
    number = np.concatenate([np.arange(len(t.output)) for t in chosen])
    prompt = np.repeat(np.arange(len(chosen)), [len(t.output) for t in chosen])
    kept = number < TOKENS_A_REQUEST
    h_r, h_c, prompt = h_r[kept], h_c[kept], prompt[kept]
    mean = np.zeros(len(weight))
    for start in range(0, 4096, 512):
        mean += softmax(h_r[start : start + 512] @ weight.T).sum(axis=0)
    small = weight[np.sort(np.argsort(-mean)[:VOCABULARY])]
    return World(
        weight=small,
        anchors=choose_anchors(small, ANCHORS),
        prompt=prompt,
        h_r=h_r,
        log_r=_log_softmax(h_r @ small.T),
        log_c=_log_softmax(h_c @ small.T),
        clamp_nats=clamp_nats,
    )


@dataclass(frozen=True, slots=True)
class Run:
    """tokens: learned from. true_gain: nats per token, mean over requests; NaN where nothing was proposed."""

    tokens: int
    proposed: bool
    promoted: bool
    true_gain: float
    requests: int


def run(w: World, seed: int) -> Run:
    random = np.random.default_rng([20_250, seed])
    prompts = int(w.prompt.max()) + 1
    order = random.permutation(prompts)
    pool, judges = order[: prompts // 2], order[prompts // 2 :]
    wanted = int(random.integers(LEARNING[0], LEARNING[1] + 1))
    sizes = np.bincount(w.prompt)
    drawn: list[int] = []
    while sum(sizes[drawn]) < wanted:
        drawn.append(int(random.choice(pool)))
    profile = _propose(w, drawn)
    tokens = int(sum(sizes[drawn]))
    if profile is None:
        return Run(tokens, False, False, float("nan"), 0)
    rest = np.flatnonzero(~np.isin(w.prompt, drawn))
    gains = np.full(prompts, np.nan)
    totals = np.bincount(w.prompt[rest], _gains(w, profile, rest), prompts)
    present = np.bincount(w.prompt[rest], minlength=prompts) > 0
    gains[present] = totals[present] / sizes[present]
    guard = Guard(ALPHA)
    guard.begin_candidate("it", {"all": (2.0 * w.clamp_nats, 1.0)})
    promoted, shown = False, 0
    for prompt in judges[:JUDGED_AT_MOST]:
        gain = float(gains[prompt])
        guard.update("it", "all", b"", b"", gain, gain, int(sizes[prompt]))
        shown += 1
        promoted = guard.decide("it", "all").action is Action.PROMOTE
        if promoted:
            break
    return Run(tokens, True, promoted, float(np.nanmean(gains)), shown)


def simulate(w: World, runs: int, name: str) -> dict[str, Any]:
    """Every run, in two processes."""
    began = time.monotonic()
    result: list[Run] = []
    # New processes, as numpy's threads are counted once: two times two of them would wait for each other.
    context = multiprocessing.get_context("spawn")
    with _one_thread_each(), concurrent.futures.ProcessPoolExecutor(CORES, context, _begin, (w,)) as pool:
        for outcome in pool.map(_numbered, range(runs), chunksize=10):
            result.append(outcome)
            if len(result) % 100 == 0:
                say(f"{name}: {len(result)} of {runs} runs, {time.monotonic() - began:.0f} s")
    promoted = [r for r in result if r.promoted]
    harmful = [r for r in promoted if r.true_gain < 0.0]
    proposed = [r for r in result if r.proposed]
    return {
        "runs": runs,
        "alpha": ALPHA,
        "proposed": len(proposed),
        "proposed_with_negative_true_gain": sum(r.true_gain < 0.0 for r in proposed),
        "promoted": len(promoted),
        "promoted_with_negative_true_gain": len(harmful),
        "rate": len(harmful) / runs,
        "mean_true_gain_of_promoted": float(np.mean([r.true_gain for r in promoted])) if promoted else None,
        "mean_true_gain_of_proposed": float(np.mean([r.true_gain for r in proposed])) if proposed else None,
        "mean_requests_to_promotion": float(np.mean([r.requests for r in promoted])) if promoted else None,
        "learning_tokens": list(LEARNING),
        "vocabulary": VOCABULARY,
        "seconds": time.monotonic() - began,
    }


@contextlib.contextmanager
def _one_thread_each() -> Iterator[None]:
    names = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")
    before = {name: os.environ.get(name) for name in names}
    os.environ.update(dict.fromkeys(names, "1"))
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


_world: World | None = None


def _begin(w: World) -> None:
    global _world  # noqa: PLW0603 - each process gets it once, instead of with every run
    _world = w


def _numbered(seed: int) -> Run:
    assert _world is not None
    return run(_world, seed)


def _propose(w: World, drawn: Sequence[int]) -> CalibrationProfile | None:
    family = ContextualLearner(w.weight, w.anchors, features=ANCHORS, limits=ProfileLimits(32, w.clamp_nats))
    records = []
    for prompt in drawn:
        rows = np.flatnonzero(w.prompt == prompt)
        unknown = np.full(len(rows), np.nan)
        ids = np.zeros((len(rows), 1), np.int32)
        candidates = Candidates(ids, unknown[:, None])
        z = w.log_c[np.ix_(rows, w.anchors)]
        records.append(
            TokenRecord(
                vocab_size=len(w.weight),
                prompt_key=prompt.to_bytes(16, "little"),
                output_ids=ids[:, 0],
                compressed=candidates,
                reference_at=unknown[:, None],
                reference=candidates,
                compressed_emitted=unknown,
                reference_emitted=unknown,
                features=Features(family.digest, (z - z.mean(axis=1, keepdims=True)).astype(np.float32)),
                reference_hidden=w.h_r[rows],
            )
        )
    return family.propose(family.update(family.init("bench", len(w.weight)), records))


def _gains(w: World, profile: CalibrationProfile, rows: npt.NDArray[np.integer]) -> npt.NDArray[np.float64]:
    """E_r[Δz] − log E_c[e^Δz] of each row, nats."""
    result = np.empty(len(rows))
    up = profile.parameters["up"].astype(np.float32).T
    for start in range(0, len(rows), 4096):
        part = rows[start : start + 4096]
        said = code(profile, w.log_c[np.ix_(part, w.anchors)]).astype(np.float32)
        delta = np.clip(said @ up, -w.clamp_nats, w.clamp_nats)
        log_c = w.log_c[part]
        result[start : start + 4096] = (np.exp(w.log_r[part]) * delta).sum(1) - np.log(np.exp(log_c + delta).sum(1))
    return result


def _log_softmax(z: Singles) -> Singles:
    z -= z.max(axis=1, keepdims=True)
    z -= np.log(np.exp(z).sum(axis=1, keepdims=True))
    return z
