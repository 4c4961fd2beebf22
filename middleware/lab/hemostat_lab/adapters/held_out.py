"""The part of the loss that an adapter recovers on texts that it was not made from, layer by layer: exact, at full
vocabulary."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from hemostat.checkpoints.texts import Text
from hemostat_calibration.adapters.factors import LowRank
from hemostat_calibration.records import ExactDistances
from hemostat_lab.adapters.distances import exact_distances
from hemostat_lab.adapters.pair import CheckpointPair
from hemostat_lab.models.activations import Batch, Calls, embed, logits, make_batches, run_layer
from hemostat_lab.models.copies import factor_tensors
from hemostat_lab.models.parts import Parts
from hemostat_lab.models.skeleton import EXACT, WeightSource, set_factors

HELD_OUT = "held-out texts"
RESAMPLES = 2000
"""The number of resamples of the bootstrap over prompts."""
INTERVAL = (2.5, 97.5)
"""Percentiles."""
_STREAMS = ("reference", "compressed", "adapted")


@dataclass(frozen=True, slots=True)
class Judged:
    """Distances from the reference at the outputs' tokens of held-out texts.

    units: int [tokens], the prompt that each belongs to, from 0.
    """

    units: npt.NDArray[np.int64]
    before: ExactDistances
    after: ExactDistances

    def summary(self, seed: int = 0) -> dict[str, Any]:
        """Means, and the recovered part of KL(reference‖compressed), with a 95 % interval by prompt (percentiles
        of a bootstrap over prompts; of one prompt there is none)."""
        prompts = int(self.units.max()) + 1 if len(self.units) else 0
        before, after = (np.bincount(self.units, weights=d.kl, minlength=prompts) for d in (self.before, self.after))
        low: float | None = None
        high: float | None = None
        if prompts > 1 and before.sum() > 0.0:
            drawn = np.random.default_rng(seed).multinomial(prompts, np.full(prompts, 1 / prompts), RESAMPLES)
            shares = 1.0 - (drawn @ after) / np.maximum(drawn @ before, np.finfo(np.float64).tiny)
            low, high = (float(value) for value in np.percentile(shares, INTERVAL))
        return {
            "tokens": len(self.units),
            "prompts": prompts,
            "kl_before": _mean(self.before.kl),
            "kl_after": _mean(self.after.kl),
            "share": float(1.0 - after.sum() / before.sum()) if before.sum() > 0.0 else None,
            "share_low": low,
            "share_high": high,
            "tv_before": _mean(self.before.tv),
            "tv_after": _mean(self.after.tv),
            "top1_before": _mean(self.before.top1),
            "top1_after": _mean(self.after.top1),
        }


def judge(
    pair: CheckpointPair,
    layers: Mapping[str, LowRank],
    texts: Sequence[Text],
    parts: Parts,
    progress: Callable[[str, int, int], None],
) -> Judged:
    """The compressed model with and without the adapter `layers`, against the reference. Each text needs a prompt.

    Only the weights of one decoder layer of one model are in memory at a time. Finished layers are kept in `parts`.
    """
    skeleton = pair.skeleton
    batches = make_batches([text.ids for text in texts], skeleton.device)
    factors = factor_tensors(layers, skeleton.linears, torch.device("cpu"), skeleton.dtype)
    sources = dict(zip(_STREAMS, (*pair.sources, pair.sources[1]), strict=True))
    count = len(skeleton.layers)
    start, hidden = _stored(parts, count, len(batches))
    # The arguments of the layers depend on the texts' lengths only.
    first, calls = embed(skeleton, sources["reference"], batches)
    if hidden is None:
        other, _ = embed(skeleton, sources["compressed"], batches)
        hidden = {"reference": first, "compressed": other, "adapted": list(other)}
    for n, layer in list(enumerate(skeleton.layers))[start:]:
        linears = skeleton.linears_of(layer)
        for source, streams in ((sources["reference"], _STREAMS[:1]), (sources["compressed"], _STREAMS[1:])):
            with skeleton.loaded(skeleton.parameters_of(layer), source):
                for stream in streams:
                    own = {name: _to(pair, factors[name]) for name in linears if name in factors}
                    set_factors(linears, own if stream == "adapted" else {})
                    _round_inputs(pair, linears, stream != "reference")
                    hidden[stream] = _through(pair, n, batches, hidden[stream], calls)
                    set_factors(linears, {})
                    _round_inputs(pair, linears, False)
        parts.put(_part(n + 1), {f"{s}|{b}": states for s in _STREAMS for b, states in enumerate(hidden[s])})
        parts.drop(_part(n))
        progress(HELD_OUT, n + 1, count + 1)
    distances = _compare(pair, texts, batches, hidden, sources)
    parts.drop(_part(count))
    progress(HELD_OUT, count + 1, count + 1)
    return distances


def _to(pair: CheckpointPair, factors: tuple[torch.Tensor, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    a, b = (tensor.to(pair.skeleton.device) for tensor in factors)
    return a, b


def _round_inputs(pair: CheckpointPair, linears: Mapping[str, Any], of_compressed: bool) -> None:
    for name, module in linears.items():
        module.inputs = pair.compressed.inputs(name) if of_compressed else EXACT


def _through(
    pair: CheckpointPair, n: int, batches: Sequence[Batch], hidden: Sequence[torch.Tensor], calls: Sequence[Calls]
) -> list[torch.Tensor]:
    with torch.no_grad():
        return [
            run_layer(pair.skeleton, n, states.to(pair.skeleton.device), call).cpu()
            for _, states, call in zip(batches, hidden, calls, strict=True)
        ]


def _compare(
    pair: CheckpointPair,
    texts: Sequence[Text],
    batches: Sequence[Batch],
    hidden: Mapping[str, Sequence[torch.Tensor]],
    sources: Mapping[str, WeightSource],
) -> Judged:
    """At the positions that predict an output's token, in the order of the texts."""
    skeleton = pair.skeleton
    distances: dict[tuple[int, str], list[ExactDistances]] = {}

    def ends(stream: str) -> AbstractContextManager[None]:
        return nullcontext() if pair.same_ends else skeleton.loaded(skeleton.ends(), sources[stream])

    with torch.no_grad(), ExitStack() as stack:
        if pair.same_ends:
            stack.enter_context(skeleton.loaded(skeleton.ends(), sources["reference"]))
        for number, batch in enumerate(batches):
            wanted = torch.zeros_like(batch.valid)
            for row, text in enumerate(batch.texts):
                wanted[row, len(texts[text].prompt) - 1 : len(texts[text]) - 1] = True
            own = {stream: hidden[stream][number].to(skeleton.device) for stream in _STREAMS}
            with ends("reference"):
                ours = [part.cpu() for part, _ in logits(skeleton, batch, own["reference"], wanted)]
            with ends("compressed"):
                theirs = (logits(skeleton, batch, own[stream], wanted) for stream in _STREAMS[1:])
                for r, (c, where), (a, _) in zip(ours, *theirs, strict=True):
                    text = batch.texts[int(where[0]) // batch.ids.shape[1]]
                    distances.setdefault((text, "before"), []).append(exact_distances(r.to(c.device), c))
                    distances.setdefault((text, "after"), []).append(exact_distances(r.to(a.device), a))
    keys = {key: n for n, key in enumerate(dict.fromkeys(text.key for text in texts))}
    units = [np.full(len(text.output), keys[text.key], np.int64) for text in texts]
    order = range(len(texts))
    return Judged(
        np.concatenate(units),
        _joined([part for n in order for part in distances.get((n, "before"), [])]),
        _joined([part for n in order for part in distances.get((n, "after"), [])]),
    )


def _stored(parts: Parts, count: int, batches: int) -> tuple[int, dict[str, list[torch.Tensor]] | None]:
    """The number of finished layers, and the hidden states after them; None where none is finished."""
    for n in range(count, 0, -1):
        kept = parts.get(_part(n))
        if kept is not None and len(kept) == len(_STREAMS) * batches:
            return n, {s: [kept[f"{s}|{b}"] for b in range(batches)] for s in _STREAMS}
    return 0, None


def _joined(distances: Sequence[ExactDistances]) -> ExactDistances:
    return ExactDistances(
        np.concatenate([d.kl for d in distances]),
        np.concatenate([d.tv for d in distances]),
        np.concatenate([d.top1 for d in distances]),
    )


def _part(n: int) -> str:
    return f"held-out-{n:04d}"


def _mean(values: npt.NDArray[Any]) -> float | None:
    return float(values.mean()) if len(values) else None
