"""Checks if all engines serve the same models, for `hemostat check`."""

from __future__ import annotations

from hemostat.config.schema import Settings
from hemostat.reference.match import PROBE_TEXT
from hemostat.reference.probes import Finding, State, plugin_of, probe_shadowing
from hemostat.reference.protocol import ReferenceFailure
from hemostat.reference.server import VllmServer
from hemostat_calibration.plugin_version import INSTALL, misfit


async def other_engines(first: VllmServer, settings: Settings) -> list[Finding]:
    """Returns a finding for each engine after the first, which has been checked: it has to serve the same base models
    with the same vocabulary and token ids, and to answer what sampled requests ask for.

    It cannot be seen from here that the weights are the same: the figures by engine show it.
    """
    upstream = settings.upstream
    findings = []
    for url in upstream.servers[1:]:
        server = VllmServer(url, upstream.api_key, ca=upstream.ca)
        try:
            findings.append(await _compared(first, server, settings))
        finally:
            await server.close()
    return findings


async def _compared(first: VllmServer, server: VllmServer, settings: Settings) -> Finding:
    what = f"engine {server.url}"
    try:
        expected, served = await _base_models(first), await _base_models(server)
        if served != expected:
            fix = "start all engines with one model and one --served-model-name"
            text = f"serves {', '.join(served) or 'nothing'}; {first.url} serves {', '.join(expected)}"
            return Finding(what, State.NO, text, fix)
        for name in served:
            sizes = await first.vocab_size(name), await server.vocab_size(name)
            if sizes[0] != sizes[1]:
                text = f"{name} has {sizes[1]} tokens there, {sizes[0]} at {first.url}"
                return Finding(what, State.NO, text, "start all engines with one checkpoint")
            if await first.tokenize(name, PROBE_TEXT) != await server.tokenize(name, PROBE_TEXT):
                text = f"{name} has other token ids of a probe text than at {first.url}"
                return Finding(what, State.NO, text, "start all engines with one tokenizer")
            for probe in await probe_shadowing(server, name, settings.shadow.top_k):
                if probe.state is State.NO and settings.reference.backend != "none":
                    return Finding(what, State.NO, f"{probe.what}: {probe.detail}", probe.fix)
    except ReferenceFailure as failure:
        return Finding(what, State.NO, str(failure), "start it, or take it out of upstream.urls")
    said = f"serves {', '.join(served)}, with the same vocabulary as {first.url}"
    if why := await _misfit(server, served):
        return Finding(what, State.NOTE, f"{said}; the plugin is loaded there; {why}", INSTALL)
    return Finding(what, State.OK, said)


async def _misfit(server: VllmServer, served: list[str]) -> str:
    """Returns what does not fit about the version of the plugin there; "" if it fits, or if that is not known."""
    try:
        plugin = await plugin_of(server, served[0]) if served else None
    except ReferenceFailure:
        return ""
    return "" if plugin is None else misfit(plugin)


async def _base_models(server: VllmServer) -> list[str]:
    return sorted(card.id for card in await server.models() if card.parent is None)
