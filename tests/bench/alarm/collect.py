"""Tokens for `bench_alarm.py`: what vLLM decodes from one checkpoint, and what transformers says of them. Two steps.

    collect.py decode  CHECKPOINT FOLDER --first 0 --requests 200 [--kv-cache fp8]
    collect.py score   REFERENCE  FOLDER

Every batch is a file, FOLDER/N.npz by its first request, then FOLDER/N.scored.npz: what is there is not made again, so
that either step can be ended at any time. Decoding is at temperature 1, in batches of several sizes, with a seed for
each request, and keeps vLLM's own top-K.
Scoring is by prefill, a request at a time, at full vocabulary. The seeds give the noise that vLLM's sampler on a CPU
drew (Gumbel noise by SplitMix64 of a seed and the token's id), and with it the margin of Token-DiFR (arXiv 2511.20621,
section 3): how far the emitted token's noisy logit is below the largest, under the reference. Clipping is for later.
"""

from __future__ import annotations

import argparse
import itertools
import os
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np

from hemostat_lab.demo import vllm_server as vllm_process

os.environ |= {
    "VLLM_NO_USAGE_STATS": "1",
    "DO_NOT_TRACK": "1",
    "HF_HUB_OFFLINE": "1",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_INT4_W4A8": "0",
    "TORCHDYNAMO_DISABLE": "1",
    "VLLM_LOGGING_LEVEL": "WARNING",
    "TOKENIZERS_PARALLELISM": "false",
}

TOP_K = 20
BATCHES = (128, 24, 72)
"""Requests at once, in turn. With the batch, the shapes of the products and their rounding change, and a batch shrinks
while its requests end."""
LENGTHS = (32, 64, 96, 128)
TEMPLATES = {
    "prose": (
        "Explain {} to a ten-year-old.",
        "Write a short story about {}.",
        "List five facts about {}.",
        "What are the main arguments for and against {}?",
        "Write an email to a colleague about {}.",
        "Summarize the history of {} in a few sentences.",
        "Write a poem about {}.",
        "What mistakes do beginners make with {}?",
    ),
    "code": (
        "Write a Python class that models {}, with type hints.",
        "Write SQL that creates a table of facts about {} and inserts three rows.",
        "Write a JavaScript function that prints a quiz about {}.",
        "Write a C program that stores a list of words about {} and sorts it.",
    ),
    "json": (
        'Answer only in JSON, with the keys "name", "summary" and "keywords": {}.',
        "Return a JSON array of three objects about {}, each with a title and a year. No other text.",
        "Describe {} as one JSON object with nested lists. Print only the JSON.",
        'Give four questions about {} as JSON: [{{"question": ..., "answer": ...}}].',
    ),
}
"""By the form of the answer that is asked for."""
TOPICS = (
    *("photosynthesis", "bicycle repair", "the French Revolution", "sourdough bread", "black holes", "chess openings"),
    *("electric cars", "house cats", "compound interest", "the Roman Empire", "gardening", "jazz music", "volcanoes"),
    *("public libraries", "remote work", "vaccines", "the stock market", "mountain climbing", "recycling", "poetry"),
    *("binary search", "coffee", "the printing press", "coral reefs", "marathon running", "learning a language"),
    *("solar panels", "origami", "the water cycle", "video games", "beekeeping", "time zones", "renting a flat"),
    *("lighthouses", "statistics", "woodworking", "the periodic table", "city planning", "dinosaurs", "tea"),
)


def prompts() -> list[tuple[str, str]]:
    """(form, prompt): every template with every topic, in an order that mixes all."""
    pairs = [(form, text.format(topic)) for form, texts in TEMPLATES.items() for text in texts for topic in TOPICS]
    return [pairs[n] for n in np.random.default_rng(0).permutation(len(pairs))]


def decode(checkpoint: Path, folder: Path, first: int, requests: int, kv_cache: str) -> None:
    """Requests first … first + requests − 1 of an endless list; the prompt of request n is number n modulo all."""
    batches, at = [], first
    for size in itertools.cycle(BATCHES):
        numbers = range(at, min(at + size, first + requests))
        if not numbers:
            break
        at += size
        if not (folder / f"{numbers[0]}.npz").is_file():
            batches.append(numbers)
    if not batches:
        return
    from vllm import LLM, SamplingParams

    texts = prompts()
    engine = LLM(
        model=str(vllm_process.runnable(checkpoint)),
        dtype=vllm_process.dtype(),
        enforce_eager=True,
        max_model_len=512,
        max_num_seqs=max(BATCHES),
        enable_chunked_prefill=False,  # a prompt in pieces takes a seed's draw back, which vLLM 0.32 cannot on a CPU
        max_logprobs=TOP_K,
        kv_cache_dtype=kv_cache,
        enable_prefix_caching=False,
        seed=0,
        disable_log_stats=True,
    )
    tokenizer = engine.get_tokenizer()
    began, done = time.monotonic(), 0
    for numbers in batches:
        asked, sampling = [], []
        for n in numbers:
            messages = [{"role": "user", "content": texts[n % len(texts)][1]}]
            asked.append(tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False))
            most = int(np.random.default_rng(n).choice(LENGTHS))
            sampling.append(SamplingParams(temperature=1.0, seed=n, max_tokens=most, logprobs=TOP_K, detokenize=False))
        answers = engine.generate([{"prompt_token_ids": ids} for ids in asked], sampling, use_tqdm=False)
        outputs = [np.array(answer.outputs[0].token_ids, np.int32) for answer in answers]
        columns: dict[str, list[Any]] = {name: [] for name in ("ids", "logprobs", "emitted")}
        for answer in answers:
            for token, row in zip(answer.outputs[0].token_ids, answer.outputs[0].logprobs, strict=True):
                best = sorted(row.items(), key=lambda item: -item[1].logprob)
                best += [(-1, None)] * (TOP_K + 1 - len(best))
                columns["ids"].append([token_id for token_id, _ in best])
                columns["logprobs"].append([value.logprob if value else -np.inf for _, value in best])
                columns["emitted"].append(row[token].logprob)
        _write(
            folder / f"{numbers[0]}.npz",
            number=np.array(numbers),
            form=np.array([texts[n % len(texts)][0] for n in numbers]),
            prompt_lengths=np.array([len(ids) for ids in asked]),
            lengths=np.array([len(ids) for ids in outputs]),
            prompt=np.concatenate(asked).astype(np.int32),
            output=np.concatenate(outputs),
            ids=np.array(columns["ids"], np.int32),
            logprobs=np.array(columns["logprobs"], np.float32),
            emitted=np.array(columns["emitted"], np.float32),
        )
        done += sum(map(len, outputs))
        _say(f"{folder.name}: request {numbers[-1]} decoded, {done / (time.monotonic() - began):.0f} tokens/s")


def score(reference: Path, folder: Path) -> None:
    """Adds what the reference says: at the candidates, of the emitted token, its own top-K, and the margin."""
    decoded = sorted(path for path in folder.glob("*.npz") if path.suffixes == [".npz"])
    parts = [path for path in decoded if not path.with_suffix(".scored.npz").is_file()]
    if not parts:
        return
    from transformers import AutoModelForCausalLM
    from vllm.platforms import current_platform

    current_platform.import_kernels()
    dtype = vllm_process.dtype()
    model = AutoModelForCausalLM.from_pretrained(reference, dtype=dtype, local_files_only=True).eval()
    began, tokens = time.monotonic(), 0
    for part in parts:
        given = dict(np.load(part))
        _write(part.with_suffix(".scored.npz"), **given, **_scores(model, given))
        tokens += len(given["output"])
        _say(f"{folder.name}: batch {part.stem} scored, {tokens / (time.monotonic() - began):.0f} tokens/s")


def _scores(model: Any, given: dict[str, Any]) -> dict[str, Any]:
    import torch

    columns: dict[str, list[Any]] = {name: [] for name in ("at", "r_emitted", "r_ids", "r_logprobs", "margin")}
    prompt_at = output_at = 0
    for number, prompt_length, length in zip(given["number"], given["prompt_lengths"], given["lengths"], strict=True):
        prompt = given["prompt"][prompt_at : prompt_at + prompt_length]
        rows = slice(output_at, output_at + length)
        prompt_at, output_at = prompt_at + prompt_length, output_at + length
        output = torch.from_numpy(given["output"][rows].astype(np.int64))
        ids = torch.from_numpy(given["ids"][rows].astype(np.int64))
        sequence = torch.cat([torch.from_numpy(prompt.astype(np.int64)), output[:-1]])
        with torch.inference_mode():
            logits = model(input_ids=sequence[None], use_cache=False, logits_to_keep=int(length)).logits[0].float()
            logprobs = torch.log_softmax(logits, dim=-1)
            best = logprobs.topk(TOP_K, dim=-1)
            columns["at"].append(logprobs.gather(1, ids.clamp_min(0)).masked_fill(ids < 0, torch.nan).numpy())
            columns["r_emitted"].append(logprobs.gather(1, output[:, None])[:, 0].numpy())
            columns["r_ids"].append(best.indices.int().numpy())
            columns["r_logprobs"].append(best.values.numpy())
            columns["margin"].append(_margins(logprobs, output, int(number)).numpy())
    return {name: np.concatenate(values) for name, values in columns.items()}


def _margins(logprobs: Any, output: Any, seed: int) -> Any:
    """How far each emitted token's noisy log-probability is below the largest, float32 [T], with the noise that the
    sampler of vLLM's CPU build drew for a request with this seed: its own kernel says which is the largest."""
    import torch

    generator = torch.Generator().manual_seed(seed)
    seeds = torch.cat([torch.randint(0, 2**31, (1,), generator=generator) for _ in range(len(output))])
    best = torch.ops._C.fused_gumbel_argmax(logprobs, seeds).long()
    ids = torch.stack([best, output], 1)
    bits = _mix(_mix(seeds)[:, None] + (ids + 1) * (0x9E3779B97F4A7C15 - 2**64)) >> 11 & 0x1FFFFFFFFFFFFF
    noisy = logprobs.gather(1, ids) - torch.log(-torch.log((bits.double() + 0.5) * 2.0**-53))
    return (noisy[:, 0] - noisy[:, 1]).clamp_min(0.0).float()


def _mix(z: Any) -> Any:
    """SplitMix64's."""
    z = (z ^ (z >> 30 & 0x3FFFFFFFF)) * (0xBF58476D1CE4E5B9 - 2**64)
    z = (z ^ (z >> 27 & 0x1FFFFFFFFF)) * (0x94D049BB133111EB - 2**64)
    return z ^ (z >> 31 & 0x1FFFFFFFF)


def _write(path: Path, **arrays: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    scratch = path.with_suffix(".tmp")
    with scratch.open("wb") as file:
        np.savez(file, **arrays)
    scratch.rename(path)


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    steps = parser.add_subparsers(dest="step", required=True)
    step = steps.add_parser("decode")
    step.add_argument("checkpoint", type=Path)
    step.add_argument("folder", type=Path)
    step.add_argument("--first", type=int, default=0)
    step.add_argument("--requests", type=int, default=200)
    step.add_argument("--kv-cache", default="auto")
    step = steps.add_parser("score")
    step.add_argument("reference", type=Path)
    step.add_argument("folder", type=Path)
    given = parser.parse_args()
    if given.step == "decode":
        decode(given.checkpoint, given.folder, given.first, given.requests, given.kv_cache)
    else:
        score(given.reference, given.folder)


if __name__ == "__main__":
    main()
