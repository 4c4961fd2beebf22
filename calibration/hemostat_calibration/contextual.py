"""The contextual family: what a row's logits at a few anchor ids say about how to change all of them.

The compressed model's logits are z = W h, so that those at N anchors show (an image of) the hidden state h. A small map
of them, y = offset + linear x + out silu(hidden x + hidden_offset), gives Δz = up y with up = W M: a gather, a product
of A × r (or A × H × r) and one of V × r a row, where the model itself had one of V × d for the logits alone.

What is learned is the map from x to δ = h_r − h_c, the difference of both models' hidden states, in the metric in which
half its squared length is KL divergence. The reference hands out h_r; h_c follows from the anchors' logits (`hidden`).
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from enum import StrEnum

import numpy as np
import numpy.typing as npt

from hemostat_calibration import hidden, regression
from hemostat_calibration.errors import InvalidArgumentError
from hemostat_calibration.families import CONTEXTUAL
from hemostat_calibration.hidden import Singles
from hemostat_calibration.profile import CalibrationProfile
from hemostat_calibration.records import Candidates, Floats, Ids, TokenRecord
from hemostat_calibration.regression import Moments
from hemostat_calibration.transform import anchors_digest

NO_KL_LIMIT = 1e30
"""A `kl_limit` that never binds."""


def contextual_profile(
    *,
    model: str,
    anchors: npt.NDArray[np.integer],
    linear: npt.NDArray[np.floating],
    offset: npt.NDArray[np.floating],
    up: npt.NDArray[np.floating],
    clamp_nats: float,
    hidden: npt.NDArray[np.floating] | None = None,
    hidden_offset: npt.NDArray[np.floating] | None = None,
    out: npt.NDArray[np.floating] | None = None,
    fisher: npt.NDArray[np.floating] | None = None,
    kl_limit: float = NO_KL_LIMIT,
    metadata: Mapping[str, str] | None = None,
) -> CalibrationProfile:
    """Profile with Δz = clip(up y, ±clamp_nats), y = s (offset + linear x + out silu(hidden x + hidden_offset)).

    x is z[anchors] − mean z[anchors], the first A of it; s = min(1, √(2 kl_limit / yᵀ fisher y)): the KL divergence of
    the row from what it was is at most about `kl_limit` nats, to second order.

    anchors: [N] ids, distinct, N ≥ A. linear: [r, A]. offset: [r]. up: [V, r], kept as float16.
    hidden: [H, A], hidden_offset: [H], out: [r, H]; all three or none of them (H = 0, a linear map).
    fisher: [r, r], symmetric; None together with no limit.
    Raises InvalidProfileError on a bad value.
    """
    rank, features = linear.shape
    with np.errstate(over="ignore"):  # an infinity is refused below
        up = np.asarray(up, dtype=np.float16)
    return CalibrationProfile(
        family=CONTEXTUAL,
        model=model,
        vocab_size=up.shape[0],
        parameters={
            "anchors": np.asarray(anchors, dtype=np.int32),
            "linear": np.asarray(linear, dtype=np.float32),
            "offset": np.asarray(offset, dtype=np.float32),
            "hidden": np.asarray(np.zeros((0, features)) if hidden is None else hidden, dtype=np.float32),
            "hidden_offset": np.asarray(np.zeros(0) if hidden_offset is None else hidden_offset, dtype=np.float32),
            "out": np.asarray(np.zeros((rank, 0)) if out is None else out, dtype=np.float32),
            "fisher": np.asarray(np.zeros((rank, rank)) if fisher is None else fisher, dtype=np.float32),
            "kl_limit": np.asarray(kl_limit, dtype=np.float32),
            "up": up,
        },
        clamp_nats=clamp_nats,
        metadata=metadata or {},
    )


def probe(model: str, vocab_size: int, anchors: npt.NDArray[np.integer], clamp_nats: float) -> CalibrationProfile:
    """A profile that changes nothing: an engine that holds it knows which logits to hand out, before anything has been
    learned from them."""
    return contextual_profile(
        model=model,
        anchors=anchors,
        linear=np.zeros((1, 1)),
        offset=np.zeros(1),
        up=np.zeros((vocab_size, 1)),
        clamp_nats=clamp_nats,
    )


def choose_anchors(
    weight: npt.NDArray[np.floating],
    count: int,
    *,
    among: npt.NDArray[np.integer] | None = None,
    covariance: Floats | None = None,
) -> Ids:
    """Ids whose logits together show the hidden state best, int32 [count], the most telling first.

    Greedy: each is the one whose logit the earlier ones leave most uncertain, which is Gram-Schmidt with pivoting on
    the centred rows of W. Once d of them span everything, it begins anew among the rest, so that more anchors mean
    less noise. Deterministic.

    weight: [V, d]. among: ids to choose from; leave out those that samplers mask (end of sequence, special ones), as a
    masked anchor means identity. covariance: of hidden states, [d, d]; None takes them to be a sphere.
    """
    ids = np.arange(len(weight), dtype=np.int32) if among is None else np.unique(among).astype(np.int32)
    if not 1 <= count <= len(ids):
        raise InvalidArgumentError(f"count is {count}: there are {len(ids)} ids to choose from")
    rows = weight[ids].astype(np.float32)
    rows -= rows.mean(axis=0)
    if covariance is not None:
        rows = rows @ np.linalg.cholesky(covariance).astype(np.float32)
    sizes = np.square(rows).sum(axis=1)
    taken = np.zeros(len(ids), dtype=np.bool_)
    chosen: list[int] = []
    while len(chosen) < count:
        left = np.where(taken, -1.0, sizes)
        least = 1e-4 * float(left.max())
        directions = np.zeros((0, rows.shape[1]), dtype=np.float32)
        while len(chosen) < count:
            pivot = int(np.argmax(left))
            chosen.append(pivot)
            taken[pivot] = True
            direction = rows[pivot] - directions.T @ (directions @ rows[pivot])
            direction /= max(float(np.linalg.norm(direction)), 1e-30)
            directions = np.vstack([directions, direction])
            left -= np.square(rows @ direction)
            left[taken] = -1.0
            if left.max() <= least:
                break
    return ids[chosen]


FOLDS = 4
"""Parts of the learning prompts, for cross-validation."""
FLUSHED = 1024
"""Tokens of a fold that are gathered before they are added to its sums: the sums are large, adding to them costs."""
_HALVES_AT_MOST = 60000.0
"""Within float16."""

Halves = npt.NDArray[np.float16]


class Source(StrEnum):
    """What a token brought, by which it is counted."""

    HIDDEN = "hidden"
    """Features of the engine and the reference's hidden state: exact."""
    HIDDEN_FROM_LIST = "hidden_from_list"
    """The hidden state, but no features: they are guessed from the compressed model's candidates, so that less of the
    difference is seen, the less the shorter the list."""
    LIST = "list"
    """Features, but of the reference only its likeliest ids."""
    UNUSABLE = "unusable"
    """Neither features nor a hidden state."""


@dataclass(frozen=True, slots=True, eq=False)
class Rows:
    """Tokens of one prompt. Arrays [T, ...], read-only.

    clock: tokens that the learner had seen at their end. features: at the anchors, [T, N]; hidden: of the reference,
    [T, d]; compressed, reference: candidates, kept only where one of the other two is missing.
    """

    fold: int
    clock: int
    tokens: int
    features: Halves | None
    hidden: Halves | None
    compressed: Candidates | None = None
    reference: Candidates | None = None


@dataclass(frozen=True, slots=True, eq=False)
class FoldSums:
    """Sums over one fold's rows, discounted to `clock`. cross: Σ x̃ zᵀ, float64 [A + 1, N]; target: Σ x̃ h_rᵀ,
    [A + 1, d]; x̃ = [x; 1], z the centred logits at the anchors, x the first A of them. waiting: rows not yet added."""

    cross: Floats
    target: Floats
    weight: float = 0.0
    clock: int = 0
    waiting: tuple[Rows, ...] = ()


@dataclass(frozen=True, slots=True, eq=False)
class ContextualState:
    """model: name of the compressed model. folds: sums. recent: the last rows, oldest first."""

    model: str
    vocab_size: int
    folds: tuple[FoldSums, ...]
    recent: tuple[Rows, ...] = ()
    tokens: int = 0
    requests: int = 0
    tokens_by_source: Mapping[Source, int] = field(default_factory=lambda: dict.fromkeys(Source, 0))


@dataclass(frozen=True, slots=True)
class Report:
    """How a proposal came about. variant: "linear", "mlp" or "list" (learned from the reference's likeliest ids).

    gain: nats per token, to second order, on learning prompts that the map was not learned from; error: its standard
    error. penalty: of the ridge, as a part of the rows' weight.
    """

    variant: str
    rank: int
    penalty: float
    gain: float
    error: float
    tokens: int
    requests: int


@dataclass(frozen=True, slots=True)
class Proposal:
    profile: CalibrationProfile
    report: Report


Progress = Callable[[str, float], None]
"""Called now and then with the name of the stage and the part of it that is done."""


class Contextual:
    """Implements `calibrator.Family`.

    Sums are exact, constant in size, and add up in any order, but for rounding, as long as nothing is forgotten; beside
    them the most recent rows are kept, for what needs rows: the covariance of hidden states, the metric, the non-linear
    map. Memory: folds × (A + 1) × (N + d) × 8 bytes and `recent_tokens` × (N + d) × 2 bytes.

    weight: the output embedding W, [V, d], whose logits are W h.
    anchors: int32 [N] ids, distinct (`choose_anchors`); the map reads the first `features` of them.
    rank: the most that is tried. clamp_nats, kl_limit: of the profiles proposed.
    half_life_tokens: after how many tokens a row counts half; None never forgets.
    noise_nats: standard deviation of a logit as the engine hands it out.
    min_tokens, min_requests: below either nothing is proposed.
    Raises InvalidArgumentError on a bad value.
    """

    def __init__(
        self,
        weight: npt.NDArray[np.floating],
        anchors: npt.NDArray[np.integer],
        *,
        features: int = 512,
        rank: int = 64,
        clamp_nats: float = 5.0,
        kl_limit: float = NO_KL_LIMIT,
        half_life_tokens: float | None = None,
        recent_tokens: int = 65_536,
        noise_nats: float = 0.03,
        min_tokens: int = 500,
        min_requests: int = 8,
    ) -> None:
        if weight.ndim != 2 or anchors.ndim != 1 or not len(anchors):
            raise InvalidArgumentError(f"weight has shape {weight.shape}, anchors {anchors.shape}: [V, d] and [N]")
        if anchors.min() < 0 or anchors.max() >= len(weight) or len(np.unique(anchors)) < len(anchors):
            raise InvalidArgumentError(f"anchors must be distinct ids of the vocabulary of {len(weight)}")
        if half_life_tokens is not None and not half_life_tokens > 0.0:
            raise InvalidArgumentError(f"half_life_tokens is {half_life_tokens}: it must be above 0")
        if rank < 1 or features < 1:
            raise InvalidArgumentError(f"rank is {rank}, features {features}: they must be 1 or more")
        self.weight: Singles = np.ascontiguousarray(weight, dtype=np.float32)
        self.anchors: Ids = anchors.astype(np.int32)
        self.digest = anchors_digest(self.anchors)
        self._features = min(features, len(anchors))
        self._ranks = (*(r for r in _RANKS if r < rank), rank)
        self._clamp_nats = clamp_nats
        self._kl_limit = kl_limit
        self._half_life = half_life_tokens
        self._recent_tokens = recent_tokens
        self._noise = noise_nats
        self._min_tokens = min_tokens
        self._min_requests = min_requests

    def init(self, model: str, vocab_size: int) -> ContextualState:
        if vocab_size != len(self.weight):
            raise InvalidArgumentError(f"vocab_size is {vocab_size}, the output embedding has {len(self.weight)} rows")
        shape = self._features + 1
        empty = FoldSums(
            _frozen(np.zeros((shape, len(self.anchors)))), _frozen(np.zeros((shape, self.weight.shape[1])))
        )
        return ContextualState(model, vocab_size, (empty,) * FOLDS)

    def probe(self, model: str) -> CalibrationProfile:
        """What an engine holds so as to hand out the features that are learned from."""
        return probe(model, len(self.weight), self.anchors, self._clamp_nats)

    # --- taking in -------------------------------------------------------------------------------------------------

    def update(self, state: ContextualState, records: Iterable[TokenRecord]) -> ContextualState:
        """InvalidArgumentError where a record has another vocabulary or width of hidden state."""
        sources = dict(state.tokens_by_source)
        folds, recent = list(state.folds), list(state.recent)
        tokens, requests = state.tokens, state.requests
        for record in records:
            source, rows = self._rows(record, state, tokens)
            sources[source] += record.tokens
            if rows is None:
                continue
            tokens += rows.tokens
            requests += 1
            recent.append(rows)
            if source is Source.HIDDEN:
                fold = folds[rows.fold]
                fold = replace(fold, waiting=(*fold.waiting, rows))
                if sum(r.tokens for r in fold.waiting) >= FLUSHED:
                    fold = self._added(fold, tokens)
                folds[rows.fold] = fold
        return replace(
            state,
            folds=tuple(folds),
            recent=self._newest(recent),
            tokens=tokens,
            requests=requests,
            tokens_by_source=sources,
        )

    def merge(self, state: ContextualState, other: ContextualState) -> ContextualState:
        """InvalidArgumentError where they learned of different models."""
        if (state.model, state.vocab_size) != (other.model, other.vocab_size):
            raise InvalidArgumentError(f"states are of {state.model} and {other.model}: they must be of one model")
        tokens = state.tokens + other.tokens
        folds = []
        for mine, theirs in zip(state.folds, other.folds, strict=True):
            a, b = self._added(mine, state.tokens), self._added(theirs, other.tokens)
            sums = _frozen(a.cross + b.cross), _frozen(a.target + b.target)
            folds.append(FoldSums(*sums, a.weight + b.weight, tokens))
        # By age: both streams end now.
        moved = [replace(r, clock=r.clock + tokens - s.tokens) for s in (state, other) for r in s.recent]
        return replace(
            state,
            folds=tuple(folds),
            recent=self._newest(sorted(moved, key=lambda r: r.clock)),
            tokens=tokens,
            requests=state.requests + other.requests,
            tokens_by_source={s: state.tokens_by_source[s] + other.tokens_by_source[s] for s in Source},
        )

    def _rows(self, record: TokenRecord, state: ContextualState, clock: int) -> tuple[Source, Rows | None]:
        if record.vocab_size != state.vocab_size:
            raise InvalidArgumentError(f"record has vocab_size {record.vocab_size}, not {state.vocab_size}")
        width = self.weight.shape[1]
        if record.reference_hidden is not None and record.reference_hidden.shape[1] != width:
            found = record.reference_hidden.shape[1]
            raise InvalidArgumentError(f"record has hidden states of {found}, the output embedding of {width} columns")
        features = record.features
        usable = features is not None and features.anchors == self.digest
        if features is not None and usable:
            kept = ~np.isnan(features.values[:, 0])
            usable = bool(kept.any())
        if not usable:
            features, kept = None, np.ones(record.tokens, dtype=np.bool_)
        if features is None and record.reference_hidden is None:
            return Source.UNUSABLE, None
        if features is None:
            source = Source.HIDDEN_FROM_LIST
        else:
            source = Source.LIST if record.reference_hidden is None else Source.HIDDEN
        exact = source is Source.HIDDEN
        tokens = int(kept.sum())
        return source, Rows(
            fold=fold_of(record.prompt_key),
            clock=clock + tokens,
            tokens=tokens,
            features=None if features is None else _halves(features.values[kept]),
            hidden=None if record.reference_hidden is None else _halves(record.reference_hidden[kept]),
            compressed=None if exact else _cut(record.compressed, kept),
            reference=_cut(record.reference, kept) if source is Source.LIST else None,
        )

    def _newest(self, rows: Sequence[Rows]) -> tuple[Rows, ...]:
        total = sum(r.tokens for r in rows)
        first = 0
        while total > self._recent_tokens and first < len(rows) - 1:
            total -= rows[first].tokens
            first += 1
        return tuple(rows[first:])

    def _discount(self, age: int) -> float:
        return 1.0 if self._half_life is None else 0.5 ** (age / self._half_life)

    def _added(self, fold: FoldSums, clock: int) -> FoldSums:
        """With what waits in the sums, all discounted to `clock`."""
        past = self._discount(clock - fold.clock)
        cross, target, weight = fold.cross * past, fold.target * past, fold.weight * past
        waiting = [r for r in fold.waiting if r.features is not None and r.hidden is not None]
        if waiting:
            z = np.concatenate([r.features for r in waiting if r.features is not None]).astype(np.float32)
            h = np.concatenate([r.hidden for r in waiting if r.hidden is not None]).astype(np.float32)
            w = np.concatenate([np.full(r.tokens, self._discount(clock - r.clock)) for r in waiting])
            x = self._inputs(z)
            weighted = (x * w[:, None].astype(np.float32)).T
            cross += weighted @ z
            target += weighted @ h
            weight += float(w.sum())
        return FoldSums(_frozen(cross), _frozen(target), weight, clock)

    def _inputs(self, z: Singles) -> Singles:
        """x̃ = [x; 1], [T, A + 1]."""
        return np.column_stack([z[:, : self._features], np.ones(len(z), np.float32)])

    # --- proposing -------------------------------------------------------------------------------------------------

    def propose(self, state: ContextualState) -> CalibrationProfile | None:
        proposal = self.fit(state)
        return None if proposal is None else proposal.profile

    def fit(
        self, state: ContextualState, base: ContextualState | None = None, progress: Progress | None = None
    ) -> Proposal | None:
        """The map whose penalty and rank did best across the folds, with how it came about; None while there is too
        little to learn from, or where no map gains more than one standard error.

        base: what was learned of all traffic, for a state of a part of it: the penalty pulls towards that map, not
        towards no change. (The rows of the part may be among those of the whole: folds are by prompt in both.)
        """
        if state.requests < self._min_requests or state.tokens < self._min_tokens:
            return None
        tell = progress or _silent
        tell("metric", 0.0)
        whole = base or state
        h = self._hidden_sample(whole)
        known = hidden.flat(self.weight, self._noise) if h is None else hidden.prior(h, self._noise)
        offset, gain = hidden.recovery(self.weight[self.anchors], known)
        if h is None:
            return None
        metric, mean_embedding = hidden.fisher(self.weight, h[:: max(1, len(h) // _METRIC_ROWS)][:_METRIC_ROWS])
        tell("linear", 0.0)
        folds = self._moments(state, known, offset, gain)
        bases = None
        if base is not None:
            bases = self._bases(self._moments(base, known, offset, gain), metric)
        found = regression.choose(folds, metric, self._ranks, bases)
        if found is None or found.gain <= found.error:
            return None
        up = self.weight @ found.up.astype(np.float32) - (mean_embedding @ found.up).astype(np.float32)
        return self._proposal(state, found, up)

    def _proposal(self, state: ContextualState, found: regression.LowRank, up: Singles) -> Proposal:
        rank = len(found.read)
        report = Report(
            variant="linear",
            rank=rank,
            penalty=found.penalty,
            gain=found.gain,
            error=found.error,
            tokens=state.tokens,
            requests=state.requests,
        )
        profile = contextual_profile(
            model=state.model,
            anchors=self.anchors,
            linear=found.read[:, :-1],
            offset=found.read[:, -1],
            up=up,
            clamp_nats=self._clamp_nats,
            fisher=np.eye(rank),
            kl_limit=self._kl_limit,
            metadata={"variant": report.variant, "rank": str(rank), "tokens": str(state.tokens)},
        )
        return Proposal(profile, report)

    def _hidden_sample(self, state: ContextualState) -> Singles | None:
        """Some of the reference's hidden states, spread over the recent rows, float32 [n, d]."""
        with_hidden = [r.hidden for r in state.recent if r.hidden is not None]
        if not with_hidden:
            return None
        total = sum(map(len, with_hidden))
        step = max(1, total // (_PRIOR_ROWS * self.weight.shape[1]))
        return np.concatenate(with_hidden)[::step].astype(np.float32)

    def _moments(
        self, state: ContextualState, known: hidden.Prior, offset: Floats, gain: Floats
    ) -> tuple[Moments, ...]:
        """Σ x̃ x̃ᵀ and Σ x̃ δᵀ by fold, δ = h_r − E[h_c | z]."""
        sums = [self._added(fold, state.tokens) for fold in state.folds]
        for rows in state.recent:
            if rows.hidden is None or rows.features is not None or rows.compressed is None:
                continue
            h = hidden.recover_from_lists(self.weight, known, rows.compressed.ids, rows.compressed.logprobs)
            embedded = self.weight[self.anchors].astype(np.float64)
            z = (h @ (embedded - embedded.mean(axis=0)).T).astype(np.float16)
            waiting = replace(rows, features=z)
            sums[rows.fold] = replace(sums[rows.fold], waiting=(*sums[rows.fold].waiting, waiting))
        sums = [self._added(fold, state.tokens) for fold in sums]
        return tuple(self._moments_of(fold, offset, gain) for fold in sums)

    def _moments_of(self, fold: FoldSums, offset: Floats, gain: Floats) -> Moments:
        count = np.append(fold.cross[-1, : self._features], fold.weight)
        xx = np.column_stack([fold.cross[:, : self._features], count])
        return Moments(xx, fold.target - np.outer(count, offset) - fold.cross @ gain.T, fold.weight)

    def _bases(self, folds: Sequence[Moments], metric: Floats) -> list[Floats] | None:
        """Bᵀ without each fold, and with all of them, at the penalty that is best for all; None where no map gains."""
        found = regression.choose(folds, metric, self._ranks)
        if found is None:
            return None
        whole = regression.total(folds)
        return [
            *(regression.full(whole - fold, found.penalty) for fold in folds),
            regression.full(whole, found.penalty),
        ]


_RANKS = (4, 8, 16, 24, 32, 48, 64, 96, 128)
_METRIC_ROWS = 1024
_PRIOR_ROWS = 8
"""Hidden states that the prior is made of, times d."""


def fold_of(prompt_key: bytes) -> int:
    """The fold of a prompt, whatever else is known of it."""
    return hashlib.blake2b(prompt_key, digest_size=8, person=b"hemostat.folds").digest()[0] % FOLDS


def _silent(stage: str, done: float) -> None: ...


def _halves(values: npt.NDArray[np.floating]) -> Halves:
    found = np.clip(values, -_HALVES_AT_MOST, _HALVES_AT_MOST).astype(np.float16)
    found.flags.writeable = False
    return found


def _cut(candidates: Candidates, kept: npt.NDArray[np.bool_]) -> Candidates:
    return Candidates(candidates.ids[kept], candidates.logprobs[kept])


def _frozen(array: Floats) -> Floats:
    array.flags.writeable = False
    return array
