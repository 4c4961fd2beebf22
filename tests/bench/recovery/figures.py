"""Full-vocabulary figures on held-out text: profile by profile, token by token; their intervals."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from tests.support.transform import apply_to_all

from hemostat_calibration.learning.contextual import hidden_states
from hemostat_calibration.profiles.profile import CalibrationProfile
from hemostat_engine.transform import HeldProfile

from .engine import Written, one_thread_each
from .log import say
from .prompts import open_ended

IDENTITY = "identity"
RESAMPLES = 2000
_CHUNK, _ROWS = 128, 8
"""Tokens whose logits are held, and worked on, at a time."""

Floats = npt.NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Figures:
    """float64 [T] each: KL(r‖c'), KL(c'‖r) and TV, nats; 1 where c' and r have the same most likely token."""

    kl: Floats
    reverse_kl: Floats
    tv: Floats
    top1: Floats


class Recovery:
    """h of the compressed model from the logits that the engine handed out (Gaussian conditioning)."""

    def __init__(self, weight: npt.NDArray[np.float32], anchors: npt.NDArray[np.int32], texts: Sequence[Written]):
        rows = np.concatenate([t.hidden for t in texts if t.hidden is not None])
        sample = rows[:: max(1, len(rows) // 8192)].astype(np.float32)
        self._offset, self._gain = hidden_states.linear_recovery(
            weight[anchors], hidden_states.estimate_prior(sample, NOISE)
        )

    def __call__(self, features: npt.NDArray[np.floating]) -> npt.NDArray[np.float32]:
        return (features.astype(np.float64) @ self._gain.T + self._offset).astype(np.float32)


NOISE = 0.03
"""Standard deviation of a logit as the engine hands it out, nats: bfloat16, then float16."""


def measure(
    weight: npt.NDArray[np.float32],
    recovery: Recovery,
    texts: Sequence[Written],
    profiles: Mapping[str, CalibrationProfile],
    name: str = "",
) -> dict[str, Figures]:
    """Of identity and every profile, over all tokens of the texts, in their order. The shifts are the engine's own."""
    held = {label: HeldProfile(profile) for label, profile in profiles.items()}
    h_r, h_c = stacked(texts, recovery)
    embedding = torch.from_numpy(weight).T.contiguous()
    began = said = time.monotonic()
    parts: list[torch.Tensor] = []

    def chunk(start: int) -> torch.Tensor:
        with torch.inference_mode():
            z_r, z_c = (torch.from_numpy(h[start : start + _CHUNK]) @ embedding for h in (h_r, h_c))
            # A few rows at a time: temporaries stay in the processor's cache.
            pairs = zip(z_r.split(_ROWS), z_c.split(_ROWS), strict=True)
            return torch.cat([_compared(held, torch.log_softmax(few, -1), z) for few, z in pairs], -1)

    with one_thread_each() as pool:
        for part in pool.map(chunk, range(0, len(h_r), _CHUNK)):
            parts.append(part)
            if time.monotonic() - said > 20:
                said = time.monotonic()
                say(f"{name}: {len(parts) * _CHUNK} of {len(h_r)} held-out tokens measured")
    say(f"{name}: {len(held)} profiles measured on {len(h_r)} tokens in {time.monotonic() - began:.0f} s")
    return {
        label: Figures(*figures.double().numpy())
        for label, figures in zip((IDENTITY, *held), torch.cat(parts, -1), strict=True)
    }


def _compared(held: Mapping[str, HeldProfile], log_r: torch.Tensor, z: torch.Tensor) -> torch.Tensor:
    """The figures of identity and of every profile on a few rows, [1 + P, 4, T]."""
    r, best = log_r.exp(), log_r.argmax(-1)
    result = []
    for profile in (None, *held.values()):
        shifted = z
        if profile is not None:
            shifted = z.clone()
            apply_to_all(profile, shifted)
        top = shifted.argmax(-1)
        log_c = torch.log_softmax(shifted, -1)
        c = log_c.exp()
        difference = torch.sub(log_r, log_c, out=log_c)
        kl, reverse = torch.linalg.vecdot(r, difference), -torch.linalg.vecdot(c, difference)
        result.append(torch.stack([kl, reverse, 0.5 * c.sub_(r).abs_().sum(-1), (top == best).float()]))
    return torch.stack(result)


def stacked(texts: Sequence[Written], recovery: Recovery) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.float32]]:
    """h of the reference and of the compressed model, float32 [T, d]."""
    reference = np.concatenate([t.hidden for t in texts if t.hidden is not None]).astype(np.float32)
    features = np.concatenate([t.features for t in texts if t.features is not None])
    return reference, recovery(features)


def sums_by(group: npt.NDArray[np.integer], values: Floats) -> Floats:
    """Σ of `values` [T] over each group, [G]."""
    _, index = np.unique(group, return_inverse=True)
    return np.bincount(index, values).astype(np.float64)


def interval(group: npt.NDArray[np.integer], above: Floats, below: Floats, seed: str) -> tuple[float, float, float]:
    """Σ above / Σ below with a 95 % interval, by a bootstrap that draws whole groups (clusters).

    group: int [T]; above, below: [T].
    """
    a, b = sums_by(group, above), sums_by(group, below)
    random = np.random.default_rng(int.from_bytes(hashlib.sha256(seed.encode()).digest()[:8], "big"))
    drawn = random.integers(len(a), size=(RESAMPLES, len(a)))
    ratios = a[drawn].sum(1) / b[drawn].sum(1)
    low, high = np.quantile(ratios, [0.025, 0.975])
    return float(a.sum() / b.sum()), float(low), float(high)


def row(
    figures: Mapping[str, Figures], label: str, group: npt.NDArray[np.integer], topics: npt.NDArray[np.integer]
) -> dict[str, Any]:
    """What recovery.json says of one profile. group: the prompt of each token, topics: its topic (the cluster)."""
    before, after = figures[IDENTITY], figures[label]
    won, low, high = interval(topics, before.kl - after.kl, before.kl, label)
    _, prompt_low, prompt_high = interval(group, before.kl - after.kl, before.kl, label)
    top1, top1_low, top1_high = interval(topics, after.top1 - before.top1, np.ones_like(before.kl), label)
    return {
        "heldout_tokens": len(before.kl),
        "heldout_prompts": len(np.unique(group)),
        "heldout_topics": len(np.unique(topics)),
        "kl_won_back": won,
        "ci95": [low, high],
        "ci95_by_prompt": [prompt_low, prompt_high],
        "kl_before": float(before.kl.mean()),
        "kl_after": float(after.kl.mean()),
        "reverse_kl_before": float(before.reverse_kl.mean()),
        "reverse_kl_after": float(after.reverse_kl.mean()),
        "tv_before": float(before.tv.mean()),
        "tv_after": float(after.tv.mean()),
        "top1_before": float(before.top1.mean()),
        "top1_after": float(after.top1.mean()),
        "top1_up": top1,
        "top1_up_ci95": [top1_low, top1_high],
    }


def groups(texts: Sequence[Written]) -> tuple[npt.NDArray[np.integer], npt.NDArray[np.integer]]:
    """Number of the prompt and of its topic, for every token, int [T]."""
    topic_of = {p.text: p.topic for p in open_ended()}
    topics = sorted({topic_of[text.ask.text] for text in texts})
    sizes = [len(text.output) for text in texts]
    number = [topics.index(topic_of[text.ask.text]) for text in texts]
    return np.repeat(np.arange(len(texts)), sizes), np.repeat(number, sizes)
