"""An adapter in a real vLLM; its values computed again by transformers and peft from checkpoints and PEFT folder.

None of Hemostat's own mathematics: the factors are torch's truncated singular value decomposition of what the weights
lost. Only the file that the engine fetches, and the PEFT folder, are written by Hemostat.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import peft
import pytest
import torch
from tests.support.recompute import load, logprobs
from tests.support.running_vllm import RunningVllm

from hemostat_calibration.adapters.factors import LowRank
from hemostat_calibration.profiles.adapter import adapter_profile
from hemostat_calibration.profiles.peft import peft_files
from hemostat_calibration.profiles.profile import CalibrationProfile
from hemostat_lab.demo.checkpoints import Checkpoints

pytestmark = [
    pytest.mark.vllm,
    pytest.mark.timeout(600),
]

RANK = 16
TOKENS = 24
COMPLETIONS = "/v1/completions"
PROMPTS = (
    "The capital of France is",
    "Water boils at",
    "Here is a short story about a fox:",
    "def add(a, b):",
    "The three states of matter are",
    "Dear Sir or Madam, I am writing",
)
ALLOWED = 1.5
"""Times the noise floor, which is a mean over some hundred values that are correlated within a text."""


class ByHand:
    """The two checkpoints as transformers loads them; the compressed one with the PEFT folder as peft loads it."""

    def __init__(self, checkpoints: Checkpoints, folder: Path) -> None:
        self.reference, compressed = load(checkpoints.reference), load(checkpoints.compressed)
        self.profile = correction(self.reference, compressed)
        folder.mkdir()
        for name, data in peft_files(self.profile, str(checkpoints.compressed)).items():
            (folder / name).write_bytes(data)
        self.version = self.profile.version
        self.model = peft.PeftModel.from_pretrained(compressed, folder, autocast_adapter_dtype=False).eval()

    def logprobs(self, prompt: list[int], output: list[int], *, adapted: bool) -> torch.Tensor:
        """float64 [T, V]: of the distribution before each output token."""
        with nullcontext() if adapted else self.model.disable_adapter():
            return logprobs(self.model, prompt, output)


def correction(reference: torch.nn.Module, compressed: torch.nn.Module) -> CalibrationProfile:
    """The best one of this rank for the weights themselves, by singular value decomposition."""
    torch.manual_seed(0)
    whole, layers = reference.state_dict(), {}
    for name, module in compressed.named_modules():
        if isinstance(module, torch.nn.Linear) and name != "lm_head":
            delta = whole[f"{name}.weight"].float() - module.weight.float()
            u, s, v = (x[..., :RANK] for x in torch.svd_lowrank(delta, 2 * RANK))
            layers[name] = LowRank(v.T.contiguous().numpy(), (u * s).contiguous().numpy())
    return adapter_profile(model="", vocab_size=reference.config.vocab_size, layers=layers)


@pytest.fixture(scope="module")
def by_hand(checkpoints: Checkpoints, tmp_path_factory: pytest.TempPathFactory) -> ByHand:
    return ByHand(checkpoints, tmp_path_factory.mktemp("by-hand") / "peft")


@pytest.fixture(scope="module")
def engine(lora_server: RunningVllm, by_hand: ByHand) -> Iterator[httpx.Client]:
    """vLLM itself; the adapter can be fetched from the admin port."""
    lora_server.admin.files[by_hand.version] = by_hand.profile.to_bytes()
    with httpx.Client(base_url=lora_server.url, timeout=300) as client:
        yield client
        client.post("/v1/unload_lora_adapter", json={"lora_name": by_hand.version})
    lora_server.admin.files.pop(by_hand.version)


def post(client: httpx.Client, path: str, body: dict[str, Any], **headers: str) -> dict[str, Any]:
    answer = client.post(path, json=body, headers=headers)
    assert answer.status_code == 200, answer.text
    result: dict[str, Any] = answer.json()
    return result


def complete(engine: httpx.Client, model: str, prompt: str) -> dict[str, Any]:
    """A greedy completion's choice, with token ids and the most likely ids of each position."""
    body = {"model": model, "prompt": prompt, "max_tokens": TOKENS, "temperature": 0, "ignore_eos": True, "logprobs": 5}
    body |= {"return_token_ids": True, "return_tokens_as_token_ids": True}
    choice: dict[str, Any] = post(engine, COMPLETIONS, body)["choices"][0]
    return choice


def prompt_logprobs(engine: httpx.Client, model: str, ids: list[int], count: int) -> np.ndarray:
    """Of the last `count` of these ids."""
    body = {"model": model, "prompt": ids, "max_tokens": 1, "temperature": 0, "prompt_logprobs": 0}
    rows = post(engine, COMPLETIONS, body)["choices"][0]["prompt_logprobs"]
    return np.array([row[str(token)]["logprob"] for row, token in zip(rows, ids, strict=True) if row][-count:])


def far(values: np.ndarray, other: np.ndarray) -> float:
    return float(np.abs(values - other).mean())


def test_the_engine_is_the_checkpoint_with_the_folder(
    engine: httpx.Client, lora_server: RunningVllm, by_hand: ByHand
) -> None:
    """The same tokens, scored by the engine and by hand, without and with the adapter; then what it generates."""
    names = {False: lora_server.model, True: by_hand.version}
    theirs, ours = {False: [], True: []}, {False: [], True: []}
    divergence: dict[bool, list[float]] = {False: [], True: []}
    for prompt in PROMPTS:
        choice = complete(engine, lora_server.model, prompt)
        first, output = choice["prompt_token_ids"], choice["token_ids"]
        r = logprobs(by_hand.reference, first, output)
        for adapted, name in names.items():
            theirs[adapted].extend(prompt_logprobs(engine, name, first + output, len(output)))
            c = by_hand.logprobs(first, output, adapted=adapted)
            ours[adapted].extend(c[range(len(output)), output].tolist())
            divergence[adapted].extend((r.exp() * (r - c)).sum(-1).tolist())
    engine_base, engine_adapted, hand_base, hand_adapted = map(np.array, (*theirs.values(), *ours.values()))
    floor = far(engine_base, hand_base)
    effect, expected = engine_adapted - engine_base, hand_adapted - hand_base
    size, correlation = float(np.abs(expected).mean()), float(np.corrcoef(effect, expected)[0, 1])
    kl = {adapted: float(np.mean(values)) for adapted, values in divergence.items()}
    print(
        f"{len(effect)} tokens: mean |Δ| {floor:.4f} nats without it, {far(engine_adapted, hand_adapted):.4f} with it; "
        f"effect {size:.4f}, correlation {correlation:.4f}; KL to the reference {kl[False]:.4f}, {kl[True]:.4f}"
    )
    assert floor < 0.1
    assert far(engine_adapted, hand_adapted) <= ALLOWED * floor
    assert size > 3 * floor, "the adapter changes more than the noise"
    assert correlation > 0.95
    assert np.polyfit(expected, effect, 1)[0] == pytest.approx(1.0, abs=0.1), "applied once, by a scale of 1"
    assert kl[True] < 0.95 * kl[False], "it is a correction, though a plain one"

    generated, hand, without = [], [], []
    for prompt in PROMPTS:
        choice = complete(engine, by_hand.version, prompt)
        first, output = choice["prompt_token_ids"], choice["token_ids"]
        c, base = (by_hand.logprobs(first, output, adapted=adapted) for adapted in (True, False))
        for t, row in enumerate(choice["logprobs"]["top_logprobs"]):
            for token, value in row.items():
                ident = int(token.removeprefix("token_id:"))
                generated.append(value)
                hand.append(c[t, ident].item())
                without.append(base[t, ident].item())
    apart = [far(np.array(generated), np.array(other)) for other in (hand, without)]
    print(f"{len(generated)} values of its own texts: mean |Δ| {apart[0]:.4f}; to the model without it {apart[1]:.4f}")
    # Five ids of each position, of which four are less likely: their values differ more (2.05 times the floor was
    # seen), by how much depends on the texts. Without the adapter they are much further apart.
    assert apart[0] <= 2.5 * floor
    assert apart[1] > 2 * apart[0]
