"""The worker's part of scoring hidden states: products with the output embedding, and scores of the logits.

They are computed with torch if it is installed (and on its devices), else with numpy. In addition to the embedding (see
`head`), they take some arrays of CHUNK_ELEMENTS float32 (64 MiB each), less than 0.5 GiB, whatever the length of a
request.
"""

from __future__ import annotations

import dataclasses
import importlib.util
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from hemostat.checkpoints.output_embedding import EmbeddingError, floats
from hemostat.reference import device, worker_messages
from hemostat.reference.full_scores import Basis, ExactScores, check_request, chunks
from hemostat.reference.hidden.head import OutputHead, Rows, TorchHead, open_head
from hemostat.reference.protocol import FailureReason
from hemostat.reference.scoring import Codes, Comparisons, HeldBases, RequestFailed, output_and_ids, scored
from hemostat_calibration.allowed_sets import AllowedSets
from hemostat_calibration.arrays import Ids
from hemostat_calibration.errors import InvalidArgumentError

See = Callable[[slice, Any], None]


class Head:
    """The loaded output head; the counterpart of `hemostat.reference.worker.Model`. It raises RequestFailed."""

    def __init__(
        self, load: worker_messages.LoadHead, tell: Callable[[device.Choice], None] = lambda choice: None
    ) -> None:
        """tell: called with the device, where it was chosen here."""
        try:
            self._head = open_head(Path(load.folder))
        except EmbeddingError as error:
            raise RequestFailed(FailureReason.HEAD, str(error)) from error
        self._torch = importlib.util.find_spec("torch") is not None
        choice = device.resolve(load.device, load.only, lambda: self._head.weight.nbytes) if self._torch else None
        if choice is not None:
            tell(choice)
        to = load.device if choice is None else choice.device
        self._products: NumpyProducts | TorchProducts
        self._comparisons: Comparisons | None = None
        if self._torch:
            self._products = TorchProducts(self._head, to, load.threads)
            # Of the compressed model's hidden states, with the same scale: its logits are W h, too.
            self._comparisons = Comparisons(self._products.output_embedding)
        elif load.device in {"cpu", device.AUTO}:
            self._products = NumpyProducts(self._head)
        else:
            raise RequestFailed(FailureReason.NOT_INSTALLED, f"reference.device: {load.device} needs torch")
        self._bases = HeldBases(self._products.on_device)
        problem = self._head.nonlinearity
        self.loaded = worker_messages.Loaded(
            digest="",
            dtype="torch" if self._torch else "numpy",
            vocab_size=self._head.vocab_size,
            max_positions=0,
            folder=load.folder,
            hidden_size=0 if problem else self._head.width,
            hidden_detail=problem,
            compares=self._torch and not problem,
            width=self._head.width,
        )

    def answer(self, request: worker_messages.Request) -> worker_messages.Answer:
        if not isinstance(request, worker_messages.Score):
            raise RequestFailed(FailureReason.PROTOCOL, "an output head only scores")
        bases, codes = self._bases.of(request)
        output, ids = output_and_ids(request)
        try:
            states = np.frombuffer(request.states, "<u2").reshape(len(output), self._head.width)
            allowed = None if request.allowed is None else request.allowed.sets()
            comparison = None if self._comparisons is None else self._comparisons.of(request)
            see = None if comparison is None else comparison.update
            scores = self._products.scores(states, output, ids, bases, codes, allowed, see)
        except (ValueError, InvalidArgumentError) as error:
            raise RequestFailed(FailureReason.VOCABULARY, str(error)) from error
        if request.hidden and self.loaded.hidden_size:
            # With the scale, so that the logits are W h.
            scores = dataclasses.replace(scores, hidden=floats(states) * np.float32(self._head.final.scale))
        return scored(request.id, scores, comparison)


class NumpyProducts:
    def __init__(self, head: OutputHead) -> None:
        self._head = head

    def on_device(self, values: npt.NDArray[Any]) -> npt.NDArray[Any]:
        return values

    def scores(
        self,
        states: npt.NDArray[np.uint16],
        output: npt.NDArray[np.int32],
        ids: npt.NDArray[np.int32],
        bases: dict[str, Basis],
        codes: Codes,
        allowed: AllowedSets | None,
        see: See | None = None,
    ) -> ExactScores:
        """Returns the scores of the states. see: never given, see `worker_messages.Loaded.compares`."""
        return numpy_scores(
            lambda rows: self._head.logits(floats(states[rows])),
            self._head.vocab_size,
            output,
            ids,
            bases,
            codes,
            allowed=allowed,
        )


class TorchProducts:
    def __init__(self, head: OutputHead, to: str, threads: int) -> None:
        import torch  # noqa: PLC0415  slow to import, and an extra

        torch.set_num_threads(threads)
        self._torch = torch
        self._head = TorchHead(head, to)

    def output_embedding(self) -> Any:
        return self._head.weight

    def on_device(self, values: npt.NDArray[Any]) -> Any:
        return self._torch.tensor(values).to(self._head.device)

    def scores(
        self,
        states: npt.NDArray[np.uint16],
        output: npt.NDArray[np.int32],
        ids: npt.NDArray[np.int32],
        bases: dict[str, Basis],
        codes: Codes,
        allowed: AllowedSets | None,
        see: See | None = None,
    ) -> ExactScores:
        """Returns the scores of the states. see: see `exact.score`."""
        from hemostat.reference import exact  # noqa: PLC0415

        with self._torch.inference_mode():
            return exact.scores_of(
                lambda rows: self._head.logits(self._head.states(floats(states[rows]))),
                self._head.head.vocab_size,
                output,
                ids,
                bases,
                codes,
                allowed=allowed,
                see=see,
            )


def numpy_scores(
    logits: Callable[[slice], Rows],
    vocab_size: int,
    output: Ids,
    ids: Ids,
    bases: Mapping[str, Basis],
    codes: Mapping[str, Rows],
    *,
    allowed: AllowedSets | None = None,
) -> ExactScores:
    """Returns what `hemostat.reference.exact.scores_of` returns. logits: returns float32 [n, V] of these positions,
    which may be written to.

    >>> z = np.log(np.array([[1, 2, 5]], np.float32))
    >>> output, ids = np.array([1], np.int32), np.array([[2, -1]], np.int32)
    >>> scores = numpy_scores(lambda rows: z[rows].copy(), 3, output, ids, {}, {})
    >>> scores.emitted.round(3).tolist(), scores.at.round(3).tolist(), scores.top_ids.tolist()
    ([-1.386], [[-0.47, nan]], [[2, 1]])
    >>> scores.entropy.round(3).tolist()
    [0.9]
    """
    tokens, width = ids.shape
    check_request(vocab_size, output, ids, bases, codes, allowed)
    top = min(width, vocab_size)
    scores = ExactScores.empty(tokens, width, bases)
    ups = {name: basis.up.astype(np.float32).T for name, basis in bases.items()}
    for rows in chunks(tokens, vocab_size):
        logprobs = logits(rows)
        if allowed is not None:
            logprobs[~allowed.mask(rows)] = -np.inf
        logprobs -= logprobs.max(axis=1, keepdims=True)
        probabilities = np.exp(logprobs)
        total = probabilities.sum(axis=1, keepdims=True, dtype=np.float64).astype(np.float32)
        logprobs -= np.log(total)
        probabilities /= total
        given = np.take_along_axis(logprobs, np.maximum(ids[rows], 0), 1).astype(np.float64)
        scores.at[rows] = np.where(ids[rows] < 0, np.nan, given)
        scores.emitted[rows] = np.take_along_axis(logprobs, output[rows, None], 1)[:, 0]
        best = np.argpartition(logprobs, vocab_size - top, axis=1)[:, vocab_size - top :]
        values = np.take_along_axis(logprobs, best, 1)
        order = np.argsort(-values, axis=1, kind="stable")
        best, values = np.take_along_axis(best, order, 1), np.take_along_axis(values, order, 1)
        scores.top_ids[rows, :top] = np.where(np.isneginf(values), -1, best)
        scores.top_logprobs[rows, :top] = values
        for name, basis in bases.items():
            shift = np.clip(codes[name][rows] @ ups[name], -basis.clamp, basis.clamp)
            scores.expected[name][rows] = np.einsum("tv,tv->t", probabilities, shift)
        # p log p is 0 where p is 0, also where log p is -inf.
        np.multiply(probabilities, logprobs, out=logprobs, where=probabilities > 0)
        logprobs[probabilities == 0] = 0.0
        scores.entropy[rows] = -logprobs.sum(axis=1)
    return scores
