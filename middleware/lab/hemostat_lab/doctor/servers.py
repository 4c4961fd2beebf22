"""Two vLLM servers: the compressed one generates and scores by `prompt_logprobs` (top K per position), and so does the
reference, or it is a pooling server, whose whole distribution follows from its hidden states. No torch."""

from __future__ import annotations

import asyncio
import os
import re
from collections.abc import Coroutine, Mapping, Sequence
from typing import Any, TypeVar

import msgspec
import numpy as np
from pydantic import SecretStr

from hemostat.config.models import Upstream
from hemostat.reference.match import compare
from hemostat.reference.on_server import ServerReference
from hemostat.reference.protocol import ReferenceFailure, ReferenceInfo, ScoreRequest
from hemostat.reference.server import VllmServer
from hemostat.reference.vllm import VllmReference
from hemostat_calibration.divergence.bounds import MIN_RATIO
from hemostat_calibration.divergence.per_token import divergence
from hemostat_calibration.errors import InvalidRecordError
from hemostat_calibration.record_checks import validate
from hemostat_calibration.records import Sampling, TokenRecord
from hemostat_lab.doctor.options import COMPRESSED_KEY, REFERENCE_KEY, DoctorError, DoctorOptions, split_address
from hemostat_lab.doctor.pair import ESTIMATE, FLOOR, UPPER, Floats, Ids, Job, Scored, Side
from hemostat_lab.doctor.prompts import Prompt

T = TypeVar("T")

MAX_CONCURRENT_REQUESTS = 8
TIMEOUT_SECONDS = 600.0
"""For one response: a long text may wait in the server's queue."""
ANCHOR = "a"
"""Ids are decoded after this text: tokenizers drop a leading space at the start."""
_SPECIAL = re.compile(r"<[^<>\s]{1,60}>")
"""How special tokens are commonly written; a server has no list of them."""


class _Choice(msgspec.Struct, frozen=True):
    token_ids: list[int] | None = None


class _Completion(msgspec.Struct, frozen=True):
    choices: list[_Choice]


class _Text(msgspec.Struct, frozen=True):
    prompt: str


class ServerPair:
    """Implements `Pair` with bounds and estimates instead of exact figures."""

    full_vocabulary = False

    def __init__(self, options: DoctorOptions) -> None:
        self._options = options
        self._runner = asyncio.Runner()
        self.notes = [
            f"upper bounds of KL assume that, for an id that is not in both lists, neither probability is less than "
            f"{MIN_RATIO:.1e} times the other",
            "the weights of a server are unknown: a report that continues after an interruption cannot detect a change",
        ]
        self._texts: dict[int, str] = {}
        try:
            self._run(self._start())
        except BaseException:
            self.close()
            raise

    async def _start(self) -> None:
        options = self._options
        reference_url, reference_name = split_address(options.reference)
        self._reference = ServerReference(
            reference_url, _key(REFERENCE_KEY), reference_name, options.top_k, folder=options.reference_folder
        )
        (self._url, wanted), key = split_address(options.compressed), _key(COMPRESSED_KEY)
        self._compressed = VllmReference(self._url, key, wanted, options.top_k)
        self._server = VllmServer(self._url, key, timeout=TIMEOUT_SECONDS)
        infos = [await self._reference.start(), await self._compressed.start()]
        self._name = infos[1].model
        self.vocab_size = infos[1].vocab_size
        self.reference, self.compressed = (
            Side(f"{info.model} at {url}", info.digest, info.dtype)
            for info, url in zip(infos, (reference_url, self._url), strict=True)
        )
        await self._compare(infos, wanted, key)
        lengths = [(await self._server.model(self._name)).max_model_len]
        lengths.append(await self._reference_length(reference_url, reference_name))
        # To score, vLLM generates one token more.
        self.max_length = min((length - 1 for length in lengths if length), default=None)

    async def _reference_length(self, url: str, name: str | None) -> int | None:
        server = VllmServer(url, _key(REFERENCE_KEY))
        try:
            return (await server.model(name)).max_model_len
        finally:
            await server.close()

    async def _compare(self, infos: list[ReferenceInfo], wanted: str | None, key: SecretStr | None) -> None:
        match = await compare(Upstream(url=self._url, api_key=key), self._reference, wanted)
        if not match.ok:
            raise DoctorError(f"{match.detail}; REFERENCE must serve the model that COMPRESSED was made from")

    def tokenize(self, prompt: Prompt) -> list[int]:
        if prompt.messages is None:
            body = {"model": self._name, "prompt": prompt.text}
            return self._run(self._server.post("/tokenize", body, _TokenIds)).tokens
        try:
            return self._run(self._server.render(self._name, prompt.messages))
        except DoctorError as error:
            raise DoctorError(f"{prompt.where}: {error}") from None

    def tokenize_completion(self, text: str) -> list[int]:
        return self._run(self._server.tokenize(self._name, text))

    def texts(self, ids: Sequence[int]) -> dict[int, str]:
        return self._run(self._detokenized(ids))

    async def _detokenized(self, ids: Sequence[int]) -> dict[int, str]:
        anchor = await self._server.tokenize(self._name, ANCHOR)
        limit = asyncio.Semaphore(MAX_CONCURRENT_REQUESTS)

        async def text(tokens: list[int]) -> str:
            async with limit:
                return (await self._server.post("/detokenize", {"model": self._name, "tokens": tokens}, _Text)).prompt

        start = await text(anchor)
        result = await asyncio.gather(*(text([*anchor, token]) for token in ids))
        self._texts = {token: whole.removeprefix(start) for token, whole in zip(ids, result, strict=True)}
        return self._texts

    def special(self) -> frozenset[int]:
        """Of the ids of the last call of `texts`."""
        return frozenset(token for token, text in self._texts.items() if _SPECIAL.fullmatch(text))

    def score(self, jobs: Sequence[Job], seed: int, greedy: bool) -> list[Scored]:
        async def score_all() -> list[Scored]:
            limit = asyncio.Semaphore(MAX_CONCURRENT_REQUESTS)

            async def score_job(job: Job) -> Scored:
                async with limit:
                    return await self._score(job, seed, greedy)

            async with asyncio.TaskGroup() as group:
                tasks = [group.create_task(score_job(job)) for job in jobs]
            return [task.result() for task in tasks]

        return self._run(score_all())

    async def _score(self, job: Job, seed: int, greedy: bool) -> Scored:
        output, sampled = job.output, False
        if output is None:
            output, sampled = await self._generate(job, seed, greedy), not greedy
        compressed = await self._compressed.score(
            ScoreRequest(job.prompt, output, np.full((len(output), 1), -1, np.int32))
        )
        reference = await self._reference.score(ScoreRequest(job.prompt, output, compressed.top.ids))
        record = TokenRecord(
            vocab_size=self.vocab_size,
            prompt_key=b"",
            output_ids=output,
            compressed=compressed.top,
            reference_at=reference.at,
            reference=reference.top,
            compressed_emitted=compressed.emitted,
            reference_emitted=reference.emitted,
            reference_entropy=reference.entropy,
            # If the text was not sampled from c, no weight makes the estimates unbiased.
            sampling=Sampling(temperature=1.0 if sampled else 0.0),
        )
        try:
            return Scored(job.index, output, _figures_of(validate(record)))
        except InvalidRecordError as error:
            raise DoctorError(f"a server's log-probabilities cannot be used: {error}") from None

    async def _generate(self, job: Job, seed: int, greedy: bool) -> Ids:
        body: dict[str, Any] = {
            "model": self._name,
            "prompt": job.prompt.tolist(),
            "max_tokens": job.tokens,
            "temperature": 0.0 if greedy else 1.0,
            # Override generation_config.json of the checkpoint, which may truncate the distribution.
            **{"top_p": 1.0, "top_k": -1, "min_p": 0.0, "repetition_penalty": 1.0},
            "seed": int(np.random.default_rng([seed, job.index]).integers(2**31)),
            "return_token_ids": True,
        }
        choices = (await self._server.post("/v1/completions", body, _Completion)).choices
        ids = choices[0].token_ids if choices else None
        if not ids:
            raise DoctorError(f"{self._url} returns no token ids; use vLLM 0.32 or newer")
        return np.array(ids, np.int32)

    def close(self) -> None:
        for name in ("_reference", "_compressed", "_server"):
            if (open_ := getattr(self, name, None)) is not None:
                self._runner.run(open_.close())
        self._runner.close()

    def _run(self, work: Coroutine[Any, Any, T]) -> T:
        try:
            return self._runner.run(work)
        except ReferenceFailure as failure:
            raise self._to_doctor_error(failure) from None
        except ExceptionGroup as group:
            first = group.exceptions[0]
            if isinstance(first, ReferenceFailure):
                raise self._to_doctor_error(first) from None
            raise first from None

    def _to_doctor_error(self, failure: ReferenceFailure) -> DoctorError:
        text = str(failure)
        if failure.reason == "refused" and "logprobs" in text:
            text += f"; start that server with --max-logprobs {self._options.top_k}, or lower --top-k"
        if failure.reason == "head":
            text = text.replace("reference.folder", "--reference-folder")
        if failure.reason == "unauthorized":
            text += f"; set {REFERENCE_KEY} and {COMPRESSED_KEY}"
        return DoctorError(text)


def _figures_of(record: TokenRecord) -> Mapping[str, Floats]:
    """Lower bounds, upper bounds and estimates of a validated record, float64 [T] each; see `pair`."""
    estimates = divergence(record)
    certain = estimates.bounds
    return {
        **{name: getattr(certain, name).lower for name in ("kl_rc", "kl_cr", "js", "tv")},
        **{name + UPPER: getattr(certain, name).upper for name in ("kl_rc", "kl_cr", "js", "tv")},
        "kl_rc" + ESTIMATE: estimates.estimate_rc,
        "kl_cr" + ESTIMATE: estimates.estimate_cr,
        "entropy_r": estimates.entropy_reference,
        "entropy_c": estimates.entropy_compressed,
        "logp_r": record.reference_emitted,
        "logp_c": record.compressed_emitted,
        "same_top": estimates.top1_agreement.astype(np.float64),
        FLOOR: np.full(record.tokens, np.nan),
    }


class _TokenIds(msgspec.Struct, frozen=True):
    tokens: list[int]


def _key(variable: str, environment: Mapping[str, str] = os.environ) -> SecretStr | None:
    value = environment.get(variable)
    return SecretStr(value) if value else None
