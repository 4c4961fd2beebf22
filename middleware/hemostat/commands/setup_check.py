"""The probes of `hemostat check`: what will work with this configuration, what will not, and how to fix it."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Awaitable, Iterable
from dataclasses import replace
from pathlib import Path

import msgspec
import numpy as np

from hemostat.adapters.live.builder import BuildFailed, check_pair
from hemostat.adapters.live.folders import CheckpointFolders, FolderError, find_compressed, find_folders
from hemostat.adapters.serving.check import probe_adapters
from hemostat.admin.status_parts import PassiveStatus
from hemostat.checkpoints.output_embedding import EmbeddingError
from hemostat.config import packages
from hemostat.config.operation import Admin
from hemostat.config.schema import Settings
from hemostat.engines.passive import PLUGIN_ALONE
from hemostat.ipc.addresses import ControlAddresses
from hemostat.ipc.messages import NOT_ACTIVE, Stats
from hemostat.ipc.relay_end import ControlLink
from hemostat.reference.hidden.folders import find_checkpoint
from hemostat.reference.listing import served_pairs, without_own
from hemostat.reference.match import compare, other_engines, served_as_reference
from hemostat.reference.pair import ModelPair
from hemostat.reference.probes import SPECULATES, Finding, State, plugin_of, probe_shadowing, speculates
from hemostat.reference.protocol import FailureReason, Reference, ReferenceFailure, ReferenceInfo, ScoreRequest
from hemostat.reference.references import References, make_references
from hemostat.reference.server import Refused, VllmServer
from hemostat.reference.thinking_markers import find_markers
from hemostat.store.factory import open_store
from hemostat.store.postgres import PostgresStore
from hemostat.store.protocol import StoreAccessDenied, StoreFailure, StoreIncompatible
from hemostat.supervisor.relays import relay_config
from hemostat.supervisor.role import Role
from hemostat_calibration.guard.wealth import MIN_CLIENTS
from hemostat_calibration.messages import shown_address
from hemostat_calibration.plugin_version import INSTALL, misfit

SAME_TOKENS = "same tokens"
CHECKPOINTS = "adapter checkpoints"
PLUGIN_FLAG = "--logits-processors hemostat_engine:LogitsProcessor"
SPECULATES_FIX = (
    f"start vLLM with {PLUGIN_FLAG} and without --speculative-config, or with both and VLLM_USE_V2_MODEL_RUNNER=1 (GPU)"
)


HEADERS_FLAG = "--middleware hemostat_engine.client_headers.ClientHeaders"
ADMIN_SECONDS = 5.0


class _Running(msgspec.Struct, frozen=True):
    """The part of a running control process's status that says how it measures."""

    passive: PassiveStatus | None = None


async def check(settings: Settings, *, alone: bool | None = None) -> list[Finding]:
    """Returns all findings; raises nothing that a server or a model can cause.

    alone: True if the plugin in vLLM will measure alone. None asks the control process that runs with these settings.
    """
    running = await _running(settings) if alone is None else None
    alone = alone or running is not None
    findings = [await _control_processes(settings) if settings.control.addresses else await _store(settings)]
    if settings.calibration.mode != "off":
        findings.append(_evidence(settings))
    findings.append(_engine_token(settings.admin, alone=alone))
    if running is not None:
        findings.append(_reporting(running))
    if alone:
        findings.append(_proxy(settings))
    upstream = settings.upstream
    server = VllmServer(upstream.servers[0], upstream.api_key, ca=upstream.ca)
    references = make_references(settings)
    try:
        findings += await _upstream(server, settings, alone=alone)
        answers = all(f.state is not State.NO for f in findings if f.what == "upstream")
        if answers:
            findings += await other_engines(server, settings)
        if references is None:
            findings.append(
                Finding(
                    "reference", State.NOTE, "reference.backend is none: nothing is measured", "set reference.backend"
                )
            )
        elif answers:
            findings += await _models(references, server, settings)
        else:
            for n, reference in enumerate(references):
                findings += await _reference(reference, settings, None, f" {n + 1}" if n else "")
    finally:
        await server.close()
        if references is not None:
            await references.close()
    return findings


def exit_code(findings: Iterable[Finding]) -> int:
    """Returns 0 when everything that the configuration asks for will work, else 1."""
    return int(any(f.state is State.NO for f in findings))


def table(findings: Iterable[Finding]) -> str:
    """Returns the findings as text: one line each, and another one for its fix."""
    rows = list(findings)
    width = max((len(f.what) for f in rows), default=0)
    lines = []
    for f in rows:
        lines.append(f"{f.state.value:<5} {f.what:<{width}}  {f.detail}")
        if f.fix:
            lines.append(f"{'':<5} {'':<{width}}  -> {f.fix}")
    return "\n".join(lines)


async def _store(settings: Settings) -> Finding:
    url = settings.store.url
    if url == "memory://":
        persistence_needed = settings.calibration.mode == "auto"
        return Finding(
            "store",
            State.NOTE,
            "memory://: profiles are lost after a restart",
            "set store.url: sqlite:///…" if persistence_needed else "",
        )
    try:
        store = open_store(url)
        try:
            if isinstance(store, PostgresStore):
                server = f" ({await asyncio.to_thread(store.probe)})"
            else:
                server = ""
                await asyncio.to_thread(store.head)
        finally:
            await asyncio.to_thread(store.close)
    except StoreIncompatible as other:
        detail, _, fix = str(other).removeprefix("store ").rpartition(": ")
        return Finding("store", State.NO, detail, fix)
    except StoreAccessDenied as refused:
        detail, _, fix = str(refused).removeprefix("store ").partition("; ")
        return Finding("store", State.NO, detail, fix or "correct user, password and database in store.url")
    except StoreFailure as failure:
        fix = (
            "start it, or change store.url" if not url.startswith("sqlite") else "correct the file, or change store.url"
        )
        detail = str(failure).removeprefix("store.url: ").removeprefix("store ")
        return Finding("store", State.NO, detail, fix)
    return Finding("store", State.OK, shown_address(url) + server)


async def _control_processes(settings: Settings) -> Finding:
    """Reports if the control processes answer, which it connects to as `hemostat relay` with this configuration
    does.
    """
    what, fix = "control processes", "start hemostat control there, or correct control.*: the same token on both sides"
    addresses = ControlAddresses.from_json(relay_config(settings, 0, Path(), Role.RELAY)["control"])
    try:
        states, failures = await ControlLink(addresses, 0, lambda _: None, _no_stats).probe()
    except OSError as error:
        return Finding(what, State.NO, f"control.ca: {error}", "name the authority's PEM file")
    detail = "; ".join([f"{address}: {why or 'active'}" for address, why in states.items()] + failures)
    if "" not in states.values():
        return Finding(what, State.NO, detail, fix)
    if failures or not {"", NOT_ACTIVE.why}.issuperset(states.values()):
        return Finding(what, State.NOTE, detail, fix)
    return Finding(what, State.OK, detail)


def _no_stats() -> Stats:
    return Stats(counters={}, overhead_buckets=[], overhead_sum=0.0, ready=False)


def _evidence(settings: Settings) -> Finding:
    """Reports how traffic is divided into kinds and clients, which decides what can be proven."""
    evidence = settings.evidence
    text = (
        f"a profile serves each of up to {evidence.kinds} kinds of traffic only on evidence in that kind; clients are "
        f"named by the header {evidence.client_header!r}, and one contributes at most {evidence.client_share:.0%} of a "
        f"test (not limited below {MIN_CLIENTS} clients)"
    )
    return Finding("evidence", State.OK, text)


async def _running(settings: Settings) -> PassiveStatus | None:
    """Returns what the control process on this machine's admin port says of the plugins that sample; None if relays
    sample there, or if none answers."""
    admin = settings.admin
    host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(admin.host, admin.host)  # noqa: S104
    if not admin.port:
        return None
    server = VllmServer(f"http://{f'[{host}]' if ':' in host else host}:{admin.port}", None, timeout=ADMIN_SECONDS)
    try:
        return (await server.get("/api/v1/status", _Running)).passive
    except ReferenceFailure:
        return None
    finally:
        await server.close()


def _reporting(passive: PassiveStatus) -> Finding:
    """Reports if plugins report to the control process, and how clients opt out."""
    what, count = "plugin alone", passive.servers
    if not count:
        fix = f"{INSTALL} with HEMOSTAT_ADMIN_URL and HEMOSTAT_ENGINE_TOKEN"
        return Finding(what, State.NO, "the plugin of no vLLM reports to the control process: nothing is measured", fix)
    processes = f"{count} process{'es' if count > 1 else ''} of vLLM's API server report{'' if count > 1 else 's'}"
    if passive.reads_headers:
        return Finding(what, State.OK, f"{processes}; X-Hemostat-Shadow: off opts a request out")
    text = f"{processes}; a request is opted out only by hemostat_shadow: off in its vllm_xargs"
    return Finding(what, State.OK, text, f"for X-Hemostat-Shadow, start vLLM with {HEADERS_FLAG}")


def _proxy(settings: Settings) -> Finding:
    """Reports what needs the proxy, which there is none of."""
    calibration = settings.calibration
    asked = {
        "calibration.mode auto": calibration.mode == "auto",
        "adapter.enabled": settings.adapter.enabled,
    }
    if wanted := [name for name, on in asked.items() if on]:
        return Finding("proxy", State.NO, f"{', '.join(wanted)}: {PLUGIN_ALONE}", "remove it, or run hemostat serve")
    return Finding("proxy", State.NOTE, PLUGIN_ALONE)


def _engine_token(admin: Admin, *, alone: bool) -> Finding:
    what, fix = "engine token", "set admin.engine_token, and the same in HEMOSTAT_ENGINE_TOKEN where vLLM runs"
    if admin.engine_token is not None:
        return Finding(what, State.OK, "engines have a token that can change nothing else")
    if admin.token is None and alone:
        return Finding(what, State.NO, "not set: the plugin in vLLM cannot report, so nothing is measured", fix)
    if admin.token is None:
        return Finding(what, State.NOTE, "not set: the plugin in vLLM can neither report nor fetch profiles", fix)
    return Finding(what, State.NOTE, "not set: engines need admin.token, with which a vLLM host can change all", fix)


async def _upstream(server: VllmServer, settings: Settings, *, alone: bool) -> list[Finding]:
    try:
        card = await server.model(None)
        version = await _or(server.version(), "of unknown version")
    except ReferenceFailure as failure:
        fix = (
            "set upstream.api_key"
            if failure.reason is FailureReason.UNAUTHORIZED
            else "start vLLM, or change upstream.url"
        )
        return [Finding("upstream", State.NO, str(failure), fix)]
    length = f", up to {card.max_model_len} tokens" if card.max_model_len else ""
    findings = [Finding("upstream", State.OK, f"{server.url} serves {card.id}{length} (vLLM {version})")]
    measured = settings.reference.backend != "none"
    findings += await probe_shadowing(server, card.id, settings.shadow.top_k, State.NO if measured else State.NOTE)
    if measured:
        result = await find_markers(server, card.id, settings.reasoning)
        findings.append(Finding("reasoning", State.OK if result.markers else State.NOTE, result.detail))
    findings.append(await _plugin(server, card.id, settings, alone=alone))
    if settings.adapter.enabled:
        findings += await probe_adapters(server, card.id, settings)
        findings.append(await _adapter_checkpoints(settings, card.id, card.root or ""))
    return findings


async def _adapter_checkpoints(settings: Settings, served: str, root: str) -> Finding:
    """Reports if an adapter can be made from both checkpoints on this machine.

    served: the name of the upstream's model. root: the folder or name from which the upstream has loaded it.
    """
    if problem := packages.missing("lab"):
        detail, _, fix = problem.rpartition("; ")
        return Finding(CHECKPOINTS, State.NO, detail, f"{fix}, where the control process runs")
    reference_root = await _reference_root(settings, served)
    found = await asyncio.to_thread(_folders, settings, served, root, reference_root)
    if isinstance(found, Finding):
        return found
    try:
        notes = await check_pair(found, settings.adapter.device)
    except BuildFailed as failed:
        fix = "REFERENCE is the reference's checkpoint, COMPRESSED is adapter.compressed"
        return Finding(CHECKPOINTS, State.NO, f"no adapter can be made of them: {failed}", fix)
    return Finding(CHECKPOINTS, State.OK, "; ".join([f"{found.reference} and {found.compressed}", *notes]))


async def _reference_root(settings: Settings, served: str) -> str:
    """Returns the folder or name from which the reference's server has loaded its model; "" if no server says it."""
    reference, own = settings.reference, settings.reference.models.get(served)
    url = (own and own.url) or reference.url
    if reference.backend != "vllm" or url is None:
        return ""
    server = VllmServer(url, reference.api_key)
    try:
        card = await server.model(own.model if own is not None else reference.model)
    except ReferenceFailure:
        return ""  # the reference's own probe says it
    finally:
        await server.close()
    return card.root or ""


def _folders(settings: Settings, served: str, root: str, reference_root: str) -> CheckpointFolders | Finding:
    """Returns both checkpoints' folders, or why they are not examined. See `_adapter_checkpoints`."""
    reference, own = settings.reference, settings.reference.models.get(served)
    model = own.model if own is not None else reference.model or ""
    folder = (own.folder if own is not None else None) or reference.folder
    try:
        compressed = find_compressed(settings.adapter, root)
        if reference.backend != "transformers":
            found = find_checkpoint(folder, reference_root) if folder is not None else None
            return find_folders(settings.adapter, None, found, root)
        if not os.path.isdir(model):
            return Finding(CHECKPOINTS, State.OK, f"{compressed}; the reference's is where {model} is loaded from")
        return find_folders(settings.adapter, model, None, root)
    except (FolderError, EmbeddingError) as error:
        return Finding(CHECKPOINTS, State.NO, str(error), "adapters are made from both folders, on this machine")


async def _plugin(server: VllmServer, model: str, settings: Settings, *, alone: bool) -> Finding:
    """Reports if vLLM has loaded the logits processor. alone: no profile can serve in any case."""
    needed = not alone and settings.calibration.mode == "auto"
    drafts = await speculates(server)
    try:
        version = await plugin_of(server, model)
    except Refused as refused:
        return Finding("engine plugin", State.NO if needed else State.NOTE, str(refused), "use vLLM 0.32 or newer")
    except ReferenceFailure as failure:
        return Finding("engine plugin", State.NO if needed else State.NOTE, str(failure), "see vLLM's log")
    if version is not None:
        said = "loaded; vLLM decodes speculatively: requests under a grammar are not scored" if drafts else "loaded"
        if why := misfit(version):
            return Finding("engine plugin", State.NOTE, f"{said}; {why}", INSTALL)
        return Finding("engine plugin", State.OK, f"{said} ({version})")
    if alone:
        text = "the logits processor is not loaded: requests under a grammar are not scored"
        return Finding("engine plugin", State.NOTE, text, "" if drafts else f"start vLLM with {PLUGIN_FLAG}")
    if drafts:
        text = f"not loaded: {SPECULATES}"
        return Finding("engine plugin", State.NO if needed else State.NOTE, text, SPECULATES_FIX)
    return Finding(
        "engine plugin",
        State.NO if needed else State.NOTE,
        "not loaded: " + ("no profile can serve" if needed else "needed for calibration.mode auto only"),
        f"start vLLM with {PLUGIN_FLAG}",
    )


async def _models(references: References, server: VllmServer, settings: Settings) -> list[Finding]:
    """Reports for each served base model which reference it is matched with, or why it has none and what to do."""
    try:
        cards = await server.models()
        pairs = await served_pairs(references, server, without_own(cards) if settings.adapter.enabled else cards)
    except ReferenceFailure as failure:
        return [Finding("models", State.NO, str(failure), "see vLLM's log")]
    findings: list[Finding] = []
    matched: list[str] = []
    calibrated = settings.calibration.model
    for n, pair in enumerate(pairs):
        if pair.scorer is None:
            findings.append(_without_reference(pair, settings))
            continue
        of = f" of {pair.name}" if len(pairs) > 1 else ""
        if n:  # the first was probed as the upstream
            probed = await probe_shadowing(server, pair.name, settings.shadow.top_k)
            findings += [replace(f, what=f.what + of) for f in probed if f.state is State.NO]
        result = await _reference(pair.scorer, settings, pair.name, of)
        findings += result
        if result[-1].what.startswith(SAME_TOKENS) and result[-1].state is State.OK:
            matched.append(pair.name)
            if calibrated in pair.names:
                calibrated = pair.name
    served = {name for pair in pairs for name in pair.names}
    if missing := [name for name in settings.reference.models if name not in served]:
        text = f"the upstream does not serve {', '.join(missing)}"
        state = State.NOTE if matched else State.NO
        findings.append(Finding("reference.models", state, text, f"it serves {', '.join(sorted(served))}"))
    if calibrated is not None and calibrated not in matched:
        fix = f"name one of {', '.join(matched)}" if matched else ""
        findings.append(Finding("calibration.model", State.NO, f"{calibrated} is not matched with a reference", fix))
    elif len(matched) > 1:
        text = f"profiles are for {calibrated or matched[0]}; the others are only measured"
        findings.append(Finding("calibration.model", State.OK, text))
    return findings


def _without_reference(pair: ModelPair, settings: Settings) -> Finding:
    fix = f"add it to reference.models, as {pair.name}: REFERENCE"
    if not settings.reference.models:
        fix += ", with the first model and its reference.model there too"
    text = "no reference of its own: its requests are neither scored nor treated"
    return Finding(f"reference of {pair.name}", State.NOTE, text, fix)


async def _reference(reference: Reference, settings: Settings, served: str | None, of: str = "") -> list[Finding]:
    """Probes the reference. served: the name of the model to compare it with; None if the upstream does not answer.
    of: what the names of the findings end with."""
    backend = settings.reference.backend
    try:
        info = await reference.start()
    except ReferenceFailure as failure:
        fix = f"{'start it, or ' if backend == 'vllm' else ''}correct the settings reference.* (backend {backend})"
        if failure.reason is FailureReason.NOT_INSTALLED:
            fix = "install it where the control process runs, or change reference.backend"
        return [Finding(f"reference{of}", State.NO, str(failure), fix)]
    detail = f"{backend}: {info.model} ({info.dtype}, {info.vocab_size} tokens), {info.figures_follow}"
    detail += f"; on {info.device}" if info.device else ""
    # A list of top ids is enough for what is asked for, and hidden states would give more.
    better = f"for exact figures, {info.exact_with}" if info.exact_with else ""
    findings = [Finding(f"reference{of}", State.OK, detail, better)]
    if served is not None and (same := await _served_model_itself(info, settings, served)):
        fix = f"set reference.{'url' if backend == 'vllm' else 'model'} to the uncompressed model"
        findings = [Finding(f"reference{of}", State.NO, f"it is the served model itself: {same}", fix)]
    tokens = np.zeros(2, np.int32)
    try:
        await reference.score(ScoreRequest(tokens[:1], tokens[1:], np.zeros((1, settings.shadow.top_k), np.int32)))
        findings.append(Finding(f"reference score{of}", State.OK, f"shadow.top_k {settings.shadow.top_k}"))
    except ReferenceFailure as failure:
        top_k = settings.shadow.top_k
        fix = f"start the reference with --max-logprobs {top_k}, or lower shadow.top_k" if backend == "vllm" else ""
        findings.append(Finding(f"reference score{of}", State.NO, str(failure), fix))
    same = SAME_TOKENS + of
    if served is None:
        findings.append(Finding(same, State.NO, "not compared: the upstream does not answer"))
        return findings
    try:
        match = await compare(settings.upstream, reference, served)
    except ReferenceFailure as failure:
        findings.append(Finding(same, State.NO, f"the reference could not be reached: {failure}"))
        return findings
    fix = "" if match.ok or not match.compared else "use the model that the served one was compressed from"
    findings.append(Finding(same, State.OK if match.ok else State.NO, match.detail, fix))
    return findings


async def _served_model_itself(info: ReferenceInfo, settings: Settings, served: str) -> str:
    """Returns why nothing can be measured if the reference is the very model that is served; "" if nothing shows that
    it is.
    """
    own = settings.reference.models.get(served)
    url = (own and own.url) or settings.reference.url
    upstream = settings.upstream
    server = VllmServer(upstream.servers[0], upstream.api_key, ca=upstream.ca)
    try:
        return await served_as_reference(info, url if settings.reference.backend == "vllm" else None, server, served)
    except ReferenceFailure:
        return ""  # the next probe says that it does not answer
    finally:
        await server.close()


async def _or(answer: Awaitable[str], otherwise: str) -> str:
    try:
        return await answer
    except ReferenceFailure:
        return otherwise
