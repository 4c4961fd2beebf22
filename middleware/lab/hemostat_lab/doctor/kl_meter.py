"""KL(r‖c) of altered models on the same tokens. Torch."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from hemostat_lab.doctor.checkpoints import kl, noise_floor, pieces, sequence_of, to_floats
from hemostat_lab.doctor.estimates import Sample
from hemostat_lab.doctor.pair import Floats, Ids

MIN_PROMPTS = 16
"""The token budget is spread over at least this many prompts, or over all."""


@dataclass(frozen=True, slots=True)
class Text:
    """A prompt and the first scored tokens after it."""

    prompt: Ids
    output: Ids

    def sequence(self, device: torch.device) -> torch.Tensor:
        return sequence_of(self.prompt, self.output, device)


def choose(texts: Sequence[Text], budget: int) -> list[Text]:
    """The first prompts, with `budget` tokens in total, spread over at least MIN_PROMPTS of them."""
    each = max(1, -(-budget // min(MIN_PROMPTS, len(texts))))
    chosen: list[Text] = []
    left = budget
    for text in texts:
        take = min(each, left, len(text.output))
        if take <= 0:
            break
        chosen.append(Text(text.prompt, text.output[:take]))
        left -= take
    return chosen


class KlMeter:
    """The reference's logits on `texts`, with which other models are compared. sample: the request of each token."""

    def __init__(self, reference: Any, texts: Sequence[Text], device: torch.device) -> None:
        """`reference` is run at the first measurement, as it is then."""
        self.texts = texts
        self.sample = Sample(np.repeat(np.arange(len(texts)), [len(text.output) for text in texts]), len(texts))
        self._reference = reference
        self._device = device
        self._logits: list[torch.Tensor] = []

    def prepare(self) -> None:
        """Run the reference now: before it is altered."""
        if not self._logits:
            # Kept on the CPU, in the model's dtype: the device already holds two models.
            self._logits = [logits_of(self._reference, text, self._device).cpu() for text in self.texts]

    def measure(self, model: Any) -> Floats:
        """KL(r‖model) in nats, float64 [N], of all tokens."""
        self.prepare()
        result = [
            to_floats(kl(r, logits_of(model, text, self._device)))
            for text, r in zip(self.texts, self._logits, strict=True)
        ]
        return np.concatenate(result)

    def floor(self) -> Floats:
        """The reference's noise floor, float64 [N]; fewer where texts have a single id, none without a state."""
        self.prepare()
        result = [
            noise_floor(self._reference, text.sequence(self._device), len(text.prompt) - 1, r)
            for text, r in zip(self.texts, self._logits, strict=True)
        ]
        return np.concatenate([np.empty(0), *(values for values in result if values is not None)])


def logits_of(model: Any, text: Text, device: torch.device) -> torch.Tensor:
    """[T, V] at the positions that predict the output."""
    return next(pieces(model, text.sequence(device), len(text.prompt) - 1, []))


@contextmanager
def altered_weights(modules: Mapping[str, Any], change: Callable[[str, torch.Tensor], torch.Tensor]) -> Iterator[None]:
    """Inside of the context every module has what `change` makes of its name and weight; then the same tensor again."""
    originals = {name: module.weight.data for name, module in modules.items()}
    try:
        for name, module in modules.items():
            module.weight.data = change(name, originals[name])
        yield
    finally:
        for name, module in modules.items():
            module.weight.data = originals[name]
