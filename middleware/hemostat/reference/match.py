"""Compares models by what their servers answer.

Do the two models use the same token ids? Scores over another vocabulary would be meaningless. Is the reference the
served model itself? Then every divergence would be of a model from itself. Are the weights behind a served name still
the same? A generating server says nothing of its weights but a name and a path, and both stay when another checkpoint
is loaded. So fixed texts are scored, and compared with what they gave before. Do all engines serve the same models?
"""

from __future__ import annotations

import asyncio
import os
import socket
from collections.abc import Sequence
from dataclasses import dataclass
from urllib.parse import urlsplit

import numpy as np

from hemostat.checkpoints.checkpoint_digest import checkpoint_digest
from hemostat.config.models import Upstream
from hemostat.config.schema import Settings
from hemostat.reference.hidden.probe import TEXT
from hemostat.reference.probes import Finding, State, plugin_of, probe_shadowing
from hemostat.reference.protocol import FailureReason, Offer, Reference, ReferenceFailure, ReferenceInfo, ScoreRequest
from hemostat.reference.server import ModelCard, Refused, VllmServer
from hemostat_calibration.plugin_version import INSTALL, misfit

MAX_LESS_LIKELY_NATS = 0.5
"""The largest amount, per token on average, by which a plain text may be less likely under a reference than under its
compressed copy.
"""
MAX_SAME_NATS = 0.05
"""The mean difference of the log-probabilities of one text's tokens, up to which two served names are one model.
Repeated computations of one model in bfloat16 differ by about 0.01; two sizes of one family by more than 0.5."""

PROBE_TEXT = (
    "Hello, world! 1234567890 3.14159  two spaces\n\ttabbed: def f(x): return x**2  # ok\n"
    'Größe, naïve, Ελληνικά, Привет, 你好，世界, こんにちは, مرحبا, 🙂🚀 {"key": [null, true]} https://example.org/?a=b&c=%20'
)
# No system message: some templates refuse one, and those that add one of their own show it.
PROBE_CHAT = [
    {"role": "user", "content": "What is 2 + 2?"},
    {"role": "assistant", "content": "4"},
    {"role": "user", "content": "And 3 + 3?"},
]

PROBE_SECONDS = 300.0
"""The time between two probes, while requests are scored."""
MAX_PROBE_TOKENS = 64
"""The largest number of tokens of each text that are scored."""
DEFAULT_PORTS = {"http": 80, "https": 443}


@dataclass(frozen=True, slots=True)
class Match:
    """The result of a comparison."""

    ok: bool
    """It is True if the reference can score the compressed model's tokens."""
    compared: bool
    """It is False if the upstream could not be asked: no mismatch, and worth another attempt."""
    detail: str
    """One line: what differs, what failed, or what was found equal."""


async def compare(upstream: Upstream, reference: Reference, model: str | None = None) -> Match:
    """Returns the comparison of the vocabulary size, the ids of a probe text, and the ids of a rendered chat. Starts
    the reference.

    model: the upstream's served name, None for its first. Raises ReferenceFailure if the reference could not be asked.
    """
    info = await reference.start()
    probe = await reference.tokenize(PROBE_TEXT)
    try:
        chat = await reference.render(PROBE_CHAT)
    except ReferenceFailure as failure:
        if failure.reason is not FailureReason.NO_CHAT_TEMPLATE:
            raise
        chat = None
    server = VllmServer(upstream.servers[0], upstream.api_key, ca=upstream.ca)
    try:
        name = (await server.model(model)).id
        size = await server.vocab_size(name)
        if size != info.vocab_size:
            differs = f"{name} has {size} tokens, the reference {info.model} has {info.vocab_size}"
            return Match(False, True, f"vocabulary: {differs}")
        if differs := _difference(await server.tokenize(name, PROBE_TEXT), probe):
            return Match(False, True, f"token ids of a probe text: {name} and the reference {info.model} {differs}")
        try:
            rendered = await server.render(name, PROBE_CHAT)
        except ReferenceFailure as failure:
            if failure.reason is not FailureReason.NO_CHAT_TEMPLATE:
                raise
            rendered = None
        if (rendered is None or chat is None) and (less := await _less_likely(server, name, reference, info)):
            return Match(False, True, less)
        if rendered is None or chat is None:
            # No template to compare: the reference scores the ids that the compressed model was given.
            missing = name if rendered is None else f"the reference {info.model}"
            return Match(True, True, f"{size} tokens, same ids of a probe text; {missing} has no chat template")
        if differs := _difference(rendered, chat):
            return Match(False, True, f"token ids of a rendered chat: {name} and the reference {info.model} {differs}")
        if less := await _less_likely(server, name, reference, info):
            return Match(False, True, less)
        return Match(True, True, f"{size} tokens, same ids of a probe text and of a rendered chat")
    except ReferenceFailure as failure:
        return Match(False, False, str(failure))
    finally:
        await server.close()


async def _less_likely(server: VllmServer, name: str, reference: Reference, info: ReferenceInfo) -> str:
    """Where two parts make up the reference, the server's hidden states and an output embedding read here: whether a
    plain text is less likely under it than under its compressed copy, as if the two were not of one model; "" if not.
    """
    if info.offer is not Offer.STATES:
        return ""
    ids = await server.tokenize(name, TEXT)
    try:
        compressed = await server.prompt_logprobs(name, ids)
    except Refused:
        return ""  # a server without prompt_logprobs
    tokens = np.array(ids, np.int32)
    nothing = np.full((len(ids) - 1, 1), -1, np.int32)
    scores = await reference.score(ScoreRequest(tokens[:1], tokens[1:], nothing))
    ours, theirs = float(scores.emitted.mean()), sum(compressed) / len(compressed)
    if ours >= theirs - MAX_LESS_LIKELY_NATS:
        return ""
    return (
        f"a plain text costs {-ours:.2f} nats per token under the reference {info.model}, {-theirs:.2f} under {name}: "
        f"the output embedding in {info.folder} is not that of the server's model; correct reference.folder"
    )


async def same_model(server: VllmServer, name: str, other: str) -> bool:
    """Returns True if two served names are one model: it gives the tokens of a text the same log-probabilities under
    both.

    Equal paths in the server's list do not say so: behind a router, every server may have loaded its own model from
    /models. Raises ReferenceFailure if the server could not be asked.
    """
    ids = await server.tokenize(name, PROBE_TEXT)
    if await server.tokenize(other, PROBE_TEXT) != ids:
        return False
    ours, theirs = await server.prompt_logprobs(name, ids), await server.prompt_logprobs(other, ids)
    differences = [abs(a - b) for a, b in zip(ours, theirs, strict=True)]
    return sum(differences) <= MAX_SAME_NATS * len(differences)


def _difference(ours: list[int], theirs: list[int]) -> str:
    """Returns from which token on the ids differ, in words; "" if they are equal."""
    if ours == theirs:
        return ""
    at = next((n for n, (a, b) in enumerate(zip(ours, theirs, strict=False)) if a != b), min(len(ours), len(theirs)))
    a, b = (str(ids[at]) if at < len(ids) else "nothing" for ids in (ours, theirs))
    return f"differ from token {at} on ({a} against {b})"


async def served_as_reference(info: ReferenceInfo, url: str | None, server: VllmServer, served: str) -> str:
    """Returns how it is known that `served` on the upstream `server` is the reference `info`; "" if nothing says so.

    url: the URL of the reference, if it is a server. Raises ReferenceFailure if the upstream could not be asked.
    """
    if url is not None and info.model == served and await asyncio.to_thread(_same_address, url, server.url):
        return f"{url} is the upstream, and serves the same model"
    root = (await server.model(served)).root or ""
    if info.folder is None or not await asyncio.to_thread(_same_files, str(info.folder), root):
        return ""
    return f"the upstream loaded {served} from {root}, which has the same files as {info.folder}"


def _same_files(first: str, other: str) -> bool:
    """Returns True if two folders have the same files; False if one of them is not a folder on this machine."""
    if not (os.path.isdir(first) and os.path.isdir(other)):
        return False
    return os.path.samefile(first, other) or checkpoint_digest(first, None) == checkpoint_digest(other, None)


def _same_address(first: str, other: str) -> bool:
    return first == other or bool(_addresses(first) & _addresses(other))


def _addresses(url: str) -> set[object]:
    parts = urlsplit(url)
    try:
        result = socket.getaddrinfo(parts.hostname, parts.port or DEFAULT_PORTS[parts.scheme], type=socket.SOCK_STREAM)
    except OSError:
        return set()
    return {address[:2] for *_, address in result}


async def probed_scores(server: VllmServer, card: ModelCard) -> tuple[float, ...]:
    """Returns the log-probabilities of the tokens of both texts, nats. Raises ReferenceFailure."""
    limit = min(MAX_PROBE_TOKENS, (card.max_model_len or MAX_PROBE_TOKENS) - 1)
    scores: list[float] = []
    for text in (TEXT, PROBE_TEXT):
        ids = await server.tokenize(card.id, text)
        scores += await server.prompt_logprobs(card.id, ids[:limit])
    return tuple(scores)


def mean_difference(before: Sequence[float], now: Sequence[float]) -> float:
    """Returns the mean absolute difference of two probes, nats; infinite if they are of different numbers of tokens."""
    if len(before) != len(now) or not before:
        return float("inf")
    return sum(abs(a - b) for a, b in zip(before, now, strict=True)) / len(before)


def same_weights(before: Sequence[float], now: Sequence[float]) -> bool:
    """Returns True if two probes are of the same weights. They are as noisy as a server: the same tokens in batches of
    other shapes differ by about 0.01 nats in bfloat16, and other weights by more than MAX_SAME_NATS. A change of the
    weights that moves the log-probabilities by less is not seen.

    >>> same_weights([-1.0, -2.0], [-1.02, -1.99]), same_weights([-1.0, -2.0], [-1.4, -2.0])
    (True, False)
    """
    return mean_difference(before, now) <= MAX_SAME_NATS


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
