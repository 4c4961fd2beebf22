"""Faults in a real vLLM (CPU build, model runner V1), switched on and off while it runs; never shipped.

vLLM loads the class by `FAULTS_ARGUMENTS` of `tests.support.running_vllm`; its methods are called by POST
/collective_rpc. One fault is on at a time.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from vllm.v1.attention.backends.cpu_attn import CPUAttentionBackendImpl

FP8 = {"e4m3": torch.float8_e4m3fn, "e5m2": torch.float8_e5m2}
_update = CPUAttentionBackendImpl.do_kv_cache_update


@dataclass
class _State:
    """Of the worker process."""

    undo: list[Callable[[], None]] = field(default_factory=list)
    runner: Any = None
    before: Callable[[Any], None] | None = None
    """Called with each SchedulerOutput."""
    scheduled: dict[str, int] = field(default_factory=dict)
    """Tokens of the present step by request."""
    resumed: set[str] = field(default_factory=set)
    """Requests that began in this step behind a cached prefix."""


_state = _State()


@dataclass(frozen=True, slots=True)
class _Part:
    """One request's rows in the present step. computed: tokens before. cached: those were in the prefix cache."""

    computed: int
    first: int
    count: int
    cached: bool

    @property
    def rows(self) -> slice:
        return slice(self.first, self.first + self.count)


def _parts() -> list[_Part]:
    """Of the requests in the batch, during a forward pass."""
    batch, first, result = _state.runner.input_batch, 0, []
    for index, request in enumerate(batch.req_ids):
        count = _state.scheduled.get(request, 0)
        result.append(_Part(int(batch.num_computed_tokens_cpu[index]), first, count, request in _state.resumed))
        first += count
    return result


def _layers() -> Any:
    return _state.runner.get_model().model.layers


def _linear(layer: int, name: str) -> Any:
    part = _layers()[layer]
    return getattr(part.mlp if name in {"gate_up_proj", "down_proj"} else part.self_attn, name)


def _caches() -> list[torch.Tensor]:
    result = []
    for layer in _layers():
        cache = layer.self_attn.attn.kv_cache
        result.append(cache[0] if isinstance(cache, list) else cache)
    return result


def _hook(module: Any, change: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]) -> None:
    """change: (input, output) -> output"""

    def hook(_: Any, inputs: Any, output: Any) -> Any:
        if isinstance(output, tuple):
            return (change(inputs[0], output[0]), *output[1:])
        return change(inputs[0], output)

    _state.undo.append(module.register_forward_hook(hook).remove)


def _noisy(values: torch.Tensor, noise: float, seed: int) -> torch.Tensor:
    """The same noise for the same seed. noise: of the root mean square."""
    generator = torch.Generator().manual_seed(seed)
    size = noise * values.float().square().mean().sqrt()
    return (values.float() + size * torch.randn(values.shape[-1], generator=generator)).to(values.dtype)


def weights(layer: int, name: str, scale: float = 1.0, noise: float = 0.0) -> None:
    """A linear layer whose weights are scaled, or have noise: what comes out of it is what such weights give.

    noise: of the outputs' root mean square, about.
    """
    made: list[torch.Tensor] = []

    def change(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        y = y * scale
        if noise:
            if not made:
                generator = torch.Generator().manual_seed(layer)
                size = noise * (y.float().square().mean() / x.float().square().mean() / x.shape[-1]).sqrt()
                made.append(torch.randn(y.shape[-1], x.shape[-1], generator=generator) * size)
            y = (y.float() + x.float() @ made[0].T).to(y.dtype)
        return y

    _hook(_linear(layer, name), change)


def kv_cast(dtype: str = "e4m3", parts: str = "kv", first: int = 0, last: int = 1000) -> None:
    """What these layers write into the cache was cast before; also what it holds, as if the engine had begun so."""

    def cast(x: torch.Tensor) -> torch.Tensor:
        return x.to(FP8[dtype]).to(x.dtype)

    held = [cache.clone() for cache in _caches()]
    for cache in _caches()[first : last + 1]:
        blocks, heads, size, _ = cache.shape
        keys, values = cache.view(blocks, heads, 2 * size, -1).chunk(2, dim=2)
        for part, name in ((keys, "k"), (values, "v")):
            if name in parts:
                part.copy_(cast(part))

    layers = {id(layer.self_attn.attn): n for n, layer in enumerate(_layers())}

    def update(self: Any, layer: Any, key: Any, value: Any, kv_cache: Any, slot_mapping: Any) -> None:
        if first <= layers.get(id(layer), 0) <= last:
            key = cast(key) if "k" in parts else key
            value = cast(value) if "v" in parts else value
        _update(self, layer, key, value, kv_cache, slot_mapping)

    CPUAttentionBackendImpl.do_kv_cache_update = update

    def undo() -> None:
        CPUAttentionBackendImpl.do_kv_cache_update = _update
        for cache, before in zip(_caches(), held, strict=True):
            cache.copy_(before)

    _state.undo.append(undo)


def stale_prefix(block: int = 0, how: str = "other", noise: float = 0.1) -> None:
    """When a prompt's beginning is in the prefix cache, one of its blocks holds something else.

    how: "other", what the block behind it holds; "zero", nothing; "noise".
    """

    def before(scheduled: Any) -> None:
        for request in scheduled.scheduled_new_reqs:
            size = _caches()[0].shape[2]  # [blocks, heads, tokens, 2 * head size]
            if (hit := request.num_computed_tokens // size) == 0:
                continue
            ids = request.block_ids[0]
            place = block % hit
            for n, cache in enumerate(_caches()):
                if how == "other":
                    cache[ids[place]] = cache[ids[place + 1]]
                elif how == "zero":
                    cache[ids[place]] = 0
                else:
                    cache[ids[place]] = _noisy(cache[ids[place]], noise, n)

    _state.before = before


def batch(layer: int, name: str, noise: float = 0.05, rows: str = "all") -> None:
    """A kernel that errs where more than one request is in the batch. rows: "all", or "later": not the first one's."""

    def change(_: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        parts = _parts()
        if len(parts) < 2:
            return y
        y = y.clone()
        begin = 0 if rows == "all" else parts[1].first
        y[begin:] = _noisy(y[begin:], noise, layer)
        return y

    _hook(_linear(layer, name), change)


def chunk(layer: int, name: str, noise: float = 0.1, rows: str = "first", cached: bool = True) -> None:
    """A prefill that errs behind the end of a chunk. rows: "first", its first token; "all", every one.

    cached: also behind a cached prefix, which the same kernels compute.
    """

    def change(_: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        for part in _parts():
            if part.computed and part.count > 1 and (cached or not part.cached):
                chosen = slice(part.first, part.first + 1) if rows == "first" else part.rows
                y = y.clone()
                y[chosen] = _noisy(y[chosen], noise, layer)
        return y

    _hook(_linear(layer, name), change)


def decoding(layer: int, name: str, scale: float = 1.1) -> None:
    """A kernel of decoding, which computes one token of a request, that scales what comes out; a prefill is right."""

    def change(_: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        for part in _parts():
            if part.computed and part.count == 1:
                y = y.clone()
                y[part.rows] *= scale
        return y

    _hook(_linear(layer, name), change)


def _clear_caches() -> None:
    """NaN stays in the blocks of the KV cache, and a kernel that reads whole blocks gives NaN to later requests."""
    for cache in _caches():
        cache.zero_()


def not_a_number(layer: int, name: str) -> None:
    """A layer that gives NaN."""
    _state.undo.append(_clear_caches)
    _hook(_linear(layer, name), lambda _, y: torch.full_like(y, torch.nan))


def head(layer: int, head: int, value: float | None = 0.0) -> None:
    """The outputs of one attention head are another value before o_proj; None: they are not a number."""
    attention = _layers()[layer].self_attn
    columns = slice(head * attention.head_dim, (head + 1) * attention.head_dim)

    def hook(_: Any, inputs: Any) -> Any:
        x = inputs[0].clone()
        x[..., columns] = torch.nan if value is None else value
        return (x, *inputs[1:])

    if value is None:
        _state.undo.append(_clear_caches)
    _state.undo.append(attention.o_proj.register_forward_pre_hook(hook).remove)


def token_zero(streams: int = 8) -> None:
    """From so many requests in the batch on, all of them get token 0 for ever."""
    model = _state.runner.model
    compute = model.compute_logits

    def logits(hidden: torch.Tensor, *more: Any, **named: Any) -> Any:
        values = compute(hidden, *more, **named)
        if values is not None and len(_parts()) >= streams:
            values = torch.full_like(values, -30.0)
            values[..., 0] = 30.0
        return values

    model.compute_logits = logits
    _state.undo.append(lambda: setattr(model, "compute_logits", compute))


KINDS = {
    "head": head,
    "token_zero": token_zero,
    "weights": weights,
    "kv_cast": kv_cast,
    "stale_prefix": stale_prefix,
    "batch": batch,
    "chunk": chunk,
    "decoding": decoding,
    "not_a_number": not_a_number,
}


class Faults:
    """Methods of the worker."""

    def inject(self, text: str) -> None:
        """text: JSON, a list of the kind and its arguments by name; [] for none."""
        if _state.runner is None:
            _state.runner = runner = self.model_runner  # type: ignore[attr-defined]
            execute_model = runner.execute_model

            def execute(scheduled: Any, *more: Any, **named: Any) -> Any:
                _state.scheduled = scheduled.num_scheduled_tokens
                new = scheduled.scheduled_new_reqs
                _state.resumed = {request.req_id for request in new if request.num_computed_tokens}
                if _state.before is not None:
                    _state.before(scheduled)
                return execute_model(scheduled, *more, **named)

            runner.execute_model = execute
        while _state.undo:
            _state.undo.pop()()
        _state.before = None
        if asked := json.loads(text):
            kind, named = asked
            KINDS[kind](**named)
