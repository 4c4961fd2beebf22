"""An adapter that is trained further: towards the reference's predictions, from the training-free adapter.

See `training`. Unlike the training-free adapter it does not run layer by layer: both models are in memory whole.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace

import torch

from hemostat.checkpoints.texts import Text
from hemostat_calibration.adapters.factors import LowRank, dequantize_rows, quantize_rows
from hemostat_calibration.profiles.adapter import adapter_layers, adapter_profile
from hemostat_lab.adapters.build import Built, peak_mib
from hemostat_lab.adapters.pair import CheckpointPair
from hemostat_lab.models.copies import Adapter, Copy
from hemostat_lab.models.parts import Parts, json_tensor, json_value
from hemostat_lab.models.second_moments import Progress
from hemostat_lab.models.skeleton import set_factors
from hemostat_lab.models.training import STEP_POSITIONS, Tensors, TooFewTextsError, Trained, train

RATES = (3e-4, 1e-4)
"""Entries of factors are about 0.05."""

_PART = "distilled"


@dataclass(frozen=True, slots=True)
class Distilled(Trained):
    """layers: what is to be served: of the complete trial, or the start itself where the fold did not improve. The
    figures are of adapters rounded to int8."""

    layers: Adapter


def distil(
    reference: Copy,
    compressed: Copy,
    start: Adapter,
    texts: Sequence[Text],
    *,
    seed: int = 0,
    rates: Sequence[float] = RATES,
    step_positions: int = STEP_POSITIONS,
    progress: Progress = lambda stage, done, total: None,
) -> Distilled:
    """Train `start` as `training.train` does, whose arguments and errors these are."""
    result = train(
        reference,
        compressed,
        TrainableAdapter(start, compressed),
        texts,
        seed=seed,
        rates=rates,
        step_positions=step_positions,
        progress=progress,
    )
    layers = start if result.tensors is None else _layers(result.tensors)
    return Distilled(**{field.name: getattr(result, field.name) for field in fields(result)}, layers=layers)


def distilled(
    pair: CheckpointPair,
    built: Built,
    texts: Sequence[Text],
    parts: Parts,
    seed: int = 0,
    rates: Sequence[float] = RATES,
    progress: Progress = lambda stage, done, total: None,
) -> Built:
    """`built` after `distil` on the same `texts`, with `distilled` in the report: `Distilled.report()`, or None with a
    note where there are too few texts. The profile is unchanged where the fold did not improve.

    Both models are loaded whole. The result is kept in `parts`. Raises AdaptError, WorkFolderError.
    """
    kept = parts.get(_PART)
    if kept is None:
        device = str(pair.skeleton.device)
        reference, compressed = (Copy.load(c.folder, device, label=c.label) for c in (pair.reference, pair.compressed))
        try:
            result = distil(reference, compressed, built.layers, texts, seed=seed, rates=rates, progress=progress)
        except TooFewTextsError as error:
            notes = [*built.report["notes"], f"not distilled: {error}"]
            return replace(built, report=built.report | {"distilled": None, "notes": notes})
        layers, report = result.layers, result.report()
        kept = {"report": json_tensor(report)}
        for name, layer in layers.items():
            kept |= {f"{name}|a": torch.from_numpy(layer.a), f"{name}|b": torch.from_numpy(layer.b)}
        parts.put(_PART, kept)
    else:
        report = json_value(kept["report"])
        names = [name.removesuffix("|a") for name in kept if name.endswith("|a")]
        layers = {name: LowRank(kept[f"{name}|a"].numpy(), kept[f"{name}|b"].numpy()) for name in names}
    profile = built.profile
    if report["improved"]:
        method = f"distilled on {report['tokens']} tokens; start: {profile.metadata['method']}"
        profile = adapter_profile(
            model=profile.model,
            vocab_size=profile.vocab_size,
            layers=layers,
            metadata=dict(profile.metadata) | {"method": method},
        )
    changes = {
        "version": profile.version,
        "method": profile.metadata["method"],
        "distilled": report,
        "seconds": built.report["seconds"] + report["seconds"],
        "cpu_seconds": built.report["cpu_seconds"] + report["cpu_seconds"],
        "peak_mib": peak_mib(),
    }
    return Built(profile, built.report | changes, adapter_layers(profile))


class TrainableAdapter:
    """The factors of an adapter, by `layer|a` and `layer|b`; served from int8."""

    def __init__(self, start: Adapter, copy: Copy) -> None:
        self._start = start
        self._copy = copy
        self.numbers = sum(layer.a.size + layer.b.size for layer in start.values())
        self.working_bytes = 0  # the model's own weights stay

    def start(self) -> dict[str, torch.Tensor]:
        """Returns the factors that training starts from, as `LowRank.for_training` scales them, by `name|a` and
        `name|b`. Layers of rank 0 are left out."""
        result = {}
        for name, layer in self._start.items():
            if layer.rank:
                even = layer.for_training()
                result[f"{name}|a"] = torch.from_numpy(even.a).to(self._copy.device, copy=True)
                result[f"{name}|b"] = torch.from_numpy(even.b).to(self._copy.device, copy=True)
        return result

    @contextmanager
    def applied(self, tensors: Tensors) -> Iterator[None]:
        dtype = self._copy.skeleton.dtype
        factors = {name: (tensors[f"{name}|a"].to(dtype), tensors[f"{name}|b"].to(dtype)) for name in _names(tensors)}
        set_factors(self._copy.linears, factors)
        try:
            yield
        finally:
            set_factors(self._copy.linears, {})

    @contextmanager
    def served(self, tensors: Tensors | None) -> Iterator[None]:
        layers = self._start if tensors is None else _layers(tensors)
        with self._copy.adapted({name: _rounded(layer) for name, layer in layers.items()}):
            yield


def _names(tensors: Tensors) -> list[str]:
    return [name.removesuffix("|a") for name in tensors if name.endswith("|a")]


def _rounded(layer: LowRank) -> LowRank:
    return LowRank(dequantize_rows(*quantize_rows(layer.a)), dequantize_rows(*quantize_rows(layer.b)))


def _layers(tensors: Tensors) -> Mapping[str, LowRank]:
    return {
        name: LowRank(*(tensors[f"{name}|{side}"].detach().cpu().numpy().copy() for side in ("a", "b"))).for_rounding()
        for name in _names(tensors)
    }
