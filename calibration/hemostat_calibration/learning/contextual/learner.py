"""The contextual family: what a row's logits at a few anchor ids say about how to change all of them.

The compressed model's logits are z = W h, so that those at N anchors show (an image of) the hidden state h. A small map
of them, y = offset + linear x + out silu(middle silu(hidden x + hidden_offset) + middle_offset), gives Δz = up y with
up = W M: a gather, a product of A × r (beside it those of A × H, H × G and G × r) and one of V × r a row, where the
model itself had one of V × d for the logits alone.

What is learned is the map from x to δ = h_r − h_c, the difference of both models' hidden states, in the metric in which
half its squared length is KL divergence. The reference hands out h_r; h_c follows from the anchors' logits (`hidden`).
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from enum import StrEnum

import numpy as np
import numpy.typing as npt

from hemostat_calibration.errors import InvalidArgumentError
from hemostat_calibration.learning.contextual import hidden_states, mlp, objective, regression
from hemostat_calibration.learning.contextual.hidden_states import Singles
from hemostat_calibration.learning.contextual.narrow import narrow
from hemostat_calibration.learning.contextual.regression import Moments
from hemostat_calibration.profiles.contextual import NO_KL_LIMIT, contextual_profile, probe_profile
from hemostat_calibration.profiles.profile import CalibrationProfile
from hemostat_calibration.profiles.transform import anchors_digest
from hemostat_calibration.records import Floats, Ids, TokenRecord

FOLDS = 4
"""Parts of the learning prompts, for cross-validation."""
FLUSHED = 1024
"""Tokens of a fold that are gathered before they are added to its sums: the sums are large, adding to them costs."""
_HALVES_AT_MOST = 60000.0
"""Within float16."""

Halves = npt.NDArray[np.float16]


class TokenSource(StrEnum):
    """What a token brought, by which it is counted."""

    HIDDEN = "hidden"
    """Features of the engine and the reference's hidden state: exact."""
    HIDDEN_FROM_LIST = "hidden_from_list"
    """The hidden state, but no features. The reference's own logits at the anchors stand for the compressed model's,
    and the difference is known at the compressed model's candidates only: less is learned, and what is won is not
    measured, as that takes features."""
    LIST = "list"
    """Features, but of the reference only its likeliest ids."""
    UNUSABLE = "unusable"
    """Neither features nor a hidden state; or one of the rows of a record for which the engine gave no features."""


@dataclass(frozen=True, slots=True, eq=False)
class Listed:
    """Ids for which the reference's log-probabilities are known, [T, J] (-1 pads), and the compressed model's, where it
    gave them, else None. likeliest: the compressed model's likeliest id, [T], and its log-probability."""

    ids: Ids
    reference: Floats
    compressed: Floats | None
    likeliest: tuple[Ids, Floats]


@dataclass(frozen=True, slots=True, eq=False)
class Rows:
    """Tokens of one prompt. Arrays [T, ...], read-only.

    clock: tokens that the learner had seen at their end. features: at the anchors, [T, N]; hidden: of the reference,
    [T, d]; listed: kept only where one of the other two is missing.
    """

    fold: int
    clock: int
    tokens: int
    features: Halves | None
    hidden: Halves | None
    listed: Listed | None = None


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
    tokens_by_source: Mapping[TokenSource, int] = field(default_factory=lambda: dict.fromkeys(TokenSource, 0))


@dataclass(frozen=True, slots=True)
class Report:
    """How a proposal came about. variant: "linear"; "mlp", a network learned by squared error; "mlp_kl", by KL itself
    after that, as many stages of it as did best; "list", learned from the reference's likeliest ids.

    gain: KL won, nats per token, on learning prompts that a map so made was not learned from; error: its standard
    error, by prompts. penalty: of the ridge that it began as, a part of the rows' weight.
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


class ContextualLearner:
    """Implements `calibrator.Family`.

    Sums are exact, constant in size, and add up in any order, but for rounding, as long as nothing is forgotten; beside
    them the most recent rows are kept, for what needs rows: the covariance of hidden states, the metric, the non-linear
    map. Memory: folds × (A + 1) × (N + d) × 8 bytes and `recent_tokens` × (N + d) × 2 bytes; while a map is fitted, as
    much again as W and, for a network, `recent_tokens` × 3 (A + d) × 2 bytes.

    A deployment without the engine's features, or whose reference gives only its likeliest ids, learns from lists of
    ids; those are kept among the recent rows alone (`TokenSource`).

    weight: the output embedding W, [V, d], whose logits are W h.
    anchors: int32 [N] ids, distinct (`choose_anchors`); the map reads the first `features` of them. N should be above
        d: fewer leave part of h_c open, and with it part of what is to be learned.
    rank: the most that is tried. clamp_nats, kl_limit: of the profiles proposed.
    half_life_tokens: after how many tokens a row counts half; None never forgets.
    noise_nats: standard deviation of a logit as the engine hands it out.
    network: the non-linear map, tried once `network_tokens` of the recent rows have features and hidden states and kept
        where it is better than the linear one on prompts that neither learned from; None does without.
    min_tokens, min_requests: below either nothing is proposed.
    Raises InvalidArgumentError on a bad value.
    """

    def __init__(
        self,
        weight: npt.NDArray[np.floating],
        anchors: npt.NDArray[np.integer],
        *,
        features: int = 512,
        rank: int = 192,
        clamp_nats: float = 5.0,
        kl_limit: float = NO_KL_LIMIT,
        half_life_tokens: float | None = None,
        recent_tokens: int = 65_536,
        noise_nats: float = 0.03,
        min_tokens: int = 500,
        min_requests: int = 8,
        network: mlp.TrainingSettings | None = None,
        network_tokens: int = 10_000,
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
        self._network = network
        self._network_tokens = network_tokens

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
        return probe_profile(model, len(self.weight), self.anchors, self._clamp_nats)

    # --- taking in -------------------------------------------------------------------------------------------------

    def update(self, state: ContextualState, records: Iterable[TokenRecord]) -> ContextualState:
        """InvalidArgumentError where a record has another vocabulary or width of hidden state."""
        sources = dict(state.tokens_by_source)
        folds, recent = list(state.folds), list(state.recent)
        tokens, requests = state.tokens, state.requests
        for record in records:
            source, rows = self._rows(record, state, tokens)
            sources[TokenSource.UNUSABLE] += record.tokens - (rows.tokens if rows else 0)
            if rows is None:
                continue
            sources[source] += rows.tokens
            tokens += rows.tokens
            requests += 1
            recent.append(rows)
            if source is TokenSource.HIDDEN:
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
            tokens_by_source={s: state.tokens_by_source[s] + other.tokens_by_source[s] for s in TokenSource},
        )

    def _rows(self, record: TokenRecord, state: ContextualState, clock: int) -> tuple[TokenSource, Rows | None]:
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
            return TokenSource.UNUSABLE, None
        if features is None:
            source = TokenSource.HIDDEN_FROM_LIST
        else:
            source = TokenSource.LIST if record.reference_hidden is None else TokenSource.HIDDEN
        tokens = int(kept.sum())
        return source, Rows(
            fold=fold_of(record.prompt_key),
            clock=clock + tokens,
            tokens=tokens,
            features=None if features is None else _halves(features.values[kept]),
            hidden=None if record.reference_hidden is None else _halves(record.reference_hidden[kept]),
            listed=_listed(record, kept, source),
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
        """The map that did best on prompts that it was not learned from, with how it came about; None while there is
        too little to learn from, or where no map gains more than one standard error there.

        base: what was learned of all traffic, for a state of a part of it: the penalty pulls towards that map, not
        towards no change. (The rows of the part may be among those of the whole: folds are by prompt in both.)
        """
        if state.requests < self._min_requests or state.tokens < self._min_tokens:
            return None
        tell = progress or _silent
        tell("metric", 0.0)
        sample = self._hidden_sample(base or state)
        if sample is None or not state.tokens_by_source[TokenSource.HIDDEN]:
            return self._fit_lists(state, tell)
        basis = self._basis(sample, hidden_states.estimate_prior(sample, self._noise))
        tell("linear", 0.0)
        folds = self._moments(state, basis)
        bases = None if base is None else self._bases(self._moments(base, basis))
        found = regression.choose(folds, self._ranks, bases)
        if found is None or found.gain <= found.error:
            return None
        rows = [r for r in self._fresh(state) if r.features is not None and r.hidden is not None]
        if not rows:
            return self._proposal(state, basis, "linear", found, _linear(found), None, found.gain, found.error)
        fold = np.repeat([r.fold for r in rows], [r.tokens for r in rows])
        prompt = np.repeat(np.arange(len(rows)), [r.tokens for r in rows])
        out = int(np.argmax(np.bincount(fold, minlength=FOLDS)))
        held = _spread(np.flatnonzero(fold == out), _JUDGED)
        x, c, t = self._gathered(rows, basis, held)
        whole, rank = regression.total(folds), len(found.read)
        # The second-order loss wants a weaker penalty than KL itself.
        penalties = [found.penalty * stronger for stronger in _STRONGER]
        starts = regression.fitted(whole - folds[out], penalties, rank, bases[out] if bases else None)
        gains = self._gains(basis, x, c, t, [_linear(start) for start in starts])
        chosen, scale = _best(gains)
        found = regression.fitted(whole, penalties[chosen : chosen + 1], rank, bases[-1] if bases else None)[0]
        variant, best, won = "linear", _linear(found), gains[chosen, scale]
        if base is None and self._network is not None and len(fold) >= self._network_tokens:
            s = regression.standardiser(whole)
            all_rows = np.arange(len(fold))
            everything = self._gathered(rows, basis, all_rows)
            others = np.flatnonzero(fold != out)
            stages = 1 + len(self._network.exact)
            maps = self._trained(starts[chosen], s, everything, others, basis, lambda d: tell("trial", d), stages)
            gains = self._gains(basis, x, c, t, maps)
            stage, network_scale = _best(gains)
            if gains[stage, network_scale].mean() > won.mean():
                variant, scale, won = "mlp_kl" if stage else "mlp", network_scale, gains[stage, network_scale]
                # The same again, from all rows.
                best = self._trained(found, s, everything, all_rows, basis, lambda d: tell("network", d), stage + 1)[-1]
        gain, error = _by_prompt(won, prompt[held])
        if gain <= error:
            return None
        best = _scaled(best, float(_SCALES[scale]))
        return self._proposal(state, basis, variant, found, best, x.astype(np.float32), gain, error)

    def _proposal(
        self,
        state: ContextualState,
        basis: _Basis,
        variant: str,
        found: regression.LowRank,
        map_: mlp.Network,
        x: Singles | None,
        gain: float,
        error: float,
    ) -> Proposal:
        """x: inputs of some rows in the basis, not standardised, [T, min(A, d)]: what of the tail may be left out is
        judged on them. None, for a linear map: on the sums."""
        map_ = _orthonormal(map_)
        rank = len(map_.linear)
        up, fisher = basis.embedding @ map_.up, np.eye(rank)
        tail = np.ones(len(up), np.bool_)
        tail[basis.likeliest[:_WIDE]] = False
        if rank >= 2 * _NARROW and tail.any():
            if x is None:
                whole = regression.total(self._moments(state, basis))
                read = np.column_stack([map_.linear, map_.offset]).astype(np.float64)
                moment = read @ whole.xx @ read.T / whole.weight
            else:
                y = map_.code(x).astype(np.float64)
                moment = y.T @ y / len(y)
            narrowed, turn, left_out = narrow(up, moment, basis.mean, tail, _NARROW)
            # ½ |y|² is the KL that all of the change makes.
            if left_out <= _LEFT_OUT * 0.5 * np.trace(moment):
                map_, back = _turned(map_, turn), np.linalg.inv(turn)
                up, fisher = narrowed, back.T @ back
        map_ = _reading(map_, basis.reads)
        report = Report(variant, rank, found.penalty, gain, error, state.tokens, state.requests)
        profile = contextual_profile(
            model=state.model,
            anchors=self.anchors,
            linear=map_.linear,
            offset=map_.offset,
            hidden=map_.hidden,
            hidden_offset=map_.hidden_offset,
            middle=map_.middle,
            middle_offset=map_.middle_offset,
            out=map_.out,
            up=up,
            clamp_nats=self._clamp_nats,
            fisher=fisher,
            kl_limit=self._kl_limit,
            metadata={
                "variant": variant,
                "rank": str(rank),
                "tokens": str(state.tokens),
                "requests": str(state.requests),
            },
        )
        return Proposal(profile, report)

    def _gains(self, basis: _Basis, x: Halves, c: Halves, t: Halves, maps: Sequence[mlp.Network]) -> Floats:
        """KL won by each map at each scale, as a profile of it would, [maps, scales, n]; c: h_c, t: h_r − h_c."""
        most = np.float32(min(2.0 * self._kl_limit, NO_KL_LIMIT))
        images = []
        for map_ in maps:
            image = map_.image(x.astype(np.float32))
            twice_kl = np.square(image).sum(axis=1, keepdims=True)
            images.append(image * np.sqrt(most / np.maximum(twice_kl, most)))
        compressed = c.astype(np.float32)
        reference = compressed + t.astype(np.float32)
        return objective.exact_gains(basis.embedding, reference, compressed, images, _SCALES, self._clamp_nats)

    def _trained(
        self,
        start: regression.LowRank,
        s: Floats,
        everything: tuple[Halves, Halves, Halves],
        rows: npt.NDArray[np.integer],
        basis: _Basis,
        tell: Callable[[float], None],
        stages: int,
    ) -> list[mlp.Network]:
        """The network after the squared error, and after each stage of KL itself: `stages` of them all."""
        training = self._network
        assert training is not None
        raw, c, t = everything
        x = _standardised(raw, s)
        network = mlp.begin(*_standard(start, s), training)
        loss: objective.Objective = objective.Squared(t)
        found: list[mlp.Network] = []
        for number, (epochs, rate) in enumerate(((training.epochs, training.rate), *training.exact)[:stages]):
            if number == 1:
                loss = objective.Softmax(basis.embedding[basis.likeliest[: training.exact_ids]], c, t)

            def told(done: float, number: int = number) -> None:
                tell((number + done) / stages)

            network = mlp.train(network, x, rows, loss, training, epochs, rate, told)
            found.append(_raw(network, s))
        return found

    def _gathered(
        self, rows: Sequence[Rows], basis: _Basis, chosen: npt.NDArray[np.integer]
    ) -> tuple[Halves, Halves, Halves]:
        """Of the chosen tokens (ascending): inputs, h_c and h_r − h_c in the basis, [n, d] each."""
        d = self.weight.shape[1]
        x, c, t = (np.empty((len(chosen), size), np.float16) for size in (len(basis.reads) - 1, d, d))
        by_z, constant, by_h = (a.astype(np.float32) for a in (basis.gain.T, basis.offset, basis.root))
        by_x = basis.reads[:-1].T.astype(np.float32)
        first = at = 0
        for part in _batched(rows, _BLOCK):
            tokens = sum(r.tokens for r in part)
            here = chosen[np.searchsorted(chosen, first) : np.searchsorted(chosen, first + tokens)] - first
            first += tokens
            if not len(here):
                continue
            z = np.concatenate([r.features for r in part if r.features is not None])[here].astype(np.float32)
            h = np.concatenate([r.hidden for r in part if r.hidden is not None])[here].astype(np.float32)
            into = slice(at, at + len(here))
            at += len(here)
            compressed = z @ by_z + constant
            x[into] = self._inputs(z) @ by_x
            c[into], t[into] = compressed, h @ by_h - compressed
        return x, c, t

    def _fit_lists(self, state: ContextualState, tell: Progress) -> Proposal | None:
        """Where either side is known by a list only: `objective.Lists` is made small.

        A first map comes from regressing that objective's slope at no change on the features, which at once gives the
        penalty and the rank; it is then improved by going down the objective itself.

        What is lost: nothing is said of the ids behind, with a small model 30 % of the mass at 20 ids. In a first study
        on int4 weights, 64 ids won back 14 % of the divergence where hidden states won back 22 %.
        """
        rows = [r for r in self._fresh(state) if r.listed is not None]
        if not rows:
            return None
        embedded = self.weight[self.anchors]
        sample = self._hidden_sample(state)
        known = (
            hidden_states.isotropic_prior(self.weight, self._noise)
            if sample is None
            else hidden_states.estimate_prior(sample, self._noise)
        )
        offset, gain = (a.astype(np.float32) for a in hidden_states.linear_recovery(embedded, known))
        embedded = embedded - embedded.mean(axis=0)
        features = [r.features if r.hidden is None else r.hidden @ embedded.T for r in rows]
        z = np.concatenate([f for f in features if f is not None]).astype(np.float32)
        h = z @ gain.T + offset
        basis = self._basis(h if sample is None else sample, known)
        c = h @ basis.root.astype(np.float32)
        lists = _lists(basis.embedding, rows, c)
        tell("linear", 0.0)
        everyone = np.arange(len(c))
        slopes = lists.slope(everyone, np.zeros_like(c))
        w = np.concatenate([np.full(r.tokens, self._discount(state.tokens - r.clock)) for r in rows])
        fold = np.repeat([r.fold for r in rows], [r.tokens for r in rows])
        prompt = np.repeat(np.arange(len(rows)), [r.tokens for r in rows])
        inputs = self._inputs(z) @ basis.reads.T.astype(np.float32)
        folds = [_moments_of_rows(inputs, -slopes, np.where(fold == k, w, 0.0)) for k in range(FOLDS)]
        found = regression.choose(folds, self._ranks)
        if found is None:
            return None
        out = int(np.argmax(np.bincount(fold, minlength=FOLDS)))
        held = _spread(np.flatnonzero(fold == out), _JUDGED)
        whole = regression.total(folds)
        s = regression.standardiser(whole)
        x = _standardised(inputs[:, :-1], s)
        training = self._network or mlp.TrainingSettings(units=0)

        def descended(start: regression.LowRank, chosen: npt.NDArray[np.integer], stage: str) -> mlp.Network:
            """From the best scale of the start."""
            begun = mlp.begin(*_standard(start, s), training)
            some = _spread(chosen, _JUDGED)
            gains = lists.gains(some, begun.image(x[some].astype(np.float32)), _LIST_SCALES)
            begun = _scaled(begun, float(_LIST_SCALES[int(np.argmax(gains.mean(axis=1)))]))
            return mlp.train(
                begun, x, chosen, lists, training, training.epochs, training.rate, lambda d: tell(stage, d)
            )

        without = regression.fitted(whole - folds[out], [found.penalty], len(found.read))[0]
        trial = descended(without, np.flatnonzero(fold != out), "trial")
        gains = lists.gains(held, trial.image(x[held].astype(np.float32)), _SCALES)
        scale = int(np.argmax(gains.mean(axis=1)))
        won, error = _by_prompt(gains[scale], prompt[held])
        if won <= error:
            return None
        best = _scaled(_raw(descended(found, everyone, "lists"), s), float(_SCALES[scale]))
        return self._proposal(state, basis, "list", found, best, inputs[held][:, :-1], won, error)

    def _basis(self, sample: Singles, known: hidden_states.Prior) -> _Basis:
        metric, mean = hidden_states.fisher_metric(self.weight, sample[_spread(np.arange(len(sample)), _METRIC_ROWS)])
        root = np.asarray(np.linalg.cholesky(metric), dtype=np.float64)
        offset, gain = hidden_states.linear_recovery(self.weight[self.anchors], known)
        turn = np.linalg.inv(root).T.astype(np.float32)
        embedding = self.weight @ turn
        embedding -= (mean @ self.weight).astype(np.float32) @ turn
        constant, by_x = (
            root.T @ a for a in hidden_states.linear_recovery(self.weight[self.anchors[: self._features]], known)
        )
        # x is centred over all anchors, which the first ones need not be.
        by_x -= by_x.mean(axis=1, keepdims=True)
        if self._features < len(root):
            # Fewer directions than the state has: turned into as many numbers, lengths stay.
            turned, by_x = np.linalg.qr(by_x)
            constant = turned.T @ constant
        reads = np.zeros((len(by_x) + 1, self._features + 1))
        reads[:-1, :-1], reads[:-1, -1], reads[-1, -1] = by_x, constant, 1.0
        return _Basis(embedding, root, root.T @ offset, root.T @ gain, reads, mean, np.argsort(-mean))

    def _fresh(self, state: ContextualState) -> list[Rows]:
        """The recent rows that are not yet half forgotten."""
        return [r for r in state.recent if self._discount(state.tokens - r.clock) >= 0.5]

    def _hidden_sample(self, state: ContextualState) -> Singles | None:
        """Some of the reference's hidden states, spread over the recent rows, float32 [n, d]."""
        with_hidden = [r.hidden for r in state.recent if r.hidden is not None]
        if not with_hidden:
            return None
        total = sum(map(len, with_hidden))
        step = max(1, total // (_PRIOR_ROWS * self.weight.shape[1]))
        return np.concatenate(with_hidden)[::step].astype(np.float32)

    def _moments(self, state: ContextualState, basis: _Basis) -> tuple[Moments, ...]:
        """Σ s sᵀ and Σ s tᵀ by fold, of inputs s = `basis.reads` x̃ and targets t = Lᵀ (h_r − E[h_c | z])."""
        return tuple(self._moments_of(self._added(fold, state.tokens), basis) for fold in state.folds)

    def _moments_of(self, fold: FoldSums, basis: _Basis) -> Moments:
        count = np.append(fold.cross[-1, : self._features], fold.weight)
        xx = np.column_stack([fold.cross[:, : self._features], count])
        xy = fold.target @ basis.root - np.outer(count, basis.offset) - fold.cross @ basis.gain.T
        return Moments(basis.reads @ xx @ basis.reads.T, basis.reads @ xy, fold.weight)

    def _bases(self, folds: Sequence[Moments]) -> list[Floats] | None:
        """Bᵀ without each fold, and with all of them, at the penalty that is best for all; None where no map gains."""
        found = regression.choose(folds, self._ranks)
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
_JUDGED = 1024
"""Tokens on which maps are compared by KL over the whole vocabulary."""
_SCALES = np.array([1.0, 0.9, 0.8, 0.7, 0.6, 0.5, 0.3])
"""By which a map is multiplied: the metric is of the mean distribution, so that a step may be too long."""
_WIDE = 8192
_NARROW = 64
"""All but the `_WIDE` likeliest ids get a change of logits of rank `_NARROW` (`narrow`), where that halves the rank."""
_LEFT_OUT = 0.05
"""Part of the change, as KL, that the tail may lose by it, at most."""
_STRONGER = (1.0, 10**0.5, 10.0, 10**1.5)
_LIST_SCALES = np.array([1.0, 0.7, 0.5, 0.35, 0.25, 0.15, 0.1, 0.05])
_BLOCK = 4096


@dataclass(frozen=True, slots=True, eq=False)
class _Basis:
    """That of `objective`. embedding: (W − w̄) L⁻ᵀ, [V, d]; root: L; offset, gain: Lᵀ E[h | z] = offset + gain z;
    reads: of x̃ = [x; 1], the same from the logits that the map reads (turned, where these are fewer than d), and 1:
    [min(A, d) + 1, A + 1]. These are the inputs that are learned from: there a length is a difference that matters, so
    that one penalty fits all directions.
    mean: the reference's mean distribution, [V]; likeliest: ids by it, [V]."""

    embedding: Singles
    root: Floats
    offset: Floats
    gain: Floats
    reads: Floats
    mean: Floats
    likeliest: npt.NDArray[np.integer]


def _spread(indices: npt.NDArray[np.integer], at_most: int) -> npt.NDArray[np.integer]:
    """Some of them, evenly spread."""
    if len(indices) <= at_most:
        return indices
    return indices[np.linspace(0, len(indices) - 1, at_most).astype(np.int64)]


def _listed(record: TokenRecord, kept: npt.NDArray[np.bool_], source: TokenSource) -> Listed | None:
    if source is TokenSource.HIDDEN:
        return None
    compressed, reference = record.compressed, record.reference
    likeliest = compressed.ids[kept, 0], compressed.logprobs[kept, 0]
    if source is TokenSource.LIST:
        return Listed(reference.ids[kept], reference.logprobs[kept], None, likeliest)
    ids = np.where(np.isnan(record.reference_at), -1, compressed.ids).astype(np.int32)
    return Listed(ids[kept], record.reference_at[kept], compressed.logprobs[kept], likeliest)


def _lists(embedding: Singles, rows: Sequence[Rows], c: Singles) -> objective.Lists:
    """c: the compressed model's hidden states in the basis, [n, d]."""
    most = max(r.listed.ids.shape[1] for r in rows if r.listed is not None)
    ids = np.zeros((len(c), most), np.int32)
    r = np.zeros((len(c), most), np.float32)
    log_c = np.full((len(c), most), -np.inf, np.float32)
    at = 0
    for row in rows:
        listed = row.listed
        if listed is None:
            continue
        part = slice(at, at + row.tokens)
        at += row.tokens
        width = listed.ids.shape[1]
        given = listed.ids >= 0
        ids[part, :width] = np.where(given, listed.ids, 0)
        r[part, :width] = np.where(given, np.exp(listed.reference), 0.0)
        if listed.compressed is None:
            # Logits follow from c; what makes them log-probabilities, from the likeliest candidate.
            first, logprob = listed.likeliest
            constant = logprob - (embedding[first] * c[part]).sum(axis=1)
            logprobs = np.einsum("tkd,td->tk", embedding[ids[part, :width]], c[part]) + constant[:, None]
        else:
            logprobs = listed.compressed
        log_c[part, :width] = np.where(given, logprobs, -np.inf)
    return objective.Lists(embedding, ids, r, log_c)


def _moments_of_rows(x: Singles, target: Singles, weights: Floats) -> Moments:
    weighted = (x * weights[:, None].astype(np.float32)).T
    return Moments((weighted @ x).astype(np.float64), (weighted @ target).astype(np.float64), float(weights.sum()))


def _linear(found: regression.LowRank) -> mlp.Network:
    read = found.read.astype(np.float32)

    def none(*shape: int) -> Singles:
        return np.zeros(shape, np.float32)

    return mlp.Network(
        linear=read[:, :-1],
        offset=read[:, -1],
        hidden=none(0, read.shape[1] - 1),
        hidden_offset=none(0),
        middle=none(0, 0),
        middle_offset=none(0),
        out=none(len(read), 0),
        up=found.up.astype(np.float32),
    )


def _standardised(x: npt.NDArray[np.floating], s: Floats) -> Halves:
    found = np.empty(x.shape, np.float16)
    scale, shift = np.diagonal(s)[:-1].astype(np.float32), s[:-1, -1].astype(np.float32)
    for start in range(0, len(x), _BLOCK):
        found[start : start + _BLOCK] = x[start : start + _BLOCK] * scale + shift
    return found


def _standard(found: regression.LowRank, s: Floats) -> tuple[Floats, Floats, Floats]:
    """linear, offset and up of the map for standardised inputs."""
    read = np.asarray(np.linalg.solve(s.T, found.read.T).T, dtype=np.float64)
    return read[:, :-1], read[:, -1], found.up


def _raw(map_: mlp.Network, s: Floats) -> mlp.Network:
    """The same for inputs as they come."""
    scale, shift = np.diagonal(s)[:-1], s[:-1, -1]
    return replace(
        map_,
        linear=(map_.linear * scale).astype(np.float32),
        offset=(map_.offset + map_.linear @ shift).astype(np.float32),
        hidden=(map_.hidden * scale).astype(np.float32),
        hidden_offset=(map_.hidden_offset + map_.hidden @ shift).astype(np.float32),
    )


def _reading(map_: mlp.Network, reads: Floats) -> mlp.Network:
    """The same for x, where its inputs are `reads` x̃."""
    by, constant = reads[:-1, :-1], reads[:-1, -1]
    return replace(
        map_,
        linear=(map_.linear @ by).astype(np.float32),
        offset=(map_.offset + map_.linear @ constant).astype(np.float32),
        hidden=(map_.hidden @ by).astype(np.float32),
        hidden_offset=(map_.hidden_offset + map_.hidden @ constant).astype(np.float32),
    )


def _scaled(map_: mlp.Network, scale: float) -> mlp.Network:
    by = np.float32(scale)
    return replace(map_, linear=map_.linear * by, offset=map_.offset * by, out=map_.out * by)


def _turned(map_: mlp.Network, turn: Floats) -> mlp.Network:
    """With the code `turn` y instead of y; its `up` is no longer of that code."""
    return replace(
        map_,
        linear=(turn @ map_.linear).astype(np.float32),
        offset=(turn @ map_.offset).astype(np.float32),
        out=(turn @ map_.out).astype(np.float32),
    )


def _orthonormal(map_: mlp.Network) -> mlp.Network:
    """The same with VᵀV = 1, so that the length of y is that of the image."""
    values, vectors = np.linalg.eigh(map_.up.T.astype(np.float64) @ map_.up)
    sizes = np.sqrt(np.maximum(values, 1e-12))
    return replace(_turned(map_, (vectors * sizes).T), up=(map_.up @ vectors / sizes).astype(np.float32))


def _best(gains: Floats) -> tuple[int, int]:
    """Map and scale of the largest mean of gains [maps, scales, n]."""
    at = np.unravel_index(int(np.argmax(gains.mean(axis=2))), gains.shape[:2])
    return int(at[0]), int(at[1])


def _by_prompt(values: Floats, prompt: npt.NDArray[np.integer]) -> tuple[float, float]:
    """Mean over tokens, and its standard error, by prompts: tokens of one are correlated."""
    mean = float(values.mean())
    sums = np.bincount(prompt, values - mean)
    prompts = len(np.unique(prompt))
    return mean, float(np.sqrt((sums**2).sum() * prompts / max(prompts - 1, 1)) / len(values))


def _batched(rows: Sequence[Rows], tokens: int) -> Iterator[list[Rows]]:
    """Rows in order, some `tokens` of them at a time."""
    batch: list[Rows] = []
    for row in rows:
        batch.append(row)
        if sum(r.tokens for r in batch) >= tokens:
            yield batch
            batch = []
    if batch:
        yield batch


def fold_of(prompt_key: bytes) -> int:
    """The fold of a prompt, whatever else is known of it."""
    return hashlib.blake2b(prompt_key, digest_size=8, person=b"hemostat.folds").digest()[0] % FOLDS


def _silent(stage: str, done: float) -> None: ...


def _halves(values: npt.NDArray[np.floating]) -> Halves:
    found = np.clip(values, -_HALVES_AT_MOST, _HALVES_AT_MOST).astype(np.float16)
    found.flags.writeable = False
    return found


def _frozen(array: Floats) -> Floats:
    array.flags.writeable = False
    return array
