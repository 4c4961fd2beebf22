"""One vLLM server as the gate asks it. Nothing of Hemostat is needed there."""

from __future__ import annotations

import secrets
from contextlib import suppress
from dataclasses import dataclass

import msgspec
import numpy as np

from hemostat.gate.asked import Prompt
from hemostat.openai.form import Form
from hemostat.openai.json_splice import MALFORMED
from hemostat.openai.logprobs.rows import Rows, read_rows
from hemostat.reference.probed_scores import mean_difference, probed_scores
from hemostat.reference.protocol import FailureReason, ReferenceFailure, ReferenceScores, ScoreRequest
from hemostat.reference.server import ModelCard, VllmServer
from hemostat.reference.vllm import MAX_ENTRY_BYTES, MAX_LOGPROB, top_ids
from hemostat_calibration.arrays import Ids
from hemostat_calibration.gate.distance import Listed

TOP_K = 20
"""The number of ids of each list, which every vLLM server allows."""


class _Choice(msgspec.Struct, frozen=True):
    text: str = ""
    token_ids: list[int] | None = None
    logprobs: msgspec.Raw = msgspec.Raw(b"null")


class _Completion(msgspec.Struct, frozen=True):
    choices: list[_Choice]


@dataclass(frozen=True, slots=True)
class Answer:
    """A model's own answer. listed: its values of these tokens while it generated them."""

    text: str
    ids: Ids
    listed: Listed


class Identity(msgspec.Struct, frozen=True):
    """The marks that tell one candidate from another. probe: log-probabilities of the tokens of fixed texts, nats."""

    model: str
    root: str
    version: str
    max_model_len: int
    probe: tuple[float, ...]

    def differences(self, other: Identity, tolerance: float) -> list[str]:
        """Returns what differs, in words. tolerance: the largest mean difference of the probes that is noise, nats."""
        changed = [
            f"{name} is {now!r} in place of {before!r}"
            for name, before, now in (
                ("the model", self.model, other.model),
                ("its folder", self.root, other.root),
                ("vLLM", self.version, other.version),
                ("the longest context", self.max_model_len, other.max_model_len),
            )
            if before != now
        ]
        far = mean_difference(self.probe, other.probe)
        if far > tolerance:
            changed.append(f"the tokens of fixed texts have other log-probabilities, by {far:.3f} nats on average")
        return changed


class Endpoint:
    """Every method raises ReferenceFailure."""

    def __init__(self, server: VllmServer, card: ModelCard) -> None:
        self._server = server
        self._card = card

    @classmethod
    async def of(cls, server: VllmServer, name: str | None) -> Endpoint:
        """Returns the endpoint of a served model. name: None: the first base model."""
        return cls(server, await server.model(name))

    @property
    def url(self) -> str:
        return self._server.url

    async def identity(self) -> Identity:
        version = ""
        with suppress(ReferenceFailure):  # a router in front of vLLM may not have the route
            version = await self._server.version()
        card = self._card
        probe = await probed_scores(self._server, card)
        return Identity(card.id, card.root or "", version, card.max_model_len or 0, probe)

    async def prompt_ids(self, prompt: Prompt) -> tuple[int, ...]:
        """Returns the ids of the prompt under the server's tokenizer and chat template."""
        if prompt.messages:
            return tuple(await self._server.render(self._card.id, prompt.chat))
        return tuple(await self._server.tokenize(self._card.id, prompt.prompt, special=True))

    async def answer(self, ids: tuple[int, ...], max_tokens: int, seed: int) -> Answer:
        """Returns an answer that is sampled from the whole distribution, at temperature 1."""
        body = {
            "model": self._card.id,
            "prompt": list(ids),
            "max_tokens": max_tokens,
            "temperature": 1.0,
            "top_p": 1.0,
            "top_k": -1,
            "min_p": 0.0,
            "repetition_penalty": 1.0,
            "seed": seed,
            "logprobs": TOP_K,
            "return_token_ids": True,
            "return_tokens_as_token_ids": True,
            "cache_salt": f"hemostat-gate-{secrets.token_hex(8)}",
        }
        limit = (max_tokens + 1) * (TOP_K + 2) * MAX_ENTRY_BYTES + 1024 * 1024
        completion = await self._server.post("/v1/completions", body, _Completion, limit=limit)
        choice = completion.choices[0] if completion.choices else _Choice()
        output = choice.token_ids
        if output is None:  # no answer of a model: taken for one without tokens, equal answers would pass unseen
            text = f"{self.url} sent no token_ids; ask vLLM itself, or a router that passes return_token_ids on"
            raise ReferenceFailure(FailureReason.BAD_ANSWER, text)
        if not output:
            return Answer("", np.zeros(0, np.int32), _nothing())
        try:
            rows = read_rows(Form.COMPLETIONS, [bytes(choice.logprobs)], output, TOP_K)
        except MALFORMED as error:
            text = f"{self.url} sent logprobs that do not fit the answer: {error}"
            raise ReferenceFailure(FailureReason.BAD_ANSWER, text) from error
        if not _are_logprobs(rows):
            text = f"{self.url} returns no log-probabilities; start it with --logprobs-mode raw_logprobs"
            raise ReferenceFailure(FailureReason.LOGPROBS_MODE, text)
        # The last column is the emitted id where it is none of the likeliest.
        listed = Listed(rows.ids[:, :TOP_K], rows.logprobs[:, :TOP_K].astype(float), rows.emitted.astype(float))
        return Answer(choice.text, np.array(output, np.int32), listed)

    async def scores(self, prompt: tuple[int, ...], output: Ids) -> Listed:
        """Returns the model's values of given tokens after the prompt."""
        request = ScoreRequest(np.array(prompt, np.int32), output, np.zeros((len(output), 0), np.int32))
        scores = await top_ids(self._server, self._card.id, request, TOP_K)
        return Listed(scores.top.ids, scores.top.logprobs, scores.emitted)


def listed_by(scores: ReferenceScores, ids: Ids) -> Listed:
    """Returns a reference's values as a list that does not depend on which token was emitted. ids: int32 [T, K], where
    the values were asked; a reference that knows only its own likeliest ids has the emitted one among them in any case.
    """
    if scores.entropy is None:
        return Listed(scores.top.ids, scores.top.logprobs, scores.emitted)
    known = ~np.isnan(scores.at)
    return Listed(np.where(known, ids, -1), np.where(known, scores.at, -np.inf), scores.emitted)


def _are_logprobs(rows: Rows) -> bool:
    """Returns True if all values can be log-probabilities. A token that was sampled has a finite one."""
    return bool(np.isfinite(rows.emitted).all() and (rows.logprobs <= MAX_LOGPROB).all())


def _nothing() -> Listed:
    return Listed(np.zeros((0, TOP_K), np.int32), np.zeros((0, TOP_K)), np.zeros(0))
