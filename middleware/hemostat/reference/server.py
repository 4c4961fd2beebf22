"""Client of a vLLM server: scores on it, and asks what it supports. HTTP errors become `ReferenceFailure` here."""

from __future__ import annotations

import asyncio
import os
import re
import ssl
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import httpx
import msgspec
from pydantic import SecretStr

from hemostat.ipc.http_bodies import IDENTITY, AnswerRefused, AnswerTooLarge, read_answer
from hemostat.reference.protocol import FailureReason, ReferenceFailure
from hemostat_calibration.messages import in_words

T = TypeVar("T")

CONNECT_SECONDS = 5.0
MAX_ANSWER_BYTES = 8 * 1024 * 1024
"""The largest size of answers whose length does not depend on a request's."""
MAX_ERROR_BYTES = 64 * 1024
OUT_OF_VOCABULARY = 2**31 - 1
NO_SUCH_ROUTE = {404, 405, 501}
"""The statuses of a server without the route."""
_REASONS = {
    400: FailureReason.REFUSED,
    401: FailureReason.UNAUTHORIZED,
    403: FailureReason.UNAUTHORIZED,
    422: FailureReason.REFUSED,
    429: FailureReason.BUSY,
    503: FailureReason.BUSY,
}
"""The reason for a failure by HTTP status."""
_VOCABULARY_SIZE = re.compile(r"[Vv]ocabulary size: (\d+)")


class Refused(ReferenceFailure):
    """The server answered with a status that is not a success. status: HTTP. detail: the server's error message."""

    def __init__(self, reason: FailureReason, message: str, status: int, detail: str) -> None:
        super().__init__(reason, message)
        self.status = status
        self.detail = detail


class ModelCard(msgspec.Struct, frozen=True):
    """An entry of GET /v1/models."""

    id: str
    root: str | None = None
    parent: str | None = None
    """The name of the base model; it is set for a LoRA adapter."""
    max_model_len: int | None = None


class _Models(msgspec.Struct, frozen=True):
    data: list[ModelCard]


class _Tokens(msgspec.Struct, frozen=True):
    tokens: list[int]


class _Entry(msgspec.Struct, frozen=True):
    logprob: float


class _Logprobs(msgspec.Struct, frozen=True):
    token_logprobs: list[float | None]


class _Choice(msgspec.Struct, frozen=True):
    prompt_logprobs: list[dict[str, _Entry] | None] | None = None
    token_ids: list[int] | None = None
    logprobs: _Logprobs | None = None


class _Completion(msgspec.Struct, frozen=True):
    choices: list[_Choice]


class VllmServer:
    """Every method raises ReferenceFailure: DOWN, TIMEOUT, UNAUTHORIZED, BUSY, REFUSED, HTTP_ERROR, BAD_ANSWER,
    TOO_LARGE (an answer of more than `limit` bytes, of which no more are read)."""

    def __init__(
        self,
        url: str,
        api_key: SecretStr | None = None,
        *,
        timeout: float = 60.0,
        ca: Path | None = None,
        host: str | None = None,
        fields: Mapping[str, str] | None = None,
    ) -> None:
        """url: the root, without /v1. timeout: seconds for one answer. ca: PEM file to trust instead of the system's
        authorities. host: what the server is called in Host and in its certificate, where the URL has its address.
        fields: further header fields of each request."""
        self.url = url
        self._seconds = timeout + CONNECT_SECONDS
        authorization = {"authorization": f"Bearer {api_key.get_secret_value()}"} if api_key else {}
        named = {} if host is None else {"host": host}
        self._extensions = {} if host is None else {"sni_hostname": httpx.URL(f"//{host}").host}
        self._client = httpx.AsyncClient(
            base_url=url,
            headers={**IDENTITY, **authorization, **named, **(fields or {})},
            timeout=httpx.Timeout(timeout, connect=CONNECT_SECONDS),
            verify=ssl.create_default_context(cafile=ca) if url.startswith("https:") else False,
            trust_env=False,  # prompts must not go through a proxy that the environment names for the internet
        )

    async def get(self, path: str, answer: type[T], *, limit: int = MAX_ANSWER_BYTES) -> T:
        return self._decoded(await self._send("GET", path, None, limit), answer)

    async def post(self, path: str, body: Any, answer: type[T], *, limit: int = MAX_ANSWER_BYTES) -> T:
        return self._decoded(await self._send("POST", path, body, limit), answer)

    async def post_for_bytes(self, path: str, body: Any, *, limit: int, skip: int = 0) -> bytes:
        """Returns the body of an answer that is not JSON, without its first `skip` bytes."""
        return await self._send("POST", path, body, limit, skip)

    async def text(self, method: str, path: str, body: Any = None) -> str:
        """Returns the body of an answer that is not JSON."""
        return (await self._send(method, path, body, MAX_ANSWER_BYTES)).decode(errors="replace")

    async def model(self, wanted: str | None) -> ModelCard:
        """Returns the card of `wanted`, or of the first base model; NO_MODEL where it is not served."""
        cards = await self.models()
        for card in cards:
            if card.id == wanted or (wanted is None and card.parent is None):
                return card
        names = ", ".join(card.id for card in cards) or "nothing"
        raise ReferenceFailure(
            FailureReason.NO_MODEL, f"{self.url} serves {names}" + (f", not {wanted}" if wanted else "")
        )

    async def models(self) -> list[ModelCard]:
        """Returns every model that it serves, LoRA adapters included."""
        return (await self.get("/v1/models", _Models)).data

    async def adapters(self) -> frozenset[str]:
        """Returns the names of the LoRA adapters that it serves."""
        return frozenset(card.id for card in await self.models() if card.parent is not None)

    async def version(self) -> str:
        return str((await self.get("/version", dict[str, str])).get("version", "unknown"))

    async def vocab_size(self, model: str) -> int:
        """Returns the size of the vocabulary, read from the error message about a token id that no model has: vLLM has
        no route for it. VOCABULARY where the message does not name it."""
        body = {
            "model": model,
            "prompt": "x",
            "max_tokens": 1,
            "logit_bias": {str(OUT_OF_VOCABULARY): 1.0},
        }
        try:
            await self.post("/v1/completions", body, dict[str, Any])
        except Refused as refused:
            if match := _VOCABULARY_SIZE.search(refused.detail):
                return int(match[1])
            if refused.status in NO_SUCH_ROUTE:
                text = f"{self.url} does not generate: start vLLM there without --runner pooling"
                raise ReferenceFailure(refused.reason, text) from None
            if refused.status not in {400, 422}:
                raise
        raise ReferenceFailure(
            FailureReason.VOCABULARY, f"{self.url} does not name its vocabulary's size; vLLM 0.32 or newer does"
        )

    async def tokenize(self, model: str, text: str, *, special: bool = False) -> list[int]:
        """Returns the token ids of a text. special: with what the tokenizer puts around every text."""
        body = {"model": model, "prompt": text, "add_special_tokens": special}
        return (await self.post("/tokenize", body, _Tokens)).tokens

    async def prompt_logprobs(self, model: str, ids: Sequence[int], **more: Any) -> list[float]:
        """Returns the log-probability of each id after the first, given the ids before it, in nats. It fails with the
        reason SHORT_ANSWER if the answer has fewer. more: further members of the body.
        """
        body = {"model": model, "prompt": list(ids), "max_tokens": 1, "temperature": 0.0, "prompt_logprobs": 0, **more}
        return self._of_prompt(await self.post("/v1/completions", body, _Completion), ids)

    async def forced_logprobs(
        self, model: str, prompt: Sequence[int], forced: Sequence[int], xargs: dict[str, Any], **more: Any
    ) -> list[float] | None:
        """Returns the log-probability of each id of `forced`, which the server decodes after the prompt because its
        plugin is given them, in nats. With `prompt_logprobs` in `more`, the values of the prompt's ids come first, as
        `prompt_logprobs` returns them. It is None if the server decodes other ids, or if the values are not the
        model's own.

        xargs: `vllm_xargs` that give the plugin the ids. more: further members of the body.
        """
        body = {
            "model": model,
            "prompt": list(prompt),
            "max_tokens": len(forced),
            "temperature": 0.0,
            "ignore_eos": True,
            "logprobs": 0,
            "return_token_ids": True,
            "vllm_xargs": xargs,
            **more,
        }
        try:
            answer = await self.post("/v1/completions", body, _Completion)
        except Refused as refused:
            if "vllm_xargs" not in refused.detail and "hemostat" not in refused.detail:
                raise
            return None  # no engine of vLLM's, or a plugin that does not do this
        choice = answer.choices[0] if answer.choices else _Choice()
        if choice.token_ids != list(forced) or choice.logprobs is None:
            return None
        values = [value for value in choice.logprobs.token_logprobs if value is not None]
        # Where the server reports log-probabilities after processors, those of forced tokens are 0.
        if len(values) != len(forced) or not any(values):
            return None
        return [*(self._of_prompt(answer, prompt) if "prompt_logprobs" in more else ()), *values]

    def _of_prompt(self, answer: _Completion, ids: Sequence[int]) -> list[float]:
        """Returns the log-probability of each id of the prompt after the first."""
        rows = (answer.choices[0].prompt_logprobs if answer.choices else None) or []
        result = [row.get(str(token)) if row else None for row, token in zip(rows[1:], list(ids)[1:], strict=False)]
        values = [entry.logprob for entry in result if entry is not None]
        if len(values) != len(ids) - 1:
            raise ReferenceFailure(
                FailureReason.SHORT_ANSWER,
                f"{self.url} sent prompt_logprobs of {len(values)} of {len(ids) - 1} tokens",
            )
        return values

    async def render(
        self, model: str, messages: list[dict[str, str]], tools: Sequence[dict[str, Any]] = ()
    ) -> list[int]:
        """Returns the token ids of a chat under the model's template; NO_CHAT_TEMPLATE where it has none. tools: what
        the request offers."""
        body: dict[str, Any] = {"model": model, "messages": messages}
        body |= {"add_generation_prompt": True, "add_special_tokens": False}
        if tools:
            body["tools"] = list(tools)
        try:
            return (await self.post("/tokenize", body, _Tokens)).tokens
        except Refused as refused:
            if "chat template" in refused.detail.lower():
                raise ReferenceFailure(
                    FailureReason.NO_CHAT_TEMPLATE, f"{model} on {self.url} has no chat template"
                ) from None
            raise

    async def close(self) -> None:
        await self._client.aclose()

    async def _send(self, method: str, path: str, body: Any, limit: int, skip: int = 0) -> bytes:
        content = None if body is None else msgspec.json.encode(body)
        headers = {} if body is None else {"content-type": "application/json"}
        try:
            # httpx's own time-outs are for one read: a server that sends a byte now and then would never end.
            async with (
                asyncio.timeout(self._seconds),
                self._client.stream(
                    method, path, content=content, headers=headers, extensions=self._extensions
                ) as response,
            ):
                if response.is_success:
                    return await read_answer(response, limit, skip)
                status, answer = response.status_code, await _error_body(response)
        except (httpx.TimeoutException, TimeoutError) as error:
            reason = FailureReason.DOWN if isinstance(error, httpx.ConnectTimeout) else FailureReason.TIMEOUT
            raise ReferenceFailure(reason, f"{self.url}{path}: no answer in time") from error
        except httpx.HTTPError as error:
            raise ReferenceFailure(FailureReason.DOWN, f"{self.url}{path}: {_cause(error)}") from error
        except AnswerRefused as error:
            too_large = isinstance(error, AnswerTooLarge)
            reason = FailureReason.TOO_LARGE if too_large else FailureReason.BAD_ANSWER
            raise ReferenceFailure(reason, f"{self.url}{path} sent {error}") from error
        detail = _detail(answer)
        raise Refused(
            _REASONS.get(status, FailureReason.HTTP_ERROR),
            f"{self.url}{path} answered {status}: {detail[:300]}",
            status,
            detail,
        )

    def _decoded(self, content: bytes, answer: type[T]) -> T:
        try:
            return msgspec.json.decode(content, type=answer)
        except msgspec.DecodeError as error:
            raise ReferenceFailure(FailureReason.BAD_ANSWER, f"{self.url} sent an invalid answer: {error}") from error


def _cause(error: BaseException) -> str:
    """Returns what the operating system says ("Connection refused"), from within what httpx, anyio and asyncio have
    wrapped around it.
    """
    deepest: BaseException = error
    below: BaseException | None = error
    while below is not None:
        deepest = below
        wrapped = deepest.__cause__ or deepest.__context__
        below = deepest.exceptions[0] if isinstance(deepest, BaseExceptionGroup) else wrapped
    if isinstance(deepest, OSError) and not isinstance(deepest, ssl.SSLError) and deepest.errno and deepest.errno > 0:
        return os.strerror(deepest.errno)
    return in_words(error)


async def _error_body(response: httpx.Response) -> bytes:
    """Returns the body of an error; b"" if it is too long to be an error's message."""
    try:
        return await read_answer(response, MAX_ERROR_BYTES)
    except AnswerRefused:
        return b""


def _detail(content: bytes) -> str:
    """Returns the message of an error in OpenAI's format, or in FastAPI's, else the whole body; on one line."""
    text = content.decode(errors="replace")
    try:
        body = msgspec.json.decode(content)
    except msgspec.DecodeError:
        return " ".join(text.split())
    match body:
        case {"error": {"message": str(message)}} | {"message": str(message)}:
            return " ".join(message.split())
    return " ".join(text.split())
