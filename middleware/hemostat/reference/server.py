"""A vLLM server as Hemostat itself talks to it: to score on it, and to ask what it can do. HTTP errors end here."""

from __future__ import annotations

import re
import ssl
from pathlib import Path
from typing import Any, TypeVar

import httpx
import msgspec
from pydantic import SecretStr

from hemostat.reference.protocol import ReferenceFailure

T = TypeVar("T")

CONNECT_WITHIN = 5.0
OUT_OF_VOCABULARY = 2**31 - 1
_VOCABULARY_SIZE = re.compile(r"[Vv]ocabulary size: (\d+)")


class Refused(ReferenceFailure):
    """The server answered with a status that is not a success; `status`, and its own words in `detail`."""

    def __init__(self, reason: str, message: str, status: int, detail: str) -> None:
        super().__init__(reason, message)
        self.status = status
        self.detail = detail


class ModelCard(msgspec.Struct, frozen=True):
    """An entry of GET /v1/models."""

    id: str
    root: str | None = None
    parent: str | None = None
    """Set for a LoRA adapter."""
    max_model_len: int | None = None


class _Models(msgspec.Struct, frozen=True):
    data: list[ModelCard]


class _Tokens(msgspec.Struct, frozen=True):
    tokens: list[int]


class VllmServer:
    """Every method raises ReferenceFailure: down, timeout, unauthorized, busy, refused, http_error, bad_answer."""

    def __init__(
        self, url: str, api_key: SecretStr | None = None, *, timeout: float = 60.0, ca: Path | None = None
    ) -> None:
        """`url`: the root, without /v1. `timeout`: seconds for one answer. `ca`: PEM file to trust instead of the
        system's authorities."""
        self.url = url
        self._client = httpx.AsyncClient(
            base_url=url,
            headers={"authorization": f"Bearer {api_key.get_secret_value()}"} if api_key else {},
            timeout=httpx.Timeout(timeout, connect=CONNECT_WITHIN),
            verify=ssl.create_default_context(cafile=ca) if url.startswith("https:") else False,
            trust_env=False,  # a proxy that is meant for the internet must not get prompts
        )

    async def get(self, path: str, answer: type[T]) -> T:
        return self._decoded(await self._send("GET", path, None), answer)

    async def post(self, path: str, body: Any, answer: type[T]) -> T:
        return self._decoded(await self._send("POST", path, body), answer)

    async def model(self, wanted: str | None) -> ModelCard:
        """The card of `wanted`, or of the first base model."""
        cards = await self.models()
        for card in cards:
            if card.id == wanted or (wanted is None and card.parent is None):
                return card
        names = ", ".join(card.id for card in cards) or "nothing"
        raise ReferenceFailure("no_model", f"{self.url} serves {names}" + (f", not {wanted}" if wanted else ""))

    async def models(self) -> list[ModelCard]:
        """What it serves, adapters included."""
        return (await self.get("/v1/models", _Models)).data

    async def version(self) -> str:
        return str((await self.get("/version", dict[str, str])).get("version", "unknown"))

    async def vocab_size(self, model: str) -> int:
        """Taken from the refusal of an impossible token id: no route of vLLM's tells it."""
        body = {
            "model": model,
            "prompt": "x",
            "max_tokens": 1,
            "logit_bias": {str(OUT_OF_VOCABULARY): 1.0},
        }
        try:
            await self.post("/v1/completions", body, dict[str, Any])
        except Refused as refused:
            if found := _VOCABULARY_SIZE.search(refused.detail):
                return int(found[1])
            if refused.status not in {400, 422}:
                raise
        raise ReferenceFailure("vocabulary", f"{self.url} does not tell its vocabulary's size; vLLM 0.11 or newer does")

    async def tokenize(self, model: str, text: str) -> list[int]:
        body = {"model": model, "prompt": text, "add_special_tokens": False}
        return (await self.post("/tokenize", body, _Tokens)).tokens

    async def render(self, model: str, messages: list[dict[str, str]]) -> list[int]:
        """Raises ReferenceFailure("no_chat_template") where the model has none."""
        body = {"model": model, "messages": messages, "add_generation_prompt": True, "add_special_tokens": False}
        try:
            return (await self.post("/tokenize", body, _Tokens)).tokens
        except Refused as refused:
            if "chat template" in refused.detail.lower():
                raise ReferenceFailure("no_chat_template", f"{model} on {self.url} has no chat template") from None
            raise

    async def close(self) -> None:
        await self._client.aclose()

    async def _send(self, method: str, path: str, body: Any) -> bytes:
        content = None if body is None else msgspec.json.encode(body)
        headers = {} if body is None else {"content-type": "application/json"}
        try:
            response = await self._client.request(method, path, content=content, headers=headers)
        except httpx.TimeoutException as error:
            reason = "down" if isinstance(error, httpx.ConnectTimeout) else "timeout"
            raise ReferenceFailure(reason, f"{self.url}{path}: no answer in time") from error
        except httpx.HTTPError as error:
            raise ReferenceFailure("down", f"{self.url}{path}: {str(error) or type(error).__name__}") from error
        if response.is_success:
            return response.content
        status = response.status_code
        detail = _detail(response.content)
        reasons = {400: "refused", 401: "unauthorized", 403: "unauthorized", 422: "refused", 429: "busy", 503: "busy"}
        reason = reasons.get(status, "http_error")
        raise Refused(reason, f"{self.url}{path} answered {status}: {detail[:300]}", status, detail)

    def _decoded(self, content: bytes, answer: type[T]) -> T:
        try:
            return msgspec.json.decode(content, type=answer)
        except msgspec.DecodeError as error:
            raise ReferenceFailure("bad_answer", f"{self.url} sent something else than expected: {error}") from error


def _detail(content: bytes) -> str:
    """The words of an error in OpenAI's shape, or in FastAPI's, or whatever stands there."""
    text = content.decode(errors="replace")
    try:
        body = msgspec.json.decode(content)
    except msgspec.DecodeError:
        return " ".join(text.split())
    match body:
        case {"error": {"message": str(message)}} | {"message": str(message)}:
            return " ".join(message.split())
    return " ".join(text.split())
