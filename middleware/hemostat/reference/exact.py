"""Scores of given tokens by a causal language model of transformers, at full vocabulary. Torch, no IO."""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from hemostat_calibration.allowed_sets import AllowedSets

Floats = npt.NDArray[np.float64]
Ids = npt.NDArray[np.int32]

CHUNK_ELEMENTS = 1 << 24
"""Entries of one float32 log-softmax (64 MiB): positions are taken in chunks of this size."""


PROBE_TOKENS = 8
PROBE_IDS = 4096
MAX_NONLINEARITY = 0.01
"""Difference from W h, relative to the largest logit, that still counts as rounding (bfloat16 has 8 bits). A softcap
that changes logits by less than that does not matter."""


@dataclass(frozen=True, slots=True)
class Basis:
    """The function clip(up[v] · code, ±clamp) of the token v. up: float16 [V, r] on the model's device."""

    up: torch.Tensor
    clamp: float


@dataclass(frozen=True, slots=True)
class ExactScores:
    """at, top_logprobs: float64 [T, K]; top_ids: int32 [T, K]; emitted, entropy, expected[name]: float64 [T]; nats.

    hidden: float32 [T, d], the input of the output embedding; None where not requested.
    """

    at: Floats
    top_ids: Ids
    top_logprobs: Floats
    emitted: Floats
    entropy: Floats
    expected: dict[str, Floats]
    hidden: npt.NDArray[np.float32] | None = None


def nonlinearity(model: Any) -> str:
    """Why the model's logits are not W h, with its output embedding W and that layer's input h; "" when they are."""
    head = model.get_output_embeddings()
    if head is None or getattr(head, "weight", None) is None:
        return "it has no output embedding"
    if getattr(head, "bias", None) is not None:
        return "its output embedding has a bias"
    vocab_size = head.weight.shape[0]
    ids = torch.arange(1, 1 + PROBE_TOKENS, device=model.device) % vocab_size
    with torch.inference_mode(), _hidden_states(model) as caught:
        logits = model(input_ids=ids[None], use_cache=False).logits[0, -1].float()
        some = torch.arange(0, vocab_size, max(1, vocab_size // PROBE_IDS), device=model.device)
        if logits.shape != (vocab_size,):
            return f"it gives {logits.shape[-1]} logits, its output embedding has {vocab_size} rows"
        off = head.weight[some].float() @ caught[0][0, -1].float() - logits[some]
    largest = float(logits.abs().max())
    if not float(off.abs().max()) <= MAX_NONLINEARITY * largest:
        return "its logits are scaled or capped after the output embedding"
    return ""


@contextlib.contextmanager
def _hidden_states(model: Any) -> Iterator[list[torch.Tensor]]:
    """Collects the input of the output embedding, [1, T, d] for each call of the model inside the context."""
    caught: list[torch.Tensor] = []
    hook = model.get_output_embeddings().register_forward_pre_hook(lambda _, given: caught.append(given[0]))
    try:
        yield caught
    finally:
        hook.remove()


def score(
    model: Any,
    prompt: Ids,
    output: Ids,
    ids: Ids,
    functionals: Mapping[str, torch.Tensor | Basis],
    codes: Mapping[str, npt.NDArray[np.float32]] = MappingProxyType({}),
    *,
    hidden: bool = False,
    reshaped: bool = False,
    allowed: AllowedSets | None = None,
    see: Callable[[slice, torch.Tensor], None] | None = None,
) -> ExactScores:
    """Score `output` [T] after `prompt` [P], P and T ≥ 1, also at `ids` [T, K] (-1 pads: NaN there).

    functionals: name -> float32 [V] on the model's device, or a basis; `expected` is E_r of each at every position.
    codes: of every basis, [T, r].
    reshaped: as a server might compute it: in a batch of two, in two chunks, the second on the first one's KV cache.
    allowed: everything is conditional on these ids: -inf at all others, which are not in `top_ids` (-1 pads).
    see: called for some positions after the other with their log-probabilities, float32 [n, V].
    ValueError when an id is not in the vocabulary, or a functional does not fit it or its code, or `allowed` fits
    neither the vocabulary nor T.
    """
    with torch.inference_mode():
        return _score(
            model,
            prompt,
            output,
            ids,
            functionals,
            codes,
            hidden=hidden,
            reshaped=reshaped,
            allowed=allowed,
            see=see,
        )


def _score(
    model: Any,
    prompt: Ids,
    output: Ids,
    ids: Ids,
    functionals: Mapping[str, torch.Tensor | Basis],
    codes: Mapping[str, npt.NDArray[np.float32]],
    *,
    hidden: bool,
    reshaped: bool,
    allowed: AllowedSets | None,
    see: Callable[[slice, torch.Tensor], None] | None,
) -> ExactScores:
    tokens = len(output)
    # The logits after the last output token predict a token that is not scored.
    sequence = torch.from_numpy(np.concatenate([prompt, output[:-1]]).astype(np.int64)).to(model.device)
    keep = {"logits_to_keep": tokens} if "logits_to_keep" in inspect.signature(model.forward).parameters else {}
    # Position P - 1 + t predicts output[t]: the last T of the P + T - 1.
    with contextlib.ExitStack() as stack:
        caught = stack.enter_context(_hidden_states(model)) if hidden else []
        if reshaped and len(sequence) > 1:
            logits = _in_two_pieces(model, sequence)[-tokens:]
        else:
            logits = model(input_ids=sequence[None], use_cache=False, **keep).logits[0, -tokens:]
    vocab_size = logits.shape[-1]
    largest = max(int(ids.max(initial=-1)), int(output.max()))
    if largest >= vocab_size or int(output.min()) < 0:
        raise ValueError(f"token id {largest} is not in the reference's vocabulary of {vocab_size}")

    if allowed is not None and (allowed.vocab_size, allowed.tokens) != (vocab_size, tokens):
        raise ValueError(
            f"the allowed ids are of a vocabulary of {allowed.vocab_size}, the reference's is {vocab_size}"
        )
    for name, functional in functionals.items():
        _check(name, functional, codes.get(name), tokens, vocab_size)
    width = ids.shape[1]
    top = min(width, vocab_size)
    scores = ExactScores(
        at=np.full((tokens, width), np.nan),
        top_ids=np.full((tokens, width), -1, np.int32),
        top_logprobs=np.full((tokens, width), -np.inf),
        emitted=np.empty(tokens),
        entropy=np.empty(tokens),
        expected={name: np.empty(tokens) for name in functionals},
        hidden=caught[0][0, -tokens:].float().cpu().numpy() if caught else None,
    )
    # float32 only during this call: eight of them would take too much memory.
    ups = {name: f.up.float().T for name, f in functionals.items() if isinstance(f, Basis)}
    chunk = max(1, CHUNK_ELEMENTS // vocab_size)
    for start in range(0, tokens, chunk):
        rows = slice(start, min(start + chunk, tokens))
        scored = logits[rows].float()
        if allowed is not None:
            scored = scored.masked_fill(~torch.from_numpy(allowed.mask(rows)).to(scored.device), -torch.inf)
        logprobs = torch.log_softmax(scored, dim=-1)
        if see is not None:
            see(rows, logprobs)
        asked = torch.from_numpy(ids[rows].astype(np.int64)).to(logprobs.device)
        given = logprobs.gather(1, asked.clamp_min(0)).masked_fill(asked < 0, torch.nan)
        scores.at[rows] = _numpy(given)
        emitted = torch.from_numpy(output[rows].astype(np.int64)).to(logprobs.device)
        scores.emitted[rows] = _numpy(logprobs.gather(1, emitted[:, None])[:, 0])
        best = logprobs.topk(top, dim=-1)
        scores.top_ids[rows, :top] = best.indices.masked_fill(best.values == -torch.inf, -1).cpu().numpy()
        scores.top_logprobs[rows, :top] = _numpy(best.values)
        probabilities = logprobs.exp()
        for name, functional in functionals.items():
            if isinstance(functional, Basis):
                code = torch.from_numpy(codes[name][rows]).to(logprobs.device)
                shift = (code @ ups[name]).clamp_(-functional.clamp, functional.clamp)
                scores.expected[name][rows] = _numpy((probabilities * shift).sum(-1))
            else:
                scores.expected[name][rows] = _numpy(probabilities @ functional)
        # p log p is 0 where p is 0, also where log p is -inf.
        terms = torch.where(probabilities > 0, probabilities * logprobs, 0.0)
        scores.entropy[rows] = _numpy(-terms.sum(-1))
    return scores


def _in_two_pieces(model: Any, sequence: torch.Tensor) -> torch.Tensor:
    batch = sequence.expand(2, -1)
    cut = len(sequence) // 2
    first = model(input_ids=batch[:, :cut], use_cache=True)
    second = model(input_ids=batch[:, cut:], past_key_values=first.past_key_values, use_cache=True)
    return torch.cat([first.logits[0], second.logits[0]])


def _check(
    name: str,
    functional: torch.Tensor | Basis,
    code: npt.NDArray[np.float32] | None,
    tokens: int,
    vocab_size: int,
) -> None:
    values = functional.up if isinstance(functional, Basis) else functional
    if values.shape[0] != vocab_size:
        raise ValueError(f"{name} is for {values.shape[0]} ids: the reference has a vocabulary of {vocab_size}")
    if isinstance(functional, Basis) and (code is None or code.shape != (tokens, values.shape[1])):
        got = "none" if code is None else code.shape
        raise ValueError(f"the code of {name} has shape {got}: it must be {(tokens, values.shape[1])}")


def _numpy(tensor: torch.Tensor) -> Floats:
    values: Floats = tensor.double().cpu().numpy()
    return values
