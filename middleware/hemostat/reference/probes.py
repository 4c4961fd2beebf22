"""Probes of a vLLM server: does it support what Hemostat asks of it? Used by `hemostat check` and by the monitor."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from typing import Any

import msgspec

from hemostat.reference.protocol import ReferenceFailure
from hemostat.reference.server import Refused, VllmServer
from hemostat_calibration import plugin_version
from hemostat_calibration.engine_keys import PROFILE_KEY

PROBE = "The capital of France is"
"""The prompt of the probes."""
LOGIT_PUSH = -100.0
"""The logit_bias that makes a token unlikely."""


class State(StrEnum):
    """The state of a finding."""

    OK = "ok"
    """It works."""
    NO = "NO"
    """The configuration needs it, and it does not work."""
    NOTE = "note"
    """The configuration does not need it, or it is worth knowing."""


@dataclass(frozen=True, slots=True)
class Finding:
    """The result of one probe."""

    what: str
    state: State
    detail: str
    fix: str = ""
    """The advice on what to do about it; "" if nothing needs to be done."""
    transient: bool = False
    """It is True if the failure says nothing about the server's settings: the next attempt may succeed."""


SPECULATES = "vLLM decodes speculatively; model runner V1 takes no plugin then, so no profile can serve"


KEEPS_RESPONSES = "VLLM_ENABLE_RESPONSES_API_STORE"
"""The name that a vLLM that keeps no responses says is missing."""


class _TopLogprobs(msgspec.Struct, frozen=True):
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float] | None]


class _Choice(msgspec.Struct, frozen=True):
    logprobs: _TopLogprobs | None = None
    token_ids: list[int] | None = None
    prompt_token_ids: list[int] | None = None


class _Completion(msgspec.Struct, frozen=True):
    choices: list[_Choice]


async def probe_shadowing(server: VllmServer, model: str, top_k: int, severity: State = State.NO) -> list[Finding]:
    """Returns findings about what a sampled request needs: `top_k` logprobs, token ids, and logprobs of the model
    itself.

    severity: the state of a finding that something is missing.
    """
    body: dict[str, Any] = {
        "model": model,
        "prompt": PROBE,
        "max_tokens": 1,
        "temperature": 0.0,
        "logprobs": top_k,
        "return_token_ids": True,
        "return_tokens_as_token_ids": True,
    }
    try:
        choice = (await server.post("/v1/completions", body, _Completion)).choices[0]
    except Refused as refused:
        if "logprobs" in refused.detail:
            fix = f"start vLLM with --max-logprobs {top_k}, or lower shadow.top_k"
            return [Finding("max_logprobs", severity, f"shadow.top_k {top_k}: {refused.detail}", fix)]
        return [Finding("completion", severity, str(refused), "see vLLM's log", transient=True)]
    except (ReferenceFailure, IndexError) as failure:
        return [
            Finding(
                "completion", severity, str(failure) or "no choices in the answer", "see vLLM's log", transient=True
            )
        ]
    findings = []
    top = choice.logprobs.top_logprobs[0] if choice.logprobs and choice.logprobs.top_logprobs else None
    if top is not None and len(top) >= top_k:
        findings.append(Finding("max_logprobs", State.OK, f"shadow.top_k {top_k} is within --max-logprobs"))
    else:
        got = f"{len(top or {})} logprobs came back, {top_k} were asked for"
        findings.append(Finding("max_logprobs", severity, got, f"start vLLM with --max-logprobs {top_k}"))
    if choice.token_ids and choice.prompt_token_ids:
        findings.append(Finding("return_token_ids", State.OK, "the server returns token ids"))
    else:
        lacks = "the server returns no token ids, so nothing can be scored"
        findings.append(Finding("return_token_ids", severity, lacks, "use vLLM 0.32 or newer"))
    if top and choice.token_ids:
        findings.append(await _probe_logprobs_mode(server, body, choice.token_ids[0], top, severity))
    return findings


async def keeps_responses(server: VllmServer, model: str) -> bool:
    """Returns True if vLLM keeps the responses of `/v1/responses`, which a client can then fetch later, or if that is
    not known.

    It is asked by a request that vLLM refuses in any case, before it generates: a request in the background that goes
    on with a response which does not exist.
    """
    body = {"model": model, "input": PROBE, "background": True, "store": True, "previous_response_id": "resp_none"}
    try:
        await server.post("/v1/responses", body, dict[str, Any])
    except Refused as refused:
        return KEEPS_RESPONSES not in refused.detail
    except ReferenceFailure:
        return True
    return True


async def plugin_of(server: VllmServer, model: str) -> str | None:
    """Returns the version of the plugin that vLLM has loaded, "" if it does not say its version, or None without one.

    It is asked by a request that names no valid profile, which the plugin refuses. Raises ReferenceFailure, which is
    Refused where vLLM itself refuses the request.
    """
    body = {"model": model, "prompt": PROBE, "max_tokens": 1, "vllm_xargs": {PROFILE_KEY: "not-a-profile-version"}}
    try:
        await server.post("/v1/completions", body, dict[str, Any])
    except Refused as refused:
        if refused.status == 400 and f"vllm_xargs.{PROFILE_KEY}" in refused.detail:
            return plugin_version.read(refused.detail)
        raise
    return None


async def speculates(server: VllmServer) -> bool:
    """Returns True if vLLM drafts tokens: then, and only then, its metrics count them. It is False if they cannot be
    read.
    """
    try:
        return "\nvllm:spec_decode_" in await server.text("GET", "/metrics")
    except ReferenceFailure:
        return False


async def _probe_logprobs_mode(
    server: VllmServer, body: dict[str, Any], best: int, top: dict[str, float], severity: State
) -> Finding:
    """Reports if logprobs come from the model itself: then they do not change with the request's own logit_bias."""
    pushed = {**body, "logit_bias": {str(best): LOGIT_PUSH}}
    name = f"token_id:{best}"
    fix = "start vLLM with --logprobs-mode raw_logprobs (its default)"
    try:
        logprobs = (await server.post("/v1/completions", pushed, _Completion)).choices[0].logprobs
    except (ReferenceFailure, IndexError) as failure:
        return Finding("logprobs_mode", State.NOTE, f"could not be determined: {failure}")
    row = logprobs.top_logprobs[0] if logprobs and logprobs.top_logprobs else None
    if row is not None and name in row and name in top and abs(row[name] - top[name]) < 1.0 and top[name] <= 0:
        return Finding("logprobs_mode", State.OK, "raw_logprobs: those of the model itself")
    return Finding("logprobs_mode", severity, "logprobs are taken after the request's own settings", fix)
