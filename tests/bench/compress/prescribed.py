"""A prescribed mix of bits beside uniform bits of equal bytes: KL(r‖c) over the whole vocabulary, on held-out topics.

The statistics are of texts that the reference wrote on other topics. Every layer is rounded to nearest, as
`hemostat compress` does without data. `python -m tests.bench.compress.prescribed` prints the rows by itself.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from tests.bench.recovery.prompts import Prompt, open_ended
from transformers import AutoModelForCausalLM, AutoTokenizer

from hemostat.doctor.kl_meter import KlMeter, Text
from hemostat.doctor.options import Target
from hemostat.doctor.prescription.losses import LayerLosses, predicted_losses
from hemostat.doctor.prescription.mixes import Mix, carried_out, prescribe, uniform_mixes
from hemostat.models.adapters.parts import Parts
from hemostat.models.compression.plan import LayerPlan
from hemostat.models.generation import generate
from hemostat.models.reference_checkpoint import cached_checkpoints

NAME = "prescribed"
CASES: tuple[tuple[Target, int], ...] = (("vllm", 4), ("any", 4), ("any", 5), ("any", 6))
"""What serves the mix, and the uniform bits, in groups of 64, whose bytes it may have."""
GROUP = 64


@dataclass(frozen=True, slots=True)
class Row:
    """KL in nats per token. more: the uniform mix minus the prescribed one, token by token; half_width: 95 %, by topic.
    holds: the prescribed mix is below, and the interval does not include 0."""

    case: str
    prescribed: float
    uniform: float
    more: float
    half_width: float
    predicted_prescribed: float
    predicted_uniform: float
    bytes_prescribed: int
    bytes_uniform: int
    tokens: int
    topics: int
    holds: bool


def rows(learned: int, held_out: int, tokens: int, seed: int = 0) -> Iterator[Row]:
    """learned, held_out: number of texts, one for each topic. tokens: written by the reference, of each text."""
    reference = cached_checkpoints().reference
    model = AutoModelForCausalLM.from_pretrained(reference, dtype="auto").eval()
    tokenizer = AutoTokenizer.from_pretrained(reference)
    prompts = open_ended()
    learn = _texts(model, tokenizer, _by_topic(prompts, False)[:learned], tokens, seed)
    held = _texts(model, tokenizer, _by_topic(prompts, True)[:held_out], tokens, seed + 1)
    meter = KlMeter(model, held, model.device, model.config.vocab_size)
    by_topic = meter.sample  # one text for each topic

    def measure(mix: Mix) -> Any:
        with torch.inference_mode(), carried_out(model, mix):
            return meter.measure(model)

    with torch.inference_mode():
        meter.prepare()
    ids = [np.concatenate([text.prompt, text.output]) for text in learn]
    losses: dict[str, Mapping[str, LayerLosses]] = {}
    measured: dict[int, Any] = {}
    for target, bits in CASES:
        if target not in losses:
            losses[target] = predicted_losses(reference, ids, target, "cpu", seed, Parts(None), lambda *_: None)
        plan = LayerPlan(bits, GROUP)
        uniform = next(mix for one, mix in uniform_mixes(losses[target], sys.maxsize) if one == plan)
        mix, _ = prescribe(losses[target], target, uniform.size)
        if bits not in measured:
            measured[bits] = measure(uniform)
        prescribed = measure(mix)
        more = by_topic.mean(measured[bits] - prescribed)
        yield Row(
            f"{target} at the bytes of {plan.name}",
            float(prescribed.mean()),
            float(measured[bits].mean()),
            more.value,
            1.96 * more.by_request,
            mix.predicted,
            uniform.predicted,
            mix.size,
            uniform.size,
            len(prescribed),
            by_topic.requests,
            bool(more.value > 1.96 * more.by_request),
        )


def _by_topic(prompts: Sequence[Prompt], held_out: bool) -> list[Prompt]:
    """The first prompt of each topic."""
    first: dict[str, Prompt] = {}
    for prompt in prompts:
        if prompt.heldout == held_out:
            first.setdefault(prompt.topic, prompt)
    return list(first.values())


def _texts(model: Any, tokenizer: Any, prompts: Sequence[Prompt], tokens: int, seed: int) -> list[Text]:
    """Written by the model, sampled at temperature 1."""
    ids = [
        np.array(
            tokenizer.apply_chat_template(
                [{"role": "user", "content": prompt.text}], add_generation_prompt=True, return_dict=False
            ),
            np.int32,
        )
        for prompt in prompts
    ]
    uniforms = [np.random.default_rng([seed, n]).random(tokens) for n in range(len(ids))]
    with torch.inference_mode():
        outputs = generate(model, ids, [tokens] * len(ids), uniforms, frozenset({int(tokenizer.eos_token_id)}))
    return [Text(prompt, output) for prompt, output in zip(ids, outputs, strict=True)]


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--learned", type=int, default=20, help="texts that the statistics are of")
    parser.add_argument("--held-out", type=int, default=30, help="texts that the mixes are measured on")
    parser.add_argument("--tokens", type=int, default=48, help="written by the reference, of each text")
    arguments = parser.parse_args(argv)
    found = []
    for row in rows(arguments.learned, arguments.held_out, arguments.tokens):
        print(json.dumps(asdict(row)), flush=True)
        found.append(row)
    return 0 if all(row.holds for row in found) else 1


if __name__ == "__main__":
    sys.exit(main())
