"""A model without weights. Its layers are loaded one at a time, so that no whole model is in memory."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch

from hemostat.checkpoints.architectures import UnsupportedModelError, check_causal
from hemostat.checkpoints.errors import AdaptError
from hemostat_calibration.messages import one_line
from hemostat_lab.models.experts import is_expert, split_experts
from hemostat_lab.models.quiet import quiet_transformers

WeightSource = Callable[[str], torch.Tensor]
"""The tensor of a parameter, by its name in the checkpoint; a dequantized one for a quantized layer."""

USED_BY_WEIGHT = ("dt_proj",)
"""Linear layers that are not called: the model's code multiplies by their weight, as Mamba's does for its time steps. A
packed weight would not be found there, and an adapter would have no effect, so they stay as they are."""
LEFT_DENSE = ("shared_expert_gate",)
"""Linear layers that engines do not quantize, nor adapt: one output, the weight of the shared expert."""

InputRounding = Literal["exact", "int8", "fp8", "fp8_groups", "nvfp4", "mxfp4"]
"""What an engine does with a linear layer's inputs before the product: nothing, or round them to 8-bit integers, to
E4M3 or to E2M1. Scales are found by token at run time, of `fp8_groups`, `nvfp4` and `mxfp4` by group of inputs."""


@dataclass(frozen=True, slots=True)
class Inputs:
    """How an engine rounds the inputs of a layer. scale: where the checkpoint stores it, and it is not found at run
    time: that of 8-bit numbers, and of NVFP4 what the scales of groups are multiples of."""

    rounding: InputRounding = "exact"
    scale: float | None = None


EXACT = Inputs()
_LARGEST = {"int8": 127.0, "fp8": 448.0, "fp8_groups": 448.0, "nvfp4": 6.0, "mxfp4": 6.0}
_GROUPS = {"fp8_groups": 128, "nvfp4": 16, "mxfp4": 32}
"""Inputs that share a scale; of the others all of a token."""
_LEAST_MAXIMUM = {"int8": 1e-7, "fp8": 1 / 512, "fp8_groups": 1e-10, "nvfp4": 0.0, "mxfp4": 2.0**-100}
"""Tokens, or groups, whose inputs are all smaller have the scale of this; of FP8 as in vLLM."""
_ATTENTION_INPUTS = ("q_proj", "k_proj", "v_proj", "qkv_proj")
_MLP_INPUTS = ("gate_proj", "up_proj", "gate_up_proj")


def rounded_inputs(inputs: torch.Tensor, how: Inputs) -> tuple[torch.Tensor, torch.Tensor]:
    """What the inputs [..., d], float32, are rounded to, in units of the scale, [..., 1] or [..., d]."""
    rounding, width = how.rounding, inputs.shape[-1]
    highest = _LARGEST[rounding]
    if how.scale is not None and rounding != "nvfp4":
        scale = torch.full_like(inputs[..., :1], how.scale)
    else:
        size = _GROUPS.get(rounding, width)
        groups = torch.nn.functional.pad(inputs.abs(), (0, -width % size)).unflatten(-1, (-1, size))
        largest = groups.amax(-1).clamp_min(_LEAST_MAXIMUM[rounding])
        scale = largest / highest
        if rounding == "nvfp4":
            unit = 1.0 if how.scale is None else how.scale
            scale = (scale / unit).clamp(max=_LARGEST["fp8"]).to(torch.float8_e4m3fn).float() * unit
        elif rounding == "mxfp4":
            scale = torch.exp2(torch.log2(largest).floor() - 2.0)
        if rounding in _GROUPS:
            scale = scale.repeat_interleave(size, -1)[..., :width]
    steps = torch.where(scale > 0, inputs / scale, 0.0).clamp(-highest - (rounding == "int8"), highest)
    if rounding == "int8":
        return steps.round(), scale
    return (steps.to(torch.float8_e4m3fn).float() if rounding.startswith("fp8") else round_to_e2m1(steps)), scale


def round_to_e2m1(numbers: torch.Tensor) -> torch.Tensor:
    """The nearest of E2M1's numbers, of two equally near ones that whose last bit is 0; at most 6."""
    size = numbers.abs().clamp(max=6.0)
    step = torch.where(size < 2.0, 0.5, torch.where(size < 4.0, 1.0, 2.0))
    return (size / step).round() * step * numbers.sign()


class CopyLinear(torch.nn.Linear):  # type: ignore[misc]  # torch is not analyzed
    """A linear layer with dense weights, as a vLLM engine computes a quantized one, with an adapter on top.

    inputs: how they are rounded before the product. The adapter reads them before that.
    factors: (A [r, inputs], B [outputs, r]); B A is added to the weight. None: no adapter.
    """

    inputs: Inputs = EXACT
    factors: tuple[torch.Tensor, torch.Tensor] | None = None

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        if self.inputs.rounding == "exact":
            outputs = torch.nn.functional.linear(inputs, self.weight, self.bias)
        else:
            rounded, scale = rounded_inputs(inputs.float(), self.inputs)
            if scale.shape[-1] > 1:
                value = inputs.float() + (rounded * scale - inputs.float()).detach()
                outputs = torch.nn.functional.linear(value.to(inputs.dtype), self.weight)
            else:
                # As in vLLM: 8 bits times 8 bits, scaled afterwards.
                exact = inputs.float() / scale
                # In value the rounded steps; their gradient is that of the exact ones (straight through).
                steps = (exact + (rounded - exact).detach()).to(inputs.dtype)
                outputs = (torch.nn.functional.linear(steps, self.weight).float() * scale).to(inputs.dtype)
            if self.bias is not None:
                outputs = outputs + self.bias
        if self.factors is not None:
            a, b = self.factors
            outputs = outputs + torch.nn.functional.linear(torch.nn.functional.linear(inputs, a), b)
        return outputs


class Skeleton:
    """A causal language model of transformers whose parameters are on torch's meta device until they are loaded.

    model: the transformers model. layers: its decoder layers, by name. linears: the `CopyLinear` layers inside the
    decoder layers, by name, without USED_BY_WEIGHT and LEFT_DENSE: those that can be compressed, and, but for experts
    (`adaptable`), that an adapter can change.
    base: `model` without the output embedding.
    can_select_logits: logits can be computed at some of the positions only.
    most_loaded: the largest number of decoder layers that were loaded at the same time.
    """

    def __init__(self, config: Any, dtype: torch.dtype, device: torch.device, label: str) -> None:
        """Raises AdaptError where transformers cannot build the architecture, or its layers are not found."""
        from accelerate import init_empty_weights  # noqa: PLC0415
        from transformers import AutoModelForCausalLM  # noqa: PLC0415

        try:
            check_causal(config)
            # Buffers, such as the frequencies of rotary embeddings, are not stored in a checkpoint: they are computed.
            with quiet_transformers(), init_empty_weights(include_buffers=False):
                self.model: Any = AutoModelForCausalLM.from_config(config, dtype=dtype)
                split_experts(self.model)
            self.model.tie_weights()
        except UnsupportedModelError as error:
            raise AdaptError(f"{label}: {error}") from None
        except Exception as error:  # noqa: BLE001  code of any architecture
            raise AdaptError(f"{label}: transformers cannot build its architecture: {one_line(error)}") from None
        self.dtype = dtype
        self.device = device
        self.model.eval().requires_grad_(False)
        self.base: Any = getattr(self.model, self.model.base_model_prefix)
        self.layers: dict[str, Any] = _decoder_layers(self.model, label)
        self.linears: dict[str, CopyLinear] = {}
        for layer in self.layers:
            for name, module in list(self.layers[layer].named_modules()):
                left = name.rpartition(".")[2] in (*USED_BY_WEIGHT, *LEFT_DENSE)
                if type(module) is torch.nn.Linear and not left:
                    self.linears[f"{layer}.{name}"] = _replace(self.model, f"{layer}.{name}", module)
        for module in self.model.modules():
            for key, buffer in module._buffers.items():
                if buffer is not None:
                    module._buffers[key] = buffer.to(device)
        self.places = _places(self.model)
        self.can_select_logits = "logits_to_keep" in inspect.signature(self.model.forward).parameters
        self.most_loaded = 0

    def parameters_of(self, prefix: str) -> list[str]:
        """Names of the parameters below the module `prefix`; tied ones once."""
        return [f"{prefix}.{name}" for name, _ in self.model.get_submodule(prefix).named_parameters()]

    def ends(self) -> list[str]:
        """Names of the parameters outside of the decoder layers: embeddings, final norm, head. A head that is tied to
        the embeddings counts as one with them."""
        inside = tuple(f"{layer}." for layer in self.layers)
        return [name for name, _ in self.model.named_parameters() if not name.startswith(inside)]

    def linears_of(self, layer: str) -> dict[str, CopyLinear]:
        return {name: module for name, module in self.linears.items() if name.startswith(f"{layer}.")}

    @property
    def adaptable(self) -> dict[str, CopyLinear]:
        """The linear layers that an adapter corrects: not those of experts that a router chooses, each of which would
        need factors of its own."""
        return {name: module for name, module in self.linears.items() if not is_expert(name)}

    @contextmanager
    def loaded(self, names: list[str], source: WeightSource) -> Iterator[None]:
        """The parameters `names` have weights inside of the context."""
        try:
            self.load(names, source)
            loaded = sum(not next(layer.parameters()).is_meta for layer in self.layers.values())
            self.most_loaded = max(self.most_loaded, loaded)
            yield
        finally:
            for name in names:
                self._set(name, torch.empty_like(self.model.get_parameter(name), device="meta"))

    def load(self, names: list[str], source: WeightSource) -> None:
        for name in names:
            shape = self.model.get_parameter(name).shape
            tensor = source(name)
            if tensor.shape != shape:
                raise AdaptError(
                    f"{name} has the shape {list(tensor.shape)} in the checkpoint, and {list(shape)} by its config.json"
                )
            self._set(name, tensor.to(self.device, self.dtype))

    def _set(self, name: str, tensor: torch.Tensor) -> None:
        new = torch.nn.Parameter(tensor, requires_grad=False)
        for module, key in self.places[name]:
            module._parameters[key] = new


def set_factors(linears: Mapping[str, CopyLinear], factors: Mapping[str, tuple[torch.Tensor, torch.Tensor]]) -> None:
    """Each layer gets its factors, or none."""
    for name, module in linears.items():
        module.factors = factors.get(name)


def _decoder_layers(model: Any, label: str) -> dict[str, Any]:
    count = getattr(model.config.get_text_config(), "num_hidden_layers", None)
    lists = [
        (name, module)
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.ModuleList) and len(module) == count
    ]
    if not lists:
        raise AdaptError(f"{label}: {type(model).__name__} has no list of its {count} layers: it is not supported")
    name, layers = max(lists, key=lambda entry: sum(p.numel() for p in entry[1].parameters()))
    return {f"{name}.{n}": layer for n, layer in enumerate(layers)}


def _places(model: Any) -> dict[str, list[tuple[Any, str]]]:
    """Where each parameter is, (module, attribute), by its first name: a tied one is in several modules."""
    names: dict[int, str] = {}
    places: dict[str, list[tuple[Any, str]]] = {}
    for prefix, module in model.named_modules():
        for key, parameter in module._parameters.items():
            if parameter is not None:
                name = names.setdefault(id(parameter), f"{prefix}.{key}" if prefix else key)
                places.setdefault(name, []).append((module, key))
    return places


def _replace(model: Any, name: str, module: torch.nn.Linear) -> CopyLinear:
    with torch.device("meta"):
        new = CopyLinear(module.in_features, module.out_features, bias=module.bias is not None)
    new.weight, new.bias = module.weight, module.bias
    model.set_submodule(name, new)
    new.eval()
    return new


def consumers(norm: str, names: list[str]) -> list[str]:
    """The linear layers that read a norm's output, by the names that decoder models of transformers share."""
    parent, _, kind = norm.rpartition(".")
    inside = [name for name in names if name.startswith(f"{parent}.")]
    of_mlp = "pre_feedforward_layernorm" if any(n.endswith("pre_feedforward_layernorm") for n in inside) else ""
    if kind == "input_layernorm":
        kinds: tuple[str, ...] = _ATTENTION_INPUTS
    elif kind == (of_mlp or "post_attention_layernorm") and not any(map(is_expert, inside)):
        # With experts the router reads it, too, and is not scaled.
        kinds = _MLP_INPUTS
    else:
        return []
    return [name for name in inside if name.rpartition(".")[2] in kinds]


def norm_offset(norm: Any) -> float:
    """1 for a norm that multiplies by 1 + weight, as Gemma's; otherwise 0."""
    probe = copy.deepcopy(norm).to_empty(device="cpu")
    with torch.no_grad():
        for parameter in probe.parameters():
            parameter.zero_()
        width = next(probe.parameters()).shape[-1]
        outputs = probe(torch.arange(1.0, width + 1.0)[None].to(next(probe.parameters()).dtype))
    return float(bool(outputs.abs().max() > 0))
