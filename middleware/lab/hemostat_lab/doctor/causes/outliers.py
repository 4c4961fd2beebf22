"""Outliers of weights and activations, and attention sinks. Torch.

- Of weights: input or output channels that hold much of a layer's error, each weight's error being weighted by the mean
  square of the input that it is multiplied by: Σ_i ΔW_ij² E[x_j²].
- Of activations: input channels with magnitudes far above the median (Dettmers et al. 2022, arXiv 2208.07339), and the
  crest factor of a token, its largest magnitude relative to its root mean square: rounding a token's inputs to 8 bits
  (W8A8) has an error of about crest / (127 √12) relative to them (Xiao et al. 2022, arXiv 2211.10438).
- Sinks: first positions whose hidden states are far larger than others (Sun et al. 2024, arXiv 2402.17762), and the
  attention that they get (Xiao et al. 2023, arXiv 2309.17453).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import numpy as np
import torch

from hemostat_lab.doctor.causes.distances import hidden_state
from hemostat_lab.doctor.causes.units import layer_pairs
from hemostat_lab.doctor.checkpoints import CheckpointPair
from hemostat_lab.doctor.estimates import Sample
from hemostat_lab.doctor.kl_meter import Text
from hemostat_lab.doctor.pair import json_number

TOP_SHARE = 0.01
"""Of the channels: how much of the error they hold is reported."""
INT8_STEPS = 127
MAX_ATTENTION_TEXTS = 8
"""For attention, which is computed by the plain implementation: memory grows with the square of the length."""


def outlier_report(pair: CheckpointPair, texts: Sequence[Text]) -> dict[str, Any]:
    """The report's `outliers`, from the reference's activations at all positions of `texts`. Raises Incomparable."""
    with torch.inference_mode():
        r_layers, c_layers = layer_pairs(pair.reference_model, pair.compressed_model)
        inputs, norms = _observe(pair, r_layers, texts)
        return {
            "requests": len(texts),
            "positions": sum(len(text.prompt) + len(text.output) - 1 for text in texts),
            "modules": [
                _module_row(n, name, seen, dict(r.named_modules())[name], dict(c.named_modules()).get(name))
                for n, (r, c) in enumerate(zip(r_layers, c_layers, strict=True))
                for name, seen in inputs[n].items()
            ],
            "sinks": _sinks(norms, _first_attention(pair, texts)),
        }


class _Inputs:
    """What one linear layer reads. squares: Σ x², float64 [inputs]. crests: of each token, by request."""

    def __init__(self) -> None:
        self.squares: torch.Tensor | None = None
        self.crests: list[np.ndarray[Any, np.dtype[np.float64]]] = []

    def add(self, given: torch.Tensor) -> None:
        """Inputs [..., n, d] of one text."""
        rows = given.reshape(-1, given.shape[-1]).float()
        squares = rows.square()
        total = squares.sum(0, dtype=torch.float64).cpu()
        self.squares = total if self.squares is None else self.squares + total
        rms = squares.mean(-1).sqrt().clamp_min(torch.finfo(torch.float32).tiny)
        self.crests.append((rows.abs().amax(-1) / rms).double().cpu().numpy())

    @property
    def tokens(self) -> int:
        return sum(map(len, self.crests))


def _observe(
    pair: CheckpointPair, r_layers: Any, texts: Sequence[Text]
) -> tuple[list[dict[str, _Inputs]], list[list[torch.Tensor]]]:
    """By layer: the inputs of its linear layers by name, and the norms [positions] of the hidden states after it."""
    inputs: list[dict[str, _Inputs]] = [
        {name: _Inputs() for name, module in layer.named_modules() if isinstance(module, torch.nn.Linear)}
        for layer in r_layers
    ]
    norms: list[list[torch.Tensor]] = [[] for _ in r_layers]

    def reads(seen: _Inputs) -> Callable[..., None]:
        return lambda module, arguments, output: seen.add(arguments[0])

    def writes(n: int) -> Callable[..., None]:
        def see(module: Any, arguments: Any, output: Any) -> None:
            norms[n].append(hidden_state(output)[0].float().norm(dim=-1).cpu())

        return see

    with ExitStack() as stack:
        for n, layer in enumerate(r_layers):
            stack.callback(layer.register_forward_hook(writes(n)).remove)
            for name, seen in inputs[n].items():
                stack.callback(layer.get_submodule(name).register_forward_hook(reads(seen)).remove)
        for text in texts:
            pair.reference_model(input_ids=text.sequence(pair.device)[None], use_cache=False)
    return inputs, norms


def _module_row(layer: int, name: str, seen: _Inputs, r: Any, c: Any) -> dict[str, Any]:
    row: dict[str, Any] = {"layer": layer, "module": name}
    if seen.squares is None:  # such as an expert that no token was routed to
        return row
    squares = seen.squares / seen.tokens
    rms = squares.sqrt()
    crests = np.concatenate(seen.crests)
    sample = Sample(np.repeat(np.arange(len(seen.crests)), [len(crest) for crest in seen.crests]), len(seen.crests))
    crest = sample.mean(crests)
    # Uniform rounding error of a step absmax / 127: variance step² / 12.
    int8 = sample.mean(crests**2 / (INT8_STEPS**2 * 12))
    median = float(rms.median())
    row |= {
        "channel_ratio": json_number(float(rms.max()) / median) if median > 0 else None,
        "channel": int(rms.argmax()),
        "crest": json_number(crest.value),
        "crest_se_by_request": json_number(crest.by_request),
        "crest_max": json_number(crests.max()),
        "int8_error": json_number(math.sqrt(int8.value)),
    }
    weight = getattr(c, "weight", None)
    if weight is None or weight.shape != r.weight.shape or not weight.is_floating_point():
        return row
    delta = r.weight.float() - weight.float()
    energy = delta.square().double().cpu() * squares
    by_input, by_output = energy.sum(0), energy.sum(1)
    return row | {
        "weight_error": json_number(float(delta.norm() / r.weight.float().norm())),
        "inputs_share": _top_share(by_input),
        "input": int(by_input.argmax()),
        "outputs_share": _top_share(by_output),
        "output": int(by_output.argmax()),
    }


def _top_share(energy: torch.Tensor) -> float | None:
    """Share of the total in the TOP_SHARE largest entries; None where there is no error."""
    total = float(energy.sum())
    count = math.ceil(TOP_SHARE * len(energy))
    return json_number(float(energy.topk(count).values.sum()) / total) if total > 0 else None


def _sinks(norms: Sequence[Sequence[torch.Tensor]], attention: Sequence[Sequence[float]]) -> list[dict[str, Any]]:
    """By layer: the norm at the first position relative to the median of the others, and its share of attention; means
    over texts."""
    rows = []
    for n, texts in enumerate(norms):
        ratios = np.array([float(text[0] / text[1:].median()) for text in texts if len(text) > 1])
        shares = np.array(attention[n]) if n < len(attention) else np.empty(0)
        rows.append({"layer": n, **_by_text("first_norm_ratio", ratios), **_by_text("first_attention", shares)})
    return rows


def _by_text(name: str, values: Any) -> dict[str, float | None]:
    estimate = Sample(np.arange(len(values)), len(values)).mean(values)
    return {name: json_number(estimate.value), f"{name}_se_by_request": json_number(estimate.by_request)}


def _first_attention(pair: CheckpointPair, texts: Sequence[Text]) -> list[list[float]]:
    """By layer and text: the attention that later positions give to the first one, a mean over heads and positions.
    Empty where the model has no attention, or does not return it."""
    result: list[list[float]] = []
    with _plain_attention(pair.reference_model) as possible:
        for text in texts[:MAX_ATTENTION_TEXTS] if possible else ():
            sequence = text.sequence(pair.device)[None]
            if sequence.shape[1] < 2:
                continue
            answer = pair.reference_model(input_ids=sequence, use_cache=False, output_attentions=True)
            layers = getattr(answer, "attentions", None) or ()
            if any(weights is None for weights in layers):
                return []
            result = result or [[] for _ in layers]
            for values, weights in zip(result, layers, strict=True):
                values.append(float(weights[0, :, 1:, 0].float().mean()))
    return result


@contextmanager
def _plain_attention(model: Any) -> Iterator[bool]:
    """Inside of the context the model computes attention so that it can be returned; False where it cannot."""
    before = getattr(model.config, "_attn_implementation", None)
    if before is None or not hasattr(model, "set_attn_implementation"):
        yield False
        return
    try:
        model.set_attn_implementation("eager")
    except (ValueError, ImportError):
        yield False
        return
    try:
        yield True
    finally:
        model.set_attn_implementation(before)
