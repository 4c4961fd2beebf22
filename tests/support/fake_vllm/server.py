"""The server: which model a request names, what is refused, and how the answer goes out."""

from __future__ import annotations

import asyncio
import itertools
import json
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

from tests.support.fake_lora import LOAD, UNLOAD
from tests.support.fake_vllm.answers import (
    DONE,
    EVENT_STREAM,
    Receive,
    RefusedError,
    Scope,
    Send,
    answer,
    disconnected,
    dumps,
    error_event,
    start,
)
from tests.support.fake_vllm.generation import Generation
from tests.support.fake_vllm.model import FakeModel, token_bytes
from tests.support.fake_vllm.other_forms import MESSAGES, RESPONSES, OtherForm, anthropic_error, as_chat
from tests.support.fake_vllm.pooling import FakePooling
from tests.support.fake_vllm.tapping import answers_of

from hemostat.engines.messages import TapAnswer

GENERATING = frozenset({("POST", "/v1/chat/completions"), ("POST", "/v1/completions")})


@dataclass
class FakeVllm(FakeModel):
    """A `FakeModel` behind vLLM's routes."""

    adapters: tuple[str, ...] = ()
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
    api_key: str | None = None
    """Required as a bearer token on every route but /version."""
    speculates: bool = False
    """It decodes speculatively: its metrics count drafts, and it refuses logit_bias."""
    returns_token_ids: bool = True
    names_vocab_size: bool = True
    """The refusal of an id outside of the vocabulary says how large the vocabulary is."""
    hang: bool = False
    """Never answer a generation."""
    short_prompt_logprobs: bool = False
    """Leave out the last position of `prompt_logprobs`."""
    last_prompt_logprob: Any = 0
    """In the place of the last one of `prompt_logprobs`; 0: none."""
    keeps_responses: bool = False
    """Those of /v1/responses, so that they can be fetched later."""
    not_a_number: bool = False
    """Its log-probabilities are NaN, so that an answer that has them is refused, as vLLM does."""
    refuses_priority: bool = False
    """It does not schedule by priority, and says so."""
    replace_body: str | None = None
    """The body of every answer with status 200."""
    on_checksums: Callable[[str], None] = field(default=lambda nonce: None)
    """Called with the nonce of a request that asks for checksums of the weights."""
    prefix_caching: bool = False
    """Its metrics say that it has a prefix cache."""
    pooling: FakePooling | None = None
    """A pooling server, which does not generate."""
    routed: bool = False
    """It is a router, with a generating server of the same model behind it, too."""
    url: str = ""
    """Set by `running`."""
    seen: list[tuple[str, dict[str, Any]]] = field(default_factory=list)
    """Path and body of every request with a JSON object as body."""
    requests: list[dict[str, Any]] = field(default_factory=list)
    """Bodies of the generations, as they came."""
    headers: list[dict[bytes, bytes]] = field(default_factory=list)
    handed_out: list[TapAnswer] = field(default_factory=list)
    """Answers, of generations that asked the plugin for them."""
    aborted: int = 0
    """Generations whose client went away."""
    _ids: Iterator[int] = field(default_factory=itertools.count)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            raise RuntimeError(f"no {scope['type']} here")
        body = b""
        while True:
            message = await receive()
            body += message.get("body", b"")
            if not message.get("more_body"):
                break
        headers: dict[bytes, bytes] = {}
        for name, value in scope["headers"]:
            headers[name] = b", ".join((headers[name], value)) if name in headers else value
        try:
            route = (scope["method"], scope["path"])
            self._note(route[1], body)
            if route[1] != "/version" and not self._authorized(headers):
                await answer(send, 401, {"error": "Unauthorized"})
            elif self.pooling is not None and route == ("POST", "/pooling"):
                await self.pooling.answer(body, (self.model, *self.adapters), self.max_model_len, receive, send)
            elif route in GENERATING and (self.pooling is None or self.routed):
                await self.named(body).generate(route[1], headers, body, receive, send)
            elif route in (("POST", RESPONSES), ("POST", MESSAGES)):
                try:
                    await self.named(body).generate(route[1], headers, body, receive, send)
                except RefusedError as refused:
                    value = anthropic_error(refused) if route[1] == MESSAGES else refused.body
                    await answer(send, refused.status, value)
            else:
                status, value = (self if route[0] == "GET" else self.named(body)).other(route, body)
                await self._answer(send, status, value)
        except RefusedError as refused:
            await answer(send, refused.status, refused.body)

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
        await answer(send, status, value, None if self.replace_body is None else self.replace_body.encode())

    def cards(self) -> list[tuple[str, str, str | None]]:
        """Name, root and parent."""
        root = self.root or self.model
        base: list[tuple[str, str, str | None]] = [(name, root, None) for name in (self.model, *self.aliases)]
        loaded = {} if self.lora is None else self.lora.names
        adapters = [*((name, name) for name in self.adapters), *loaded.items()]
        return [*base, *((name, path, self.model) for name, path in adapters)]

    def named(self, body: bytes) -> FakeVllm:
        """The model that the body names."""
        try:
            name = json.loads(body or b"{}").get("model")
        except (json.JSONDecodeError, AttributeError):
            return self
        return next((fake for fake in self.others if name in (fake.model, *fake.aliases, *fake.adapters)), self)

    def other(self, route: tuple[str, str], body: bytes) -> tuple[int, Any]:
        if route == ("GET", "/v1/models"):
            cards = [card for fake in (self, *self.others) for card in fake.cards()]
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
        if route == ("GET", "/metrics") and self.prefix_caching:
            return 200, 'vllm:cache_config_info{block_size="16",enable_prefix_caching="True"} 1.0\n'
        if route == ("GET", "/metrics"):
            drafts = '# TYPE x counter\nvllm:spec_decode_num_drafts_total{engine="0"} 0.0\n' if self.speculates else ""
            return 200, ("" if self.lora is None else self.lora.metrics()) + drafts
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

    def _check(self, chat: bool, data: bytes) -> tuple[dict[str, Any], list[list[int]], int]:
        """Body, prompts and the most tokens to generate; or RefusedError as vLLM words it."""
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
            prompts = [self.render(body["messages"])]
            limit = body.get("max_completion_tokens") or body.get("max_tokens")
        else:
            given = body.get("prompt") or ""
            several = isinstance(given, list) and given and not isinstance(given[0], int)
            prompts = [self.encode(p) if isinstance(p, str) else list(p) for p in (given if several else [given])]
            limit = 16 if body.get("max_tokens") is None else body["max_tokens"]
        longest = max(map(len, prompts))
        if longest >= self.max_model_len:
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
        if (choices := body.get("n") or 1) > 1 and body.get("temperature") == 0:
            raise RefusedError(f"n must be 1 when using greedy sampling, got {choices}.", None)
        if strange := [int(i) for i in body.get("logit_bias") or {} if not 0 <= int(i) < self.vocab_size]:
            size = f" Vocabulary size: {self.vocab_size}" if self.names_vocab_size else ""
            raise RefusedError(
                f"token_id(s) {strange} in logit_bias contain out-of-vocab token ids.{size} "
                f"(parameter=logit_bias, value={strange})",
                "logit_bias",
            )
        if any(token >= self.vocab_size for prompt in prompts for token in prompt):
            raise RefusedError(f"Token id {max(map(max, prompts))} is out of vocabulary", None)
        if self.not_a_number and not chat and (body.get("logprobs") is not None or "prompt_logprobs" in body):
            raise RefusedError("Out of range float values are not JSON compliant", None)
        if self.refuses_priority and body.get("priority"):
            raise RefusedError(f"Got priority {body['priority']} but Priority scheduling is not enabled.", None)
        if self.speculates and body.get("logit_bias"):
            raise RefusedError(
                "The min_p and logit_bias sampling parameters are not yet supported with speculative decoding.", None
            )
        version = (body.get("vllm_xargs") or {}).get("hemostat")
        if self.plugin and version is not None and not re.fullmatch("[0-9a-f]{32}", str(version)):
            said = f" (hemostat-vllm {self.plugin_version})" if self.plugin_version else ""
            raise RefusedError(f"vllm_xargs.hemostat must be a profile version (32 lowercase hex digits){said}", None)
        if (asked := body.get("prompt_logprobs") or 0) > self.max_logprobs:
            raise RefusedError(
                f"Requested prompt logprobs of {asked}, which is greater than max allowed: {self.max_logprobs} "
                f"(parameter=prompt_logprobs, value={asked})",
                "prompt_logprobs",
            )
        room = self.max_model_len - longest
        return body, prompts, min(room, limit or room)

    async def generate(self, path: str, headers: dict[bytes, bytes], data: bytes, receive: Receive, send: Send) -> None:
        own, chat = json.loads(data or b"{}") if path in (RESPONSES, MESSAGES) else None, path != "/v1/completions"
        self.headers.append(headers)
        if self.status is not None:
            raise RefusedError("Internal server error", None, "InternalServerError", self.status)
        if self.hang:
            await disconnected(receive)
            return
        if own is not None:
            data = dumps(as_chat(path, own, kept=self.keeps_responses))
        body, prompts, limit = self._check(chat, data)
        self.requests.append(body if own is None else own)
        xargs = body.get("vllm_xargs") or {}
        if "hemostat_checksums" in xargs and self.acts_on(xargs):
            self.on_checksums(xargs["hemostat_checksums"])
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
            await start(send, 200, EVENT_STREAM)
            await send({"type": "http.response.body", "body": error_event(refused.body) + DONE})
            return
        name = headers.get(b"x-request-id", str(next(self._ids)).encode()).decode()
        chosen = Generation(self, chat, body, prompts, limit, ("chatcmpl-" if chat else "cmpl-") + name)
        generation = chosen if own is None else OtherForm(chosen, path, own)
        gone = asyncio.ensure_future(disconnected(receive))
        self.running += 1
        try:
            if body.get("stream"):
                await start(send, 200, EVENT_STREAM)
                async for event in generation.events():
                    if gone.done():
                        self.aborted += 1
                        return
                    await send({"type": "http.response.body", "body": event, "more_body": True})
                self._hand_out(chosen)
                await send({"type": "http.response.body", "body": b""})
            else:
                work = asyncio.ensure_future(generation.whole())
                await asyncio.wait({work, gone}, return_when=asyncio.FIRST_COMPLETED)
                if not work.done():
                    self.aborted += 1
                    work.cancel()
                    return
                self._hand_out(chosen)
                await self._answer(send, 200, work.result())
        finally:
            gone.cancel()
            self.running -= 1
            if "prompt_logprobs" not in body:
                self.salts.add(body.get("cache_salt") or "")

    def _hand_out(self, generation: Generation) -> None:
        xargs = generation.body.get("vllm_xargs") or {}
        top = xargs.get("hemostat_tap_top")
        if top is not None and self.acts_on(xargs):
            own = generation.body.get("top_logprobs" if generation.chat else "logprobs") or 0
            self.handed_out += answers_of(generation, max(own, min(int(top), self.max_logprobs)))
