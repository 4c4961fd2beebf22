"""Where a reasoning model's thinking ends and its answer begins, found by token ids.

A reasoning model encloses its thinking in two markers, such as `<think>` and `</think>`. A marker is one special token
in most vocabularies, and a sequence of tokens in others, where how it is cut depends on the characters around it: so a
marker is a set of sequences of ids, any of which stands for it. Texts are not looked at: they do not say which ids they
were made of.

Where thinking begins: the prompt may have begun it (a chat template that ends with the start marker), may have ended it
(a template that skips the thinking), or leaves it to the output. An end marker that nothing began ends a thinking that
began with the output, as vLLM's parsers have it. Of an output that holds several spans, the first one is its thinking,
and all that follows is its answer.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

import numpy as np

from hemostat_calibration.arrays import Bools, Ids
from hemostat_calibration.errors import InvalidArgumentError

MAX_SEQUENCES = 64
"""The largest number of sequences of ids for one marker."""
MAX_IDS = 32
"""The largest number of ids in one sequence."""

Sequences = tuple[tuple[int, ...], ...]


@dataclass(frozen=True, slots=True)
class Markers:
    """The markers of a model's thinking. start, end: sequences of ids, any of which is the marker.

    Raises InvalidArgumentError if `end` is empty, a sequence is empty or too long, or there are too many.
    """

    start: Sequences
    end: Sequences

    def __post_init__(self) -> None:
        for name, sequences in (("start", self.start), ("end", self.end)):
            if len(sequences) > MAX_SEQUENCES or any(not 1 <= len(ids) <= MAX_IDS for ids in sequences):
                raise InvalidArgumentError(
                    f"{name} of thinking has {len(sequences)} sequences: at most {MAX_SEQUENCES}, of 1 to {MAX_IDS} ids"
                )
        if not self.end:
            raise InvalidArgumentError("end of thinking has no sequence of ids: at least one is needed")


@dataclass(frozen=True, slots=True)
class Thinking:
    """The thinking in one output of T tokens, its markers included: positions begin to answer_start − 1.

    answer_start: of the first token after the end marker; T where the thinking does not end, or where nothing follows.
    ended: the end marker is there.
    """

    begin: int
    answer_start: int
    ended: bool

    @property
    def tokens(self) -> int:
        """The number of tokens of the thinking so far, with its markers."""
        return self.answer_start - self.begin


def find_thinking(prompt: Ids, output: Ids, markers: Markers) -> Thinking | None:
    """Returns the thinking in an output, None if there is none. prompt: int [P], output: int [T].

    >>> markers = Markers(start=((7,),), end=((8, 9),))
    >>> find_thinking(np.array([1, 2]), np.array([7, 3, 4, 8, 9, 5]), markers)
    Thinking(begin=0, answer_start=5, ended=True)
    >>> find_thinking(np.array([1, 7, 2]), np.array([3, 4]), markers)
    Thinking(begin=0, answer_start=2, ended=False)
    >>> find_thinking(np.array([7, 8, 9]), np.array([3, 4]), markers) is None
    True
    """
    started, ended = _last(prompt, markers.start), _last(prompt, markers.end)
    own, first_end = _first(output, markers.start, 0), _first(output, markers.end, 0)
    in_prompt = started >= 0 or ended >= 0
    if started > ended or (not in_prompt and first_end is not None and (own is None or first_end[0] < own[0])):
        begin = 0
    elif own is None:
        return None
    else:
        begin = own[0]
    end = _first(output, markers.end, begin)
    if end is None:
        return Thinking(begin, len(output), ended=False)
    return Thinking(begin, end[0] + end[1], ended=True)


def thinking_mask(thinking: Thinking | None, first: int, tokens: int) -> Bools:
    """Returns which of the positions first … first + tokens − 1 of an output are thinking: bool [tokens].

    >>> thinking_mask(Thinking(1, 3, ended=True), first=0, tokens=5).tolist()
    [False, True, True, False, False]
    """
    at = np.arange(first, first + tokens)
    return np.zeros(tokens, np.bool_) if thinking is None else (at >= thinking.begin) & (at < thinking.answer_start)


def _starts(ids: Ids, sequence: tuple[int, ...]) -> Ids:
    """Returns where the sequence begins, in ascending order."""
    width = len(ids) - len(sequence) + 1
    if width < 1:
        return np.zeros(0, np.int32)
    at = np.flatnonzero(ids[:width] == sequence[0])
    for offset, wanted in enumerate(sequence[1:], 1):
        at = at[ids[at + offset] == wanted]
    return at.astype(np.int32)


def _first(ids: Ids, sequences: Collection[tuple[int, ...]], start: int) -> tuple[int, int] | None:
    """Returns where the first of the sequences begins, from `start` on, and its length: of several that begin there,
    the longest."""
    places = ((int(at[0]), len(sequence)) for sequence in sequences if len(at := _starts(ids[start:], sequence)))
    best = min(places, key=lambda place: (place[0], -place[1]), default=None)
    return None if best is None else (best[0] + start, best[1])


def _last(ids: Ids, sequences: Collection[tuple[int, ...]]) -> int:
    """Returns where the last of the sequences ends; −1 if there is none."""
    return max((int(at[-1]) + len(sequence) for sequence in sequences if len(at := _starts(ids, sequence))), default=-1)
