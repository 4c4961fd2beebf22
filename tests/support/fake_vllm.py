"""A vLLM without a model: the wire format of 0.32 (checked against the real server by tests/wire/test_real_vllm.py).

An ASGI application, deterministic from its seed: logits are a hash of the last tokens. A prompt whose last line is
`say: TEXT` makes it answer TEXT, token by token, so that tests choose the answer (unicode, tool calls, stop strings).
It also answers as a reference server does (`prompt_logprobs`, `/tokenize`). Faults are fields of `FakeVllm`, which may
be set at any time.

    python tests/support/fake_vllm.py --port 8000        # a server, for trying things by hand
"""

from __future__ import annotations

import argparse
import asyncio
import codecs
import itertools
import json
import re
import threading
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import AbstractContextManager, asynccontextmanager, contextmanager, nullcontext
from dataclasses import dataclass, field
from hashlib import blake2b
from typing import Any

import numpy as np
import numpy.typing as npt
import uvicorn
from tests.support.fake_lora import LOAD, UNLOAD, FakeLora

VOCAB = 512
IM_START, EOS = 256, 257
"""Ids below 256 are bytes, those above 257 are words."""

_EVENT_STREAM = [(b"content-type", b"text/event-stream; charset=utf-8")]
_DONE = b"data: [DONE]\n\n"

Scope = dict[str, Any]
Receive = Callable[[], Awaitable[dict[str, Any]]]
Send = Callable[[dict[str, Any]], Awaitable[None]]


def token_bytes(token: int) -> bytes:
    if token < 256:
        return bytes([token])
    return {IM_START: b"<|im_start|>", EOS: b"<|im_end|>"}.get(token, b" w%d" % token)


def encode(text: str) -> list[int]:
    return list(text.encode())


def render(messages: list[dict[str, Any]]) -> list[int]:
    """The chat template: a marker, the role and the text of every message."""
    ids: list[int] = []
    for message in messages:
        content = message.get("content") or ""
        if isinstance(content, list):
            content = "\n".join(part.get("text", "") for part in content)
        ids += [IM_START, *encode(f"{message['role']}\n{content}"), EOS]
    return [*ids, IM_START, *encode("assistant\n")]


def _dumps(value: Any) -> bytes:
    return json.dumps(value, ensure_ascii=False, separators=(",", ":")).encode()


def _error_event(body: dict[str, Any]) -> bytes:
    """With json.dumps's own separators, as vLLM writes it."""
    return b"data: " + json.dumps(body).encode() + b"\n\n"


class RefusedError(Exception):
    def __init__(self, message: str, param: str | None, kind: str = "BadRequestError", code: int = 400) -> None:
        super().__init__(message)
        self.status = code
        self.body = {"error": {"message": message, "type": kind, "param": param, "code": code}}


@dataclass(frozen=True, slots=True)
class Step:
    """One engine step: one token."""

    token: int
    logprobs: npt.NDArray[np.float64]
    text: str
    """What is new in the text; held back while a stop string or a character is incomplete."""
    finish: str | None
    stop_reason: str | None


@dataclass
class FakeVllm:
    """seed: the model. noise: how far this model's logits stand off those of the same seed without noise."""

    seed: int = 0
    noise: float = 0.0
    model: str = "fake"
    adapters: tuple[str, ...] = ()
    lora: FakeLora | None = None
    """Adapters that are loaded at run time, in addition to `adapters`, which change nothing but the name."""
    aliases: tuple[str, ...] = ()
    """Further names of the model."""
    others: tuple[FakeVllm, ...] = ()
    """Further base models, as behind a router: requests that name one are answered by it."""
    root: str | None = None
    """The path of the model in the list; None: its name."""
    max_logprobs: int = 64
    max_model_len: int = 2048
    tool_parser: bool = True
    force_usage: bool = False
    fingerprint: str | None = "vllm-0.32.0-fake0000"
    created: int = 1_700_000_000
    token_delay: float = 0.0
    """Seconds before every token."""
    hold_after: int | None = None
    """Wait before this token for as long as this is set."""
    die_after: int | None = None
    """Drop the connection before this token."""
    error_after: int | None = None
    """Send an error event before this token of a stream."""
    lose_tool_tokens: bool = False
    """Leave out the events of steps that the tool parser holds back, as vllm-project/vllm#27482 reports."""
    status: int | None = None
    """Answer every generation with this status."""
    vocab_size: int = VOCAB
    api_key: str | None = None
    """Required as a bearer token on every route but /version."""
    plugin: bool = False
    """Hemostat's logits processor is loaded: it refuses what is not a profile version."""
    returns_token_ids: bool = True
    raw_logprobs: bool = True
    """Off: logprobs are reported after logit_bias, as another --logprobs-mode does."""
    chat_template: str | None = ""
    """Text in front of every rendered chat; None: the model has no chat template."""
    names_vocab_size: bool = True
    """The refusal of an id outside of the vocabulary says how large the vocabulary is."""
    hang: bool = False
    """Never answer a generation."""
    short_prompt_logprobs: bool = False
    """Leave out the last position of `prompt_logprobs`."""
    replace_body: str | None = None
    """The body of every answer with status 200."""
    url: str = ""
    """Set by `running`."""
    seen: list[tuple[str, dict[str, Any]]] = field(default_factory=list)
    """Path and body of every request with a JSON object as body."""
    requests: list[dict[str, Any]] = field(default_factory=list)
    """Bodies of the generations, as they came."""
    headers: list[dict[bytes, bytes]] = field(default_factory=list)
    aborted: int = 0
    """Generations whose client went away."""
    _ids: Iterator[int] = field(default_factory=itertools.count)

    # The model -------------------------------------------------------------------------------------------------------

    def logprobs(self, context: list[int], adapter: str | None = None) -> npt.NDArray[np.float64]:
        """float64 [VOCAB], nats: what comes after these tokens. adapter: one of `lora`."""
        key = np.asarray(context[-4:], "<i4").tobytes()

        def normal(purpose: bytes) -> npt.NDArray[np.float64]:
            digest = blake2b(key, digest_size=16, key=self.seed.to_bytes(8, "little"), person=purpose).digest()
            return np.random.Generator(np.random.PCG64(int.from_bytes(digest, "little"))).standard_normal(
                self.vocab_size
            )

        logits = 3.0 * normal(b"model")
        logits[:IM_START] -= 4.0
        if self.noise:
            logits += self.noise * normal(b"noise")
        if adapter is not None and self.lora is not None:
            logits += self.lora.effect(adapter, context, self.vocab_size)
        # float32 as in the engine, so that JSON carries what was computed.
        return (logits - np.log(np.exp(logits).sum())).astype(np.float32).astype(np.float64)

    def _row_logprobs(self, context: list[int], body: dict[str, Any]) -> npt.NDArray[np.float64]:
        """The same for a request: with the adapter that it names."""
        adapter = None if self.lora is None else self.lora.applied(self.answers_as(body))
        return self.logprobs(context, adapter)

    def encode(self, text: str) -> list[int]:
        return encode(text)

    def render(self, messages: list[dict[str, Any]]) -> list[int]:
        if self.chat_template is None:
            raise RefusedError("default chat template is no longer allowed, so you must provide a chat template", None)
        return [*encode(self.chat_template), *render(messages)]

    @staticmethod
    def _biased(logprobs: npt.NDArray[np.float64], body: dict[str, Any]) -> npt.NDArray[np.float64]:
        biased = logprobs.copy()
        for token, bias in (body.get("logit_bias") or {}).items():
            biased[int(token)] += bias
        return biased

    def _sample(self, logprobs: npt.NDArray[np.float64], body: dict[str, Any], position: int) -> int:
        temperature = 1.0 if body.get("temperature") is None else body["temperature"]
        biased = self._biased(logprobs, body)
        if temperature:
            seed = (self.seed, body.get("seed") or 0, position)
            biased = biased / temperature + np.random.default_rng(seed).gumbel(size=self.vocab_size)
        return int(biased.argmax())

    def _steps(self, prompt: list[int], body: dict[str, Any], limit: int) -> Iterator[Step]:
        text_of_prompt = bytes(token for token in prompt if token < 256).decode(errors="replace")
        script: Iterator[int] | None = None
        if "say: " in text_of_prompt:
            said = text_of_prompt.rpartition("say: ")[2].removesuffix("assistant\n")
            script = iter([*encode(said), EOS])
        stops = body.get("stop") or []
        stops = [stops] if isinstance(stops, str) else stops
        hold = max((len(stop) for stop in stops), default=1) - 1
        decoder = codecs.getincrementaldecoder("utf-8")("replace")
        context, text, sent = list(prompt), "", 0
        for position in range(1, limit + 1):
            logprobs = self._row_logprobs(context, body)
            token = next(script) if script is not None else self._sample(logprobs, body, position)
            context.append(token)
            finish: str | None = None
            stop_reason: str | None = None
            if token == EOS and not body.get("ignore_eos"):
                finish = "stop"
            else:
                text += decoder.decode(token_bytes(token))
                found = [(text.find(stop), stop) for stop in stops if stop in text]
                if found:
                    end, stop_reason = min(found)
                    text, finish = text[:end], "stop"
                elif position == limit:
                    finish = "length"
            end = len(text) if finish else max(sent, len(text) - hold)
            reported = logprobs if self.raw_logprobs else self._biased(logprobs, body)
            yield Step(token, reported, text[sent:end], finish, stop_reason)
            sent = end
            if finish:
                return

    # Logprobs as the two routes write them ---------------------------------------------------------------------------

    @staticmethod
    def _row(step: Step, top_k: int) -> dict[int, float]:
        """The emitted token first, then the most likely ones, as the engine hands them out."""
        row = {step.token: float(step.logprobs[step.token])}
        for token in np.argsort(-step.logprobs, kind="stable")[:top_k]:
            row.setdefault(int(token), float(step.logprobs[token]))
        return row

    def _chat_logprobs(self, steps: list[Step], body: dict[str, Any]) -> dict[str, Any]:
        as_ids = body.get("return_tokens_as_token_ids")
        top_k = body.get("top_logprobs") or 0

        def entry(token: int, logprob: float) -> dict[str, Any]:
            name = f"token_id:{token}" if as_ids else token_bytes(token).decode(errors="replace")
            return {"token": name, "logprob": logprob, "bytes": list(name.encode())}

        content = []
        for step in steps:
            row = self._row(step, top_k)
            own = entry(step.token, row[step.token])
            own["bytes"] = list(token_bytes(step.token).decode(errors="replace").encode())
            own["top_logprobs"] = [entry(*item) for item in itertools.islice(row.items(), top_k)]
            content.append(own)
        return {"content": content}

    def _completion_logprobs(self, steps: list[Step], body: dict[str, Any], offset: int) -> dict[str, Any]:
        def name(token: int) -> str:
            as_ids = body.get("return_tokens_as_token_ids")
            return f"token_id:{token}" if as_ids else token_bytes(token).decode(errors="replace")

        tokens = [name(step.token) for step in steps]
        rows = [self._row(step, body["logprobs"]) for step in steps]
        return {
            "text_offset": [offset + sum(map(len, tokens[:i])) for i in range(len(tokens))],
            "token_logprobs": [row[step.token] for row, step in zip(rows, steps, strict=True)],
            "tokens": tokens,
            "top_logprobs": [{name(token): value for token, value in row.items()} for row in rows],
        }

    def _prompt_logprobs(self, prompt: list[int], body: dict[str, Any]) -> list[dict[str, Any] | None]:
        rows: list[dict[str, Any] | None] = [None]
        top_k = body["prompt_logprobs"]
        for position in range(1, len(prompt)):
            logprobs = self._row_logprobs(prompt[:position], body)
            order = np.argsort(-logprobs, kind="stable")
            ranks = {int(token): rank for rank, token in enumerate(order, 1)}
            chosen = dict.fromkeys([prompt[position], *(int(token) for token in order[:top_k])])
            rows.append(
                {
                    str(token): {
                        "logprob": float(logprobs[token]),
                        "rank": ranks[token],
                        "decoded_token": token_bytes(token).decode(errors="replace"),
                    }
                    for token in chosen
                }
            )
        return rows[: len(rows) - self.short_prompt_logprobs]

    # HTTP ------------------------------------------------------------------------------------------------------------

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            raise RuntimeError(f"no {scope['type']} here")
        body = b""
        while True:
            message = await receive()
            body += message.get("body", b"")
            if not message.get("more_body"):
                break
        headers = dict(scope["headers"])
        try:
            route = (scope["method"], scope["path"])
            self._note(route[1], body)
            if route[1] != "/version" and not self._authorized(headers):
                await _answer(send, 401, {"error": "Unauthorized"})
            elif route in (("POST", "/v1/chat/completions"), ("POST", "/v1/completions")):
                await self._named(body)._generate(route[1] == "/v1/chat/completions", headers, body, receive, send)
            else:
                status, value = (self if route[0] == "GET" else self._named(body))._other(route, body)
                await self._answer(send, status, value)
        except RefusedError as refused:
            await _answer(send, refused.status, refused.body)

    def _authorized(self, headers: dict[bytes, bytes]) -> bool:
        return self.api_key is None or headers.get(b"authorization") == f"Bearer {self.api_key}".encode()

    def _note(self, path: str, data: bytes) -> None:
        try:
            body = json.loads(data or b"{}")
        except json.JSONDecodeError:
            return
        if isinstance(body, dict):
            self.seen.append((path, body))

    async def _answer(self, send: Send, status: int, value: Any) -> None:
        await _answer(send, status, value, None if self.replace_body is None else self.replace_body.encode())

    def _cards(self) -> list[tuple[str, str, str | None]]:
        """Name, root and parent."""
        root = self.root or self.model
        base: list[tuple[str, str, str | None]] = [(name, root, None) for name in (self.model, *self.aliases)]
        loaded = {} if self.lora is None else self.lora.names
        adapters = [*((name, name) for name in self.adapters), *loaded.items()]
        return [*base, *((name, path, self.model) for name, path in adapters)]

    def answers_as(self, body: dict[str, Any]) -> str:
        """What the answer names as its model: whichever name of the base model was asked for, its first."""
        name = body.get("model") or self.model
        return self.model if name in self.aliases else str(name)

    def _named(self, body: bytes) -> FakeVllm:
        """The model that the body names."""
        try:
            name = json.loads(body or b"{}").get("model")
        except (json.JSONDecodeError, AttributeError):
            return self
        return next((fake for fake in self.others if name in (fake.model, *fake.aliases, *fake.adapters)), self)

    def _other(self, route: tuple[str, str], body: bytes) -> tuple[int, Any]:
        if route == ("GET", "/v1/models"):
            cards = [card for fake in (self, *self.others) for card in fake._cards()]
            return 200, {
                "object": "list",
                "data": [
                    {
                        "id": name,
                        "object": "model",
                        "created": self.created,
                        "owned_by": "vllm",
                        "root": root,
                        "parent": parent,
                        "max_model_len": self.max_model_len,
                        "permission": [],
                    }
                    for name, root, parent in cards
                ],
            }
        if route == ("GET", "/version"):
            return 200, {"version": "0.32.0"}
        if route[1] in ("/health", "/ping"):
            return 200, None
        if self.lora is not None and route[0] == "POST":
            answer = self.lora.route(route[1], json.loads(body))
            if answer is not None and answer[0] == 200:
                return 200, answer[1]
            if answer is not None:
                raise RefusedError(answer[1], None, "InvalidUserInput", answer[0])
        if route == ("GET", "/metrics"):
            return 200, "" if self.lora is None else self.lora.metrics()
        if route == ("GET", "/openapi.json"):
            updating = self.lora is not None and self.lora.updating
            return 200, {"openapi": "3.1.0", "paths": {key: {} for key in ((LOAD, UNLOAD) if updating else ())}}
        if route == ("POST", "/tokenize"):
            asked = json.loads(body)
            ids = self.render(asked["messages"]) if "messages" in asked else self.encode(asked["prompt"])
            return 200, {"count": len(ids), "max_model_len": self.max_model_len, "tokens": ids, "token_strs": None}
        if route == ("POST", "/detokenize"):
            ids = json.loads(body)["tokens"]
            return 200, {"prompt": b"".join(map(token_bytes, ids)).decode(errors="replace")}
        return 404, {"detail": "Not Found"}

    def _check(self, chat: bool, data: bytes) -> tuple[dict[str, Any], list[int], int]:
        """Body, prompt and the most tokens to generate; or RefusedError as vLLM words it."""
        try:
            body = json.loads(data)
        except json.JSONDecodeError as error:
            text = (
                f"1 validation error:\n  {{'type': 'json_invalid', 'loc': 'body.{error.pos}', "
                f"'msg': 'JSON decode error', 'input': '<dict of 0 items>', 'ctx': {{'error': '{error.msg}'}}}}"
            )
            raise RefusedError(text, f"body.{error.pos}", "Bad Request") from None
        if chat and "messages" not in body:
            text = (
                "1 validation error:\n  {'type': 'missing', 'loc': 'body.messages', 'msg': 'Field required', "
                f"'input': '<dict of {len(body)} items>'}}"
            )
            raise RefusedError(text, "body.messages", "Bad Request")
        name = body.get("model") or self.model
        status, refusal = 404, f"The model `{name}` does not exist. Valid aliases: {self.model}."
        known = name in (self.model, *self.aliases, *self.adapters)
        if not known and self.lora is not None:
            status, text = self.lora.resolve(name)
            known, refusal = not status, text if status == 400 else refusal
        if not known:
            raise RefusedError(refusal, "model", "NotFoundError" if status == 404 else "BadRequestError", status)
        if chat:
            prompt = self.render(body["messages"])
            limit = body.get("max_completion_tokens") or body.get("max_tokens")
        else:
            given = body.get("prompt") or ""
            prompt = self.encode(given) if isinstance(given, str) else list(given)
            limit = 16 if body.get("max_tokens") is None else body["max_tokens"]
        if len(prompt) >= self.max_model_len:
            raise RefusedError(
                f"This model's maximum context length is {self.max_model_len} tokens. However, your prompt contains at "
                f"least {self.max_model_len + 1} input tokens, which exceeds this limit even without any output tokens."
                " Please reduce the length of the input prompt. "
                f"(parameter=input_tokens, value={self.max_model_len + 1})",
                "input_tokens",
            )
        if (body.get("temperature") or 0) < 0:
            value = float(body["temperature"])
            raise RefusedError(
                f"temperature must be non-negative, got {value}. (parameter=temperature, value={value})", "temperature"
            )
        if strange := [int(i) for i in body.get("logit_bias") or {} if not 0 <= int(i) < self.vocab_size]:
            size = f" Vocabulary size: {self.vocab_size}" if self.names_vocab_size else ""
            raise RefusedError(
                f"token_id(s) {strange} in logit_bias contain out-of-vocab token ids.{size} "
                f"(parameter=logit_bias, value={strange})",
                "logit_bias",
            )
        version = (body.get("vllm_xargs") or {}).get("hemostat")
        if self.plugin and version is not None and not re.fullmatch("[0-9a-f]{32}", str(version)):
            raise RefusedError("vllm_xargs.hemostat must be a profile version (32 lowercase hex digits)", None)
        if (asked := body.get("prompt_logprobs") or 0) > self.max_logprobs:
            raise RefusedError(
                f"Requested prompt logprobs of {asked}, which is greater than max allowed: {self.max_logprobs} "
                f"(parameter=prompt_logprobs, value={asked})",
                "prompt_logprobs",
            )
        room = self.max_model_len - len(prompt)
        return body, prompt, min(room, limit or room)

    async def _generate(
        self, chat: bool, headers: dict[bytes, bytes], data: bytes, receive: Receive, send: Send
    ) -> None:
        self.headers.append(headers)
        if self.status is not None:
            raise RefusedError("Internal server error", None, "InternalServerError", self.status)
        if self.hang:
            await _disconnected(receive)
            return
        body, prompt, limit = self._check(chat, data)
        self.requests.append(body)
        asked = (body.get("top_logprobs") if chat else body.get("logprobs")) or 0
        if asked > self.max_logprobs:
            refused = RefusedError(
                f"Requested sample logprobs of {asked}, which is greater than max allowed: {self.max_logprobs} "
                f"(parameter=logprobs, value={asked})",
                "logprobs",
            )
            if not body.get("stream"):
                raise refused
            # Only the engine knows the limit, and by then the stream has begun.
            await _start(send, 200, _EVENT_STREAM)
            await send({"type": "http.response.body", "body": _error_event(refused.body) + _DONE})
            return
        name = headers.get(b"x-request-id", str(next(self._ids)).encode()).decode()
        generation = _Generation(self, chat, body, prompt, limit, ("chatcmpl-" if chat else "cmpl-") + name)
        gone = asyncio.ensure_future(_disconnected(receive))
        try:
            if body.get("stream"):
                await _start(send, 200, _EVENT_STREAM)
                async for event in generation.events():
                    if gone.done():
                        self.aborted += 1
                        return
                    await send({"type": "http.response.body", "body": event, "more_body": True})
                await send({"type": "http.response.body", "body": b""})
            else:
                work = asyncio.ensure_future(generation.whole())
                await asyncio.wait({work, gone}, return_when=asyncio.FIRST_COMPLETED)
                if not work.done():
                    self.aborted += 1
                    work.cancel()
                    return
                await self._answer(send, 200, work.result())
        finally:
            gone.cancel()


class _Generation:
    """One request's output, in the form that was asked for."""

    def __init__(
        self, fake: FakeVllm, chat: bool, body: dict[str, Any], prompt: list[int], limit: int, request_id: str
    ) -> None:
        self.fake, self.chat, self.body, self.prompt, self.limit, self.id = fake, chat, body, prompt, limit, request_id
        options = body.get("stream_options") or {}
        self.usage = fake.force_usage or bool(options.get("include_usage"))
        self.continuous = fake.force_usage or (self.usage and bool(options.get("continuous_usage_stats")))
        self.return_ids = bool(body.get("return_token_ids")) and fake.returns_token_ids
        self.tools = bool(body.get("tools")) and body.get("tool_choice", "auto") == "auto" and fake.tool_parser
        self.tool_id = f"chatcmpl-tool-{blake2b(request_id.encode(), digest_size=8).hexdigest()}"

    async def _steps(self) -> AsyncIterator[Step]:
        with self._in_batches():
            async for step in self._own_steps():
                yield step

    def _in_batches(self) -> AbstractContextManager[None]:
        lora = self.fake.lora
        return nullcontext() if lora is None else lora.generation(self.fake.answers_as(self.body))

    async def _own_steps(self) -> AsyncIterator[Step]:
        for position, step in enumerate(self.fake._steps(self.prompt, self.body, self.limit)):
            await asyncio.sleep(self.fake.token_delay)
            while position == self.fake.hold_after:
                await asyncio.sleep(0.01)
            if self.fake.lora is not None and self.body.get("model") in self.fake.lora.broken:
                raise RefusedError("Internal server error", None, "InternalServerError", 500)
            if position == self.fake.die_after:
                raise ConnectionError("the fake engine dies here, as it was told to")
            yield step

    def _usage(self, completed: int) -> dict[str, Any]:
        prompt = len(self.prompt)
        return {"prompt_tokens": prompt, "total_tokens": prompt + completed, "completion_tokens": completed}

    async def whole(self) -> dict[str, Any]:
        steps = [step async for step in self._steps()]
        text = "".join(step.text for step in steps)
        last = steps[-1]
        ids = [step.token for step in steps] if self.return_ids else None
        prompt_ids = self.prompt if self.return_ids else None
        if self.chat:
            message: dict[str, Any] = {
                "role": "assistant",
                "content": text,
                "refusal": None,
                "annotations": None,
                "audio": None,
                "function_call": None,
            }
            finish = last.finish
            if self.tools and (call := _tool_call(text)) is not None:
                before, name, arguments = call
                message["content"] = before or None
                message["tool_calls"] = [
                    {"id": self.tool_id, "type": "function", "function": {"name": name, "arguments": arguments}}
                ]
                finish = "tool_calls"
            choice: dict[str, Any] = {
                "index": 0,
                "message": message | {"reasoning": None},
                "logprobs": self.fake._chat_logprobs(steps, self.body) if self.body.get("logprobs") else None,
                "finish_reason": finish,
                "stop_reason": last.stop_reason,
                "token_ids": ids,
                "routed_experts": None,
            }
            extra = {"prompt_logprobs": None, "prompt_token_ids": prompt_ids, "prompt_text": None}
        else:
            wanted, prompt_k = self.body.get("logprobs"), self.body.get("prompt_logprobs")
            choice = {
                "index": 0,
                "text": text,
                "logprobs": None if wanted is None else self.fake._completion_logprobs(steps, self.body, 0),
                "finish_reason": last.finish,
                "stop_reason": last.stop_reason,
                "token_ids": ids,
                "prompt_logprobs": None if prompt_k is None else self.fake._prompt_logprobs(self.prompt, self.body),
                "prompt_token_ids": prompt_ids,
                "routed_experts": None,
            }
            extra = {}
        return {
            "id": self.id,
            "object": "chat.completion" if self.chat else "text_completion",
            "created": self.fake.created,
            "model": self.fake.answers_as(self.body),
            "choices": [choice],
            "service_tier": None,
            "system_fingerprint": self.fake.fingerprint,
            "usage": self._usage(len(steps)) | {"prompt_tokens_details": None, "completion_tokens_details": None},
            **extra,
            "kv_transfer_params": None,
            "ec_transfer_params": None,
            "metrics": None,
        }

    def _event(self, choice: dict[str, Any] | None, completed: int, **more: Any) -> bytes:
        event: dict[str, Any] = {
            "id": self.id,
            "object": "chat.completion.chunk" if self.chat else "text_completion",
            "created": self.fake.created,
            "model": self.fake.answers_as(self.body),
            "choices": [] if choice is None else [choice],
        }
        if choice is None:
            event["usage"] = self._usage(completed)
        elif self.continuous:
            details = {"completion_tokens_details": None} if self.chat else {}
            event["usage"] = self._usage(completed) | details
        finished = choice is None or (choice["finish_reason"] is not None and not self.usage)
        if finished and self.fake.fingerprint is not None:
            event["system_fingerprint"] = self.fake.fingerprint
        return b"data: " + _dumps(event | more) + b"\n\n"

    async def events(self) -> AsyncIterator[bytes]:
        parser = _ToolStream(self.tool_id) if self.tools else None
        completed = offset = 0
        async for step in self._steps():
            if completed == self.fake.error_after:
                yield _error_event(RefusedError("Internal server error", None, "InternalServerError", 500).body)
                break
            if completed == 0 and self.chat:
                role = {"index": 0, "delta": {"role": "assistant", "content": ""}, "logprobs": None}
                prompt_ids = self.prompt if self.return_ids else None
                yield self._event(role | {"finish_reason": None}, 0, prompt_token_ids=prompt_ids, prompt_text=None)
            completed += 1
            ids = [step.token] if self.return_ids else None
            if self.chat:
                event = self._chat_event(step, ids, completed, parser)
                if event is not None:
                    yield event
                continue
            logprobs = None
            if self.body.get("logprobs") is not None:
                logprobs = self.fake._completion_logprobs([step], self.body, offset)
                offset += len(logprobs["tokens"][0])
            yield self._event(
                {
                    "index": 0,
                    "text": step.text,
                    "logprobs": logprobs,
                    "finish_reason": step.finish,
                    "stop_reason": step.stop_reason,
                    "prompt_token_ids": self.prompt if self.return_ids and completed == 1 else None,
                    "token_ids": ids,
                },
                completed,
            )
        else:
            if self.usage:
                yield self._event(None, completed)
        yield _DONE

    def _chat_event(
        self, step: Step, ids: list[int] | None, completed: int, parser: _ToolStream | None
    ) -> bytes | None:
        delta: dict[str, Any] | None = {"content": step.text}
        finish = step.finish
        if parser is not None:
            delta = parser.feed(step.text, step.finish is not None)
            if parser.called and finish == "stop":
                finish = "tool_calls"
        elif self.fake.tool_parser and not step.text:
            delta = None
        logprobs = self.fake._chat_logprobs([step], self.body) if self.body.get("logprobs") else None
        if delta is None and finish is None and (self.fake.lose_tool_tokens or (logprobs is None and ids is None)):
            return None
        choice: dict[str, Any] = {"index": 0, "delta": delta or {}, "logprobs": logprobs, "finish_reason": finish}
        if finish is not None:
            choice["stop_reason"] = step.stop_reason
        return self._event(choice | {"token_ids": ids}, completed)


_OPEN, _CLOSE = "<tool_call>", "</tool_call>"


def _tool_call(text: str) -> tuple[str, str, str] | None:
    """Text before the call, name and arguments, in Hermes's format."""
    before, opened, rest = text.partition(_OPEN)
    if not opened:
        return None
    call = json.loads(rest.partition(_CLOSE)[0])
    return before, call["name"], json.dumps(call["arguments"], ensure_ascii=False)


class _ToolStream:
    """Text in, deltas out; None where the parser has nothing to say yet."""

    def __init__(self, tool_id: str) -> None:
        self.called = False
        self._tool_id = tool_id
        self._text = ""
        self._sent = 0
        self._closed = False

    def feed(self, text: str, finished: bool) -> dict[str, Any] | None:
        self._text += text
        opened = self._text.find(_OPEN)
        if opened < 0:
            held = 0 if finished else next((n for n in range(10, 0, -1) if self._text.endswith(_OPEN[:n])), 0)
            end = len(self._text) - held
            content, self._sent = self._text[self._sent : end], end
            return {"content": content} if content else None
        if self._closed:
            return None
        if not self.called and '"arguments"' in self._text:
            self.called = True
            name = self._text.partition('"name": "')[2].partition('"')[0]
            function = {"name": name}
            return self._delta({"id": self._tool_id, "type": "function", "index": 0, "function": function})
        if _CLOSE in self._text and (call := _tool_call(self._text)) is not None:
            self._closed = True
            return self._delta({"index": 0, "function": {"arguments": call[2]}})
        return None

    @staticmethod
    def _delta(call: dict[str, Any]) -> dict[str, Any]:
        return {"content": None, "tool_calls": [call]}


async def _disconnected(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


async def _start(send: Send, status: int, headers: list[tuple[bytes, bytes]]) -> None:
    await send({"type": "http.response.start", "status": status, "headers": headers})


async def _answer(send: Send, status: int, value: Any, replaced: bytes | None = None) -> None:
    """replaced: the body, instead of `value`."""
    data = b"" if value is None else value.encode() if isinstance(value, str) else _dumps(value)
    data = data if replaced is None else replaced
    headers = [(b"content-length", str(len(data)).encode())]
    if value is not None:
        headers.append((b"content-type", b"application/json"))
    await _start(send, status, headers)
    await send({"type": "http.response.body", "body": data})


@contextmanager
def serving(fake: FakeVllm, port: int = 0) -> Iterator[str]:
    """Serve it on a thread of its own; yields the base URL."""
    config = uvicorn.Config(
        fake, host="127.0.0.1", port=port, log_level="critical", lifespan="off", ws="none", access_log=False
    )
    server = uvicorn.Server(config)
    socket = config.bind_socket()
    socket.listen(128)  # now, so that whoever gets the address may connect at once: the thread may take its time
    thread = threading.Thread(target=server.run, kwargs={"sockets": [socket]}, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{socket.getsockname()[1]}"
    finally:
        server.should_exit = True
        server.force_exit = True
        thread.join(10)
        socket.close()


@asynccontextmanager
async def running(fake: FakeVllm) -> AsyncIterator[FakeVllm]:
    """The same for asynchronous tests; `fake.url` is its base URL."""
    with serving(fake) as fake.url:
        yield fake


def main() -> None:
    parser = argparse.ArgumentParser(description="A vLLM without a model.")
    parser.add_argument("--port", type=int, default=8000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--noise", type=float, default=0.0)
    parser.add_argument("--token-delay", type=float, default=0.0)
    arguments = parser.parse_args()
    fake = FakeVllm(seed=arguments.seed, noise=arguments.noise, token_delay=arguments.token_delay)
    uvicorn.run(fake, host="127.0.0.1", port=arguments.port, lifespan="off", ws="none", access_log=False)


if __name__ == "__main__":
    main()
