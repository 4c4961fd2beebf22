"""The examples that fitters learn from: hidden states of both models (`HiddenExamples`), or lists of ids
(`ListExamples`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from hemostat_calibration.arrays import Floats, Halves, Ids, Indices, Singles
from hemostat_calibration.learning.contextual import hidden_states, regression
from hemostat_calibration.learning.contextual.basis import Basis, evenly_spread, hidden_sample, make_basis
from hemostat_calibration.learning.contextual.fold_sums import Forgetting, inputs_of
from hemostat_calibration.learning.contextual.maps import LinearMap
from hemostat_calibration.learning.contextual.objective import Lists
from hemostat_calibration.learning.contextual.regression import Moments
from hemostat_calibration.learning.contextual.rows import FOLDS, TokenRows, batched, folds_and_prompts

MAX_HELD_OUT = 1024
"""The largest number of held-out tokens on which maps are compared by KL over the whole vocabulary."""
_BATCH = 4096
"""The number of tokens converted at a time."""


@dataclass(frozen=True, slots=True, eq=False)
class HiddenRows:
    """The rows of n tokens, float16 [n, ...]: inputs x of the map in the basis, h_c, and h_r − h_c."""

    inputs: Halves
    compressed: Halves
    target: Halves


class HiddenExamples:
    """Tokens with features and the reference's hidden state.

    basis: see `basis.Basis`.
    moments: of every fold, of all that was learned, in the basis.
    rows: recent tokens, all with features and hidden states; may be empty.
    """

    def __init__(self, basis: Basis, moments: Sequence[Moments], rows: Sequence[TokenRows]) -> None:
        self.basis = basis
        self.moments = moments
        self.rows = rows
        self.fold, self.prompt = folds_and_prompts(rows)
        self._held_out_rows: HiddenRows | None = None

    @property
    def held_out_fold(self) -> int:
        """The fold with the most tokens."""
        return largest_fold(self.fold)

    @property
    def held_out(self) -> Indices:
        """The tokens of the held-out fold that maps are judged on, ascending."""
        return evenly_spread(np.flatnonzero(self.fold == self.held_out_fold), MAX_HELD_OUT)

    @property
    def held_out_rows(self) -> HiddenRows:
        """The rows of the `held_out` tokens; they are gathered once, for all fitters."""
        if self._held_out_rows is None:
            self._held_out_rows = self.gather(self.held_out)
        return self._held_out_rows

    def gather(self, chosen: Indices) -> HiddenRows:
        """Returns the rows of the chosen tokens, which are in ascending order."""
        basis = self.basis
        features, width = basis.reads.shape[1] - 1, len(basis.root)
        x, c, t = (np.empty((len(chosen), size), np.float16) for size in (len(basis.reads) - 1, width, width))
        by_z, constant, by_h = (a.astype(np.float32) for a in (basis.gain.T, basis.offset, basis.root))
        by_x = basis.reads[:-1].T.astype(np.float32)
        first = at = 0
        for part in batched(self.rows, _BATCH):
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
            x[into] = inputs_of(z, features) @ by_x
            c[into], t[into] = compressed, h @ by_h - compressed
        return HiddenRows(x, c, t)

    def code_moment(self, map_: LinearMap) -> Floats:
        """Returns E[y yᵀ] of the map's code y, [r, r]: on held-out tokens, or, without rows, on the sums."""
        if self.rows:
            return code_moment_of(map_, self.held_out_rows.inputs.astype(np.float32))
        whole = regression.total(self.moments)
        read = np.column_stack([map_.linear, map_.offset]).astype(np.float64)
        moment: Floats = read @ whole.xx @ read.T / whole.weight
        return moment


@dataclass(frozen=True, slots=True, eq=False)
class ListExamples:
    """Tokens where either model is known by a list of ids only.

    inputs: float32 [n, min(A, d) + 1], of the map in the basis, the last one 1. lists: both models at the listed ids.
    weight: float64 [n]. fold, prompt: int [n].
    """

    basis: Basis
    inputs: Singles
    lists: Lists
    weight: Floats
    fold: npt.NDArray[np.int64]
    prompt: npt.NDArray[np.int64]

    @property
    def held_out_fold(self) -> int:
        """The fold with the most tokens."""
        return largest_fold(self.fold)

    @property
    def held_out(self) -> Indices:
        """The tokens of the held-out fold that maps are judged on, ascending."""
        return evenly_spread(np.flatnonzero(self.fold == self.held_out_fold), MAX_HELD_OUT)

    def code_moment(self, map_: LinearMap) -> Floats:
        """Returns E[y yᵀ] of the map's code y on held-out tokens, [r, r]."""
        return code_moment_of(map_, self.inputs[self.held_out][:, :-1])


def list_examples(
    rows: Sequence[TokenRows],
    recent: Sequence[TokenRows],
    *,
    weight: Singles,
    anchors: Ids,
    features: int,
    noise_nats: float,
    forgetting: Forgetting,
    clock: int,
) -> ListExamples:
    """Returns the examples of the rows that have lists. recent: rows whose hidden states, if any, the basis is made
    from.

    weight: W, [V, d]. anchors: [N]. features: how many of them a map reads. clock: tokens seen so far.
    """
    embedded = weight[anchors]
    sample = hidden_sample(recent, weight.shape[1])
    if sample is None:
        prior = hidden_states.isotropic_prior(weight, noise_nats)
    else:
        prior = hidden_states.estimate_prior(sample, noise_nats)
    offset, gain = (a.astype(np.float32) for a in hidden_states.linear_recovery(embedded, prior))
    embedded = embedded - embedded.mean(axis=0)
    anchored = [r.features if r.hidden is None else r.hidden @ embedded.T for r in rows]
    z = np.concatenate([f for f in anchored if f is not None]).astype(np.float32)
    h = z @ gain.T + offset
    basis = make_basis(weight, anchors, features, h if sample is None else sample, prior)
    fold, prompt = folds_and_prompts(rows)
    return ListExamples(
        basis=basis,
        inputs=inputs_of(z, features) @ basis.reads.T.astype(np.float32),
        lists=_lists(basis.embedding, rows, h @ basis.root.astype(np.float32)),
        weight=np.concatenate([np.full(r.tokens, forgetting.weight(clock - r.clock)) for r in rows]),
        fold=fold,
        prompt=prompt,
    )


def largest_fold(fold: npt.NDArray[np.int64]) -> int:
    """Returns the fold with the most tokens, of the folds of all tokens, [n].

    >>> largest_fold(np.array([0, 2, 2, 1]))
    2
    """
    return int(np.argmax(np.bincount(fold, minlength=FOLDS)))


def code_moment_of(map_: LinearMap, inputs: Singles) -> Floats:
    """Returns E[y yᵀ] of the map's code y over rows of inputs [n, A], [r, r].

    >>> map_ = LinearMap(np.eye(2), np.zeros(2), np.eye(2))
    >>> code_moment_of(map_, np.array([[1.0, 0.0], [1.0, 2.0]], np.float32)).tolist()
    [[1.0, 1.0], [1.0, 2.0]]
    """
    y = map_.code(inputs).astype(np.float64)
    moment: Floats = y.T @ y / len(y)
    return moment


def _lists(embedding: Singles, rows: Sequence[TokenRows], c: Singles) -> Lists:
    """Returns the lists of tokens. c: the compressed model's hidden states in the basis, [n, d]."""
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
            # Logits follow from c; the constant that makes them log-probabilities, from the likeliest candidate.
            first, logprob = listed.likeliest
            constant = logprob - (embedding[first] * c[part]).sum(axis=1)
            logprobs = np.einsum("tkd,td->tk", embedding[ids[part, :width]], c[part]) + constant[:, None]
        else:
            logprobs = listed.compressed
        log_c[part, :width] = np.where(given, logprobs, -np.inf)
    return Lists(embedding, ids, r, log_c)
