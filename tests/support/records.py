"""Whole distributions, so that what is computed from their top-K view can be compared with the truth."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
from hypothesis import strategies as st
from tests.support.oracle import shift

from hemostat_calibration.profiles.profile import CalibrationProfile
from hemostat_calibration.record_checks import validate
from hemostat_calibration.records import GRAMMAR, Candidates, Sampling, Shift, TokenRecord


@dataclass(frozen=True, eq=False)
class Truth:
    """Both models' log-probabilities over the whole vocabulary, float64 [T, V], and the emitted ids [T]."""

    reference: np.ndarray
    compressed: np.ndarray
    emitted: np.ndarray


def log_softmax(logits: np.ndarray) -> np.ndarray:
    shifted = logits - logits.max(-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))


def entropy(logprobs: np.ndarray) -> np.ndarray:
    return -(np.exp(logprobs) * np.where(np.isfinite(logprobs), logprobs, 0.0)).sum(-1)


def top(logprobs: np.ndarray, k: int, emitted: np.ndarray | None = None, *, chat: bool = False) -> Candidates:
    """The k most likely ids, and behind them the emitted one where it is not among them, as vLLM's completions answer;
    its chat route (`chat`) gives k in all, the emitted one in the last one's place."""
    rows, vocabulary = logprobs.shape
    k = min(k, vocabulary)
    order = np.argsort(-logprobs, axis=-1, kind="stable")[:, :k].astype(np.int32)
    values = np.take_along_axis(logprobs, order, -1)
    if emitted is None:
        return Candidates(order, values)
    outside = ~(order == emitted[:, None]).any(1)
    last_id = np.where(outside, emitted, -1).astype(np.int32)
    last = np.where(outside, logprobs[np.arange(rows), emitted], -np.inf)
    ids, listed = np.column_stack([order, last_id]), np.column_stack([values, last])
    if chat:
        ids[outside, k - 1], listed[outside, k - 1] = emitted[outside], last[outside]
        ids[:, k], listed[:, k] = -1, -np.inf
    return Candidates(ids, listed)


def condition(logprobs: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """Log-probabilities given that the id is one of `mask` [T, V]; -inf at the others."""
    return log_softmax(np.where(mask, logprobs, -np.inf))


def without_impossible(candidates: Candidates) -> Candidates:
    """Padding in place of the ids whose probability is 0, which are the last of their rows."""
    return Candidates(np.where(np.isneginf(candidates.logprobs), -1, candidates.ids), candidates.logprobs)


def make_record(
    truth: Truth,
    k: int,
    *,
    reference_k: int | None = None,
    chat: bool = False,
    profile: CalibrationProfile | None = None,
    log_normalizer: bool = True,
    sampling: Sampling | None = None,
    applied: str | None = None,
    key: bytes = b"key",
    mask: np.ndarray | None = None,
) -> TokenRecord:
    """The top-k view. `reference_k`: the reference gave only that many (a vLLM server), None: it gave all. `mask`
    [T, V]: the ids that a grammar allows, the emitted ones among them."""
    if mask is not None:
        truth = replace(truth, reference=condition(truth.reference, mask), compressed=condition(truth.compressed, mask))
    rows, vocabulary = truth.compressed.shape
    at = np.arange(rows)
    candidates = top(truth.compressed, k, truth.emitted, chat=chat)
    reference_at = np.take_along_axis(truth.reference, np.maximum(candidates.ids, 0), -1)
    reference = top(truth.reference, 8 if reference_k is None else reference_k, truth.emitted)
    if mask is not None:
        candidates, reference = without_impossible(candidates), without_impossible(reference)
    if reference_k is not None:
        given = (candidates.ids[:, :, None] == reference.ids[:, None, :]).any(-1)
        reference_at = np.where(given, reference_at, np.nan)
    shifts = {}
    if profile is not None:
        delta = shift(profile, truth.compressed)
        unknown = np.full(rows, np.nan)
        shifts[profile.version] = Shift(
            expected=(np.exp(truth.reference) * delta).sum(-1) if reference_k is None else unknown,
            log_normalizer=np.log((np.exp(truth.compressed) * np.exp(delta)).sum(-1)) if log_normalizer else unknown,
        )
    return validate(
        TokenRecord(
            vocab_size=vocabulary,
            prompt_key=key,
            output_ids=truth.emitted.astype(np.int32),
            compressed=candidates,
            reference_at=np.where(candidates.ids >= 0, reference_at, np.nan),
            reference=reference,
            compressed_emitted=truth.compressed[at, truth.emitted],
            reference_emitted=truth.reference[at, truth.emitted],
            reference_entropy=entropy(truth.reference) if reference_k is None else None,
            sampling=sampling or Sampling(),
            applied=applied,
            shifts=shifts,
            support=None if mask is None else mask.sum(1).astype(np.int32),
            constraint="" if mask is None else GRAMMAR,
        )
    )


@st.composite
def truths(draw: st.DrawFn, rows: int = 4, max_vocabulary: int = 24) -> Truth:
    """Random, peaked, flat and adversarial pairs: spreads from almost uniform to almost one-hot, agreement from the
    same distribution to unrelated ones, near-ties included."""
    vocabulary = draw(st.integers(2, max_vocabulary))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    spread = draw(st.sampled_from([0.0, 0.1, 1.0, 3.0, 10.0, 60.0]))
    noise = draw(st.sampled_from([0.0, 1e-6, 0.1, 1.0, 5.0, 40.0]))
    z = spread * rng.normal(size=(rows, vocabulary))
    reference = log_softmax(z)
    compressed = log_softmax(z + noise * rng.normal(size=z.shape))
    if draw(st.booleans()):
        compressed = compressed[:, ::-1].copy()
    emitted = np.array([rng.choice(vocabulary, p=np.exp(row) / np.exp(row).sum()) for row in compressed])
    return Truth(reference, compressed, emitted)


@st.composite
def profiles(draw: st.DrawFn, vocabulary: int) -> CalibrationProfile:
    from tests.support.temperature_bias import temperature_bias

    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    bias = draw(st.sampled_from([0.0, 0.1, 1.0])) * rng.normal(size=vocabulary)
    return temperature_bias(
        "m", vocabulary, draw(st.sampled_from([0.6, 0.9, 1.0, 1.1, 1.7])), bias, draw(st.sampled_from([0.05, 0.5, 2.0]))
    )
