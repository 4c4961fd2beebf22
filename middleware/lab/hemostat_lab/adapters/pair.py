"""The reference and the compressed checkpoint of one model: whether they fit, and by how much each weight differs.

**Scales that were moved between layers.** AWQ (Lin et al. 2023, arXiv 2306.00978) and SmoothQuant (Xiao et al. 2022,
arXiv 2211.10438) change the weights without changing the model before they quantize: they divide channel i of what a
layer reads by s_i, in the norm or in the linear layer before it, and multiply column i of the layer by s_i. The error
of such a checkpoint is the difference from the reference *with the same scales moved*, which is the same function:

    ΔW = D_out⁻¹ W_reference D_in − W_compressed

`LayerScales` holds them. They are exact for a norm (the ratio of both norms' weights), and fitted by least squares
for a linear layer in between, whose rows were quantized; any scales give an equivalent reference, so that a fitted one
costs only a slightly larger ΔW. In the coordinates of the compressed model, inputs are divided by s_in, and gradients
at the outputs multiplied by s_out.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch

from hemostat.checkpoints.architectures import UnsupportedModelError, check_serves_adapters
from hemostat.checkpoints.errors import AdaptError
from hemostat_lab.models.checkpoint import Checkpoint
from hemostat_lab.models.copies import device_of, dtype_of, weights_of
from hemostat_lab.models.skeleton import EXACT, Skeleton, WeightSource, consumers, norm_offset

MAX_RELATIVE_ERROR = 0.9
"""|ΔW| / |W|: unrelated weights have 1.4, weights of 2 bits about 0.5."""
MIN_FIT = 0.8
"""Fitted scales are used where they leave at most this part of the squared error."""
NORM_TOLERANCE = 0.01
"""Relative difference of norm weights that rounding to bfloat16 explains."""
_SHAPE_FIELDS = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads")


@dataclass(frozen=True, slots=True)
class LayerScales:
    """Scales that were moved inside of one decoder layer, by linear layer; a layer that is missing has none.

    inputs: float32 [inputs]. outputs: float32 [outputs]. norms: parameters that were divided by such scales.
    """

    inputs: Mapping[str, torch.Tensor] = field(default_factory=dict)
    outputs: Mapping[str, torch.Tensor] = field(default_factory=dict)
    norms: frozenset[str] = frozenset()


class CheckpointPair:
    """Two checkpoints of one architecture. No weights are kept.

    skeleton: the model, for the weights of either. same_ends: embeddings, final norm and head are equal. notes:
    differences that an adapter does not correct, one line each.
    """

    def __init__(self, reference: Checkpoint, compressed: Checkpoint, skeleton: Skeleton) -> None:
        self.reference = reference
        self.compressed = compressed
        self.skeleton = skeleton
        self.notes: list[str] = []
        self.same_ends = True
        self._scales: dict[str, LayerScales] = {}
        self._notes_of: dict[str, list[str]] = {}
        """By decoder layer, what its scales do not explain."""

    @classmethod
    def open(cls, reference: Path, compressed: Path, device: str = "cpu", dtype: str = "auto") -> CheckpointPair:
        """Raises AdaptError unless both are checkpoints of the same architecture and vocabulary.

        dtype: of the computation; `auto` is the reference's own.
        """
        whole, small = Checkpoint(reference, "REFERENCE"), Checkpoint(compressed, "COMPRESSED")
        if whole.quantized:
            raise AdaptError(f"REFERENCE: {reference} is quantized: name the original that COMPRESSED was made from")
        _same_architecture(whole, small)
        _same_vocabulary(whole, small)
        on = device_of(device)
        skeleton = Skeleton(whole.config, dtype_of(whole, dtype, on), on, "REFERENCE")
        try:
            check_serves_adapters(whole.config)
        except UnsupportedModelError as error:
            raise AdaptError(f"REFERENCE: {error}") from None
        for checkpoint in (whole, small):
            _complete(checkpoint, skeleton)
        pair = cls(whole, small, skeleton)
        pair._note_ends()
        if small.quantized_kv_cache:
            pair.notes.append("the KV cache of COMPRESSED is quantized, too: not corrected")
        experts = len(skeleton.linears) - len(skeleton.adaptable)
        if experts:
            pair.notes.append(
                f"{experts} layers of experts that a router chooses are not corrected; vLLM's CPU build ends at the "
                "first request of such a model where it has --enable-lora"
            )
        rounded = sum(small.inputs(name) != EXACT for name in skeleton.linears)
        if rounded:
            pair.notes.append(
                f"{rounded} layers of COMPRESSED round their inputs: an adapter corrects weights only, and recovers "
                "little of such a loss"
            )
        return pair

    @property
    def sources(self) -> tuple[WeightSource, WeightSource]:
        """Parameters of the reference, and of the compressed model, as they are: no scales are moved."""
        return weights_of(self.reference), weights_of(self.compressed)

    def delta(self, name: str, scales: LayerScales) -> npt.NDArray[np.float32]:
        """ΔW, float32 [outputs, inputs], of the linear layer `name`. AdaptError where it is too large for a pair."""
        reference = _moved(self.reference.weight(name).float(), name, scales)
        difference = reference - self.compressed.weight(name).float()
        size, error = float(reference.norm()), float(difference.norm())
        if not np.isfinite(error):
            raise AdaptError(f"layer {name} holds weights that are not finite: one of the checkpoints is damaged")
        if error > MAX_RELATIVE_ERROR * size:
            raise AdaptError(
                f"layer {name} of COMPRESSED differs from REFERENCE's by {error / max(size, 1e-30):.0%} of its size, "
                "also with scales moved between layers: REFERENCE must be the model that COMPRESSED was made from"
            )
        values: npt.NDArray[np.float32] = difference.numpy()
        return values

    def scales(self, layer: str) -> LayerScales:
        """The scales that were moved inside of the decoder layer `layer`; notes what they do not explain."""
        if layer not in self._scales:
            known = len(self.notes)
            self._scales[layer] = self._find_scales(layer)
            self._notes_of.setdefault(layer, self.notes[known:])
        return self._scales[layer]

    def notes_of(self, layer: str) -> list[str]:
        """Returns the notes about a decoder layer; none, as long as its scales are not known."""
        return self._notes_of.get(layer, [])

    def restore_notes(self, layer: str, notes: list[str]) -> None:
        """Takes over the notes of an earlier process about a decoder layer that need not be looked at again."""
        self._notes_of[layer] = notes
        for text in notes:
            self._note(text)

    def _find_scales(self, layer: str) -> LayerScales:
        names = [f"{layer}.{name}" for name, _ in self.skeleton.layers[layer].named_modules() if name]
        linears = set(self.skeleton.linears_of(layer))
        inputs: dict[str, torch.Tensor] = {}
        norms = set()
        for parameter in self.skeleton.parameters_of(layer):
            module = parameter.rpartition(".")[0]
            if module in linears:
                continue
            ours, theirs = self.reference.tensor(parameter).float(), self.compressed.tensor(parameter).float()
            if _equal(ours, theirs):
                continue
            readers = [name for name in consumers(module, names) if name in linears]
            ratio = self._ratio(module, ours, theirs) if parameter.endswith(".weight") and readers else None
            if ratio is None or not self._explains(ratio, readers):
                self._note(
                    f"{parameter} differs between the checkpoints, not by scales of the next layer: not corrected"
                )
                continue
            inputs |= dict.fromkeys(readers, ratio)
            norms.add(parameter)
        outputs: dict[str, torch.Tensor] = {}
        for before, after in (("v_proj", "o_proj"), ("up_proj", "down_proj")):
            for name in sorted(linears):
                other = name.removesuffix(before) + after if name.endswith(f".{before}") else ""
                if other not in linears or other in inputs:
                    continue
                if self.skeleton.linears[name].out_features != self.skeleton.linears[other].in_features:
                    continue  # grouped heads: AWQ does not scale those
                fitted = self._fitted(name, other, inputs.get(name))
                if fitted is not None:
                    outputs[name] = inputs[other] = fitted
        scales = LayerScales(inputs, outputs, frozenset(norms))
        for name in sorted(linears):
            self._compare_bias(name, scales)
        return scales

    def _ratio(self, module: str, ours: torch.Tensor, theirs: torch.Tensor) -> torch.Tensor | None:
        """s of a norm; None where it is not a scale."""
        offset = norm_offset(self.skeleton.model.get_submodule(module))
        ratio = (ours + offset) / (theirs + offset)
        # A channel that is 0 in both has any scale.
        ratio = torch.where((ours + offset == 0) & (theirs + offset == 0), 1.0, ratio)
        return ratio if bool((ratio.isfinite() & (ratio > 0)).all()) else None

    def _explains(self, ratio: torch.Tensor, readers: list[str]) -> bool:
        """Returns True if the layers that read a norm's output were multiplied by its scales: then the error is
        smaller.

        Factors by which rows were divided, such as the rows of up_proj for down_proj, are fitted on both sides.
        """
        plain = moved = 0.0
        for name in readers:
            ours, theirs = self.reference.weight(name).float(), self.compressed.weight(name).float()
            plain += _error_by_row(ours, theirs)
            moved += _error_by_row(ours * ratio, theirs)
        return moved < plain

    def _fitted(self, before: str, after: str, inputs: torch.Tensor | None) -> torch.Tensor | None:
        """The scales by which the rows of `before` were divided and the columns of `after` multiplied; None: none."""
        rows, rows_c = self.reference.weight(before).float(), self.compressed.weight(before).float()
        columns, columns_c = self.reference.weight(after).float(), self.compressed.weight(after).float()
        if inputs is not None:
            rows = rows * inputs
        fitted = (rows * rows_c).sum(1) / rows_c.square().sum(1).clamp_min(1e-30)
        fitted = torch.where((fitted > 0) & fitted.isfinite(), fitted, 1.0)

        def error(scale: torch.Tensor) -> float:
            # Relative: the rows are divided and the columns multiplied by the same numbers.
            first = (rows / scale[:, None] - rows_c).square().sum() / rows_c.square().sum().clamp_min(1e-30)
            second = (columns * scale - columns_c).square().sum() / columns_c.square().sum().clamp_min(1e-30)
            return float(first + second)

        return fitted if error(fitted) < MIN_FIT * error(torch.ones_like(fitted)) else None

    def _compare_bias(self, name: str, scales: LayerScales) -> None:
        if self.skeleton.linears[name].bias is None:
            return
        ours, theirs = (c.tensor(f"{name}.bias").float() for c in (self.reference, self.compressed))
        if name in scales.outputs:
            ours = ours / scales.outputs[name]
        if not _equal(ours, theirs):
            self._note(f"{name}.bias differs between the checkpoints: not corrected")

    def _note_ends(self) -> None:
        sources = self.sources
        for name in self.skeleton.ends():
            ours, theirs = (source(name) for source in sources)
            if ours.shape != theirs.shape:
                raise AdaptError(
                    f"{name} has the shape {list(ours.shape)} in REFERENCE and {list(theirs.shape)} in COMPRESSED: "
                    "REFERENCE must be the model that COMPRESSED was made from"
                )
            if torch.equal(ours, theirs):
                continue
            self.same_ends = False
            if not _equal(ours.float(), theirs.float()):
                self._note(f"{name} differs between the checkpoints: not corrected")

    def _note(self, text: str) -> None:
        if text not in self.notes:
            self.notes.append(text)


def _moved(weight: torch.Tensor, name: str, scales: LayerScales) -> torch.Tensor:
    if name in scales.inputs:
        weight = weight * scales.inputs[name]
    if name in scales.outputs:
        weight = weight / scales.outputs[name][:, None]
    return weight


def _error_by_row(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    """Squared error, relative by row, that is left where every row of `ours` is multiplied by its best number."""
    factors = (ours * theirs).sum(1) / ours.square().sum(1).clamp_min(1e-30)
    left = (ours * factors[:, None] - theirs).square().sum(1)
    return float((left / theirs.square().sum(1).clamp_min(1e-30)).sum())


def _equal(ours: torch.Tensor, theirs: torch.Tensor) -> bool:
    return ours.shape == theirs.shape and bool(((ours - theirs).abs() <= NORM_TOLERANCE * ours.abs()).all())


def _same_architecture(reference: Checkpoint, compressed: Checkpoint) -> None:
    fix = "REFERENCE must be the model that COMPRESSED was made from"
    ours, theirs = (c.config.get_text_config() for c in (reference, compressed))
    if reference.config.architectures != compressed.config.architectures:
        one, other = (", ".join(c.config.architectures or ["no architecture"]) for c in (reference, compressed))
        raise AdaptError(f"architectures: REFERENCE is {one}, COMPRESSED is {other}; {fix}")
    for name in _SHAPE_FIELDS:
        sizes = [getattr(config, name, None) for config in (ours, theirs)]
        if sizes[0] != sizes[1]:
            raise AdaptError(f"{name}: REFERENCE has {sizes[0]}, COMPRESSED has {sizes[1]}; {fix}")
    if ours.vocab_size != theirs.vocab_size:
        raise AdaptError(
            f"vocabulary: REFERENCE has {ours.vocab_size} tokens, COMPRESSED has {theirs.vocab_size}; {fix}"
        )


def _same_vocabulary(reference: Checkpoint, compressed: Checkpoint) -> None:
    """Equal ids mean equal texts, where both folders bring a tokenizer.json."""
    vocabularies = []
    for checkpoint in (reference, compressed):
        try:
            tokenizer = json.loads((checkpoint.folder / "tokenizer.json").read_text(encoding="utf-8"))
            vocabularies.append(tokenizer["model"]["vocab"])
        except (OSError, ValueError, KeyError, TypeError):
            return
    if vocabularies[0] != vocabularies[1]:
        raise AdaptError(
            "vocabulary: REFERENCE and COMPRESSED have different tokens in tokenizer.json; REFERENCE must be the model "
            "that COMPRESSED was made from"
        )


def _complete(checkpoint: Checkpoint, skeleton: Skeleton) -> None:
    """Every parameter is stored; AdaptError names the first one that is not."""
    for name in skeleton.places:
        if name not in checkpoint.names and not (
            name.endswith(".weight") and checkpoint.is_quantized(name.removesuffix(".weight"))
        ):
            raise AdaptError(
                f"{checkpoint.label}: {checkpoint.folder} has no tensor {name}: it is incomplete, or its architecture "
                "stores weights in another form than transformers computes with, which is not supported"
            )
