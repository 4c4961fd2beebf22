"""Two models on the same tokens: what the report needs of them, however they run."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import msgspec
import numpy as np
import numpy.typing as npt

from hemostat.doctor.options import Decoding, DoctorError, DoctorOptions
from hemostat.doctor.prompts import Prompt

Floats = npt.NDArray[np.float64]
Ids = npt.NDArray[np.int32]

EXACT = ("kl_rc", "kl_cr", "js", "tv", "entropy_r", "entropy_c")
"""Figures of a token at full vocabulary, float64 [T]: KL(r‖c), KL(c‖r), JS, entropies in nats; TV 0 to 1. r is the
reference, c the compressed model. From vLLM servers these are lower bounds."""
ALWAYS = ("logp_r", "logp_c", "same_top")
"""Log-probabilities of the scored token, nats; 1.0 where both models' likeliest ids are one, else 0.0."""
UPPER, ESTIMATE = "_upper", "_estimate"
"""Endings of the figures that servers add: upper bounds, and estimates without truncation bias (NaN: not available)."""
FLOOR = "floor_kl"
"""KL of the compressed model's one-piece prefill from itself, the prompt and the continuation read one after the other:
what rounding alone does. NaN: not measured."""


@dataclass(frozen=True, slots=True)
class Side:
    """One of the models. `digest` identifies the weights (of a server: its model card)."""

    name: str
    digest: str
    dtype: str


@dataclass(frozen=True, slots=True)
class Job:
    """One prompt, encoded. `output`: the ids to score, None to have the compressed model write at most `tokens`."""

    index: int
    prompt: Ids
    output: Ids | None
    tokens: int


@dataclass(frozen=True, slots=True)
class Scored:
    """One prompt's tokens. figures: name -> float64 [T]."""

    index: int
    output: Ids
    figures: Mapping[str, Floats]


class Pair(Protocol):
    """A reference and a compressed model. All methods raise DoctorError and nothing else."""

    reference: Side
    compressed: Side
    vocab_size: int
    max_length: int | None
    """Tokens that both models read, prompt and continuation."""
    full_vocabulary: bool
    notes: list[str]

    def tokenize(self, prompt: Prompt) -> list[int]:
        """Ids of the prompt, chat template and special tokens included."""

    def tokenize_completion(self, text: str) -> list[int]:
        """Ids of a text that goes on where a prompt ended."""

    def score(self, jobs: Sequence[Job], seed: int, greedy: bool) -> list[Scored]:
        """Generate what is to be generated, and score; the same again for the same jobs and seed."""

    def texts(self, ids: Sequence[int]) -> dict[int, str]:
        """What each id adds to a text that it goes on."""

    def special(self) -> frozenset[int]:
        """Ids that are no text; empty where that is unknown."""

    def close(self) -> None: ...


def encode(pair: Pair, prompts: Sequence[Prompt], options: DoctorOptions) -> list[Job]:
    """Raises DoctorError naming the line that cannot be scored."""
    jobs = []
    for index, prompt in enumerate(prompts):
        ids = pair.tokenize(prompt)
        output: list[int] | None = None
        tokens = min(options.tokens, prompt.max_tokens or options.tokens)
        if prompt.completion is not None:
            output = pair.tokenize_completion(prompt.completion)
            if not output:
                raise DoctorError(f"{prompt.where}: completion has no token; fill it in")
        elif options.decoding == "given":
            if prompt.text is None:
                raise DoctorError(f"{prompt.where}: --given scores what is there: add a completion to the messages")
            if len(ids) < 2:
                raise DoctorError(
                    f"{prompt.where}: the text has {len(ids)} token; --given needs at least 2 to score one"
                )
            ids, output = ids[:1], ids[1:]
        if not ids:
            raise DoctorError(f"{prompt.where}: the prompt has no token; fill it in")
        length = len(ids) + (tokens if output is None else len(output))
        if pair.max_length is not None and length > pair.max_length:
            with_what = f"--tokens {tokens}" if output is None else "what is given"
            raise DoctorError(
                f"{prompt.where}: {len(ids)} tokens and {with_what} make {length}, the models read {pair.max_length}; "
                "shorten the line"
            )
        jobs.append(Job(index, np.array(ids, np.int32), None if output is None else np.array(output, np.int32), tokens))
    return jobs


def decoding_of(jobs: Sequence[Job], decoding: Decoding) -> dict[Decoding, int]:
    """How many prompts are scored on whose text."""
    given = sum(job.output is not None for job in jobs)
    counts: dict[Decoding, int] = {"given": given}
    if given < len(jobs):
        counts[decoding] = len(jobs) - given
    return {name: count for name, count in counts.items() if count}


def jobs_digest(jobs: Sequence[Job]) -> str:
    whole = hashlib.sha256()
    for job in jobs:
        output = b"" if job.output is None else job.output.astype("<i4").tobytes()
        for part in (job.prompt.astype("<i4").tobytes(), output, str(job.tokens).encode()):
            whole.update(len(part).to_bytes(8, "little") + part)
    return whole.hexdigest()


class _Stored(msgspec.Struct):
    index: int
    output: bytes
    figures: dict[str, bytes]


def pack(scored: Sequence[Scored]) -> bytes:
    return msgspec.msgpack.encode(
        [
            _Stored(
                one.index,
                one.output.astype("<i4").tobytes(),
                {name: values.astype("<f8").tobytes() for name, values in one.figures.items()},
            )
            for one in scored
        ]
    )


def unpack(data: bytes) -> list[Scored]:
    return [
        Scored(
            one.index,
            np.frombuffer(one.output, "<i4").astype(np.int32),
            {name: np.frombuffer(values, "<f8").astype(np.float64) for name, values in one.figures.items()},
        )
        for one in msgspec.msgpack.decode(data, type=list[_Stored])
    ]


def one_line(error: BaseException) -> str:
    return " ".join(str(error).split())[:400] or type(error).__name__


def json_number(value: Any) -> float | None:
    """JSON has neither NaN nor infinity."""
    number = float(value)
    return number if np.isfinite(number) else None
