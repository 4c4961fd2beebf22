"""The ids that a grammar allows at each row of a step: vLLM's own bitmask, taken where its model runner applies it.

Only this module knows where that is. A runner masks the logits just before it samples from them, so that what is noted
here is of the step whose logits the processor is called with next. vLLM holds the mask in the host's memory: nothing
waits for the device.
"""

from __future__ import annotations

import functools
import importlib
import inspect
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from hemostat_engine.retries import first_line

log = logging.getLogger("hemostat.engine")

FREE, UNKNOWN = -1, -2
"""These stand in place of a row's mask. FREE: no grammar restricts the row. UNKNOWN: one may, and what it allows is not
known."""

_WRAPPED = "_hemostat_wrapped"
"""The attribute of our wrapper that holds vLLM's function."""


@dataclass(frozen=True, slots=True)
class Masks:
    """The masks of R rows.

    index: the place of each row's mask in `words`, FREE or UNKNOWN. words: int32 [M, ceil(V / 32)]; bit i % 32 of word
    i // 32 is 1 if id i is allowed; None: there is none.
    """

    index: Sequence[int]
    words: npt.NDArray[np.int32] | None = None


@dataclass(frozen=True, slots=True)
class Step:
    """The masks of vLLM in one step.

    requests: the requests of the batch. restricted: the requests with a mask. bitmask: int32 [M, words], the masks of
    the restricted requests in this order. rows: the number of rows of the logits.
    """

    requests: Sequence[str]
    restricted: Sequence[str]
    bitmask: npt.NDArray[np.int32]
    rows: int

    @property
    def plain(self) -> bool:
        """It is True if there is a row for each request, and one mask for each restricted one. Under speculative
        decoding a request has several, of which most are not sampled from.
        """
        return self.rows == len(self.requests) and len(self.bitmask) == len(self.restricted)


def _v1(given: Mapping[str, Any]) -> Step:
    output = given["grammar_output"]
    return Step(
        given["input_batch"].req_ids,
        output.structured_output_request_ids,
        output.grammar_bitmask,
        len(given["logits"]),
    )


def _v2(given: Mapping[str, Any]) -> Step:
    return Step(given["input_batch"].req_ids, given["grammar_req_ids"], given["grammar_bitmask"], len(given["logits"]))


@dataclass(frozen=True, slots=True)
class _Place:
    """A function of vLLM's that masks logits. read: what its arguments, by name, say."""

    module: str
    owner: str | None
    parameters: tuple[str, ...]
    read: Callable[[Mapping[str, Any]], Step]
    name: str = "apply_grammar_bitmask"


_PLACES = {
    "v1": _Place(
        "vllm.v1.worker.gpu_model_runner", None, ("scheduler_output", "grammar_output", "input_batch", "logits"), _v1
    ),
    "v2": _Place(
        "vllm.v1.worker.gpu.structured_outputs",
        "StructuredOutputsWorker",
        ("self", "logits", "input_batch", "grammar_req_ids", "grammar_bitmask"),
        _v2,
    ),
}
"""The place where vLLM applies the mask, by model runner."""


class GrammarMasks:
    """Owns what vLLM masks in the current step. All on the engine's thread."""

    def __init__(self, *, watched: bool = False) -> None:
        """watched: `note` is called whenever something is masked."""
        self._watched = watched
        self._step: Step | None = None
        self._failed = False
        """It is True if a failure was met in this step."""
        self._has_failed = False

    def watch(self, runner: str) -> bool:
        """Notes from now on what this model runner masks, in place of whoever did before. Returns False, and logs it,
        if this vLLM does so in another way."""
        self._watched, reason = False, "it masks logits in another way"
        try:
            self._watched = self._wrap(_PLACES[runner])
        except Exception as error:  # noqa: BLE001 - vLLM must start whatever happens here
            reason = f"{type(error).__name__}: {first_line(str(error))}"
        if not self._watched:
            log.warning("which ids grammars allow is not known with this vLLM: %s", reason)
        return self._watched

    def _wrap(self, place: _Place) -> bool:
        holder: Any = importlib.import_module(place.module)  # the runner has imported it
        if place.owner is not None:
            holder = getattr(holder, place.owner)
        result = getattr(holder, place.name)
        apply = getattr(result, _WRAPPED, result)
        if tuple(inspect.signature(apply).parameters) != place.parameters:
            return False

        @functools.wraps(apply)
        def wrapped(*arguments: Any, **named: Any) -> Any:
            self.update(lambda: place.read(dict(zip(place.parameters, arguments, strict=False)) | named))
            return apply(*arguments, **named)

        setattr(wrapped, _WRAPPED, apply)
        setattr(holder, place.name, wrapped)
        return True

    def begin(self) -> None:
        """Begins a step: nothing is masked yet."""
        self._step, self._failed = None, False

    def update(self, read: Callable[[], Step]) -> None:
        """Notes the masks before vLLM masks logits. It never raises."""
        try:
            self._step = read()
        except Exception as error:  # noqa: BLE001 - vLLM goes on
            self._failed = True
            if not self._has_failed:
                log.error("what a grammar allows cannot be read: %s: %s", type(error).__name__, first_line(str(error)))
            self._has_failed = True

    def of(self, rows: Sequence[int], has_room: Callable[[int], bool]) -> Masks:
        """Returns copies of the masks of these rows of the batch. has_room: whether so many bytes may be kept."""
        step = self._step
        if self._failed or not self._watched:
            return Masks([UNKNOWN] * len(rows))
        if step is None:
            return Masks([FREE] * len(rows))
        places = {request: place for place, request in enumerate(step.restricted)}
        result = [places.get(step.requests[row], FREE) for row in rows]
        chosen = [place for place in result if place != FREE]
        if not chosen:
            return Masks(result)
        if not step.plain or not has_room(len(chosen) * step.bitmask[0].nbytes):
            return Masks([FREE if place == FREE else UNKNOWN for place in result])
        copied = iter(range(len(chosen)))
        return Masks([FREE if place == FREE else next(copied) for place in result], step.bitmask[chosen])


masks = GrammarMasks()
"""The masks of this process, as vLLM's runner belongs to it."""
