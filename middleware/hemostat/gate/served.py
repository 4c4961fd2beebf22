"""Asks a prompt as a client does, without sampling parameters, and judges the answer by the rules of live traffic."""

from __future__ import annotations

import secrets
import time
from typing import Any

import msgspec
import numpy as np

from hemostat.gate.asked import Asked
from hemostat.gate.outcomes import CUT, ERRORS, JSON, LOOPS, TOOL_CALLS, Served
from hemostat.openai.json_splice import MALFORMED
from hemostat.openai.logprobs.rows import read_rows
from hemostat.openai.routes import Form
from hemostat.reference.server import VllmServer
from hemostat.reference.vllm import MAX_ENTRY_BYTES
from hemostat.relay.answers import parse
from hemostat.relay.outcomes import OutcomeObserver
from hemostat_calibration.outcomes import Outcome

LISTED = 2
"""The number of ids that are asked for at each token. In a chat, vLLM lists the emitted one first, and then the others
by their rank: one id would not show the likeliest one."""

_NAMES = {Outcome.EMPTY: ERRORS, Outcome.BROKEN_OFF: ERRORS, Outcome.LOOP: LOOPS, Outcome.CUT: CUT, Outcome.JSON: JSON}


class _Choice(msgspec.Struct, frozen=True):
    token_ids: list[int] | None = None
    logprobs: msgspec.Raw = msgspec.Raw(b"null")


class _Answer(msgspec.Struct, frozen=True):
    choices: list[_Choice] = []


async def served(server: VllmServer, model: str, asked: Asked, seed: int, *, timed: bool) -> Served:
    """Returns the answer to a prompt. timed: also ask for an answer of one token, to know the time of the first one.
    Raises ReferenceFailure."""
    prompt = asked.prompt
    form = Form.CHAT if prompt.messages else Form.COMPLETIONS
    path = "/v1/chat/completions" if prompt.messages else "/v1/completions"
    body: dict[str, Any] = {"model": model, "max_tokens": prompt.max_tokens, "seed": seed}
    if prompt.messages:
        body |= {"messages": prompt.chat, "logprobs": True, "top_logprobs": LISTED}
    else:
        body |= {"prompt": list(asked.ids), "logprobs": LISTED}
    body |= {"return_token_ids": True, "return_tokens_as_token_ids": True}
    if prompt.tools:
        body["tools"] = prompt.tools
    first = await _seconds(server, path, {**body, "max_tokens": 1}) if timed else None
    if prompt.response_format:  # an answer of one token cannot be JSON
        body["response_format"] = prompt.response_format
    limit = (prompt.max_tokens + 1) * 6 * MAX_ENTRY_BYTES + 1024 * 1024
    began = time.monotonic()
    data = await server.post_for_bytes(path, _salted(body), limit=limit)
    whole = time.monotonic() - began
    bad, tokens = _judged(msgspec.json.encode(body), data, form, tools=bool(prompt.tools))
    further = None if first is None or tokens < 2 else max(whole - first, 0.0) / (tokens - 1)
    surplus = None if prompt.response_format else _surplus(data, form)
    return Served(bad, tokens, surplus, first, further)


async def _seconds(server: VllmServer, path: str, body: dict[str, Any]) -> float:
    began = time.monotonic()
    await server.post(path, _salted(body), dict[str, Any])
    return time.monotonic() - began


def _salted(body: dict[str, Any]) -> dict[str, Any]:
    """Returns the body with a salt, so that no other request has filled the prefix cache for this one."""
    return {**body, "cache_salt": f"hemostat-gate-{secrets.token_hex(8)}"}


def _judged(body: bytes, data: bytes, form: Form, *, tools: bool) -> tuple[frozenset[str], int]:
    """Returns what is bad about an answer, and the number of its tokens."""
    observer = OutcomeObserver(form)
    observer.feed_request(body)
    observer.compare(body, json_in_words=False)
    observer.begin_response(stream=False)
    observer.feed_response(data)
    outcome = observer.finish("", lambda name, labels, value: None)
    bad = {_NAMES[name] for name in _NAMES if (outcome.bad or {}).get(name)}
    response = parse(data, form, stream=False)
    if response is None or not response.choices:
        bad.add(ERRORS)
    if tools and (not response or not any(choice.calls for choice in response.choices) or _unfit(outcome.bad)):
        bad.add(TOOL_CALLS)
    return frozenset(bad), outcome.output_tokens or 0


def _unfit(bad: dict[str, bool] | None) -> bool:
    return bool((bad or {}).get(Outcome.TOOL_CALL))


def _surplus(data: bytes, form: Form) -> float | None:
    """Returns `Served.surplus`; None if the answer does not list its tokens."""
    try:
        choice = msgspec.json.decode(data, type=_Answer).choices[0]
        if not choice.token_ids:
            return None
        rows = read_rows(form, [bytes(choice.logprobs)], choice.token_ids, LISTED)
    except (*MALFORMED, IndexError):
        return None
    likeliest = rows.logprobs[:, 0]
    return float(((rows.emitted >= likeliest) - np.exp(np.minimum(likeliest, 0.0))).mean())
