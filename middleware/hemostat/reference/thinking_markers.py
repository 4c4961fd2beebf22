"""The ids by which a reasoning model's thinking is recognized: from the settings, or from the server's tokenizer.

Clients cannot see vLLM's `--reasoning-parser`, and each parser has its markers as texts. Here they are by the
parsers' names (vLLM 0.32, `vllm/reasoning`), and the server's /tokenize says which ids they are. `auto` takes the first
markers that are single tokens in the vocabulary: only a model that was made to think has such. Markers that are several
tokens depend on what stands around them; they are tokenized in several contexts, and every way is a marker.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from hemostat.config.models import Reasoning
from hemostat.config.reasoning_parsers import PARSERS, SINGLE, Texts
from hemostat.reference.protocol import ReferenceFailure
from hemostat_calibration.reasoning import MAX_IDS, MAX_SEQUENCES, Markers, Sequences

CONTEXTS = (
    *(("", ""), ("\n", ""), ("\n", "\n"), ("", "\n"), (" ", " "), ("a", "a"), ("a ", " a")),
    *((f"a{sign}", "\n") for sign in ".!?:)\"'`*>"),
)
"""The texts before and after a marker of several tokens: the characters next to it may share a token with it."""


class Tokenizer(Protocol):
    """The part of `hemostat.reference.server.VllmServer` that tokenizes."""

    async def tokenize(self, model: str, text: str) -> list[int]: ...


@dataclass(frozen=True, slots=True)
class FoundMarkers:
    """The markers that were found. markers: None if none are known. detail: one line for people."""

    markers: Markers | None
    detail: str


async def find_markers(server: Tokenizer, model: str, settings: Reasoning) -> FoundMarkers:
    """Returns the markers of a served model. Fails open: a tokenizer that cannot be asked is as one without markers."""
    if settings.start or settings.end:
        markers = Markers((tuple(settings.start),) if settings.start else (), (tuple(settings.end),))
        return FoundMarkers(markers, f"ids {settings.start} to {settings.end}, as set")
    if settings.parser == "none":
        return FoundMarkers(None, "reasoning.parser is none: thinking and answer are not distinguished")
    try:
        if settings.parser != "auto":
            return await _of_texts(server, model, PARSERS[settings.parser], settings.parser)
        for texts in SINGLE:
            start, end = [await server.tokenize(model, text) for text in texts]
            if len(start) == len(end) == 1:
                markers = Markers((tuple(start),), (tuple(end),))
                return FoundMarkers(markers, f"{texts[0]} is id {start[0]}, {texts[1]} is id {end[0]}")
    except ReferenceFailure as failure:
        return FoundMarkers(None, f"the server's tokenizer could not be asked: {failure}")
    return FoundMarkers(None, "no markers among the vocabulary's single tokens: not taken to be a reasoning model")


async def _of_texts(server: Tokenizer, model: str, texts: Texts, parser: str) -> FoundMarkers:
    start, end = [await _sequences(server, model, text) for text in texts]
    if not start or not end:
        return FoundMarkers(
            None, f"parser {parser}: the tokenizer does not give {texts[0]} and {texts[1]} ids of their own"
        )
    ways = f"{len(start)} and {len(end)} sequences of ids" if len(start) + len(end) > 2 else f"ids {start[0]}, {end[0]}"
    return FoundMarkers(Markers(start, end), f"parser {parser}: {texts[0]} and {texts[1]} are {ways}")


async def _sequences(server: Tokenizer, model: str, text: str) -> Sequences:
    """Returns every way in which the tokenizer cuts the text, alone or next to other characters; the shortest sequences
    come first.
    """
    alone = tuple(await server.tokenize(model, text))
    if len(alone) == 1:
        return (alone,)
    result: dict[tuple[int, ...], int] = {}
    for before, after in CONTEXTS:
        first = await server.tokenize(model, before) if before else []
        last = await server.tokenize(model, after) if after else []
        whole = await server.tokenize(model, before + text + after)
        # What is equal to the context's own ids is not of the marker; a token that both share is.
        begin = _common(whole, first)
        end = len(whole) - _common(whole[begin:][::-1], last[::-1])
        ids = tuple(whole[begin:end])
        if 1 < len(ids) <= MAX_IDS:
            result[ids] = len(result)
    return tuple(sorted(result, key=lambda ids: (len(ids), result[ids])))[:MAX_SEQUENCES]


def _common(a: list[int], b: list[int]) -> int:
    """Returns the length of the common beginning."""
    return next((n for n, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))
