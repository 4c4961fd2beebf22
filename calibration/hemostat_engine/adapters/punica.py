"""vLLM's LoRA operations on a CPU (PunicaWrapperCPU), with the products of `grouped`."""

from __future__ import annotations

import functools
from typing import Any

import torch

from hemostat_engine.adapters.grouped import FactorCache, Plan, add_product, add_rows, matrix, plan, true_rank

_WRAPPED = "_hemostat_wrapped"
METHODS = ("update_metadata", "add_lora_linear", "add_shrink", "add_expand", "add_lora_embedding", "add_lora_logits")
_NO_ROWS = Plan()


def install(wrapper_class: Any) -> None:
    """Replaces the operations of PunicaWrapperCPU; a second call changes nothing.

    An operation over other rows than those that vLLM announced (`update_metadata`) is left to vLLM.
    """
    if _WRAPPED in vars(wrapper_class):
        return
    setattr(wrapper_class, _WRAPPED, True)
    vllm = {name: getattr(wrapper_class, name) for name in METHODS}

    def replace(function: Any) -> Any:
        name = function.__name__
        setattr(wrapper_class, name, functools.update_wrapper(function, vllm[name]))
        return function

    @replace
    def update_metadata(self: Any, *arguments: Any, **named: Any) -> None:
        vllm["update_metadata"](self, *arguments, **named)
        if not hasattr(self, "_hemostat_factors"):
            self._hemostat_factors = FactorCache()
        self._hemostat_tokens = plan(self.token_lora_indices.tolist())
        self._hemostat_samples = plan(self.sampler_indices.tolist())

    @replace
    def add_lora_linear(
        self: Any,
        y: torch.Tensor,
        x: torch.Tensor,
        lora_a_stacked: Any,
        lora_b_stacked: Any,
        scale: float,
        output_slices: Any,
        **named: Any,
    ) -> None:
        tokens = _tokens(self)
        if not tokens.groups and tokens.rows == x.shape[0] and named.get("add_inputs", True):
            return
        if tokens.rows != x.shape[0] or not named.get("add_inputs", True):
            vllm["add_lora_linear"](self, y, x, lora_a_stacked, lora_b_stacked, scale, output_slices, **named)
            return
        if y.ndim != 2:
            y = y.view(-1, y.shape[-1])
        for group in tokens.groups:
            factors = self._hemostat_factors.get(lora_a_stacked, lora_b_stacked, group.slot, output_slices)
            add_product(y, x, group, factors, scale)

    @replace
    def add_shrink(self: Any, y: Any, x: torch.Tensor, lora_a_stacked: Any, scale: float, **named: Any) -> None:
        x = x.view(-1, x.shape[-1])
        tokens = _tokens(self)
        if tokens.rows != x.shape[0]:
            vllm["add_shrink"](self, y, x, lora_a_stacked, scale, **named)
            return
        for part, a_slots in zip(y, lora_a_stacked, strict=False):
            flat = part.view(-1, part.shape[-1])
            for group in tokens.groups:
                a = matrix(a_slots, group.slot)
                hidden = torch.mm(group.of(x), a.T).mul_(scale).to(flat.dtype)
                if group.index is None:
                    flat[group.start : group.stop, : len(a)] = hidden
                else:
                    flat[:, : len(a)].index_copy_(0, group.index, hidden)

    @replace
    def add_expand(
        self: Any,
        y: torch.Tensor,
        x: Any,
        lora_b_stacked: Any,
        output_slices: Any,
        offset_start: int = 0,
        add_inputs: bool = True,
        **named: Any,
    ) -> None:
        flat = y.view(-1, y.shape[-1])
        tokens = _tokens(self)
        if tokens.rows != flat.shape[0] or not add_inputs:
            vllm["add_expand"](self, y, x, lora_b_stacked, output_slices, offset_start, add_inputs, **named)
            return
        start = offset_start
        for hidden, b_slots, outputs in zip(x, lora_b_stacked, output_slices, strict=False):
            for group in tokens.groups:
                b = matrix(b_slots, group.slot)
                change = torch.mm(group.of(hidden).to(b.dtype), b.T)
                add_rows(flat, change, group, start, start + outputs)
            start += outputs

    @replace
    def add_lora_embedding(
        self: Any, y: torch.Tensor, x: torch.Tensor, lora_b_stacked: torch.Tensor, add_inputs: bool = True, **named: Any
    ) -> None:
        tokens = _tokens(self)
        if tokens.rows != x.shape[0] or not add_inputs:
            vllm["add_lora_embedding"](self, y, x, lora_b_stacked, add_inputs, **named)
            return
        for group in tokens.groups:
            rows = group.of(x)
            b = matrix(lora_b_stacked, group.slot)
            # The adapter's rows of the embedding are zero where it has none.
            if rows.any():
                add_rows(y, torch.mm(rows.to(y.dtype), b.T.to(y.dtype)), group, 0, b.shape[0])

    @replace
    def add_lora_logits(
        self: Any,
        y: torch.Tensor,
        x: torch.Tensor,
        lora_a_stacked: torch.Tensor,
        lora_b_stacked: torch.Tensor,
        scale: float,
        **named: Any,
    ) -> None:
        flat, x = y.view(-1, y.shape[-1]), x.view(-1, x.shape[-1])
        samples = getattr(self, "_hemostat_samples", _NO_ROWS)
        if samples.rows != flat.shape[0]:
            # Logits of prompts (`prompt_logprobs`): vLLM takes them for the sampled rows, and its engine ends where the
            # numbers differ. Adapters of Hemostat's leave the output embedding alone: then there is nothing to add.
            if lora_a_stacked.any():
                vllm["add_lora_logits"](self, y, x, lora_a_stacked, lora_b_stacked, scale, **named)
            return
        for group in samples.groups:
            a, b = matrix(lora_a_stacked, group.slot), matrix(lora_b_stacked, group.slot)
            if not a.any():
                continue
            rank = true_rank(a, b)
            hidden = torch.mm(group.of(x).float(), a[:rank].T.float()).mul_(scale).to(flat.dtype)
            columns = min(b.shape[0], flat.shape[1])
            add_rows(flat, torch.mm(hidden, b[:columns, :rank].T.to(flat.dtype)), group, 0, columns)


def _tokens(wrapper: Any) -> Plan:
    result: Plan = getattr(wrapper, "_hemostat_tokens", _NO_ROWS)
    return result
