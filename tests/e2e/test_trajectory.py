"""The predicted length of the common greedy prefix against greedy texts that both real models really write."""

import json
from importlib import resources

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from hemostat_calibration.divergence.trajectory import Survival

TOKENS = 23
"""One of the positions at which the survival is kept."""
REQUESTS = 30
PROMPT = 16
"""Tokens of every prompt: a text is cut there and gone on with, so that the test is short."""


class Pair:
    """Both checkpoints in float32: in bfloat16 near-ties fall one way in a batch and another way outside it."""

    def __init__(self, checkpoints):
        self.reference, self.compressed = (
            AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
            for path in (checkpoints.reference, checkpoints.compressed)
        )
        self.end = self.reference.config.eos_token_id

    def write(self, model, prompts):
        """Greedy text, int [requests, TOKENS]; never ended early, so that every length is observed."""
        with torch.inference_mode():
            ids = model.generate(
                prompts,
                attention_mask=torch.ones_like(prompts),
                do_sample=False,
                max_new_tokens=TOKENS,
                min_new_tokens=TOKENS,
                pad_token_id=self.end,
            )
        return ids[:, PROMPT:]

    def choices(self, model, prompts, text):
        """What `model` would write after each prefix of `text`."""
        with torch.inference_mode():
            logits = model(torch.cat([prompts, text], dim=1), logits_to_keep=TOKENS + 1).logits[:, :-1]
            logits[:, :, self.end] = -torch.inf
            return logits.argmax(-1)


def prompts_of(checkpoints):
    """int [2 × REQUESTS, PROMPT]: the beginnings of what the demo's users say."""
    tokenizer = AutoTokenizer.from_pretrained(checkpoints.reference)
    lines = (resources.files("hemostat.gate") / "prompts.jsonl").read_text().splitlines()
    texts = [json.loads(line)["messages"][-1]["content"] for line in lines]
    ids = [ids[:PROMPT] for ids in tokenizer(texts).input_ids if len(ids) >= PROMPT]
    return torch.tensor(ids[: 2 * REQUESTS])


@pytest.mark.slow
def test_the_predicted_prefix_is_what_greedy_texts_share(checkpoints):
    """Predicted on one set of prompts, the reference only reading the compressed model's text; observed on another,
    both writing. The two means differ by no more than the intervals of both allow, and prompt by prompt the first
    disagreement that is read is where the texts part."""
    prompts = prompts_of(checkpoints)
    learned, held_out = prompts[0::2], prompts[1::2]
    assert len(learned) == len(held_out) == REQUESTS
    pair = Pair(checkpoints)
    state = Survival()
    text = pair.write(pair.compressed, learned)
    for agrees in (pair.choices(pair.reference, learned, text) == text).double().numpy():
        state = state.update(agrees)
    predicted = state.get(TOKENS)

    text = pair.write(pair.compressed, held_out)
    other = pair.write(pair.reference, held_out)
    lengths = (text == other).long().cumprod(1).sum(1).double().numpy()
    read = (pair.choices(pair.reference, held_out, text) == text).long().cumprod(1).sum(1).double().numpy()
    assert (read == lengths).mean() >= 0.95

    half = 1.96 * lengths.std(ddof=1) / np.sqrt(len(lengths))
    allowed = np.hypot(half, (predicted.prefix_high - predicted.prefix_low) / 2)
    print(f"predicted {predicted.prefix:.2f} [{predicted.prefix_low:.2f}, {predicted.prefix_high:.2f}]")
    print(
        f"observed {lengths.mean():.2f} ± {half:.2f}; half-life {predicted.half_life:.2f}, median {np.median(lengths)}"
    )
    assert abs(predicted.prefix - lengths.mean()) <= allowed
    # Narrow enough to be wrong: neither "they part at once" nor "they never part" is inside.
    assert predicted.horizon == TOKENS
    assert 0.0 < predicted.prefix_low < predicted.prefix_high < 0.5 * TOKENS
