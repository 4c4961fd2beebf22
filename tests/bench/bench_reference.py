"""A reference on a vLLM server beside the model in process: `make bench-reference`, build/bench/reference.json.

head       tokens/s of one core from hidden states to scores (the product with V x d, log-softmax, top ids, entropy), by
           torch and by numpy, at (V, d) = (49k, 576) and (128k, 4096); and the memory that the scores take.
backends   text of the W4A16 checkpoint at temperature 1, scored by the reference in process (`transformers`), by the
           hidden states of a pooling server (`vllm`) and by lists of 20 ids of a generating server (`vllm_lists`): the
           figures of each and their differences, in nats and with asymptotic intervals over requests; each backend
           against itself (its noise floor); bytes and seconds of reference time a token, asked one at a time.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import httpx
import numpy as np

ROOT = Path(__file__).resolve().parents[2]
BUILD = ROOT / "build" / "bench"

from hemostat.measurement.figures import REFERENCE  # noqa: E402
from hemostat.reference.hidden.pooling import POOLING_ARGUMENTS  # noqa: E402
from hemostat.reference.on_server import ServerReference  # noqa: E402
from hemostat.reference.protocol import Reference, ReferenceScores, ScoreRequest  # noqa: E402
from hemostat.reference.transformers import TransformersReference  # noqa: E402
from hemostat.reference.vllm import VllmReference  # noqa: E402
from hemostat.scoring.noise_floor import self_record  # noqa: E402
from hemostat_calibration.divergence.per_token import divergence  # noqa: E402
from hemostat_calibration.record_checks import validate  # noqa: E402
from hemostat_calibration.records import Sampling, TokenRecord  # noqa: E402
from hemostat_lab.demo import prompts  # noqa: E402
from hemostat_lab.demo import vllm_server as vllm_process  # noqa: E402
from hemostat_lab.demo.checkpoints import cached_checkpoints  # noqa: E402

VOCABULARY = 49_152
TOP_K = 20
SHAPES = ((49_152, 576), (128_256, 4096))
FIGURES = ("kl_lower", "kl_estimate", "tv_lower", "same_top", "entropy")


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


# --- the head ---------------------------------------------------------------------------------------------------------


def head_child(vocab_size: int, width: int, library: str, tokens: int) -> None:
    """In a process of its own, with one thread: prints JSON."""
    from hemostat.reference import worker_messages
    from hemostat.reference.hidden.head import FinalMap, OutputHead
    from hemostat.reference.hidden.products import NumpyProducts, TorchProducts

    rng = np.random.default_rng(0)
    with tempfile.NamedTemporaryFile() as file:
        weight = np.memmap(file.name, "<u2", "w+", 0, (vocab_size, width))
        # Values of about 0.02, as bfloat16.
        block = (rng.normal(0, 0.02, (1024, width)).astype("<f4").view("<u4") >> 16).astype("<u2")
        for start in range(0, vocab_size, 1024):
            weight[start : start + 1024] = block[: vocab_size - start]
        weight.flush()
        head = OutputHead(np.memmap(file.name, "<u2", "c", 0, (vocab_size, width)), None, FinalMap())
        load = worker_messages.LoadHead("", "cpu", 1)
        products = TorchProducts(head, load) if library == "torch" else NumpyProducts(head)
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        states = (rng.normal(0, 1, (tokens, width)).astype("<f4").view("<u4") >> 16).astype("<u2")
        output = rng.integers(0, vocab_size, tokens).astype(np.int32)
        ids = rng.integers(0, vocab_size, (tokens, TOP_K + 1)).astype(np.int32)
        products.scores(states[:8], output[:8], ids[:8], {}, {}, None)
        seconds = []
        for _ in range(3):
            began = time.process_time()
            products.scores(states, output, ids, {}, {}, None)
            seconds.append(time.process_time() - began)
        result = {
            "tokens_per_core_second": tokens / sorted(seconds)[1],
            # Without the embedding, whose pages count once they are read.
            "mib_of_scores": (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
            - head.weight.nbytes / (1 << 20),
        }
    print(json.dumps(result))


def head(tokens: int) -> list[dict[str, Any]]:
    rows = []
    for vocab_size, width in SHAPES:
        for library in ("torch", "numpy"):
            say(f"head: {library}, V = {vocab_size}, d = {width}")
            command = [sys.executable, __file__, "--head-child", str(vocab_size), str(width), library, str(tokens)]
            environment = {
                **os.environ,
                **dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1"),
            }
            done = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
            result = json.loads(done.stdout.splitlines()[-1])
            rows.append({"library": library, "vocabulary": vocab_size, "width": width, "tokens": tokens, **result})
    return rows


# --- backends ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Text:
    prompt: np.ndarray
    output: np.ndarray
    compressed: ReferenceScores
    """The compressed model's own top ids of the same tokens."""


@contextmanager
def server(checkpoint: Path, folder: Path, arguments: Sequence[str]) -> Any:
    common = ["--dtype", vllm_process.dtype(), "--max-model-len", "1024", "--enforce-eager"]
    running = vllm_process.VllmServer(checkpoint, "model", folder / "vllm.log", [*common, *arguments])
    try:
        running.start()
        running.wait_ready(900, progress=say)
        yield running.url
    finally:
        running.stop()


async def write(url: str, requests: int, tokens: int) -> list[Text]:
    """Text of the compressed model, at temperature 1."""
    own = VllmReference(url, top_k=TOP_K)
    await own.start()
    limit = asyncio.Semaphore(8)
    chats = [prompt.messages for prompt in prompts.load()]

    async with httpx.AsyncClient(base_url=url, timeout=600, trust_env=False) as client:

        async def answer_prompt(number: int) -> Text:
            async with limit:
                messages = [{"role": m.role, "content": m.content} for m in chats[number % len(chats)]]
                prompt = await own.render(messages)
                body = {
                    **{"model": "model", "prompt": prompt, "max_tokens": tokens, "temperature": 1.0, "seed": number},
                    **{"top_p": 1.0, "top_k": -1, "min_p": 0.0, "repetition_penalty": 1.0, "return_token_ids": True},
                }
                answer = (await client.post("/v1/completions", json=body)).json()
                ids, output = np.array(prompt, np.int32), np.array(answer["choices"][0]["token_ids"], np.int32)
                scores = await own.score(ScoreRequest(ids, output, output[:, None]))
                return Text(ids, output, scores)

        texts = await asyncio.gather(*(answer_prompt(number) for number in range(requests)))
    await own.close()
    return list(texts)


def record_of(compressed: ReferenceScores, reference: ReferenceScores, output: np.ndarray) -> TokenRecord:
    return validate(
        TokenRecord(
            vocab_size=VOCABULARY,
            prompt_key=b"",
            output_ids=output,
            compressed=compressed.top,
            reference_at=reference.at,
            reference=reference.top,
            compressed_emitted=compressed.emitted,
            reference_emitted=reference.emitted,
            reference_entropy=reference.entropy,
            sampling=Sampling(temperature=1.0),
        )
    )


def with_reference(record: TokenRecord, scores: ReferenceScores) -> TokenRecord:
    return validate(
        replace(
            record,
            reference_at=scores.at,
            reference=scores.top,
            reference_emitted=scores.emitted,
            reference_entropy=scores.entropy,
        )
    )


def figures(record: TokenRecord) -> np.ndarray:
    """Means over a request's tokens, in the order of FIGURES."""
    result = divergence(record)
    values = (result.kl_rc, result.estimate_rc, result.tv, result.top1_agreement, result.entropy_reference)
    return np.array([np.mean(value) for value in values])


def interval(values: np.ndarray) -> dict[str, float]:
    mean, width = float(values.mean()), float(1.96 * values.std(ddof=1) / np.sqrt(len(values)))
    return {"mean": mean, "low": mean - width, "high": mean + width}


async def scored(
    reference: Reference, texts: Sequence[Text], *, again: bool, others: Sequence[TokenRecord] = ()
) -> dict[str, Any]:
    """Figures by request, of the pair and of the reference against itself, and what it took. others: records of another
    reference against itself; `between` has the figures with this one in the reference's place."""
    await reference.start()
    pair, itself, first, tokens = [], [], [], 0
    began = time.monotonic()
    for n, text in enumerate(texts):
        first.append(await reference.score(ScoreRequest(text.prompt, text.output, text.compressed.top.ids)))
        tokens += len(text.prompt) + len(text.output)
        if n % 50 == 49:
            say(f"{n + 1} of {len(texts)} scored")
    seconds = time.monotonic() - began
    for text, scores in zip(texts, first, strict=True):
        pair.append(figures(record_of(text.compressed, scores, text.output)))
        if again:
            own = self_record(record_of(text.compressed, scores, text.output), REFERENCE)
            asked = await reference.score(ScoreRequest(text.prompt, text.output, own.compressed.ids, reshaped=True))
            itself.append(figures(with_reference(own, asked)))
    between = []
    for text, other in zip(texts, others, strict=False):
        asked = await reference.score(ScoreRequest(text.prompt, text.output, other.compressed.ids))
        between.append(figures(with_reference(other, asked)))
    await reference.close()
    return {
        "figures": np.array(pair),
        "floor": np.array(itself),
        "between": np.array(between),
        "scores": first,
        "seconds_per_token": seconds / tokens,
        "tokens": tokens,
    }


async def bytes_of_lists(url: str, texts: Sequence[Text]) -> float:
    """Of an answer with `prompt_logprobs: 20`, for each token."""
    size = tokens = 0
    async with httpx.AsyncClient(base_url=url, timeout=600, trust_env=False) as client:
        for text in texts[:20]:
            prompt = [*text.prompt.tolist(), *text.output.tolist()]
            body = {"model": "model", "prompt": prompt, "max_tokens": 1, "temperature": 0.0, "prompt_logprobs": TOP_K}
            size += len((await client.post("/v1/completions", json=body)).content)
            tokens += len(prompt)
    return size / tokens


def backends(requests: int, tokens: int) -> dict[str, Any]:
    checkpoints = cached_checkpoints("w4a16", say)
    result: dict[str, dict[str, Any]] = {}
    width = 576
    with tempfile.TemporaryDirectory(prefix="hemostat-reference-") as name:
        folder = Path(name)
        with server(checkpoints.compressed, folder, ["--max-logprobs", str(TOP_K)]) as url:
            texts = asyncio.run(write(url, requests, tokens))
        say(f"{sum(len(text.output) for text in texts)} tokens written")
        with server(checkpoints.reference, folder, POOLING_ARGUMENTS) as url:
            served = ServerReference(url, folder=checkpoints.reference, top_k=TOP_K)
            result["vllm"] = asyncio.run(scored(served, texts, again=True)) | {"bytes_per_token": width * 2.0}
        with server(checkpoints.reference, folder, ["--max-logprobs", str(TOP_K), "--no-enable-prefix-caching"]) as url:
            lists = ServerReference(url, top_k=TOP_K)
            result["vllm_lists"] = asyncio.run(scored(lists, texts, again=False))
            result["vllm_lists"]["bytes_per_token"] = asyncio.run(bytes_of_lists(url, texts))
    local = TransformersReference(str(checkpoints.reference), vllm_process.dtype())
    # One backend in the place of the compressed model, the other in that of the reference.
    others = [
        self_record(record_of(text.compressed, ours, text.output), REFERENCE)
        for text, ours in zip(texts, result["vllm"]["scores"], strict=True)
    ]
    result["transformers"] = asyncio.run(scored(local, texts, again=True, others=others)) | {"bytes_per_token": 0.0}

    rows = []
    for backend, measured in result.items():
        row = {
            "reference": backend,
            "requests": len(texts),
            "tokens": int(sum(len(text.output) for text in texts)),
            "bytes_per_token": measured["bytes_per_token"],
            "reference_seconds_per_token": measured["seconds_per_token"],
        }
        columns = range(len(FIGURES))
        row["figures"] = {FIGURES[i]: interval(measured["figures"][:, i]) for i in columns}
        if len(measured["floor"]):
            row["floor"] = {FIGURES[i]: interval(measured["floor"][:, i]) for i in columns}
        rows.append(row)
    difference = result["vllm"]["figures"] - result["transformers"]["figures"]
    between = result["transformers"]["between"]
    floors = {
        backend: float(result[backend]["floor"][:, FIGURES.index("kl_estimate")].mean())
        for backend in ("vllm", "transformers")
    }
    return {
        "rows": rows,
        "vllm_minus_transformers": {FIGURES[i]: interval(difference[:, i]) for i in range(len(FIGURES))},
        "vllm_against_transformers": {FIGURES[i]: interval(between[:, i]) for i in range(len(FIGURES))},
        "floors": floors,
    }


def table(report: dict[str, Any]) -> str:
    lines = []
    if "head" in report:
        lines.append(f"{'':8}{'V':>8}{'d':>7}  {'tokens/s a core':>16}  {'MiB of scores':>13}")
        lines += [
            f"{r['library']:8}{r['vocabulary']:>8}{r['width']:>7}  {r['tokens_per_core_second']:>16.0f}"
            f"  {r['mib_of_scores']:>13.0f}"
            for r in report["head"]
        ]
    if "backends" in report:
        lines.append(
            f"{'reference':14}" + "".join(f"{name:>28}" for name in FIGURES) + f"{'bytes/token':>13}{'ms/token':>10}"
        )
        for r in report["backends"]["rows"]:
            cells = "".join(f"{_cell(r['figures'][name]):>28}" for name in FIGURES)
            cost = f"{r['bytes_per_token']:>13.0f}{1e3 * r['reference_seconds_per_token']:>10.2f}"
            lines.append(f"{r['reference']:14}{cells}{cost}")
            if "floor" in r:
                lines.append(f"{'  its floor':14}" + "".join(f"{_cell(r['floor'][name]):>28}" for name in FIGURES))
        for name in ("vllm_minus_transformers", "vllm_against_transformers"):
            lines.append(f"{name}: " + "; ".join(f"{f} {_cell(v)}" for f, v in report["backends"][name].items()))
    return "\n".join(lines)


def _cell(value: dict[str, float]) -> str:
    return f"{value['mean']:.4f} [{value['low']:.4f}, {value['high']:.4f}]"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", type=int, default=200)
    parser.add_argument("--tokens", type=int, default=48, help="of each answer, at most")
    parser.add_argument("--only", choices=("head", "backends"), action="append")
    parser.add_argument("--head-tokens", type=int, default=256)
    parser.add_argument("--head-child", nargs=4, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.head_child:
        vocab_size, width, library, tokens = given.head_child
        head_child(int(vocab_size), int(width), library, int(tokens))
        return
    parts = given.only or ["head", "backends"]
    BUILD.mkdir(parents=True, exist_ok=True)
    file = BUILD / "reference.json"
    report: dict[str, Any] = json.loads(file.read_text()) if given.only and file.exists() else {}
    if "head" in parts:
        report["head"] = head(given.head_tokens)
    if "backends" in parts:
        report["backends"] = backends(given.requests, given.tokens)
    report["dtype"] = vllm_process.dtype()
    file.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    print(table(report))


if __name__ == "__main__":
    main()
