"""Stores what was learned as bytes, for a restart: safetensors with a description in their metadata.

Of each state the sums are kept (in float32: the products that they add up are computed in float32) and the counts; of
the recent rows the newest ones, as far as a limit of bytes allows, in the precision in which they are held. A state
without the oldest of its rows proposes the same map but for the metric's sample and the held-out choice; a map from
lists is learned from the rows that are left.

What is stored is read again only by a learner with the same `dependencies`: anchors, output embedding, forgetting.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt
import safetensors
import safetensors.numpy

from hemostat_calibration.arrays import frozen
from hemostat_calibration.errors import InvalidArgumentError
from hemostat_calibration.learning.contextual.fold_sums import FoldSums, flushed
from hemostat_calibration.learning.contextual.learner import ContextualLearner, ContextualState
from hemostat_calibration.learning.contextual.rows import FOLDS, ListedTokens, TokenRows, TokenSource

FORMAT = "hemostat.learned.1"
MAX_STATES = 64
MAX_LISTED = 4096
"""The largest number of ids for a token in stored lists."""
_DIGEST_ELEMENTS = 1 << 24
"""The number of elements of the output embedding that enter `dependencies`, about: evenly spaced rows of it."""
_MAX_LOGPROB = 1e-3
_MAX_HEADER_BYTES = 1 << 20
_ENTRY = "learned"
"""The key in the metadata."""

Arrays = Mapping[str, npt.NDArray[Any]]


def dependencies(learner: ContextualLearner, about: str) -> str:
    """Returns the digest of all that stored sums depend on: the output embedding (evenly spaced rows of a large one),
    the anchors and how many are read, the forgetting, and `about`, the caller's name of the two models.

    >>> learner = ContextualLearner(np.eye(4), np.arange(3))
    >>> dependencies(learner, "models") == dependencies(learner, "other models")
    False
    """
    weight = learner.weight
    step = max(1, -(-weight.size // _DIGEST_ELEMENTS))
    result = hashlib.sha256(repr((FORMAT, about, weight.shape, learner.features, FOLDS, learner.forgetting)).encode())
    result.update(learner.digest.encode())
    result.update(np.ascontiguousarray(weight[::step]).astype("<f4", copy=False).data)
    return result.hexdigest()[:32]


def save(states: Mapping[str, ContextualState], learner: ContextualLearner, about: str, max_bytes: int) -> bytes:
    """Returns states by name as bytes, about `max_bytes` at most; b"" if not even the sums of the first state fit.

    The first state is kept before the others; further ones are left out from the first whose sums do not fit. Of what
    the sums leave of `max_bytes`, each state's newest rows get an equal part, and the first one also what the others do
    not need. Deterministic. about: see `dependencies`.

    >>> learner = ContextualLearner(np.eye(4), np.arange(3))
    >>> states = {"": learner.init("m", 4)}
    >>> load(save(states, learner, "m", 10_000), learner, "m")[""].tokens
    0
    """
    arrays: dict[str, npt.NDArray[Any]] = {}
    described: list[dict[str, Any]] = []
    held: list[ContextualState] = []
    left = max_bytes
    for name, state in list(states.items())[:MAX_STATES]:
        sums, counts = _sums(state, learner)
        size = sum(array.nbytes for array in sums.values()) + 1024
        if size > left:
            break
        left -= size
        arrays |= {f"{len(held)}.{key}": array for key, array in sums.items()}
        described.append({"name": name, "model": state.model, "vocab_size": state.vocab_size, **counts})
        held.append(state)
    if not held:
        return b""
    for n in (*range(1, len(held)), 0):
        rows = _newest_within(held[n].recent, left if n == 0 else left // len(held))
        left -= sum(map(_row_bytes, rows))
        arrays |= {f"{n}.{key}": array for key, array in _row_arrays(rows).items()}
    fields = {"format": FORMAT, "dependencies": dependencies(learner, about), "states": described}
    # One entry: the library keeps no order among them.
    return bytes(safetensors.numpy.save(arrays, {_ENTRY: json.dumps(fields)}))


def load(data: bytes, learner: ContextualLearner, about: str) -> dict[str, ContextualState]:
    """Returns what `save` wrote. Raises InvalidArgumentError if it is damaged, or comes from another learner or other
    models.

    >>> learner = ContextualLearner(np.eye(4), np.arange(3))
    >>> load(save({"a": learner.init("m", 4)}, learner, "m", 10_000), learner, "m")["a"].model
    'm'
    """
    try:
        fields = _metadata(data)
        described = fields["states"]
        same = fields["format"] == FORMAT and fields["dependencies"] == dependencies(learner, about)
        arrays = safetensors.numpy.load(data)
    except (safetensors.SafetensorError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise InvalidArgumentError(f"what was learned cannot be read: {str(error)[:100]}") from None
    if not same:
        raise InvalidArgumentError("what was learned is of other models, another output embedding or other settings")
    if not isinstance(described, list) or not 1 <= len(described) <= MAX_STATES:
        raise InvalidArgumentError("what was learned describes no states")
    try:
        return {str(entry["name"]): _state(entry, _Part(arrays, n), learner) for n, entry in enumerate(described)}
    except (ValueError, KeyError, TypeError, OverflowError, AttributeError) as error:
        raise InvalidArgumentError(f"what was learned is damaged: {str(error)[:100]}") from None


def _metadata(data: bytes) -> dict[str, Any]:
    length = int.from_bytes(data[:8], "little")
    if length > _MAX_HEADER_BYTES:
        raise ValueError(f"a header of {length} bytes")
    fields = json.loads(json.loads(data[8 : 8 + length])["__metadata__"][_ENTRY])
    return {str(key): value for key, value in fields.items()}


# --- writing ---------------------------------------------------------------------------------------------------------


def _sums(state: ContextualState, learner: ContextualLearner) -> tuple[dict[str, npt.NDArray[Any]], dict[str, Any]]:
    folds = [flushed(fold, state.tokens, learner.forgetting) for fold in state.folds]
    arrays: dict[str, npt.NDArray[Any]] = {"weights": np.array([fold.weight for fold in folds])}
    if any(fold.weight for fold in folds):
        arrays["cross"] = np.stack([fold.cross for fold in folds]).astype(np.float32)
        arrays["target"] = np.stack([fold.target for fold in folds]).astype(np.float32)
    sources = {str(source): int(tokens) for source, tokens in state.tokens_by_source.items()}
    return arrays, {"tokens": state.tokens, "requests": state.requests, "sources": sources}


def _row_bytes(row: TokenRows) -> int:
    """Returns the size of a row as it is stored."""
    size = 64 + sum(array.nbytes for array in (row.features, row.hidden) if array is not None)
    if row.listed is not None:
        size += (8 if row.listed.compressed is None else 12) * row.listed.ids.size + 8 * row.tokens
    return size


def _newest_within(rows: Sequence[TokenRows], max_bytes: int) -> Sequence[TokenRows]:
    first = len(rows)
    while first > 0 and (max_bytes := max_bytes - _row_bytes(rows[first - 1])) >= 0:
        first -= 1
    return rows[first:]


def _row_arrays(rows: Sequence[TokenRows]) -> dict[str, npt.NDArray[Any]]:
    """Returns one array for each kind of value, all rows behind each other; `rows`: int64 [R, 5], what each row
    holds."""
    if not rows:
        return {}
    held = [
        (
            r.fold,
            r.clock,
            r.tokens,
            (r.features is not None) + 2 * (r.hidden is not None) + 4 * (r.listed is not None and _has_compressed(r)),
            -1 if r.listed is None else r.listed.ids.shape[1],
        )
        for r in rows
    ]
    listed = [r.listed for r in rows if r.listed is not None]
    parts: dict[str, tuple[list[npt.NDArray[Any]], type[np.generic]]] = {
        "features": ([r.features.ravel() for r in rows if r.features is not None], np.float16),
        "hidden": ([r.hidden.ravel() for r in rows if r.hidden is not None], np.float16),
        "ids": ([x.ids.ravel() for x in listed], np.int32),
        "reference": ([x.reference.ravel() for x in listed], np.float32),
        "compressed": ([x.compressed.ravel() for x in listed if x.compressed is not None], np.float32),
        "likeliest": ([x.likeliest[0] for x in listed], np.int32),
        "likeliest_at": ([x.likeliest[1] for x in listed], np.float32),
    }
    arrays = {name: np.concatenate(pieces).astype(kind) for name, (pieces, kind) in parts.items() if pieces}
    return {"rows": np.array(held, np.int64), **arrays}


def _has_compressed(row: TokenRows) -> bool:
    return row.listed is not None and row.listed.compressed is not None


# --- reading ---------------------------------------------------------------------------------------------------------


class _Part:
    """The arrays of one state, of which the values of rows are taken one row after the other."""

    def __init__(self, arrays: Arrays, n: int) -> None:
        self._arrays, self._n = arrays, n
        self._taken: dict[str, int] = {}

    def whole(self, name: str, dtype: type[np.generic], shape: tuple[int, ...]) -> npt.NDArray[Any]:
        array = self._arrays[f"{self._n}.{name}"]
        if array.dtype != dtype or array.shape != shape or not np.isfinite(array).all():
            raise ValueError(f"{name} is {array.dtype} {array.shape}, or not finite; expected {shape}")
        return array

    def rows(self) -> npt.NDArray[np.int64]:
        array = self._arrays.get(f"{self._n}.rows")
        if array is None:
            return np.zeros((0, 5), np.int64)
        if array.dtype != np.int64 or array.ndim != 2 or array.shape[1] != 5:
            raise ValueError(f"rows is {array.dtype} {array.shape}")
        return array

    def take(self, name: str, dtype: type[np.generic], *shape: int) -> npt.NDArray[Any]:
        """Returns the next values; a copy, so that dropping rows frees memory."""
        array, first = self._arrays[f"{self._n}.{name}"], self._taken.get(name, 0)
        size = int(np.prod(shape, dtype=object))
        if array.dtype != dtype or array.ndim != 1 or first + size > len(array):
            raise ValueError(f"{name} is {array.dtype} {array.shape}")
        self._taken[name] = first + size
        return array[first : first + size].reshape(shape).copy()


def _state(described: Mapping[str, Any], part: _Part, learner: ContextualLearner) -> ContextualState:
    state = learner.init(str(described["model"]), _count(described["vocab_size"]))
    tokens, requests = _count(described["tokens"]), _count(described["requests"])
    sources = {source: _count(described["sources"][str(source)]) for source in TokenSource}
    weights = part.whole("weights", np.float64, (FOLDS,))
    if weights.min() < 0.0 or weights.sum() > tokens + 0.5:
        raise ValueError(f"weights {weights} of {tokens} tokens")
    folds = [replace(fold, clock=tokens) for fold in state.folds]
    if weights.any():
        cross = part.whole("cross", np.float32, (FOLDS, *state.folds[0].cross.shape)).astype(np.float64)
        target = part.whole("target", np.float32, (FOLDS, *state.folds[0].target.shape)).astype(np.float64)
        folds = [FoldSums(frozen(cross[f]), frozen(target[f]), float(weights[f]), tokens) for f in range(FOLDS)]
    recent, clock = [], 0
    for row in part.rows().tolist():
        recent.append(_row(row, part, learner))
        if not clock <= recent[-1].clock <= tokens:
            raise ValueError(f"a row's clock is {recent[-1].clock}, after {clock} of {tokens} tokens")
        clock = recent[-1].clock
    return replace(
        state,
        folds=tuple(folds),
        recent=tuple(recent),
        tokens=tokens,
        requests=requests,
        tokens_by_source=sources,
    )


def _row(row: Sequence[int], part: _Part, learner: ContextualLearner) -> TokenRows:
    fold, clock, tokens, holds, listed = row
    if not (0 <= fold < FOLDS and tokens >= 1 and 0 <= holds < 8 and -1 <= listed <= MAX_LISTED):
        raise ValueError(f"a row is {row}")
    features = part.take("features", np.float16, tokens, len(learner.anchors)) if holds & 1 else None
    hidden = part.take("hidden", np.float16, tokens, learner.weight.shape[1]) if holds & 2 else None
    for values in (features, hidden):
        if values is not None and not np.isfinite(values).all():
            raise ValueError("features or hidden states are not finite")
        if values is not None:
            values.flags.writeable = False
    if (listed >= 0) == (features is not None and hidden is not None) or (features is None and hidden is None):
        raise ValueError(f"a row is {row}")
    lists = _lists(tokens, listed, bool(holds & 4), part, len(learner.weight)) if listed >= 0 else None
    return TokenRows(fold, clock, tokens, features, hidden, lists)


def _lists(tokens: int, width: int, has_compressed: bool, part: _Part, vocab_size: int) -> ListedTokens:
    ids = part.take("ids", np.int32, tokens, width)
    reference = part.take("reference", np.float32, tokens, width).astype(np.float64)
    compressed = part.take("compressed", np.float32, tokens, width).astype(np.float64) if has_compressed else None
    likeliest = part.take("likeliest", np.int32, tokens)
    likeliest_at = part.take("likeliest_at", np.float32, tokens).astype(np.float64)
    known = ids >= 0
    for values in (reference[known], *([] if compressed is None else [compressed[known]]), likeliest_at):
        if not (values <= _MAX_LOGPROB).all():
            raise ValueError("a log-probability is above 0 or NaN")
    if ids.size and (ids.min() < -1 or ids.max() >= vocab_size):
        raise ValueError("an id is outside the vocabulary")
    if likeliest.min() < 0 or likeliest.max() >= vocab_size:
        raise ValueError("an id is outside the vocabulary")
    return ListedTokens(ids, reference, compressed, (likeliest, likeliest_at))


def _count(value: Any) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value < 1 << 62:
        raise ValueError(f"{value!r} is not a count")
    return value
