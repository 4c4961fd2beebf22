"""The predicted length of the common greedy prefix against greedy texts that both real models really write."""

import json
from importlib import resources

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from hemostat_calibration.trajectory import Survival

TOKENS = 32
REQUESTS = 30
LONGEST_PROMPT = 200
"""Characters."""


class Pair:
    """Both checkpoints in float32: in bfloat16 near-ties fall one way in a batch and another way outside it."""

    def __init__(self, checkpoints):
        self.reference, self.compressed = (
            AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
            for path in (checkpoints.reference, checkpoints.compressed)
        )
        self._tokenizer = AutoTokenizer.from_pretrained(checkpoints.reference, padding_side="left")

    def encode(self, prompts):
        texts = [self._tokenizer.apply_chat_template(m, tokenize=False, add_generation_prompt=True) for m in prompts]
        return self._tokenizer(texts, return_tensors="pt", padding=True, add_special_tokens=False)

    def write(self, model, batch):
        """Greedy text, int [requests, TOKENS]; never ended early, so that every length is observed."""
        with torch.inference_mode():
            ids = model.generate(
                **batch, do_sample=False, max_new_tokens=TOKENS, min_new_tokens=TOKENS, pad_token_id=self.end
            )
        return ids[:, batch.input_ids.shape[1] :]

    def choices(self, model, batch, text):
        """What `model` would write after each prefix of `text`."""
        ids = torch.cat([batch.input_ids, text], dim=1)
        mask = torch.cat([batch.attention_mask, torch.ones_like(text)], dim=1)
        with torch.inference_mode():
            positions = (mask.cumsum(1) - 1).clamp(min=0)
            logits = model(ids, attention_mask=mask, position_ids=positions, logits_to_keep=TOKENS + 1).logits[:, :-1]
            logits[:, :, self.end] = -torch.inf
            return logits.argmax(-1)

    @property
    def end(self):
        return self._tokenizer.eos_token_id


# torch looks at its own deprecated parts when transformers asks whether to compile.
@pytest.mark.filterwarnings("ignore:.*torch.jit.script_method:DeprecationWarning")
def test_the_predicted_prefix_is_what_greedy_texts_share(checkpoints):
    """Predicted on one set of prompts, the reference only reading the compressed model's text; observed on another,
    both writing. The two means differ by no more than the intervals of both allow, and prompt by prompt the first
    disagreement that is read is where the texts part."""
    lines = (resources.files("hemostat.demo") / "prompts.jsonl").read_text().splitlines()
    chats = [json.loads(line)["messages"] for line in lines]
    chats = [chat for chat in chats if sum(len(message["content"]) for message in chat) <= LONGEST_PROMPT]
    learned, held_out = chats[0 : 2 * REQUESTS : 2], chats[1 : 2 * REQUESTS : 2]
    assert len(learned) == len(held_out) == REQUESTS
    pair = Pair(checkpoints)
    state = Survival()
    batch = pair.encode(learned)
    text = pair.write(pair.compressed, batch)
    for agrees in (pair.choices(pair.reference, batch, text) == text).double().numpy():
        state = state.update(agrees)
    predicted = state.get(TOKENS)

    batch = pair.encode(held_out)
    text = pair.write(pair.compressed, batch)
    other = pair.write(pair.reference, batch)
    lengths = (text == other).long().cumprod(1).sum(1).double().numpy()
    read = (pair.choices(pair.reference, batch, text) == text).long().cumprod(1).sum(1).double().numpy()
    assert (read == lengths).mean() >= 0.95

    half = 1.96 * lengths.std(ddof=1) / np.sqrt(len(lengths))
    allowed = np.hypot(half, (predicted.prefix_high - predicted.prefix_low) / 2)
    print(f"predicted {predicted.prefix:.2f} [{predicted.prefix_low:.2f}, {predicted.prefix_high:.2f}]")
    print(
        f"observed {lengths.mean():.2f} ± {half:.2f}; half-life {predicted.half_life:.2f}, median {np.median(lengths)}"
    )
    assert abs(predicted.prefix - lengths.mean()) <= allowed
    # Narrow enough to be wrong: neither "they part at once" nor "they never part" is inside.
    assert 1.0 < predicted.prefix_low < predicted.prefix_high < 0.5 * TOKENS
