"""An adapter from two checkpoints and texts, and the report on it."""

from __future__ import annotations

import resource
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch

from hemostat.checkpoints.errors import AdaptError
from hemostat.checkpoints.texts import Text
from hemostat_calibration.adapters.correction import low_rank
from hemostat_calibration.adapters.factors import LowRank
from hemostat_calibration.adapters.gram import DiagonalGram, FullGram, Gram
from hemostat_calibration.allocation.knapsack import share_ranks
from hemostat_calibration.profiles.adapter import adapter_bytes, adapter_layers, adapter_profile, max_rank
from hemostat_calibration.profiles.profile import CalibrationProfile
from hemostat_lab.adapters.held_out import Judged, judge
from hemostat_lab.adapters.pair import CheckpointPair, LayerScales
from hemostat_lab.models.activations import Moments
from hemostat_lab.models.parts import Parts
from hemostat_lab.models.second_moments import LayerStatistics, Progress

Floats = npt.NDArray[np.float64]

_NOTES = "|notes"


@dataclass(frozen=True, slots=True)
class Correction:
    """factors: of the largest rank that was asked for. errors: weighted squared error that is left by rank, [R + 1].
    metric: what it is weighed by, such as `full inputs, full outputs`."""

    factors: LowRank
    errors: Floats
    metric: str


class Solver:
    """The corrections of `pair`, of rank `rank` or less."""

    def __init__(self, pair: CheckpointPair, rank: int) -> None:
        self._pair = pair
        self._rank = rank

    def run(self, statistics: LayerStatistics) -> dict[str, Correction]:
        """By linear layer, from the reference's statistics. AdaptError, WorkFolderError."""
        corrections: dict[str, Correction] = {}
        for layer, kept in statistics.run(self._solve_layer, Moments).items():
            self._pair.restore_notes(layer, _notes(kept))
            corrections |= _unpack(kept)
        return {name: corrections[name] for name in self._pair.skeleton.adaptable}

    def _solve_layer(self, layer: str, moments: Moments) -> Mapping[str, torch.Tensor]:
        corrections = {
            name: self._correct(name, moments, self._pair.scales(layer))
            for name in self._pair.skeleton.linears_of(layer)
            if name in self._pair.skeleton.adaptable
        }
        return _pack(corrections, self._pair.notes_of(layer))

    def _correct(self, name: str, moments: Moments, scales: LayerScales) -> Correction:
        inputs = _scaled(moments.inputs(name), 1.0 / scales.inputs[name] if name in scales.inputs else None)
        outputs = moments.outputs(name)
        if outputs is not None:
            outputs = _scaled(outputs, scales.outputs.get(name))
        factors, errors = low_rank(self._pair.delta(name, scales), self._rank, inputs, outputs)
        metric = f"{_kind(inputs)} inputs" + ("" if outputs is None else f", {_kind(outputs)} outputs")
        return Correction(factors, errors, metric)


def _scaled(gram: Gram, scale: torch.Tensor | None) -> Gram:
    """Statistics of the vectors times `scale`, entry by entry."""
    if scale is None:
        return gram
    factors = scale.double().numpy()
    if isinstance(gram, FullGram):
        return FullGram(gram.count, gram.total * factors[:, None] * factors[None, :])
    return DiagonalGram(gram.count, gram.total * factors**2)


def _kind(gram: Gram) -> str:
    return "full" if isinstance(gram, FullGram) else "diagonal"


def _pack(corrections: Mapping[str, Correction], notes: Sequence[str]) -> dict[str, torch.Tensor]:
    tensors = {_NOTES: _characters("\n".join(notes))} if notes else {}
    for name, correction in corrections.items():
        tensors[f"{name}|a"] = torch.from_numpy(correction.factors.a)
        tensors[f"{name}|b"] = torch.from_numpy(np.ascontiguousarray(correction.factors.b))
        tensors[f"{name}|errors"] = torch.from_numpy(correction.errors)
        tensors[f"{name}|metric"] = _characters(correction.metric)
    return tensors


def _characters(text: str) -> torch.Tensor:
    return torch.frombuffer(bytearray(text.encode()), dtype=torch.uint8)


def _notes(tensors: Mapping[str, torch.Tensor]) -> list[str]:
    return bytes(tensors[_NOTES].tolist()).decode().split("\n") if _NOTES in tensors else []


def _unpack(tensors: Mapping[str, torch.Tensor]) -> dict[str, Correction]:
    names = [name.removesuffix("|a") for name in tensors if name.endswith("|a")]
    return {
        name: Correction(
            LowRank(tensors[f"{name}|a"].numpy(), tensors[f"{name}|b"].numpy()),
            tensors[f"{name}|errors"].numpy(),
            bytes(tensors[f"{name}|metric"].tolist()).decode(),
        )
        for name in names
    }


MAX_RANK = 512
SHARED_OUT_FACTOR = 4
"""`max_rank` in multiples of `rank`, unless it is given."""
_SCALE_BYTES = 4
_BFLOAT16_BYTES = 2


@dataclass(frozen=True, slots=True)
class BuildOptions:
    """rank: of every layer; with `shared_out`, on average by bytes.
    max_rank: largest of a layer with `shared_out`, else unused; None: SHARED_OUT_FACTOR times `rank`.
    metric: `kfac`: inputs and gradients at the outputs, `full`: inputs, `diagonal`: only their squares; `auto`: as
        `kfac`, with diagonals where `memory_mib` is too little for the rest.
    model: served name of the compressed model, for the profile; "": any with that vocabulary.
    Raises AdaptError.
    """

    rank: int = 16
    max_rank: int | None = None
    shared_out: bool = False
    metric: Literal["auto", "kfac", "full", "diagonal"] = "auto"
    memory_mib: int = 4096
    seed: int = 0
    model: str = ""

    def __post_init__(self) -> None:
        if not 1 <= self.rank <= MAX_RANK:
            raise AdaptError(f"rank is {self.rank}: it must be 1 to {MAX_RANK}")
        if self.max_rank is not None and not self.rank <= self.max_rank <= MAX_RANK:
            raise AdaptError(f"max_rank is {self.max_rank}: it must be {self.rank} (rank) to {MAX_RANK}")
        if self.metric not in ("auto", "kfac", "full", "diagonal"):
            raise AdaptError(f"metric is {self.metric!r}: use auto, kfac, full or diagonal")
        if self.shared_out and not self.measures_gradients:
            raise AdaptError(
                f"metric {self.metric} cannot be shared out: errors of different layers are comparable only with the "
                "gradients at the outputs; use metric auto or kfac"
            )

    @property
    def measures_gradients(self) -> bool:
        return self.metric in ("auto", "kfac")

    @property
    def largest_rank(self) -> int:
        if not self.shared_out:
            return self.rank
        return min(self.max_rank or SHARED_OUT_FACTOR * self.rank, MAX_RANK)


@dataclass(frozen=True, slots=True)
class Built:
    """report: for JSON; see `docs/operations.md`. layers: the corrections as they are served (from int8)."""

    profile: CalibrationProfile
    report: dict[str, Any]
    layers: Mapping[str, LowRank] = field(repr=False)


def build(
    pair: CheckpointPair,
    texts: Sequence[Text],
    options: BuildOptions,
    parts: Parts | None = None,
    progress: Progress = lambda stage, done, total: None,
) -> Built:
    """The adapter for `pair` from the reference's activations on `texts`. Deterministic.

    parts: finished layers, from which an interrupted build goes on; they must be of the same arguments. Raises
    AdaptError, and WorkFolderError when a part cannot be stored.
    """
    clock, processor = time.monotonic(), time.process_time()
    statistics = LayerStatistics(
        pair.skeleton,
        pair.sources[0],
        [text.ids for text in texts],
        parts or Parts(None),
        gradients=options.measures_gradients,
        memory_bytes={"auto": options.memory_mib << 20, "kfac": None, "full": None, "diagonal": 0}[options.metric],
        seed=options.seed,
        progress=progress,
    )
    corrections = Solver(pair, options.largest_rank).run(statistics)
    ranks = _ranks(corrections, options)
    layers = {name: corrections[name].factors.first(rank) for name, rank in ranks.items()}
    if not any(layer.rank for layer in layers.values()):
        raise AdaptError(
            "no linear layer of COMPRESSED differs from REFERENCE's: there is nothing to correct; is COMPRESSED the "
            "compressed checkpoint?"
        )
    tokens = sum(map(len, texts))
    metrics = sorted({correction.metric for correction in corrections.values()})
    method = "training-free; " + "; ".join(metrics)
    digests = {"reference": pair.reference.digest(), "compressed": pair.compressed.digest()}
    profile = adapter_profile(
        model=options.model,
        vocab_size=vocab_size_of(pair),
        layers=layers,
        metadata={
            "method": method,
            "rank": str(options.rank),
            "shared_out": str(options.shared_out).lower(),
            "tokens": str(tokens),
            **digests,
        },
    )
    report = {
        "version": profile.version,
        "model": profile.model,
        "rank": options.rank,
        "max_rank": max_rank(profile),
        "shared_out": options.shared_out,
        "metric": options.metric,
        "method": method,
        "tokens": tokens,
        "texts": len(texts),
        **_sizes(pair, profile),
        "layers": {
            name: {"rank": layers[name].rank, "won": _won([corrections[name]], [layers[name].rank])} for name in layers
        },
        "kinds": _kinds(corrections, layers),
        "seconds": time.monotonic() - clock,
        "cpu_seconds": time.process_time() - processor,
        "peak_mib": peak_mib(),
        "notes": list(pair.notes),
        **digests,
        "held_out": None,
    }
    return Built(profile, report, adapter_layers(profile))


def judged(
    pair: CheckpointPair,
    built: Built,
    texts: Sequence[Text],
    parts: Parts | None = None,
    progress: Progress = lambda stage, done, total: None,
) -> tuple[Built, Judged]:
    """Returns the adapter with its figures on held-out `texts` in the report, and these figures."""
    result = judge(pair, built.layers, texts, parts or Parts(None), progress)
    report = built.report | {"held_out": result.summary(), "peak_mib": peak_mib()}
    return Built(built.profile, report, built.layers), result


def vocab_size_of(pair: CheckpointPair) -> int:
    """Number of ids that the output embedding has."""
    return int(pair.skeleton.model.get_output_embeddings().weight.shape[0])


def peak_mib() -> float:
    """The largest memory of this process so far, without a GPU's; and of the GPU, if that is more."""
    size = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    resident = size / (1 << 20) if sys.platform == "darwin" else size / (1 << 10)
    on_gpu = torch.cuda.max_memory_allocated() / (1 << 20) if torch.cuda.is_available() else 0.0
    return float(max(resident, on_gpu))


def _ranks(corrections: Mapping[str, Correction], options: BuildOptions) -> dict[str, int]:
    if not options.shared_out:
        return {name: min(options.rank, correction.factors.rank) for name, correction in corrections.items()}
    # What one rank adds to the stored profile: a row of a with its scale, and a column of b.
    one_rank = {
        name: correction.factors.a.shape[1] + _SCALE_BYTES + correction.factors.b.shape[0]
        for name, correction in corrections.items()
    }
    budget = sum(options.rank * size for size in one_rank.values())
    errors = {name: correction.errors for name, correction in corrections.items()}
    return share_ranks(errors, one_rank, budget, options.largest_rank)


def _sizes(pair: CheckpointPair, profile: CalibrationProfile) -> dict[str, Any]:
    """bytes: stored and sent (int8). engine_bytes: in the engine, bfloat16, every layer padded to the largest rank as
    vLLM does. quantized_bytes: of the layers that it corrects, as COMPRESSED stores them."""
    linears = [pair.skeleton.linears[name] for name in adapter_layers(profile)]
    padded = sum(m.in_features + m.out_features for m in linears) * max_rank(profile) * _BFLOAT16_BYTES
    quantized = sum(pair.compressed.stored_bytes(name) for name in pair.skeleton.linears)
    return {
        "bytes": adapter_bytes(profile),
        "engine_bytes": padded,
        "quantized_bytes": quantized,
        "bytes_share": adapter_bytes(profile) / quantized if quantized else None,
        "engine_bytes_share": padded / quantized if quantized else None,
    }


def _won(corrections: Sequence[Correction], ranks: Sequence[int]) -> float | None:
    """The part of the weighted squared error that the ranks take away; None where there is none."""
    before = sum(float(c.errors[0]) for c in corrections)
    after = sum(float(c.errors[min(r, len(c.errors) - 1)]) for c, r in zip(corrections, ranks, strict=True))
    return 1.0 - after / before if before > 0.0 else None


def _kinds(corrections: Mapping[str, Correction], layers: Mapping[str, LowRank]) -> dict[str, Any]:
    """Returns the number of layers, the mean rank, and the part of the sum of the layers' errors that is won, by the
    last part of the layers' names."""
    result: dict[str, Any] = {}
    for kind in dict.fromkeys(name.rpartition(".")[2] for name in corrections):
        names = [name for name in corrections if name.rpartition(".")[2] == kind]
        ranks = [layers[name].rank for name in names]
        result[kind] = {
            "layers": len(names),
            "rank": sum(ranks) / len(ranks),
            "won": _won([corrections[name] for name in names], ranks),
        }
    return result
