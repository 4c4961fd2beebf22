"""Compares two models by their log-probabilities, by the code that computes the figures live."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from hemostat.interface.reports import Report
from hemostat.measurement.figures import StageFigures
from hemostat_calibration.arrays import Floats, Ids
from hemostat_calibration.divergence.per_token import divergence
from hemostat_calibration.errors import InvalidArgumentError
from hemostat_calibration.record_checks import validate
from hemostat_calibration.records import Candidates, TokenRecord

MAX_ERROR = 1e-2
"""The largest difference of a row's sum of probabilities from 1: models compute in float16 or more."""


def compare(
    reference_logprobs: npt.ArrayLike | Sequence[npt.ArrayLike],
    compressed_logprobs: npt.ArrayLike | Sequence[npt.ArrayLike],
    *,
    output_ids: npt.ArrayLike | Sequence[npt.ArrayLike] | None = None,
    clients: Sequence[str] | None = None,
) -> Report:
    """Returns the divergence of a compressed model from its reference, both over the whole vocabulary.

    reference_logprobs, compressed_logprobs: natural logarithms of the probabilities of all V ids, at the same
        positions after the same tokens: one array [T, V] for each request, or one array for a single request.
    output_ids: the tokens that followed, int [T] for each request; without them, those that the compressed model finds
        likeliest. Only the figures of emitted tokens depend on them.
    clients: the client of each request, so that the interval knows what depends on each other.

    Raises InvalidArgumentError, which names the argument.

    >>> import numpy as np
    >>> reference = np.log([[0.5, 0.4, 0.1], [0.6, 0.3, 0.1]])
    >>> compressed = np.log([[0.7, 0.2, 0.1], [0.6, 0.3, 0.1]])
    >>> report = compare(reference, compressed)
    >>> round(report["kl_nats"].mean, 4), report["top1_agreement"].mean
    (0.0545, 1.0)
    """
    references, compresseds = _requests(reference_logprobs), _requests(compressed_logprobs)
    if len(references) != len(compresseds):
        raise InvalidArgumentError(
            f"compressed_logprobs has {len(compresseds)} requests, reference_logprobs {len(references)}: give as many"
        )
    outputs: list[npt.ArrayLike | None] = [None] * len(references)
    if output_ids is not None:
        outputs = [*output_ids] if _is_list(reference_logprobs) else [output_ids]  # type: ignore[misc, list-item]
    for name, given in (("output_ids", outputs), ("clients", clients)):
        if given is not None and len(given) != len(references):
            raise InvalidArgumentError(f"{name} has {len(given)} entries, and there are {len(references)} requests")
    figures = StageFigures()
    for number, (reference, compressed, output) in enumerate(zip(references, compresseds, outputs, strict=True)):
        record = _record(_checked(reference, "reference_logprobs"), _checked(compressed, "compressed_logprobs"), output)
        figures.update(divergence(record), b"" if clients is None else clients[number].encode())
    return Report(
        {
            "report": "hemostat compare",
            "captures": len(references),
            "scored": len(references),
            "not_scored": {},
            "tokens": figures.tokens,
            "raw": figures.summary(),
            "by_kind": [],
        }
    )


def _is_list(given: object) -> bool:
    """Returns True if it is a sequence of arrays, one for each request."""
    if isinstance(given, np.ndarray):
        return given.ndim == 3
    return isinstance(given, Sequence) and bool(given) and np.ndim(given[0]) == 2


def _requests(given: npt.ArrayLike | Sequence[npt.ArrayLike]) -> list[npt.ArrayLike]:
    return [*given] if _is_list(given) else [given]  # type: ignore[misc, list-item]


def _checked(given: npt.ArrayLike, name: str) -> Floats:
    try:
        logprobs = np.asarray(given, np.float64)
    except (TypeError, ValueError):
        raise InvalidArgumentError(f"{name}: give numbers, an array [T, V] for each request") from None
    if logprobs.ndim != 2 or not len(logprobs) or logprobs.shape[1] < 2:
        raise InvalidArgumentError(f"{name} has the shape {list(logprobs.shape)}: give [T, V] for each request")
    with np.errstate(over="ignore"):
        sums = np.exp(logprobs).sum(axis=1)
    if not (np.abs(sums - 1.0) <= MAX_ERROR).all():
        worst = int(np.nanargmax(np.abs(sums - 1.0))) if not np.isnan(sums).all() else 0
        raise InvalidArgumentError(
            f"{name}: the probabilities of position {worst} add up to {sums[worst]:.4g}, and not to 1: give "
            "log-probabilities over the whole vocabulary, such as log_softmax of the logits"
        )
    normalized: Floats = np.minimum(logprobs - np.log(sums)[:, None], 0.0)
    return normalized


def _record(reference: Floats, compressed: Floats, output: npt.ArrayLike | None) -> TokenRecord:
    if reference.shape != compressed.shape:
        raise InvalidArgumentError(
            f"reference_logprobs has the shape {list(reference.shape)}, compressed_logprobs {list(compressed.shape)}: "
            "give the same positions and the same vocabulary"
        )
    tokens, vocabulary = compressed.shape
    ids = np.argsort(-compressed, axis=1, kind="stable").astype(np.int32)
    output_ids: Ids = ids[:, 0] if output is None else np.asarray(output, np.int32)
    if output_ids.shape != (tokens,) or output_ids.min() < 0 or output_ids.max() >= vocabulary:
        raise InvalidArgumentError(f"output_ids: give {tokens} ids below {vocabulary} for this request")
    likeliest = np.argsort(-reference, axis=1, kind="stable").astype(np.int32)
    with np.errstate(invalid="ignore"):
        entropy = -np.where(reference > -np.inf, np.exp(reference) * reference, 0.0).sum(axis=1)
    at = output_ids[:, None]
    return validate(
        TokenRecord(
            vocab_size=vocabulary,
            prompt_key=b"",
            output_ids=output_ids,
            compressed=Candidates(ids, np.take_along_axis(compressed, ids, 1)),
            reference_at=np.take_along_axis(reference, ids, 1),
            reference=Candidates(likeliest, np.take_along_axis(reference, likeliest, 1)),
            compressed_emitted=np.take_along_axis(compressed, at, 1)[:, 0],
            reference_emitted=np.take_along_axis(reference, at, 1)[:, 0],
            reference_entropy=entropy,
        )
    )
