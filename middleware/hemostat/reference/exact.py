"""Scores of given tokens by a causal language model of transformers, at full vocabulary. Torch, no IO."""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from types import MappingProxyType
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from hemostat.checkpoints.piecewise import PiecewiseReader
from hemostat.reference.full_scores import Basis, ExactScores, check_request, chunks
from hemostat_calibration.allowed_sets import AllowedSets
from hemostat_calibration.arrays import Floats, Ids

PROBE_TOKENS = 8
PROBE_IDS = 4096
MAX_NONLINEARITY = 0.01
"""The difference from W h, relative to the largest logit, that still counts as rounding (bfloat16 has 8 bits). A
softcap that changes logits by less than that does not matter."""


def nonlinearity(model: Any) -> str:
    """Returns why the model's logits are not W h, with its output embedding W and that layer's input h; "" if they
    are.
    """
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
    """Yields a list that collects the input of the output embedding, [1, T, d] for each call of the model inside the
    context."""
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
    bases: Mapping[str, Basis],
    codes: Mapping[str, npt.NDArray[np.float32]] = MappingProxyType({}),
    *,
    hidden: bool = False,
    reshaped: bool = False,
    allowed: AllowedSets | None = None,
    see: Callable[[slice, torch.Tensor], None] | None = None,
) -> ExactScores:
    """Returns the scores of `output` [T] after `prompt` [P], P and T ≥ 1, also at `ids` [T, K] (-1 pads: NaN there).

    bases: by name, on the model's device; `expected` is E_r of each at every position. codes: of every basis, [T, r].
    reshaped: as a server might compute it: in a batch of two, in two pieces, the second on the state (KV cache) of the
        first one.
    allowed: everything is conditional on these ids: -inf at all others, which are not in `top_ids` (-1 pads).
    see: called for some positions after the other with their log-probabilities, float32 [n, V]. Raises ValueError if an
    id is not in the vocabulary, or a basis does not fit it or its code, or `allowed` fits neither the vocabulary nor T.
    """
    with torch.inference_mode():
        return _score(
            model,
            prompt,
            output,
            ids,
            bases,
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
    bases: Mapping[str, Basis],
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
    scores = scores_of(
        lambda rows: logits[rows].float(),
        logits.shape[-1],
        output,
        ids,
        bases,
        codes,
        allowed=allowed,
        see=see,
    )
    return replace(scores, hidden=caught[0][0, -tokens:].float().cpu().numpy()) if caught else scores


def scores_of(
    logits: Callable[[slice], torch.Tensor],
    vocab_size: int,
    output: Ids,
    ids: Ids,
    bases: Mapping[str, Basis],
    codes: Mapping[str, npt.NDArray[np.float32]],
    *,
    allowed: AllowedSets | None = None,
    see: Callable[[slice, torch.Tensor], None] | None = None,
) -> ExactScores:
    """Returns the scores of `score` from the logits that predict `output`.

    logits: float32 [n, V] of these positions, on any device; called once for each chunk of them.
    """
    tokens, width = ids.shape
    check_request(vocab_size, output, ids, bases, codes, allowed)
    top = min(width, vocab_size)
    scores = ExactScores.empty(tokens, width, bases)
    # float32 only during this call: eight of them would take too much memory.
    ups = {name: basis.up.float().T for name, basis in bases.items()}
    for rows in chunks(tokens, vocab_size):
        scored = logits(rows)
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
        for name, basis in bases.items():
            code = torch.from_numpy(codes[name][rows]).to(logprobs.device)
            shift = (code @ ups[name]).clamp_(-basis.clamp, basis.clamp)
            scores.expected[name][rows] = _numpy((probabilities * shift).sum(-1))
        # p log p is 0 where p is 0, also where log p is -inf.
        terms = torch.where(probabilities > 0, probabilities * logprobs, 0.0)
        scores.entropy[rows] = _numpy(-terms.sum(-1))
    return scores


def _in_two_pieces(model: Any, sequence: torch.Tensor) -> torch.Tensor:
    """Returns the logits of the model in two pieces, [L, V]."""
    batch = sequence.expand(2, -1)
    reader = PiecewiseReader(model)
    return torch.cat([reader.read(piece)[0] for piece in batch.tensor_split([len(sequence) // 2], dim=1)])


def _numpy(tensor: torch.Tensor) -> Floats:
    values: Floats = tensor.double().cpu().numpy()
    return values
