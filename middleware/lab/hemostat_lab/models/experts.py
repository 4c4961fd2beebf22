"""Mixtures of experts: each expert as linear layers of its own, and what a router chooses.

transformers computes with all experts of a decoder layer in two tensors, and stores each expert's weights by itself.
`split_experts` gives the model the form in which it is stored, so that an expert's layers are read, measured and
written like any other; what is computed is the same.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

from hemostat.checkpoints.architectures import UnsupportedModelError

_EXPERT = ".experts."
_PARTS = ("gate_proj", "up_proj", "down_proj")
_STORED_AS = {"mixtral": ("block_sparse_moe", ("w1", "w3", "w2"))}
"""By `model_type`, where names in the checkpoint are not those of transformers: of the module with router and experts,
and of an expert's layers."""


Routing = tuple[torch.Tensor, torch.Tensor]
"""The experts that were chosen, int64 [tokens, experts per token], and the weights of their outputs."""


class Experts(torch.nn.ModuleList):  # type: ignore[misc]  # torch is not analyzed
    """The experts of one decoder layer, in the place of transformers' module, whose tensors they share."""

    def __init__(self, original: Any, parts: tuple[str, str, str]) -> None:
        super().__init__()
        inner = original.down_proj.shape[2]
        for both, down in zip(original.gate_up_proj.detach(), original.down_proj.detach(), strict=True):
            expert = torch.nn.Module()
            for part, weight in zip(parts, (both[:inner], both[inner:], down), strict=True):
                linear = torch.nn.Linear(*reversed(weight.shape), bias=False, device="meta")
                linear.weight = torch.nn.Parameter(weight, requires_grad=False)
                expert.add_module(part, linear)
            self.append(expert)
        self._parts = parts
        original.gate_up_proj = original.down_proj = None
        # Its activation, which some architectures define themselves; not a module of this one.
        object.__setattr__(self, "_original", original)

    def forward(self, hidden: torch.Tensor, chosen: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """hidden [tokens, d]; chosen, scores [tokens, experts per token]."""
        output = torch.zeros_like(hidden)
        for number, expert in enumerate(self):
            tokens, place = torch.where(chosen == number)
            if not len(tokens):
                continue
            gate, up, down = (expert.get_submodule(part) for part in self._parts)
            inputs = hidden[tokens]
            inner = self._original._apply_gate(torch.cat((gate(inputs), up(inputs)), dim=-1))
            output = output.index_add(0, tokens, (down(inner) * scores[tokens, place, None]).to(output.dtype))
        return output


def split_experts(model: Any) -> None:
    """Replace the experts of all layers by `Experts`. UnsupportedModelError where they are computed in another way than
    `down(act(gate(x)) * up(x))` of weights [outputs, inputs] without biases."""
    module_name, parts = _STORED_AS.get(model.config.get_text_config().model_type, (None, _PARTS))
    for name, original in list(model.named_modules()):
        if not hasattr(original, "is_concatenated"):  # of transformers' decorator of all its modules of experts
            continue
        if original.is_transposed or original.has_bias or not original.has_gate or not original.is_concatenated:
            raise UnsupportedModelError(
                f"the experts of {model.config.model_type} have biases, no gate, or transposed or interleaved weights"
            )
        model.set_submodule(name, Experts(original, parts))
        if module_name is not None:
            layer, _, block = name.rpartition(".")[0].rpartition(".")
            _rename(model.get_submodule(layer), block, module_name)


def _rename(module: Any, old: str, new: str) -> None:
    """Call a child as its parameters are stored. The module's own code finds it under both names."""
    module.add_module(new, module._modules.pop(old))
    kind = type(module)
    module.__class__ = type(kind.__name__, (kind,), {old: property(lambda self: getattr(self, new))})


def has_experts(config: Any) -> bool:
    """Whether the model of a configuration has a router that chooses among experts."""
    text = config.get_text_config()
    return bool(getattr(text, "num_local_experts", None) or getattr(text, "num_experts", None))


def is_expert(name: str) -> bool:
    """Whether a linear layer belongs to an expert that a router chooses, by its name in the checkpoint."""
    return _EXPERT in name


def experts_of(model: Any) -> list[Experts]:
    """Of each decoder layer that has some, in the order of the layers."""
    return [module for module in model.modules() if isinstance(module, Experts)]


def routers(model: Any) -> list[str]:
    """Names of the modules that choose among the experts. Their weight is a parameter, not a linear layer."""
    names = []
    for name, module in model.named_modules():
        if isinstance(module, Experts):
            block = name.rpartition(".")[0]
            for child, other in model.get_submodule(block).named_children():
                weight = getattr(other, "weight", None)
                if weight is not None and weight.ndim == 2 and len(weight) == len(module) and other is not module:
                    names.append(f"{block}.{child}")
    return names


@contextmanager
def routed(model: Any, see: Callable[[int, Routing], Routing]) -> Iterator[None]:
    """Inside of the context, the experts of a decoder layer compute with what `see` makes of their number in
    `experts_of` and of the router's choice."""

    def hook(number: int) -> Callable[[Any, tuple[torch.Tensor, ...]], tuple[torch.Tensor, ...]]:
        return lambda _, given: (given[0], *see(number, (given[1], given[2])))

    handles = [module.register_forward_pre_hook(hook(number)) for number, module in enumerate(experts_of(model))]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
