"""A vendor's endpoint with the OpenAI API and nothing of vLLM's: it refuses members of a request that OpenAI does not
have. It has the distributions of a `FakeModel`, noise of its own, and the habits of vendors."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from tests.support.fake_vllm import FakeVllm, RefusedError
from tests.support.fake_vllm.answers import Receive, Scope, Send, answer
from tests.support.fake_vllm.model import token_bytes

KNOWN = {
    *("model", "messages", "prompt", "temperature", "top_p", "seed", "logprobs", "top_logprobs"),
    *("max_tokens", "max_completion_tokens"),
}


@dataclass
class FakeVendor:
    """Fields may be set at any time. path: in front of /v1. other, share: another version of the model, and the share
    of the answers that it gives. caches: answers are kept by the prompt alone, or with `seeds` by the whole request.
    decimals: of rounded log-probabilities. most: of listed tokens. busy: so many next answers are 429."""

    model: FakeVllm = field(default_factory=FakeVllm)
    path: str = ""
    noise: float = 0.003
    other: FakeVllm | None = None
    share: float = 0.5
    caches: bool = False
    seeds: bool = False
    decimals: int | None = None
    most: int = 20
    busy: int = 0
    chat: bool = True
    completions: bool = True
    logprobs: bool = True
    newer_length: bool = False
    api_key: str = ""
    asked: int = 0
    seen: list[dict[str, Any]] = field(default_factory=list)
    _rng: np.random.Generator = field(default_factory=lambda: np.random.default_rng(0))
    _kept: dict[str, Any] = field(default_factory=dict)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        body = b""
        while True:
            message = await receive()
            body += message.get("body", b"")
            if not message.get("more_body"):
                break
        try:
            status, value = 200, self._answer(scope["method"], scope["path"], dict(scope["headers"]), body)
        except RefusedError as refused:
            status, value = refused.status, refused.body
        await answer(send, status, value)

    def _answer(self, method: str, path: str, headers: dict[bytes, bytes], data: bytes) -> Any:
        if self.api_key and headers.get(b"authorization") != f"Bearer {self.api_key}".encode():
            raise RefusedError("Incorrect API key provided.", None, "Unauthorized", 401)
        route = path.removeprefix(self.path)
        if not path.startswith(self.path) or (method, route) not in self._routes():
            raise RefusedError("Not Found", None, "NotFoundError", 404)
        if route == "/v1/models":
            return {"object": "list", "data": [{"id": "vendor/model", "object": "model", "owned_by": "vendor"}]}
        if self.busy:
            self.busy -= 1
            raise RefusedError("Rate limit reached.", None, "RateLimitError", 429)
        body = json.loads(data)
        self.seen.append(body)
        self._check(body)
        seed = body.get("seed") if self.seeds else None
        key = json.dumps([body.get("messages"), body.get("prompt"), seed])
        if self.caches and key in self._kept:
            return self._kept[key]
        self._kept[key] = made = self._made(body)
        return made

    def _routes(self) -> set[tuple[str, str]]:
        routes = {("GET", "/v1/models")}
        routes |= {("POST", "/v1/chat/completions")} if self.chat else set()
        return routes | ({("POST", "/v1/completions")} if self.completions else set())

    def _check(self, body: dict[str, Any]) -> None:
        if strange := body.keys() - KNOWN:
            raise RefusedError(f"Unrecognized request argument supplied: {min(strange)}", None, "BadRequestError")
        if self.newer_length and "max_tokens" in body:
            text = "Unsupported parameter: 'max_tokens' is not supported. Use 'max_completion_tokens' instead."
            raise RefusedError(text, "max_tokens", "BadRequestError")
        if (body["top_logprobs"] if "messages" in body else body["logprobs"]) > self.most:
            raise RefusedError(f"top_logprobs must be at most {self.most}.", None, "BadRequestError")

    def _made(self, body: dict[str, Any]) -> dict[str, Any]:
        self.asked += 1
        chat = "messages" in body
        text = body["messages"][0]["content"] if chat else body["prompt"]
        model = self.other if self.other is not None and self._rng.random() < self.share else self.model
        logits = model.logprobs(model.encode(text)) + self._rng.normal(0.0, self.noise, model.vocab_size)
        values = logits - np.log(np.exp(logits).sum())
        token = int((values + self._rng.gumbel(size=len(values))).argmax())
        shown = values if self.decimals is None else values.round(self.decimals)
        best = np.argsort(-values)[: body["top_logprobs"] if chat else body["logprobs"]].tolist()
        top = {token_bytes(n).decode(errors="replace"): float(shown[n]) for n in best}
        name = token_bytes(token).decode(errors="replace")
        if not self.logprobs:
            logprobs: Any = None
        elif chat:
            listed = [{"token": key, "logprob": value} for key, value in top.items()]
            logprobs = {"content": [{"token": name, "logprob": float(shown[token]), "top_logprobs": listed}]}
        else:
            logprobs = {"tokens": [name], "top_logprobs": [top | {name: float(shown[token])}]}
        choice = {"index": 0, "finish_reason": "length", "logprobs": logprobs}
        choice |= {"message": {"role": "assistant", "content": name}} if chat else {"text": name}
        return {"id": f"chatcmpl-{self.asked}", "model": body["model"], "choices": [choice]}
