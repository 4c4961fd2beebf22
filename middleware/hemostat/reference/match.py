"""Do the two models use the same token ids? Scores over another vocabulary would be meaningless."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from hemostat.config.models import Upstream
from hemostat.reference.hidden.probe import TEXT
from hemostat.reference.protocol import FailureReason, Offer, Reference, ReferenceFailure, ReferenceInfo, ScoreRequest
from hemostat.reference.server import Refused, VllmServer

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
