"""The requests about adapters that Hemostat sends to a vLLM server. Failures are `ReferenceFailure`, as in
`reference.server`."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

import msgspec

from hemostat.reference.protocol import FailureReason, ReferenceFailure
from hemostat.reference.server import ModelCard, VllmServer
from hemostat_calibration.profiles.profile import VERSION_PATTERN

LOAD, UNLOAD = "/v1/load_lora_adapter", "/v1/unload_lora_adapter"
TOP = 5
"""Most likely ids whose log-probabilities are asked for at each token."""
_MAX_LORAS = re.compile(r'^vllm:lora_requests_info\{[^}]*max_lora="(\d+)"', re.MULTILINE)
_STARTED = re.compile(r"^process_start_time_seconds (\S+)", re.MULTILINE)
_TOKEN_ID = "token_id:"  # noqa: S105  no secret


@dataclass(frozen=True, slots=True)
class Listed:
    """The answer of /v1/models.

    base: the served names of base models, in the server's order. ours: the versions of Hemostat's adapters. others:
    the names of further adapters, which are the clients' own.
    """

    base: tuple[str, ...]
    ours: frozenset[str]
    others: frozenset[str]


@dataclass(frozen=True, slots=True)
class Completed:
    """A greedy completion.

    tokens: its ids. logprobs: of these, nats. top: the most likely ids of each
    position, with their log-probabilities, nats.
    """

    tokens: list[int]
    logprobs: list[float]
    top: list[dict[int, float]]


class _Logprobs(msgspec.Struct, frozen=True):
    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float] | None]


class _Choice(msgspec.Struct, frozen=True):
    logprobs: _Logprobs | None = None


class _Completion(msgspec.Struct, frozen=True):
    choices: list[_Choice]
    model: str = ""


def is_version(name: str) -> bool:
    """Returns True if a served name is a version of a profile, as Hemostat's adapters are named."""
    return VERSION_PATTERN.fullmatch(name) is not None


def listed(cards: Sequence[ModelCard]) -> Listed:
    return Listed(
        tuple(card.id for card in cards if card.parent is None and not is_version(card.id)),
        frozenset(card.id for card in cards if is_version(card.id)),
        frozenset(card.id for card in cards if card.parent is not None and not is_version(card.id)),
    )


async def touch(server: VllmServer, name: str, ids: Sequence[int]) -> None:
    """A completion of one token: an adapter that is not loaded is resolved and loaded for it."""
    body = {"model": name, "prompt": list(ids), "max_tokens": 1, "temperature": 0.0}
    answer = await server.post("/v1/completions", body, _Completion)
    if answer.model != name:
        raise ReferenceFailure(
            FailureReason.BAD_ANSWER, f"{server.url} answered as {answer.model[:80]!r} what was asked of {name}"
        )


async def load(server: VllmServer, name: str, path: str) -> None:
    """Has the server load an adapter from a folder that the server can read."""
    await server.text("POST", LOAD, {"lora_name": name, "lora_path": path})


async def unload(server: VllmServer, name: str) -> None:
    await server.text("POST", UNLOAD, {"lora_name": name})


async def lora_enabled(server: VllmServer) -> bool | None:
    """Returns True if the server was started with --enable-lora, as its own metrics show; None if they do not
    show it."""
    try:
        result = await server.text("GET", "/metrics")
    except ReferenceFailure:
        return None
    return "vllm:lora_requests_info" in result if "vllm:" in result else None


async def max_loras(server: VllmServer) -> int | None:
    """--max-loras as the server's own metrics say, once it has answered a request; None where they do not."""
    try:
        match = _MAX_LORAS.search(await server.text("GET", "/metrics"))
    except ReferenceFailure:
        return None
    return int(match[1]) if match else None


async def started(server: VllmServer) -> str | None:
    """When the server's process began, by its own metrics, as it writes it; None where they do not say."""
    try:
        match = _STARTED.search(await server.text("GET", "/metrics"))
    except ReferenceFailure:
        return None
    return match[1] if match else None


async def complete(server: VllmServer, name: str, ids: Sequence[int], tokens: int, salt: str) -> Completed:
    """A greedy completion of exactly so many tokens. salt: requests with another one share no cached prefix."""
    body = {
        "model": name,
        "prompt": list(ids),
        "max_tokens": tokens,
        "temperature": 0.0,
        "ignore_eos": True,
        "logprobs": TOP,
        "return_tokens_as_token_ids": True,
        "cache_salt": salt,
    }
    answer = await server.post("/v1/completions", body, _Completion)
    result = answer.choices[0].logprobs if answer.choices else None
    if result is None or not tokens == len(result.tokens) == len(result.token_logprobs) == len(result.top_logprobs):
        raise ReferenceFailure(FailureReason.SHORT_ANSWER, f"{server.url} sent log-probabilities of too few tokens")
    try:
        return Completed(
            [_token_id(token) for token in result.tokens],
            [float("nan") if value is None else value for value in result.token_logprobs],
            [{_token_id(token): value for token, value in (row or {}).items()} for row in result.top_logprobs],
        )
    except ValueError:
        raise ReferenceFailure(FailureReason.BAD_ANSWER, f"{server.url} sent tokens without their ids") from None


def _token_id(token: str) -> int:
    return int(token.removeprefix(_TOKEN_ID)) if token.startswith(_TOKEN_ID) else int("")
