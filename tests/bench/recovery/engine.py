"""Text from a real vLLM with Hemostat's plugin, what the plugin taps from it, and the reference's hidden states.

A stage's result is one file under build/, named after all that it was made from: what was made once is read again.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import secrets
import socket
import time
from collections.abc import AsyncIterator, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import numpy.typing as npt
import torch
import uvicorn
from fastapi import FastAPI
from transformers import AutoModelForCausalLM

from hemostat.engines.api import engine_router
from hemostat.engines.reports import PluginReports
from hemostat.engines.taps import TapResult
from hemostat.reference.protocol import ScoreRequest
from hemostat.reference.transformers import TransformersReference
from hemostat_calibration.profiles.profile import CalibrationProfile
from hemostat_lab.demo import vllm_server as vllm_process

from .log import say

CORES = os.cpu_count() or 1
STREAMS = 64
"""Requests at once."""
PREFILLS = 8
"""Requests for log-probabilities of a prompt at once."""
ARGUMENTS = (
    *("--enforce-eager", "--dtype", vllm_process.dtype(), "--max-model-len", "512", "--max-num-seqs", "96"),
    *("--no-enable-prefix-caching", "--logits-processors", vllm_process.LOGITS_PROCESSOR),
)
TAPPED_WITHIN = 30.0
"""Seconds after the answer."""
TRIES = 5
"""Of one request: the tap drops rather than holds up decoding, as it may on a machine that is busy."""
TEXTS_AT_ONCE = 16
"""That the reference is given."""
COMPARED = 4
ROUNDING = 0.05
"""Of a hidden state's length: bfloat16 in another order of sums, through 30 layers."""

Halves = npt.NDArray[np.float16]


@dataclass(frozen=True, slots=True)
class Ask:
    """One request. number: tells two of the same prompt apart (vLLM 0.32 on a CPU ends when a request brings a seed).

    version: of the profile that the engine is to apply. tap: have the plugin hand out its features.
    """

    text: str
    max_tokens: int
    temperature: float
    number: int
    version: str | None = None
    tap: bool = True


@dataclass(frozen=True, slots=True)
class Written:
    """What came of an `Ask`.

    features: float16 [T, N], centred logits at the anchors; None without a tap. log_normalizer: by profile version,
    log E_c[e^Δz], float64 [T]. hidden: of the reference, float16 [T, d], once it has been asked.
    """

    ask: Ask
    prompt: npt.NDArray[np.int32]
    output: npt.NDArray[np.int32]
    text: str
    features: Halves | None = None
    log_normalizer: dict[str, npt.NDArray[np.float64]] = field(default_factory=dict)
    hidden: Halves | None = None


@contextlib.contextmanager
def one_thread_each() -> Iterator[ThreadPoolExecutor]:
    """Workers of one torch thread each: on a machine in use, many small operations on several threads wait for each
    other most of the time."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with ThreadPoolExecutor(CORES, initializer=torch.set_num_threads, initargs=(1,)) as pool:
            yield pool
    finally:
        torch.set_num_threads(before)


class _Server(uvicorn.Server):
    """uvicorn that leaves the signals alone."""

    @contextlib.contextmanager
    def capture_signals(self) -> Any:
        yield


@contextlib.asynccontextmanager
async def engine(
    checkpoint: Path,
    profiles: Sequence[CalibrationProfile],
    log: Path,
    adapters: Sequence[CalibrationProfile] = (),
    max_lora_rank: int = 16,
) -> AsyncIterator[Engine]:
    """A vLLM server with `checkpoint`, whose plugin holds `profiles` (the first one's anchors are what is tapped).

    adapters: that may be asked for by `model: <version>`, of at most `max_lora_rank`; the plugin fetches them.
    """
    registry = PluginReports()
    registry.set_wanted(profile.version for profile in (*profiles, *adapters))
    files = {profile.version: profile.to_bytes() for profile in (*profiles, *adapters)}
    # One slot more than adapters: see docs/operations.md.
    lora = ("--enable-lora", "--max-lora-rank", str(max_lora_rank), "--max-loras", str(len(adapters) + 1))
    allowed = {"HEMOSTAT_ADAPTERS": "1", "VLLM_ALLOW_RUNTIME_LORA_UPDATING": "True"}
    app = FastAPI()
    app.include_router(engine_router(registry, files.get, time.monotonic))
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
        admin = _Server(uvicorn.Config(app, log_level="warning", access_log=False))
        serving = asyncio.create_task(admin.serve([listener]))
        server = vllm_process.VllmServer(
            checkpoint,
            "bench",
            log,
            (*ARGUMENTS, *(lora if adapters else ())),
            {"HEMOSTAT_ADMIN_URL": f"http://127.0.0.1:{port}", **(allowed if adapters else {})},
        )
        server.start()
        try:
            await asyncio.to_thread(server.wait_ready, progress=say)
            while profiles and not {p.version for p in profiles} <= registry.acknowledged(time.monotonic()):
                await asyncio.sleep(0.2)
            yield Engine(server.url, registry)
        finally:
            await asyncio.to_thread(server.stop)
            admin.should_exit = True
            await serving


class Engine:
    """A running server."""

    def __init__(self, url: str, registry: PluginReports) -> None:
        self._url = url
        self._registry = registry

    async def write(self, asks: Sequence[Ask], name: str, model: str = "bench") -> list[Written]:
        """All answers, in the order of the asks. model: "bench", or an adapter's version."""
        turns = iter(enumerate(asks))
        result: dict[int, Written] = {}
        began = said = time.monotonic()
        tokens = 0

        async def stream(http: httpx.AsyncClient) -> None:
            nonlocal tokens, said
            for number, ask in turns:
                result[number] = written = await self._write(http, ask, model)
                tokens += len(written.output)
                if time.monotonic() - said > 15:
                    said = time.monotonic()
                    say(f"{name}: {len(result)} of {len(asks)} texts, {tokens / (said - began):.0f} tokens/s")

        async with self._client() as http:
            await asyncio.gather(*(stream(http) for _ in range(STREAMS)))
        say(f"{name}: {len(asks)} texts, {tokens} tokens in {time.monotonic() - began:.0f} s")
        return [result[number] for number in range(len(asks))]

    async def logprobs(self, texts: Sequence[Written], model: str = "bench") -> list[npt.NDArray[np.float64]]:
        """Log-probabilities of every text's output by the engine's prefill, float64 [T] each, nats.

        Some texts at a time: a prompt's log-probabilities take a copy of its logits each."""
        turns = iter(enumerate(texts))
        result: dict[int, npt.NDArray[np.float64]] = {}

        async def stream(http: httpx.AsyncClient) -> None:
            for number, text in turns:
                ids = [int(i) for i in (*text.prompt, *text.output)]
                body = {"model": model, "prompt": ids, "max_tokens": 1, "temperature": 0.0, "prompt_logprobs": 0}
                answer = await http.post("/v1/completions", json=body)
                answer.raise_for_status()
                given = answer.json()["choices"][0]["prompt_logprobs"]
                last = range(len(text.prompt), len(ids))
                result[number] = np.array([given[at][str(ids[at])]["logprob"] for at in last])

        async with self._client() as http:
            await asyncio.gather(*(stream(http) for _ in range(PREFILLS)))
        return [result[number] for number in range(len(texts))]

    def _client(self) -> httpx.AsyncClient:
        # The server closes what is idle for 5 s: sooner than that, so that no request is sent on such a connection.
        limits = httpx.Limits(max_connections=STREAMS, keepalive_expiry=1.0)
        return httpx.AsyncClient(base_url=self._url, timeout=httpx.Timeout(600.0), limits=limits, trust_env=False)

    async def _write(self, http: httpx.AsyncClient, ask: Ask, model: str) -> Written:
        failed: httpx.TransportError | None = None
        for _ in range(TRIES):
            try:
                written = await self._try(http, ask, model)
            except httpx.TransportError as error:  # a connection that had been idle
                failed = error
                await asyncio.sleep(0.5)
                continue
            if written is not None:
                return written
        raise RuntimeError(f"no text whose positions the engine handed out in {TRIES} tries") from failed

    async def _try(self, http: httpx.AsyncClient, ask: Ask, model: str) -> Written | None:
        """None where the engine did not hand out all positions."""
        nonce = secrets.token_hex(8)
        xargs = {"hemostat_tap": nonce} if ask.tap else {}
        xargs |= {"hemostat": ask.version} if ask.version else {}
        xargs = self._registry.secrets.signed(xargs, time.monotonic())
        body = {
            "model": model,
            "messages": [{"role": "user", "content": ask.text}],
            "max_tokens": ask.max_tokens,
            "temperature": ask.temperature,
            "return_token_ids": True,
            **({"vllm_xargs": xargs} if xargs else {}),
        }
        answer = await http.post("/v1/chat/completions", json=body)
        answer.raise_for_status()
        said = answer.json()
        (choice,) = said["choices"]
        output = np.array(choice["token_ids"], dtype=np.int32)
        written = Written(
            ask, np.array(said["prompt_token_ids"], dtype=np.int32), output, choice["message"]["content"] or ""
        )
        if not ask.tap:
            return written
        tap = await self._tap(nonce, len(output))
        if tap is None:
            return None
        if tap.applied != ask.version or tap.mixed:
            raise RuntimeError(f"the engine applied {tap.applied}, not {ask.version}")
        features = None if tap.features is None else tap.features.values[: len(output)].astype(np.float16)
        numbers = {version: values[: len(output)] for version, values in tap.log_normalizer.items()}
        return Written(ask, written.prompt, output, written.text, features, numbers)

    async def _tap(self, nonce: str, tokens: int) -> TapResult | None:
        give_up = time.monotonic() + TAPPED_WITHIN
        while self._registry.taps.covered(nonce) < tokens:
            if time.monotonic() > give_up:
                self._registry.taps.take(nonce, tokens)
                return None
            await asyncio.sleep(0.1)
        tap = self._registry.taps.take(nonce, tokens)
        assert tap is not None
        return tap


def with_hidden(reference: Path, texts: Sequence[Written], name: str) -> list[Written]:
    """The texts with the reference's hidden states, many texts at a time; the first ones are compared with those that
    Hemostat's reference process gives one by one, which takes ten times as long."""
    began = said = time.monotonic()
    model: Any = AutoModelForCausalLM.from_pretrained(str(reference), dtype=vllm_process.dtype()).eval()
    by_length = sorted(range(len(texts)), key=lambda i: len(texts[i].prompt) + len(texts[i].output))
    result: dict[int, Written] = {}

    def part(start: int) -> dict[int, Written]:
        numbers = by_length[start : start + TEXTS_AT_ONCE]
        sequences = [torch.from_numpy(np.concatenate([texts[i].prompt, texts[i].output[:-1]])).long() for i in numbers]
        # Attention is causal: what is padded behind a text does not change it.
        padded = torch.nn.utils.rnn.pad_sequence(sequences, batch_first=True)
        with torch.inference_mode():
            states = model.get_decoder()(input_ids=padded, use_cache=False).last_hidden_state.float().numpy()
        hidden = [
            rows[: len(ids)][-len(texts[i].output) :] for i, ids, rows in zip(numbers, sequences, states, strict=True)
        ]
        return {i: replace(texts[i], hidden=h.astype(np.float16)) for i, h in zip(numbers, hidden, strict=True)}

    with one_thread_each() as pool:
        for some in pool.map(part, range(0, len(by_length), TEXTS_AT_ONCE)):
            result |= some
            if time.monotonic() - said > 15:
                said = time.monotonic()
                say(f"{name}: {len(result)} of {len(texts)} scored by the reference")
    scored = [result[number] for number in range(len(texts))]
    asyncio.run(_compare(reference, scored[:COMPARED]))
    say(f"{name}: scored by the reference in {time.monotonic() - began:.0f} s")
    return scored


async def _compare(reference: Path, texts: Sequence[Written]) -> None:
    scorer = TransformersReference(str(reference), vllm_process.dtype(), threads=2)
    await scorer.start()
    try:
        for text in texts:
            assert text.hidden is not None
            scores = await scorer.score(ScoreRequest(text.prompt, text.output, text.output[:, None], hidden=True))
            assert scores.hidden is not None
            off = float(np.linalg.norm(text.hidden - scores.hidden) / np.linalg.norm(scores.hidden))
            if not off < ROUNDING:
                raise RuntimeError(f"hidden states are {off:.1%} off those of Hemostat's reference process")
    finally:
        await scorer.close()
