"""The findings of `hemostat check` about adapters at the upstream, as far as a server shows them from outside."""

from __future__ import annotations

from typing import Any

from hemostat.adapters.serving.server import LOAD, listed, lora_enabled, max_loras
from hemostat.adapters.serving.setting import PLUGIN, UPDATING, flags
from hemostat.adapters.serving.slots import rank_setting
from hemostat.config.schema import Settings
from hemostat.reference.probes import PROBE, Finding, State
from hemostat.reference.protocol import FailureReason, ReferenceFailure
from hemostat.reference.server import Refused, VllmServer

NO_VERSION = "0" * 32
"""A version that no profile has. The resolver of Hemostat's general plugin refuses it in words of its own."""
ONE_API_SERVER = "and one API server (vLLM refuses that variable with --api-server-count above 1)"


async def probe_adapters(server: VllmServer, model: str, settings: Settings) -> list[Finding]:
    """Returns the findings about `adapter.enabled`: the arguments and environment that vLLM lacks. model: the served
    base model.

    The requests are such that vLLM's API server refuses them. Its engine is not asked to load anything: it would log a
    traceback.
    """
    adapter = settings.adapter
    rank = adapter.rank * (4 if adapter.shared_out else 1)
    needed = flags(rank)
    try:
        missing = await _missing(server, settings)
        others = listed(await server.models()).others
        await server.post("/v1/completions", {"model": model, "prompt": PROBE, "max_tokens": 1}, dict[str, Any])
        slots = await max_loras(server)
    except ReferenceFailure as failure:
        return [Finding("adapters", State.NO, str(failure), "see vLLM's log")]
    if missing:
        fix = f"start vLLM with {needed}, the environment {UPDATING} {PLUGIN}, {ONE_API_SERVER}"
        return [Finding("adapters", State.NO, f"not usable: missing {', '.join(missing)}", fix)]
    findings = []
    least = 2 + len(others)
    if slots is None:
        text = (
            f"vLLM loads adapters at run time; it needs --enable-lora --max-loras {least} or more, and its metrics, "
            "which would show both, cannot be read"
        )
        findings.append(Finding("adapters", State.OK, text))
    elif slots < least:
        own = f", {len(others)} of clients," if others else ""
        text = f"--max-loras is {slots}: one adapter{own} and a free slot take {least}"
        findings.append(Finding("adapters", State.NO, text, f"start vLLM with --max-loras {least}"))
    else:
        at_a_time = f"{slots - 1 - len(others)} of Hemostat's at a time (--max-loras {slots})"
        findings.append(Finding("adapters", State.OK, f"vLLM loads adapters at run time, {at_a_time}"))
    text = f"ranks are up to {rank}: vLLM needs --max-lora-rank {rank_setting(rank)} or more, and does not show it"
    findings.append(Finding("adapter rank", State.NOTE, text))
    return [*findings, _routes(settings)]


async def _missing(server: VllmServer, settings: Settings) -> list[str]:
    """Arguments and variables of vLLM that it was started without. ReferenceFailure where it does not answer at all."""
    refusal = await _refusal(server, LOAD, {"lora_name": "", "lora_path": ""})
    if refusal.status in {401, 403}:
        raise refusal
    missing = [UPDATING] if refusal.status in {404, 405} else []
    if await lora_enabled(server) is False:
        missing.append("--enable-lora")
    if settings.adapter.folder is None:
        unresolved = await _refusal(server, "/v1/completions", {"model": NO_VERSION, "prompt": PROBE, "max_tokens": 1})
        if "Hemostat's resolver" not in unresolved.detail:
            # Without the variable, vLLM asks no resolver.
            missing.append(PLUGIN)
    return missing


async def _refusal(server: VllmServer, path: str, body: dict[str, Any]) -> Refused:
    try:
        await server.text("POST", path, body)
    except Refused as refused:
        return refused
    raise ReferenceFailure(FailureReason.BAD_ANSWER, f"{server.url}{path} accepted an adapter that does not exist")


def _routes(settings: Settings) -> Finding:
    what = f"whoever reaches vLLM may load and unload adapters there ({UPDATING})"
    if settings.upstream.allow_adapter_routes:
        text = f"{what}, through Hemostat's data port, too"
        return Finding("adapter routes", State.NOTE, text, "set upstream.allow_adapter_routes: false")
    text = f"{what}; Hemostat's data port refuses these routes with 403, so let clients reach nothing else"
    return Finding("adapter routes", State.OK, text)
