"""A stand-in for vLLM's AsyncLLM, which yields vLLM's own outputs."""

from __future__ import annotations

import asyncio
import warnings
from collections.abc import AsyncGenerator
from types import SimpleNamespace
from typing import Any

from vllm import SamplingParams
from vllm.logprobs import append_logprobs_for_next_position, create_sample_logprobs
from vllm.sampling_params import RequestOutputKind

with warnings.catch_warnings():
    warnings.simplefilter("ignore", DeprecationWarning)  # of torch, in what this imports
    from vllm.outputs import CompletionOutput, RequestOutput

PROMPT = [5, 6, 7]
TOP = {0: (-0.5, 3), 1: (-1.0, 4), 2: (-3.0, 9)}
"""Rank -> log-probability and id; the same at each position."""


def logprobs_of(ids: list[int], top: int | None, flat: bool) -> Any:
    """As vLLM builds them: the sampled id first, then the `top` most likely ones."""
    if top is None:
        return None
    container = create_sample_logprobs(flat)
    known = {i: value for value, i in TOP.values()}
    for emitted in ids:
        row = [(emitted, known.get(emitted, -7.0)), *((i, value) for value, i in list(TOP.values())[:top])]
        append_logprobs_for_next_position(
            container, [i for i, _ in row], [value for _, value in row], [None] * len(row), 1, top
        )
    return container


class Engine:
    """`generate` yields the pieces of each choice as vLLM does for the parameters that it gets."""

    def __init__(self, choices: list[list[list[int]]], max_logprobs: int = 20) -> None:
        self.model_config = SimpleNamespace(max_logprobs=max_logprobs)
        self.choices = choices
        self.given: list[SamplingParams] = []
        self.closed = False

    async def generate(
        self, prompt: Any, sampling_params: SamplingParams, request_id: str
    ) -> AsyncGenerator[RequestOutput, None]:
        self.given.append(sampling_params)
        try:
            for index, pieces in enumerate(self.choices):
                for position, ids in enumerate(pieces):
                    last = position == len(pieces) - 1
                    logprobs = logprobs_of(ids, sampling_params.logprobs, sampling_params.flat_logprobs)
                    cumulative = None if sampling_params.logprobs is None else -1.0
                    output = CompletionOutput(
                        index, "", ids, cumulative, logprobs, finish_reason="stop" if last else None
                    )
                    yield RequestOutput(request_id, None, PROMPT, None, [output], last)
                    await asyncio.sleep(0)
        finally:
            self.closed = True


def params(xargs: dict[str, Any] | None = None, **more: Any) -> SamplingParams:
    more.setdefault("output_kind", RequestOutputKind.DELTA)
    return SamplingParams(extra_args=xargs, **more)
