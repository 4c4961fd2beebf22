"""A server that answers as vLLM does where Hemostat looks; its model is a table of random bigram log-probabilities."""

from __future__ import annotations

import asyncio
import itertools
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np


@dataclass
class FakeVllm:
    """Switches are read at every request, so that a test can change its mind."""

    vocab_size: int = 64
    seed: int = 0
    max_logprobs: int = 20
    max_model_len: int = 128
    api_key: str | None = None
    plugin: bool = True
    token_ids: bool = True
    raw: bool = True
    chat_template: str | None = "{}"
    tells_vocabulary: bool = True
    fail_with: int | None = None
    """Answer every scoring request with this status."""
    hang: bool = False
    short: bool = False
    """Leave out the last position's logprobs."""
    mangle: str = ""
    """Answer with these bytes."""
    adapters: tuple[str, ...] = ("adapter",)
    url: str = ""
    seen: list[tuple[str, dict[str, Any]]] = field(default_factory=list)

    @property
    def logprobs(self) -> Any:
        """float64 [V, V]: row is the token before."""
        logits = np.random.default_rng(self.seed).normal(0, 3, (self.vocab_size, self.vocab_size))
        return logits - np.log(np.exp(logits).sum(1, keepdims=True))

    def encode(self, text: str) -> list[int]:
        return [b % self.vocab_size for b in text.encode()]

    def answer(self, path: str, headers: dict[str, str], body: dict[str, Any]) -> tuple[int, Any]:
        if path == "/version":
            return 200, {"version": "0.32.0"}
        if self.api_key and headers.get("authorization") != f"Bearer {self.api_key}":
            return 401, {"error": "Unauthorized"}
        if path == "/v1/models":
            loras = [{"id": name, "parent": "fake"} for name in self.adapters]
            return 200, {
                "data": [*loras, {"id": "fake", "root": "/m", "max_model_len": self.max_model_len, "created": 1}]
            }
        if path == "/tokenize":
            if "prompt" in body:
                return 200, {"tokens": self.encode(body["prompt"]), "count": 1, "max_model_len": 1}
            if self.chat_template is None:
                return error(400, "default chat template is no longer allowed, so you must provide a chat template")
            return 200, {"tokens": self.encode(self.chat_template + json.dumps(body["messages"]))}
        if path == "/v1/completions":
            return self.complete(body)
        return 404, {"detail": "Not Found"}

    def complete(self, body: dict[str, Any]) -> tuple[int, Any]:
        if self.fail_with is not None:
            return error(self.fail_with, "no luck\ntoday")
        if body["model"] not in ("fake", *self.adapters):
            return error(404, f"The model `{body['model']}` does not exist.")
        biases = {int(k): v for k, v in body.get("logit_bias", {}).items()}
        if bad := [k for k in biases if k >= self.vocab_size]:
            said = f" Vocabulary size: {self.vocab_size}" if self.tells_vocabulary else ""
            return error(400, f"token_id(s) {bad} in logit_bias contain out-of-vocab token ids.{said}")
        for name in ("logprobs", "prompt_logprobs"):
            if (asked := body.get(name) or 0) > self.max_logprobs:
                text = f"Requested {name} of {asked}, which is greater than max allowed: {self.max_logprobs}"
                return error(400, text)
        if self.plugin and "hemostat" in body.get("vllm_xargs", {}):
            return error(400, "vllm_xargs.hemostat must be a profile version (32 lowercase hex digits)")
        prompt = body["prompt"] if isinstance(body["prompt"], list) else self.encode(body["prompt"])
        table = self.logprobs
        row = table[prompt[-1]].copy()
        chosen = int((row + [biases.get(i, 0.0) for i in range(self.vocab_size)]).argmax())
        if not self.raw:
            row += [biases.get(i, 0.0) for i in range(self.vocab_size)]
        choice: dict[str, Any] = {"text": "x", "index": 0}
        if k := body.get("logprobs"):
            best = {*row.argsort()[::-1][:k].tolist(), chosen}
            choice["logprobs"] = {
                "token_logprobs": [row[chosen]],
                "top_logprobs": [{f"token_id:{i}": row[i] for i in best}],
            }
        if body.get("return_token_ids") and self.token_ids:
            choice |= {"token_ids": [chosen], "prompt_token_ids": prompt}
        if k := body.get("prompt_logprobs"):
            rows: list[Any] = [None]
            for before, token in itertools.pairwise(prompt):
                order = table[before].argsort()[::-1]
                ids = dict.fromkeys([token, *order[:k].tolist()])
                rank = {int(i): n + 1 for n, i in enumerate(order)}
                rows.append({str(i): {"logprob": table[before, i], "rank": rank[i], "decoded_token": "x"} for i in ids})
            choice["prompt_logprobs"] = rows[: len(rows) - self.short]
        return 200, {"choices": [choice]}

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while line := await reader.readline():
                path = line.split()[1].decode()
                headers = {}
                while (header := (await reader.readline()).decode().strip()) != "":
                    name, _, value = header.partition(":")
                    headers[name.lower()] = value.strip()
                body = json.loads(await reader.readexactly(int(headers.get("content-length", 0))) or b"{}")
                self.seen.append((path, body))
                if self.hang and path == "/v1/completions":
                    await asyncio.sleep(3600)
                status, answer = self.answer(path, headers, body)
                data = self.mangle.encode() if self.mangle and status == 200 else json.dumps(answer).encode()
                writer.write(b"HTTP/1.1 %d X\r\ncontent-length: %d\r\n\r\n" % (status, len(data)) + data)
        except (ConnectionError, asyncio.CancelledError):
            pass
        finally:
            writer.close()


def error(status: int, message: str) -> tuple[int, Any]:
    return status, {"error": {"message": message, "type": "BadRequestError", "code": status}}


@asynccontextmanager
async def running(fake: FakeVllm) -> AsyncIterator[FakeVllm]:
    connections: set[asyncio.Task[None]] = set()

    async def connected(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        connections.add(task)
        await fake.serve(reader, writer)

    server = await asyncio.start_server(connected, "127.0.0.1", 0)
    fake.url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
    try:
        yield fake
    finally:
        server.close()
        for task in connections:
            task.cancel()
        await asyncio.gather(*connections, return_exceptions=True)
