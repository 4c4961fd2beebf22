"""The interface that each form implements."""

from __future__ import annotations

from typing import Protocol

import msgspec

from hemostat.metrics.reasons import Unscored
from hemostat.openai.json_splice import JsonObject
from hemostat.openai.requests import NO_LOGPROBS, Message, Request, RequestedLogprobs
from hemostat.openai.tokens import ResponseTokens


class Details(msgspec.Struct, frozen=True):
    """The parts that a form's reader finds in a request's body; see `Request` for the fields of the same names."""

    unscorable: Unscored | None
    messages: list[Message] | None
    """The messages of a conversation; None: the request has a prompt instead."""
    conversation: bytes | None
    """The JSON that is equal for every turn of one conversation; without the model. None without a prompt."""
    usage_requested: bool = False
    choices: int = 1
    prompts: int = 1
    min_prompt_tokens: int = 0
    requested: RequestedLogprobs = NO_LOGPROBS
    ids_only: bool = False


class Stripper(Protocol):
    """Takes one response's bytes, records its tokens, and gives back what the client gets.

    Never raises: what it cannot parse is passed on unchanged, and the tokens fail with a reason.
    """

    def feed(self, data: bytes) -> bytes:
        """Takes the next bytes of the body; returns what the client gets now."""

    def finish(self) -> bytes:
        """Is called when the response is complete: returns the rest of what the client gets, and checks the tokens."""


class Format(Protocol):
    """One form of request and response."""

    def read(self, body: JsonObject) -> Details:
        """Returns the details of a request's body. It may raise one of MALFORMED."""

    def restricts_tokens(self, body: JsonObject) -> bool:
        """Returns True if a grammar restricts the tokens; see `restrictions`. May raise one of MALFORMED."""

    def injected_members(self, request: Request, top_k: int) -> dict[str, bytes]:
        """Returns the members (JSON) that make the engine return token ids, the `top_k` most likely ids with logprobs,
        and the usage. top_k: 0 for ids only."""

    def stripper(self, request: Request, tokens: ResponseTokens, *, stream: bool) -> Stripper:
        """Returns the stripper of the response to a request with the injected members. stream: it is an event stream by
        its content type, whatever was asked for.
        """

    def observer(self, request: Request, tokens: ResponseTokens, *, stream: bool) -> Stripper:
        """Returns the observer of the response to a request without them: every byte is passed on; the model, the
        finish reasons and the usage are read.
        """
