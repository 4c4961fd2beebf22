"""The parts that the two kinds of workers share: what they hold between requests, and scores as messages."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import astuple
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from hemostat.reference import worker_messages
from hemostat.reference.full_scores import Basis, ExactScores
from hemostat.reference.protocol import FailureReason

if TYPE_CHECKING:
    import torch

    from hemostat.reference.recovered import Comparison, CompressedSide

Codes = dict[str, npt.NDArray[np.float32]]


class RequestFailed(Exception):
    """Becomes a `Failed` answer; the worker takes the next request."""

    def __init__(self, reason: FailureReason, message: str) -> None:
        super().__init__(message)
        self.reason = reason


class HeldBases:
    """Owns the bases whose expectations are asked for: sent once, held as long as they are wanted.

    on_device: puts an array where the logits are computed.
    """

    def __init__(self, on_device: Callable[[npt.NDArray[Any]], Any]) -> None:
        self._on_device = on_device
        self._held: dict[str, Basis] = {}

    def of(self, request: worker_messages.Score) -> tuple[dict[str, Basis], Codes]:
        """Returns the request's bases, and its codes by name. What is held does not change where it is
        `reshaped`."""
        if request.reshaped:
            return {}, {}
        for name, basis in request.bases.items():
            up = np.frombuffer(basis.up, "<f2").reshape(-1, basis.rank)
            self._held[name] = Basis(self._on_device(up), basis.clamp)
        self._held = {name: self._held[name] for name in request.wanted}
        tokens = len(request.output) // 4
        return self._held, {name: np.frombuffer(c, "<f4").reshape(tokens, -1) for name, c in request.codes.items()}


def output_and_ids(request: worker_messages.Score) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.int32]]:
    """Returns the output, int32 [T], and the ids, int32 [T, width], of a request."""
    output = np.frombuffer(request.output, "<i4")
    return output, np.frombuffer(request.ids, "<i4").reshape(len(output), request.width)


class Comparisons:
    """Owns what is computed once for a set of anchors, of the last one: comparisons with the compressed model's
    recovered distribution."""

    def __init__(self, weight: Callable[[], torch.Tensor]) -> None:
        """weight: the output embedding, [V, d], of logits that are W h."""
        self._weight = weight
        self._last: tuple[bytes, CompressedSide] | None = None

    def of(self, request: worker_messages.Score) -> Comparison | None:
        """Returns the comparison of a request; None if none is requested. Raises ValueError if the request's arrays do
        not fit each other."""
        from hemostat.reference.recovered import CompressedSide  # noqa: PLC0415  imports torch

        if (given := request.compressed) is None:
            return None
        if self._last is None or self._last[0] != given.anchors:
            self._last = (given.anchors, CompressedSide(self._weight(), np.frombuffer(given.anchors, "<i4")))
        _, ids = output_and_ids(request)
        features = np.frombuffer(given.features, "<f4").reshape(len(ids), -1)
        return self._last[1].of(features, ids, np.frombuffer(given.logprobs, "<f8").reshape(ids.shape))


def scored(number: int, scores: ExactScores, comparison: Comparison | None = None) -> worker_messages.Scored:
    return worker_messages.Scored(
        id=number,
        at=scores.at.astype("<f8").tobytes(),
        top_ids=scores.top_ids.astype("<i4").tobytes(),
        top_logprobs=scores.top_logprobs.astype("<f8").tobytes(),
        emitted=scores.emitted.astype("<f8").tobytes(),
        entropy=scores.entropy.astype("<f8").tobytes(),
        expected={name: values.astype("<f8").tobytes() for name, values in scores.expected.items()},
        hidden=b"" if scores.hidden is None else scores.hidden.astype("<f4").tobytes(),
        recovered=b"" if comparison is None else np.stack(astuple(comparison.result())).astype("<f8").tobytes(),
    )
