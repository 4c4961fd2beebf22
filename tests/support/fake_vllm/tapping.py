"""What Hemostat's plugin in vLLM's API server hands out of a generation that asks for it."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from tests.support.fake_vllm.model import Step

from hemostat.engines.messages import TapAnswer

if TYPE_CHECKING:
    from tests.support.fake_vllm.generation import Generation


def answers_of(generation: Generation, top: int) -> list[TapAnswer]:
    """One for each choice that has ended. top: candidates at each position, beside the emitted one."""
    nonce = generation.body["vllm_xargs"]["hemostat_tap"]
    each = len(generation.choices) // len(generation.prompts)
    result = []
    for choice, steps in zip(generation.choices, generation.steps, strict=True):
        if not steps or steps[-1].finish is None:
            continue
        rows = [_row(step, top) for step in steps]
        call, index = divmod(choice.index, each)
        result.append(
            TapAnswer(
                nonce,
                call,
                index,
                each,
                np.array(choice.prompt, "<i4").tobytes(),
                np.array([step.token for step in steps], "<i4").tobytes(),
                top,
                np.array([ids for ids, _ in rows], "<i4").tobytes(),
                np.array([values for _, values in rows], "<f4").tobytes(),
                np.array([step.logprobs[step.token] for step in steps], "<f4").tobytes(),
                steps[-1].finish,
            )
        )
    return result


def _row(step: Step, top: int) -> tuple[list[int], list[float]]:
    order = np.argsort(-step.logprobs, kind="stable")[:top].tolist()
    ids = order if step.token in order else [*order, step.token]
    pad = top + 1 - len(ids)
    return [*ids, *[-1] * pad], [*(float(step.logprobs[i]) for i in ids), *[-np.inf] * pad]
