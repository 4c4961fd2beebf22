"""Profiles learned from texts, by the families that Hemostat serves with, and what the guard says of them."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from hemostat_calibration.guard.decisions import Action
from hemostat_calibration.guard.guard import Guard
from hemostat_calibration.learning.contextual.learner import ContextualLearner, ContextualState
from hemostat_calibration.profiles.profile import CalibrationProfile
from hemostat_calibration.profiles.transform import anchors_digest, max_shift
from hemostat_calibration.records import Candidates, Features, TokenRecord
from hemostat_calibration.statistics.split import prompt_key

from .engine import Written
from .figures import Figures, Recovery, stacked
from .log import say

TOP_K = 20
ALPHA = 0.05

Singles = npt.NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class Learned:
    """A profile, what its learner says of it, and how long the learner took.

    seconds: of the fit; seconds_update: of taking in the records before.
    """

    profile: CalibrationProfile | None
    said: dict[str, Any]
    seconds: float
    seconds_update: float = 0.0


def first_tokens(texts: Sequence[Written], tokens: int) -> list[Written]:
    """The first texts that have `tokens` tokens together."""
    total = np.cumsum([len(t.output) for t in texts])
    return list(texts[: int(np.searchsorted(total, tokens)) + 1])


def contextual_records(texts: Sequence[Written], anchors: npt.NDArray[np.int32], vocabulary: int) -> list[TokenRecord]:
    """What the contextual family reads. It is told no candidates (NaN): beside features and hidden states it needs
    none."""
    digest = anchors_digest(anchors)
    result = []
    for text in texts:
        assert text.features is not None
        assert text.hidden is not None
        unknown = np.full(len(text.output), np.nan)
        candidates = Candidates(text.output[:, None], unknown[:, None])
        result.append(
            TokenRecord(
                vocab_size=vocabulary,
                prompt_key=prompt_key(text.prompt),
                output_ids=text.output,
                compressed=candidates,
                reference_at=unknown[:, None],
                reference=candidates,
                compressed_emitted=unknown,
                reference_emitted=unknown,
                features=Features(digest, text.features.astype(np.float32)),
                reference_hidden=text.hidden.astype(np.float32),
            )
        )
    return result


def listed_records(weight: Singles, recovery: Recovery, texts: Sequence[Written]) -> Iterator[TokenRecord]:
    """Yields records of the compressed model's top 20 with both models' log-probabilities.

    They are computed from both hidden states, that of the compressed model from the engine's logits."""
    embedding = torch.from_numpy(weight).T
    for text in texts:
        h_r, h_c = (torch.from_numpy(h) for h in stacked([text], recovery))
        log_r, log_c = torch.log_softmax(h_r @ embedding, -1), torch.log_softmax(h_c @ embedding, -1)
        best = torch.topk(log_c, TOP_K, -1)
        rows, output = torch.arange(len(text.output)), torch.from_numpy(text.output).long()
        reference = torch.topk(log_r, TOP_K, -1)
        yield TokenRecord(
            vocab_size=len(weight),
            prompt_key=prompt_key(text.prompt),
            output_ids=text.output,
            compressed=Candidates(best.indices.int().numpy(), best.values.double().numpy()),
            reference_at=torch.gather(log_r, 1, best.indices).double().numpy(),
            reference=Candidates(reference.indices.int().numpy(), reference.values.double().numpy()),
            compressed_emitted=log_c[rows, output].double().numpy(),
            reference_emitted=log_r[rows, output].double().numpy(),
        )


def learn_from_lists(
    family: ContextualLearner, weight: Singles, recovery: Recovery, texts: Sequence[Written], *, tapped: bool, name: str
) -> Learned:
    """The contextual family where one side is known by its top 20 only: the reference's (a vLLM reference), with the
    engine's features; or, not `tapped`, the compressed model's, with the reference's hidden states."""
    records = []
    whole = contextual_records(texts, family.anchors, len(weight))
    for listed, record in zip(listed_records(weight, recovery, texts), whole, strict=True):
        features, hidden = (record.features, None) if tapped else (None, record.reference_hidden)
        records.append(replace(listed, features=features, reference_hidden=hidden))
    began = time.monotonic()
    state = family.update(family.init("bench", len(weight)), records)
    updated = time.monotonic()
    return _learned(family, state, updated - began, name)


def _learned(family: ContextualLearner, state: ContextualState, updating: float, name: str) -> Learned:
    began = time.monotonic()
    proposal = family.fit(state)
    spent = time.monotonic() - began
    if proposal is None:
        say(f"{name}: nothing proposed")
        return Learned(None, {}, spent, updating)
    report = proposal.report
    said = {
        "variant": report.variant,
        "rank": report.rank,
        "penalty": report.penalty,
        "cross_validated_gain": report.gain,
        "cross_validated_gain_se": report.error,
    }
    say(f"{name}: {report.variant}, rank {report.rank}, {report.gain:.4f} nats by cross-validation, {spent:.0f} s")
    return Learned(proposal.profile, said, spent, updating)


class GrowingRun:
    """Takes in texts in order, and can be asked at several token counts."""

    def __init__(self, family: ContextualLearner) -> None:
        self._family = family
        self._state: ContextualState = family.init("bench", len(family.weight))
        self._taken = 0
        self._seconds = 0.0

    def learn(self, texts: Sequence[Written], name: str) -> Learned:
        """Fit on the texts, of which those taken in before are a prefix."""
        records = contextual_records(texts[self._taken :], self._family.anchors, len(self._family.weight))
        self._taken = len(texts)
        began = time.monotonic()
        for start in range(0, len(records), 32):
            self._state = self._family.update(self._state, records[start : start + 32])
        self._seconds += time.monotonic() - began
        return _learned(self._family, self._state, self._seconds, name)


def judged(
    profile: CalibrationProfile, figures: Figures, identity: Figures, prompts: npt.NDArray[np.integer]
) -> dict[str, Any]:
    """What the guard says when the held-out prompts come by one after the other, of one kind and one client, gains
    exact."""
    guard = Guard(ALPHA)
    guard.begin_candidate("it", {"all": (2.0 * max_shift(profile), 1.0)})
    gains = identity.kl - figures.kl
    tokens = np.bincount(prompts)
    promoted = False
    means = np.bincount(prompts, gains) / np.maximum(tokens, 1)
    for prompt in np.flatnonzero(tokens):
        gain = float(means[prompt])
        guard.update("it", "all", b"", b"", gain, gain, int(tokens[prompt]))
        promoted = guard.decide("it", "all").action is Action.PROMOTE
        if promoted:
            break
    evidence = guard.evidence("it", "all")
    return {
        "promoted": promoted,
        "guard_requests": evidence.units,
        "guard_progress": evidence.progress,
        "guard_alpha": evidence.alpha,
    }
