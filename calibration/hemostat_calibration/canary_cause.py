"""Finds the cause of a difference of canaries: the same tokens are scored in variants, and each is compared with what
it was when the set was taken.

A variant changes one thing of how an engine computes: a prefill of the whole text or of short pieces, alone or together
with other requests, or decoding of given tokens, after a prompt that is computed or that is in the prefix cache. Where
variants have changed, and where not, says which part of the engine has. The table of causes is `_TABLE`. Of an engine
in which everything has changed, weights and KV cache are distinguished by how many distinct values the cache holds: the
size of the differences does not (measured: docs/lab/notes.md#canaries).

**Null.** Of an unchanged engine, all variants that score the same tokens give the same, but for what batch shapes and
chunks do. The baseline has them all, twice; a bound is twice the largest distance among these replays.

A cause is said only where exactly one explains every variant; else it is unknown.

>>> rng = np.random.default_rng(0)
>>> text = np.arange(640, dtype=np.int32)
>>> true = {variant: rng.normal(-2.0, 1.0, shape) for variant, shape in shapes(len(text)).items()}
>>> true[Variant.LONG_BESIDE] = true[Variant.LONG]
>>> true |= dict.fromkeys(DECODING, decoded_part(true[Variant.LONG], len(text)))
>>> baseline = CauseBaseline(text, (Measured(true, 9.1), Measured(true, 9.1)))
>>> baseline.explain(Measured(true, 9.1), 0.01).cause.value
'none'
>>> other = {variant: values + 0.1 for variant, values in true.items()}
>>> print(baseline.explain(Measured(other, 7.0), 0.01).text)
KV cache: all variants have changed, with a context of at most 32 tokens by 0.100 nats and of up to 640 by 0.100 \
(bound 0.010); of 1,024 values that the cache held, 549 were distinct, now 128
>>> stale = true | {Variant.CACHED: true[Variant.CACHED] + 0.3}
>>> print(baseline.explain(Measured(stale, 9.1), 0.01).text)
prefix cache: decoding after a cached prompt has changed by 0.300 nats (bound 0.010), nothing else has
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum

import numpy as np

from hemostat_calibration.arrays import Floats, Ids
from hemostat_calibration.described_enum import DescribedEnum
from hemostat_calibration.errors import InvalidArgumentError

MAX_TEXT = 1_000
MIN_TEXT = 256
"""The least number of tokens of a text; of a model with a shorter context nothing is said."""
WINDOW = 32
"""The number of tokens of a short piece, and of a part of the whole text."""
PROMPT = 144
"""The number of tokens of the first prompt after which tokens are decoded: more than a block of the prefix cache, of
128 on a CPU."""
STEP = 40
"""The number of tokens by which each further prompt is longer."""
PROMPTS = 2
DECODED = 16
"""The number of tokens that are decoded after each prompt."""
REPLAYS = 2
"""The least number of replays in a baseline."""
NOISE_FACTOR = 2.0
TOKEN_NATS = 0.05
"""The difference of a single token that is never a change."""
ONSET_NATS = 0.002
"""The difference of a single token that is never a change when the first token of a text that differs is looked for.
Twice the largest difference of the baseline is more than this, unless the engine's results are equal to the last bit.
"""
MOSTLY = 0.8
"""The share of the parts of a variant that have to differ where all of it has changed."""
MAX_SHIFT = 32
"""The largest number of tokens by which other requests in the batch move the end of a chunk: they take so many of its
budget.
"""
PRECISION_BITS = 1.5
"""The least change of log2 of the number of distinct values in the KV cache that counts as a change; half of it is
none. A cast of bfloat16 to FP8 changes it by 2.4 and more.
"""


class Cause(DescribedEnum):
    """The values of the label `cause`."""

    NONE = "none", "no variant differs from then"
    WEIGHTS = "weights", "what the model computes for each token: its weights, their scales, or kernels"
    KV_CACHE = "kv_cache", "the KV cache holds coarser, or finer, values"
    PREFIX_CACHE = "prefix_cache", "what is decoded behind a cached prompt"
    BATCH = "batch", "what is computed beside other requests"
    DECODING = "decoding", "what is decoded, and not what a prefill computes of the same tokens"
    CHUNK_BOUNDARY = "chunk_boundary", "what follows the end of a chunk of a long prompt"
    ONE_ENGINE = "one_engine", "one engine of several; the text says what there"
    UNKNOWN = "unknown", "no single cause explains what differs"


class Variant(StrEnum):
    """The way in which the tokens are scored."""

    LONG = "long"
    """The tokens are scored by a prefill of the whole text, alone."""
    LONG_BESIDE = "long_beside"
    """The tokens are scored by the same prefill while other requests are decoded."""
    SHORT = "short"
    """The tokens are scored by prefills of pieces of the text, each with no context but its own."""
    DECODED = "decoded"
    """The tokens are scored by decoding given tokens, after a prompt that no cache has."""
    CACHED = "cached"
    """The tokens are scored by decoding after the same prompt again, which the prefix cache has."""
    BESIDE = "beside"
    """The tokens are scored by decoding as in DECODED, while other requests are decoded."""


DECODING = (Variant.DECODED, Variant.CACHED, Variant.BESIDE)


class State(StrEnum):
    """The state of one variant, compared with the baseline."""

    SAME = "same"
    PARTLY = "partly"
    CHANGED = "changed"
    UNKNOWN = "unknown"
    """The variant was not measured."""


_S, _ANY = frozenset({State.SAME}), frozenset(State)
_ALL = frozenset({State.CHANGED})
_SOME = _ALL | {State.PARTLY}
_MAYBE = frozenset({State.UNKNOWN})

_TABLE: dict[Cause, dict[Variant, frozenset[State]]] = {
    Cause.NONE: {Variant.LONG: _S, Variant.LONG_BESIDE: _S | _MAYBE, Variant.SHORT: _S}
    | dict.fromkeys(DECODING, _S | _MAYBE),
    # Which of the two: `_whole`.
    Cause.WEIGHTS: {Variant.LONG: _ALL, Variant.LONG_BESIDE: _ALL | _MAYBE, Variant.SHORT: _ALL}
    | dict.fromkeys(DECODING, _ALL | _MAYBE),
    Cause.PREFIX_CACHE: {
        Variant.LONG: _S,
        Variant.LONG_BESIDE: _S,
        Variant.SHORT: _S,
        Variant.DECODED: _S,
        Variant.CACHED: _SOME,
        Variant.BESIDE: _S,
    },
    Cause.BATCH: {
        Variant.LONG: _S,
        Variant.LONG_BESIDE: _S | _SOME | _MAYBE,
        Variant.SHORT: _S,
        Variant.DECODED: _S,
        Variant.CACHED: _S,
        Variant.BESIDE: _SOME,
    },
    Cause.DECODING: {Variant.LONG: _S, Variant.LONG_BESIDE: _S | _MAYBE, Variant.SHORT: _S}
    | dict.fromkeys(DECODING, _SOME)
    | {Variant.BESIDE: _SOME | _MAYBE},
    # And the first difference has to move: `_chunk`.
    Cause.CHUNK_BOUNDARY: {Variant.LONG: _SOME, Variant.LONG_BESIDE: _SOME, Variant.SHORT: _S}
    | dict.fromkeys(DECODING, _ANY),
}
"""The states of all variants that each cause explains."""

_NAMES = {
    Cause.NONE: "nothing",
    Cause.WEIGHTS: "weights or kernels",
    Cause.KV_CACHE: "KV cache",
    Cause.PREFIX_CACHE: "prefix cache",
    Cause.BATCH: "batch",
    Cause.DECODING: "prefill and decode differ",
    Cause.CHUNK_BOUNDARY: "chunk boundary",
    Cause.ONE_ENGINE: "one engine of several",
    Cause.UNKNOWN: "unknown",
}


_ALONE = {
    Cause.PREFIX_CACHE: (Variant.CACHED, "nothing else has"),
    Cause.BATCH: (Variant.BESIDE, "nothing that is computed alone has"),
    Cause.DECODING: (Variant.DECODED, "the prefill of the same tokens has not"),
}
"""The variant whose change is named for a cause that leaves others as they are, and what is said of the others."""


def text_of(sequences: Sequence[Sequence[int]], max_model_len: int = 0) -> Ids:
    """Returns the text that is scored: the token ids of a set one behind the other, at most MAX_TEXT. max_model_len: 0
    where it is not known. Empty where the model's context, or the set, is too short.

    >>> sequences = [[1] * 140] * 16
    >>> len(text_of(sequences)), len(text_of(sequences, 512)), len(text_of(sequences, 128))
    (1000, 510, 0)
    """
    ids = np.array([token for sequence in sequences for token in sequence], np.int32)
    text = ids[: min(MAX_TEXT, max_model_len - 2) if max_model_len else MAX_TEXT]
    return text if len(text) >= MIN_TEXT else text[:0]


def windows(length: int) -> list[slice]:
    """Returns the pieces of a text.

    >>> windows(100)
    [slice(0, 32, None), slice(32, 64, None), slice(64, 96, None)]
    """
    return [slice(begin, begin + WINDOW) for begin in range(0, length - WINDOW + 1, WINDOW)]


def prompts() -> list[int]:
    """Returns the lengths of the prompts after which tokens are decoded; each prompt is a beginning of the text.

    >>> prompts()
    [144, 184]
    """
    return [PROMPT + n * STEP for n in range(PROMPTS)]


def shapes(length: int) -> dict[Variant, int]:
    """Returns the number of log-probabilities of each variant, for a text of so many tokens.

    >>> shapes(256)[Variant.SHORT], shapes(256)[Variant.DECODED]
    (248, 32)
    """
    long, decoded = length - 1, PROMPTS * DECODED
    short = len(windows(length)) * (WINDOW - 1)
    return {Variant.LONG: long, Variant.LONG_BESIDE: long, Variant.SHORT: short} | dict.fromkeys(DECODING, decoded)


def decoded_part(long: Floats, length: int) -> Floats:
    """Returns the log-probabilities from a prefill of the whole text for the tokens that are decoded, too. length: the
    length of the text in tokens.

    >>> decoded_part(np.arange(1.0, 256.0), 256)[[0, 15, 16]].tolist()
    [144.0, 159.0, 184.0]
    """
    assert len(long) == length - 1
    return np.concatenate([long[prompt - 1 : prompt - 1 + DECODED] for prompt in prompts()])


@dataclass(frozen=True, slots=True, eq=False)
class Measured:
    """The measurements of one replay.

    scores: float64, nats, by variant, for the variants that could be measured. precision: log2 of the number of
    distinct values among the 1,024 that the engine's plugin read in the KV cache; 0.0 if it did not say. cache: the
    dtype of the KV cache that the server names; "" if it names none.
    """

    scores: Mapping[str, Floats]
    precision: float = 0.0
    cache: str = ""


@dataclass(frozen=True, slots=True)
class Verdict:
    """The cause of a difference. text: the cause with its figures, in one sentence."""

    cause: Cause
    text: str


UNCHANGED = Verdict(Cause.NONE, "nothing: its replays are as they were")
"""The verdict on an engine that has not changed while another one has."""


@dataclass(frozen=True, slots=True)
class _Reading:
    """The comparison of one variant with the baseline. nats: mean |difference| of its tokens. first: the first token of
    the text that differs.
    """

    state: State
    nats: float = 0.0
    first: int | None = None


@dataclass(frozen=True, slots=True, eq=False)
class CauseBaseline:
    """The replays that later ones are compared with. Raises InvalidArgumentError if they do not fit together.

    text: int32 [L]. measured: the replays.
    """

    text: Ids
    measured: tuple[Measured, ...]

    def __post_init__(self) -> None:
        expected = shapes(len(self.text))
        for replay in self.measured:
            for variant, values in replay.scores.items():
                if len(values) != expected.get(Variant(variant)) or not np.isfinite(values).all():
                    raise InvalidArgumentError(f"the canaries' variant {variant} is no list of log-probabilities")
        if len(self.measured) < REPLAYS or any(
            not replay.scores.keys() >= {"long", "short"} for replay in self.measured
        ):
            raise InvalidArgumentError("the canaries' variants lack replays")

    def explain(self, now: Measured, tolerance: float) -> Verdict:
        """Returns the cause of what is measured. What else is served than then, such as another path or another version
        of vLLM, has no influence. tolerance: nats, as for canaries."""
        bounds = self._bounds(tolerance)
        readings = {variant: self._reading(variant, now, bounds) for variant in Variant}
        fits = [
            cause
            for cause, states in _TABLE.items()
            if all(readings[variant].state in allowed for variant, allowed in states.items())
        ]
        if fits == [Cause.WEIGHTS]:
            return self._whole(now, readings, bounds)
        if fits == [Cause.CHUNK_BOUNDARY]:
            return self._chunk(readings, bounds)
        if fits == [Cause.NONE]:
            missing = [_DESCRIBED[variant] for variant in Variant if readings[variant].state is State.UNKNOWN]
            also = f"; not measured: {', '.join(missing)}" if missing else ""
            return _verdict(
                Cause.NONE, f"every variant that was measured is as it was (bound {bounds.mean:.3f} nats){also}"
            )
        if len(fits) == 1:
            (cause,) = fits
            changed, rest = _ALONE[cause]
            figures = f"has changed by {readings[changed].nats:.3f} nats (bound {bounds.mean:.3f})"
            return _verdict(cause, f"{_DESCRIBED[changed]} {figures}, {rest}")
        return _verdict(Cause.UNKNOWN, f"no single cause explains the variants: {_listed(readings)}")

    # --- what a variant says ---------------------------------------------------------------------------------------

    def _bounds(self, tolerance: float) -> _Bounds:
        means, tokens = [0.0], [0.0]
        for variant, a, b in self._pairs():
            difference = np.abs(a - b)
            means.append(float(_parts(variant, difference).max()))
            tokens.append(float(difference.max()))
        mean, token = NOISE_FACTOR * max(means), NOISE_FACTOR * max(tokens)
        return _Bounds(max(mean, tolerance), max(token, TOKEN_NATS), max(token, ONSET_NATS))

    def _pairs(self) -> Iterator[tuple[Variant, Floats, Floats]]:
        """Yields the pairs of the baseline's arrays that score the same tokens, each with its variant."""
        pools: dict[Variant, list[Floats]] = {Variant.LONG: [], Variant.SHORT: [], Variant.DECODED: []}
        for replay in self.measured:
            for name, values in replay.scores.items():
                variant = Variant(name)
                pool = Variant.DECODED if variant in DECODING else variant
                pools[Variant.LONG if variant is Variant.LONG_BESIDE else pool].append(values)
                if variant is Variant.LONG:
                    pools[Variant.DECODED].append(decoded_part(values, len(self.text)))
        for variant, alike in pools.items():
            yield from ((variant, alike[a], alike[b]) for a in range(len(alike)) for b in range(a))

    def _reading(self, variant: Variant, now: Measured, bounds: _Bounds) -> _Reading:
        then = [replay.scores[variant] for replay in self.measured if variant in replay.scores]
        values = now.scores.get(variant)
        if values is None or not then:
            return _Reading(State.UNKNOWN)
        difference = np.abs(values - np.mean(then, axis=0))
        beyond = _parts(variant, difference) > bounds.mean
        state = State.CHANGED if beyond.mean() >= MOSTLY else State.PARTLY
        if not beyond.any() and difference.max() <= bounds.token:
            state = State.SAME
        differs = np.flatnonzero(difference > bounds.onset)
        return _Reading(state, float(difference.mean()), int(differs[0]) + 1 if len(differs) else None)

    # --- causes that need more than the table ----------------------------------------------------------------------

    def _whole(self, now: Measured, readings: Mapping[Variant, _Reading], bounds: _Bounds) -> Verdict:
        """Returns the cause if everything has changed: the cache holds coarser values, or the model computes something
        else."""
        figures = (
            f"all variants have changed, with a context of at most {WINDOW} tokens by "
            f"{readings[Variant.SHORT].nats:.3f} nats and of up to {len(self.text):,} by "
            f"{readings[Variant.LONG].nats:.3f} (bound {bounds.mean:.3f})"
        )
        then = min(replay.precision for replay in self.measured)
        dtypes = {replay.cache for replay in self.measured} | {now.cache}
        named = ""
        if len(dtypes) > 1 and "" not in dtypes:
            named = f"; the cache's dtype was {self.measured[0].cache}, and is {now.cache}"
        if not then or not now.precision:
            if named:
                return _verdict(Cause.KV_CACHE, figures + named)
            return _verdict(
                Cause.UNKNOWN,
                f"{figures}: weights or KV cache, which the engine's plugin would distinguish; it did not answer",
            )
        moved = abs(then - now.precision)
        distinct, left = round(2**then), round(2**now.precision)
        held = f"of 1,024 values that the cache held, {distinct} were distinct, now {left}{named}"
        if PRECISION_BITS / 2 < moved < PRECISION_BITS or (named and moved <= PRECISION_BITS / 2):
            return _verdict(Cause.UNKNOWN, f"{figures}; {held}, which says neither weights nor KV cache")
        return _verdict(Cause.KV_CACHE if moved >= PRECISION_BITS else Cause.WEIGHTS, f"{figures}; {held}")

    def _chunk(self, readings: Mapping[Variant, _Reading], bounds: _Bounds) -> Verdict:
        """Returns the cause if only later parts of the long text have changed: by the end of a chunk, if that moves
        with its budget."""
        alone, beside = readings[Variant.LONG].first, readings[Variant.LONG_BESIDE].first
        assert alone is not None
        figures = (
            f"from its token {alone:,} on the text has changed by {readings[Variant.LONG].nats:.3f} nats in the mean"
        )
        if alone > WINDOW and beside is not None and 1 <= alone - beside <= MAX_SHIFT:
            return _verdict(
                Cause.CHUNK_BOUNDARY,
                f"{figures}, beside other requests, which take a part of each chunk, from {beside:,} on; pieces of "
                f"{WINDOW} tokens have not changed (bound {bounds.mean:.3f})",
            )
        return _verdict(
            Cause.UNKNOWN, f"{figures}, beside other requests from {beside or 0:,} on, pieces of it have not"
        )


@dataclass(frozen=True, slots=True)
class _Bounds:
    """Nats: of the mean of a part, of a token, and of the first token that differs."""

    mean: float
    token: float
    onset: float


_DESCRIBED = {
    Variant.LONG: "a prefill of a long text",
    Variant.LONG_BESIDE: "a prefill beside other requests",
    Variant.SHORT: "a prefill of short pieces",
    Variant.DECODED: "decoding",
    Variant.CACHED: "decoding after a cached prompt",
    Variant.BESIDE: "decoding beside other requests",
}


def _parts(variant: Variant, difference: Floats) -> Floats:
    """Returns the means over the parts of a variant: windows of a text, or what is decoded after one prompt."""
    size = DECODED if variant in DECODING else WINDOW - 1 if variant is Variant.SHORT else WINDOW
    begins = np.arange(0, len(difference), size)
    sums: Floats = np.add.reduceat(difference, begins)
    means: Floats = sums / np.diff(np.append(begins, len(difference)))
    return means


def _listed(readings: Mapping[Variant, _Reading]) -> str:
    """Returns each variant's state, in words."""
    words = {
        State.SAME: "as it was",
        State.PARTLY: "partly changed",
        State.CHANGED: "changed",
        State.UNKNOWN: "unknown",
    }
    return ", ".join(
        f"{_DESCRIBED[variant]} {words[reading.state]}"
        + ("" if reading.state is State.UNKNOWN else f" ({reading.nats:.3f} nats)")
        for variant, reading in readings.items()
    )


def _verdict(cause: Cause, figures: str) -> Verdict:
    return Verdict(cause, f"{_NAMES[cause]}: {figures}")


def of_engines(verdicts: Mapping[str, Verdict]) -> Verdict:
    """Returns the cause of several engines that serve the same, by name.

    >>> whole, none = Verdict(Cause.WEIGHTS, "weights: all"), Verdict(Cause.NONE, "nothing: same")
    >>> print(of_engines({"a": none, "b": whole}).text)
    one engine of several: b differs from then, 1 other does not; there weights: all
    >>> of_engines({"a": whole, "b": whole}).cause.value, of_engines({"a": whole}).cause.value
    ('weights', 'weights')
    """
    changed = {name: verdict for name, verdict in verdicts.items() if verdict.cause is not Cause.NONE}
    if not changed or len(verdicts) == 1:
        return next(iter(verdicts.values()))
    causes = {verdict.cause for verdict in changed.values()}
    rest = len(verdicts) - len(changed)
    (name, first), *more = changed.items()
    if not rest:
        return (
            first if len(causes) == 1 else _verdict(Cause.UNKNOWN, f"the engines' causes differ: {_by_engine(changed)}")
        )
    if more:
        return _verdict(Cause.UNKNOWN, f"{len(changed)} of {len(verdicts)} engines have changed: {_by_engine(changed)}")
    others = f"{rest} other{'s do' if rest > 1 else ' does'} not"
    return _verdict(Cause.ONE_ENGINE, f"{name} differs from then, {others}; there {first.text}")


def _by_engine(verdicts: Mapping[str, Verdict]) -> str:
    return ", ".join(f"{name} {verdict.cause.value}" for name, verdict in verdicts.items())
