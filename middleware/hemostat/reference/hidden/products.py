"""The worker's part of scoring hidden states: products with the output embedding, and scores of the logits.

They are computed with torch if it is installed (and on its devices), else with numpy. In addition to the embedding (see
`head`), they take some arrays of CHUNK_ELEMENTS float32 (64 MiB each), less than 0.5 GiB, whatever the length of a
request.
"""

from __future__ import annotations

import dataclasses
import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from hemostat.checkpoints.output_embedding import EmbeddingError, floats
from hemostat.reference import device, worker_messages
from hemostat.reference.full_scores import ExactScores
from hemostat.reference.hidden import numpy_scores
from hemostat.reference.hidden.head import OutputHead, TorchHead, open_head
from hemostat.reference.protocol import FailureReason
from hemostat.reference.scoring import Codes, Comparisons, HeldFunctionals, RequestFailed, output_and_ids, scored
from hemostat_calibration.allowed_sets import AllowedSets
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
        self._functionals = HeldFunctionals(self._products.on_device)
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
        functionals, codes = self._functionals.of(request)
        output, ids = output_and_ids(request)
        try:
            states = np.frombuffer(request.states, "<u2").reshape(len(output), self._head.width)
            allowed = None if request.allowed is None else request.allowed.sets()
            comparison = None if self._comparisons is None else self._comparisons.of(request)
            see = None if comparison is None else comparison.see
            scores = self._products.scores(states, output, ids, functionals, codes, allowed, see)
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
        functionals: dict[str, Any],
        codes: Codes,
        allowed: AllowedSets | None,
        see: See | None = None,
    ) -> ExactScores:
        """Returns the scores of the states. see: never given, see `worker_messages.Loaded.compares`."""
        return numpy_scores.scores_of(
            lambda rows: self._head.logits(floats(states[rows])),
            self._head.vocab_size,
            output,
            ids,
            functionals,
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
        functionals: dict[str, Any],
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
                functionals,
                codes,
                allowed=allowed,
                see=see,
            )
