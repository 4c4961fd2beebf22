"""The interface to a pair of models, in process or on servers, and the scored tokens."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import msgspec
import numpy as np
import numpy.typing as npt

from hemostat_lab.doctor.options import Decoding, DoctorError, DoctorOptions
from hemostat_lab.doctor.prompts import Prompt

Floats = npt.NDArray[np.float64]
Ids = npt.NDArray[np.int32]

EXACT = ("kl_rc", "kl_cr", "js", "tv", "entropy_r", "entropy_c")
"""Figures of a token at full vocabulary, float64 [T]: KL(r‖c), KL(c‖r), JS, entropies in nats; TV 0 to 1. r is the
reference, c the compressed model. From vLLM servers these are lower bounds."""
ALWAYS = ("logp_r", "logp_c", "same_top")
"""Log-probabilities of the scored token, nats; 1.0 where both models have the same most likely id, else 0.0."""
UPPER, ESTIMATE = "_upper", "_estimate"
"""Suffixes of the figures that servers add: upper bounds, and estimates without truncation bias (NaN: unavailable)."""
FLOOR = "floor_kl"
"""The noise floor: KL between two runs of the compressed model, one prefill of the whole text and one in two pieces. It
is the effect of rounding. NaN: not measured."""


@dataclass(frozen=True, slots=True)
class Side:
    """One of the two models. `digest` identifies the weights (for a server: the model card)."""

    name: str
    digest: str
    dtype: str


@dataclass(frozen=True, slots=True)
class Job:
    """One prompt, encoded. `output`: the ids to score; None: the compressed model generates at most `tokens`."""

    index: int
    prompt: Ids
    output: Ids | None
    tokens: int


@dataclass(frozen=True, slots=True)
class Scored:
    """The scored tokens of one prompt. figures: name -> float64 [T]."""

    index: int
    output: Ids
    figures: Mapping[str, Floats]


class Pair(Protocol):
    """A reference and a compressed model. All methods raise DoctorError and nothing else."""

    reference: Side
    compressed: Side
    vocab_size: int
    max_length: int | None
    """Maximum length of prompt and continuation for both models."""
    full_vocabulary: bool
    notes: list[str]

    def tokenize(self, prompt: Prompt) -> list[int]:
        """Ids of the prompt, chat template and special tokens included."""

    def tokenize_completion(self, text: str) -> list[int]:
        """Ids of a text that continues a prompt."""

    def score(self, jobs: Sequence[Job], seed: int, greedy: bool) -> list[Scored]:
        """Generate where a job has no output, and score. Deterministic in jobs and seed."""

    def texts(self, ids: Sequence[int]) -> dict[int, str]:
        """The text that each id adds when it continues a text."""

    def special(self) -> frozenset[int]:
        """Special ids; empty where they are unknown."""

    def close(self) -> None: ...


def encode(pair: Pair, prompts: Sequence[Prompt], options: DoctorOptions) -> list[Job]:
    """Tokenize the prompts. Raises DoctorError with the line that cannot be scored."""
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
                raise DoctorError(f"{prompt.where}: --given scores text of the file: add a completion to the messages")
            if len(ids) < 2:
                raise DoctorError(
                    f"{prompt.where}: the text has {len(ids)} token; --given needs at least 2 to score one"
                )
            ids, output = ids[:1], ids[1:]
        if not ids:
            raise DoctorError(f"{prompt.where}: the prompt has no token; fill it in")
        length = len(ids) + (tokens if output is None else len(output))
        if pair.max_length is not None and length > pair.max_length:
            with_what = f"--tokens {tokens}" if output is None else "the given text"
            raise DoctorError(
                f"{prompt.where}: {len(ids)} tokens and {with_what} make {length}, the models accept "
                f"{pair.max_length}; shorten the line"
            )
        jobs.append(Job(index, np.array(ids, np.int32), None if output is None else np.array(output, np.int32), tokens))
    return jobs


def decoding_of(jobs: Sequence[Job], decoding: Decoding) -> dict[Decoding, int]:
    """The number of prompts by the kind of text that is scored."""
    given = sum(job.output is not None for job in jobs)
    counts: dict[Decoding, int] = {"given": given}
    if given < len(jobs):
        counts[decoding] = len(jobs) - given
    return {name: count for name, count in counts.items() if count}


def jobs_digest(jobs: Sequence[Job]) -> str:
    """SHA-256 of all prompts, outputs and limits."""
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
                text.index,
                text.output.astype("<i4").tobytes(),
                {name: values.astype("<f8").tobytes() for name, values in text.figures.items()},
            )
            for text in scored
        ]
    )


def unpack(data: bytes) -> list[Scored]:
    return [
        Scored(
            text.index,
            np.frombuffer(text.output, "<i4").astype(np.int32),
            {name: np.frombuffer(values, "<f8").astype(np.float64) for name, values in text.figures.items()},
        )
        for text in msgspec.msgpack.decode(data, type=list[_Stored])
    ]


def json_number(value: Any) -> float | None:
    """The value, or None for NaN and infinity, which JSON does not have."""
    number = float(value)
    return number if np.isfinite(number) else None
