"""The learner of the contextual family: a row's logits at a few anchor ids determine how all of its logits change.

The compressed model's logits are z = W h, so that those at N anchors determine (an image of) the hidden state h. A
linear map of them, y = offset + linear x, gives Δz = up y with up = W M. For each row that is a gather, a product of
A × r and one of V × r, where the model itself has one of V × d for the logits alone.

What is learned is the map from x to δ = h_r − h_c, the difference of both models' hidden states, in the metric in which
half its squared length is KL divergence. The reference gives h_r; h_c follows from the anchors' logits
(`hidden_states`).

The parts: `anchors` (their choice), `rows` (tokens as they are kept), `fold_sums` (sums over them), `basis` (the
metric), `examples` (what fitters learn from), `fitter` (what they give), `fit_linear`, `fit_lists`, `choose` (the
held-out choice), `export` (from a map to a profile).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace

import numpy as np
import numpy.typing as npt

from hemostat_calibration.arrays import Ids, Singles
from hemostat_calibration.errors import InvalidArgumentError
from hemostat_calibration.learning.contextual import hidden_states
from hemostat_calibration.learning.contextual.basis import Basis, hidden_sample, make_basis
from hemostat_calibration.learning.contextual.choose import DEFAULT_LIMITS, ProfileLimits
from hemostat_calibration.learning.contextual.examples import HiddenExamples, ListExamples, list_examples
from hemostat_calibration.learning.contextual.export import to_profile
from hemostat_calibration.learning.contextual.fit_linear import LinearFitter
from hemostat_calibration.learning.contextual.fit_lists import ListFitter
from hemostat_calibration.learning.contextual.fitter import Progress, Proposal, Report, no_progress
from hemostat_calibration.learning.contextual.fold_sums import (
    FoldSums,
    Forgetting,
    empty_fold,
    flushed,
    moments_in_basis,
    with_rows,
)
from hemostat_calibration.learning.contextual.regression import Moments
from hemostat_calibration.learning.contextual.rows import FOLDS, TokenRows, TokenSource, newest, rows_of
from hemostat_calibration.profiles.contextual import probe_profile
from hemostat_calibration.profiles.profile import CalibrationProfile
from hemostat_calibration.profiles.transform import anchors_digest
from hemostat_calibration.records import TokenRecord

_RANKS = (4, 8, 16, 24, 32, 48, 64, 96, 128)
"""The ranks that are tried in addition to the largest one."""
_NOISE_NATS = 0.03
"""The standard deviation of a logit as the engine hands it out."""


@dataclass(frozen=True, slots=True, eq=False)
class ContextualState:
    """The state of all that was learned. model: name of the compressed model. folds: sums. recent: the last rows,
    oldest first.

    tokens, requests: that were learned from. tokens_by_source: all tokens, by what their records held.
    """

    model: str
    vocab_size: int
    folds: tuple[FoldSums, ...]
    recent: tuple[TokenRows, ...] = ()
    tokens: int = 0
    requests: int = 0
    tokens_by_source: Mapping[TokenSource, int] = field(default_factory=lambda: dict.fromkeys(TokenSource, 0))


class ContextualLearner:
    """Learns profiles from records.

    `init`, `update` and `propose` are pure. States are frozen values: no method changes one that it was given. `update`
    takes a batch of records of the learning side of the split, of whatever arm: records hold the compressed model's own
    distribution, before any profile.

    Sums are exact, constant in size, and add up in any order (up to rounding) as long as nothing is forgotten. The
    most recent rows are also kept, for what needs rows: the covariance of hidden states, the metric, the held-out
    choice. Memory: folds × (A + 1) × (N + d) × 8 bytes and `recent_tokens` × (N + d) × 2 bytes; while a map is fitted,
    as much again as W.

    A deployment without the engine's features, or whose reference gives only its likeliest ids, learns from lists of
    ids; those are kept among the recent rows alone (`TokenSource`).

    weight: the output embedding W, [V, d], whose logits are W h.
    anchors: int32 [N] ids, distinct (`choose_anchors`); the map reads the first `features` of them. N should be above
        d: fewer leave part of h_c undetermined, and with it part of what is to be learned.
    limits: of the profiles proposed.
    half_life_tokens: after how many tokens a row counts half; None never forgets.
    min_tokens, min_requests: below either nothing is proposed.
    Raises InvalidArgumentError on a bad value.

    >>> from hemostat_calibration.records import Candidates, Features
    >>> weight = np.array([[2.0, 0.0], [0.0, 2.0], [-2.0, 0.0], [0.0, -2.0], [1.0, 1.0]])
    >>> learner = ContextualLearner(weight, np.arange(4), limits=ProfileLimits(rank=2), min_tokens=1, min_requests=1)
    >>> def record(n):
    ...     h_r = np.array([[np.sin(n), np.cos(3.0 * n)]] * 8) * np.linspace(0.2, 1.0, 8)[:, None]
    ...     log_r, log_c = (z - np.log(np.exp(z).sum(1, keepdims=True)) for z in (h_r @ weight.T, 0.5 * h_r @ weight.T))
    ...     ids = np.argsort(-log_c, axis=1, kind="stable").astype(np.int32)
    ...     at_c, at_r = (np.take_along_axis(x, ids, 1) for x in (log_c, log_r))
    ...     z = 0.5 * h_r @ weight[:4].T
    ...     return TokenRecord(
    ...         5, bytes([n]), ids[:, 0], Candidates(ids, at_c), at_r, Candidates(ids, at_r), at_c[:, 0], at_r[:, 0],
    ...         features=Features(learner.digest, (z - z.mean(1, keepdims=True)).astype(np.float32)),
    ...         reference_hidden=h_r.astype(np.float32),
    ...     )
    >>> proposal = learner.fit(learner.update(learner.init("m", 5), map(record, range(40))))
    >>> proposal.report.variant.value, proposal.report.tokens, proposal.report.gain > proposal.report.error
    ('linear', 320, True)
    """

    def __init__(
        self,
        weight: npt.NDArray[np.floating],
        anchors: npt.NDArray[np.integer],
        *,
        features: int = 512,
        limits: ProfileLimits = DEFAULT_LIMITS,
        half_life_tokens: float | None = None,
        recent_tokens: int = 65_536,
        min_tokens: int = 500,
        min_requests: int = 8,
    ) -> None:
        if weight.ndim != 2 or anchors.ndim != 1 or not len(anchors):
            raise InvalidArgumentError(f"weight has shape {weight.shape}, anchors {anchors.shape}: [V, d] and [N]")
        if anchors.min() < 0 or anchors.max() >= len(weight) or len(np.unique(anchors)) < len(anchors):
            raise InvalidArgumentError(f"anchors must be distinct ids of the vocabulary of {len(weight)}")
        if half_life_tokens is not None and not half_life_tokens > 0.0:
            raise InvalidArgumentError(f"half_life_tokens is {half_life_tokens}: it must be above 0")
        if limits.rank < 1 or features < 1:
            raise InvalidArgumentError(f"rank is {limits.rank}, features {features}: they must be 1 or more")
        self.weight: Singles = np.ascontiguousarray(weight, dtype=np.float32)
        self.anchors: Ids = anchors.astype(np.int32)
        self.digest = anchors_digest(self.anchors)
        self.forgetting = Forgetting(half_life_tokens)
        self.features = min(features, len(anchors))
        self._ranks = (*(r for r in _RANKS if r < limits.rank), limits.rank)
        self._limits = limits
        self._recent_tokens = recent_tokens
        self._min_tokens = min_tokens
        self._min_requests = min_requests

    def init(self, model: str, vocab_size: int) -> ContextualState:
        """Returns the state before the first record. Raises InvalidArgumentError unless the output embedding has
        `vocab_size` rows."""
        if vocab_size != len(self.weight):
            raise InvalidArgumentError(f"vocab_size is {vocab_size}, the output embedding has {len(self.weight)} rows")
        empty = empty_fold(self.features, len(self.anchors), self.weight.shape[1])
        return ContextualState(model, vocab_size, (empty,) * FOLDS)

    def probe(self, model: str) -> CalibrationProfile:
        """Returns the profile that makes an engine report the features that are learned from, and changes nothing."""
        return probe_profile(model, len(self.weight), self.anchors, self._limits.clamp_nats)

    def update(self, state: ContextualState, records: Iterable[TokenRecord]) -> ContextualState:
        """Returns the state after learning from validated records. Raises InvalidArgumentError if one has another
        vocabulary or hidden size."""
        sources = dict(state.tokens_by_source)
        folds, recent = list(state.folds), list(state.recent)
        tokens, requests = state.tokens, state.requests
        for record in records:
            self._check(record, state)
            source, rows = rows_of(record, self.digest, tokens)
            sources[TokenSource.UNUSABLE] += record.tokens - (rows.tokens if rows else 0)
            if rows is None:
                continue
            sources[source] += rows.tokens
            tokens += rows.tokens
            requests += 1
            recent.append(rows)
            if source is TokenSource.HIDDEN:
                folds[rows.fold] = with_rows(folds[rows.fold], rows, tokens, self.forgetting)
        return replace(
            state,
            folds=tuple(folds),
            recent=newest(recent, self._recent_tokens),
            tokens=tokens,
            requests=requests,
            tokens_by_source=sources,
        )

    def propose(self, state: ContextualState) -> CalibrationProfile | None:
        """Returns the profile of `fit`."""
        proposal = self.fit(state)
        return None if proposal is None else proposal.profile

    def fit(self, state: ContextualState, progress: Progress | None = None) -> Proposal | None:
        """Returns the map that did best on prompts that it was not learned from, with how it came about. It is None
        while there is too little to learn from, or if no map gains more than one standard error there.
        """
        if state.requests < self._min_requests or state.tokens < self._min_tokens:
            return None
        progress = progress or no_progress
        progress("metric", 0.0)
        sample = hidden_sample(state.recent, self.weight.shape[1])
        examples: HiddenExamples | ListExamples | None
        if sample is None or not state.tokens_by_source[TokenSource.HIDDEN]:
            examples = self._list_examples(state)
            candidate = None if examples is None else ListFitter(self._ranks).fit(examples, progress)
        else:
            examples = self._hidden_examples(state, sample)
            candidate = LinearFitter(self._ranks, self._limits).fit(examples, progress)
        if candidate is None or examples is None or candidate.gain <= candidate.error:
            return None
        map_ = candidate.refit()
        report = Report(
            variant=candidate.variant,
            rank=len(map_.linear),
            penalty=candidate.penalty,
            gain=candidate.gain,
            error=candidate.error,
            tokens=state.tokens,
            requests=state.requests,
        )
        profile = to_profile(
            map_,
            examples.basis,
            examples.code_moment,
            model=state.model,
            anchors=self.anchors,
            limits=self._limits,
            metadata={
                "variant": str(report.variant),
                "rank": str(report.rank),
                "tokens": str(report.tokens),
                "requests": str(report.requests),
            },
        )
        return Proposal(profile, report)

    def _hidden_examples(self, state: ContextualState, sample: Singles) -> HiddenExamples:
        prior = hidden_states.estimate_prior(sample, _NOISE_NATS)
        basis = make_basis(self.weight, self.anchors, self.features, sample, prior)
        rows = [r for r in self._fresh(state) if r.features is not None and r.hidden is not None]
        return HiddenExamples(basis, self._moments(state, basis), rows)

    def _list_examples(self, state: ContextualState) -> ListExamples | None:
        rows = [r for r in self._fresh(state) if r.listed is not None]
        if not rows:
            return None
        return list_examples(
            rows,
            state.recent,
            weight=self.weight,
            anchors=self.anchors,
            features=self.features,
            noise_nats=_NOISE_NATS,
            forgetting=self.forgetting,
            clock=state.tokens,
        )

    def _moments(self, state: ContextualState, basis: Basis) -> tuple[Moments, ...]:
        folds = (flushed(fold, state.tokens, self.forgetting) for fold in state.folds)
        return tuple(moments_in_basis(fold, basis) for fold in folds)

    def _fresh(self, state: ContextualState) -> list[TokenRows]:
        """Returns the recent rows that are not yet half forgotten."""
        return [r for r in state.recent if self.forgetting.weight(state.tokens - r.clock) >= 0.5]

    def _check(self, record: TokenRecord, state: ContextualState) -> None:
        if record.vocab_size != state.vocab_size:
            raise InvalidArgumentError(f"record has vocab_size {record.vocab_size}, not {state.vocab_size}")
        width = self.weight.shape[1]
        if record.reference_hidden is not None and record.reference_hidden.shape[1] != width:
            given = record.reference_hidden.shape[1]
            raise InvalidArgumentError(f"record has hidden states of {given}, the output embedding of {width} columns")
