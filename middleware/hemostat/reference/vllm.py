"""A reference model on another vLLM server, which scores by `prompt_logprobs`. No torch."""

from __future__ import annotations

import asyncio
import hashlib
import time
from pathlib import Path

import msgspec
import numpy as np
from pydantic import SecretStr

from hemostat.reference.match import MAX_SAME_NATS, PROBE_SECONDS, mean_difference, probed_scores, same_weights
from hemostat.reference.protocol import (
    FailureReason,
    ReferenceFailure,
    ReferenceInfo,
    ReferenceScores,
    ScoreRequest,
)
from hemostat.reference.server import MAX_ANSWER_BYTES, ModelCard, Refused, VllmServer
from hemostat_calibration.records import Candidates

MAX_ENTRY_BYTES = 512
"""The largest size of one id of a list, with its text."""
MAX_LOGPROB = 1e-3
"""The largest log-probability, 0 and a margin for rounding; a larger value is no log-probability: the server runs with
another --logprobs-mode."""


class _Entry(msgspec.Struct, frozen=True):
    logprob: float
    rank: int | None = None


class _Choice(msgspec.Struct, frozen=True):
    prompt_logprobs: list[msgspec.Raw] | None = None


class _Completion(msgspec.Struct, frozen=True):
    choices: list[_Choice]


_row = msgspec.json.Decoder(dict[int, _Entry], strict=False)
"""The type of a position's entries; the keys are token ids as strings."""


class VllmReference:
    """Implements `Reference` with the server's top ids: no entropies, no expected shifts."""

    def __init__(
        self,
        url: str,
        api_key: SecretStr | None = None,
        model: str | None = None,
        top_k: int = 20,
        *,
        ca: Path | None = None,
        probes: bool = False,
    ) -> None:
        """url: the server's root. model: the served name, None for the first. top_k: ids requested for each position,
        at most the server's --max-logprobs. ca: PEM file to trust instead of the system's authorities. probes: `start`
        and, every PROBE_SECONDS, `score` find out whether the server has loaded other weights under the same name."""
        self._own_server = self._server = VllmServer(url, api_key, ca=ca)
        self._wanted = model
        self._top_k = top_k
        self._card: ModelCard | None = None
        self._probes = probes
        self._probe: tuple[float, ...] = ()
        """The scores of the fixed texts at the last start."""
        self._probed_at = 0.0
        self._probing = asyncio.Lock()

    def set_server(self, server: VllmServer) -> None:
        """Scores at another server of the same model; `start` comes next. Whoever made the server closes it."""
        self._server = server

    async def start(self) -> ReferenceInfo:
        """Asks the server every time: it may have restarted with another model."""
        card = await self._server.model(self._wanted)
        vocab_size = await self._server.vocab_size(card.id)
        # The answer's other fields (dates, permissions) change from call to call.
        identity = f"{card.id}\0{card.root}\0{card.parent}\0{card.max_model_len}"
        digest = hashlib.sha256(identity.encode()).hexdigest()[:32]
        if self._probes:
            now = await probed_scores(self._server, card)
            # The same weights keep their first probe: else the noise of many small steps would add up unseen.
            self._probe = self._probe if same_weights(self._probe, now) else now
            self._probed_at = time.monotonic()
        self._card = card
        return ReferenceInfo(
            card.id,
            digest,
            "server",
            vocab_size,
            False,
            hidden_detail="a vLLM server returns no hidden states",
            probe=self._probe,
        )

    async def score(self, request: ScoreRequest) -> ReferenceScores:
        """See `Reference.score`; `at` is NaN at ids that are neither emitted nor among the server's top. `reshaped` has
        no effect: the server chooses which requests share a batch, and chooses differently each time."""
        card = self._started()
        if request.allowed is not None:
            raise ReferenceFailure(
                FailureReason.GRAMMAR_NEEDS_FULL_VOCABULARY, "a list of top ids cannot be conditioned on a grammar"
            )
        if self._probes:
            await self._probe_now_and_then(card)
        adapter, length = request.adapter, request.tokens
        if not len(request.prompt) or not len(request.output):
            raise ReferenceFailure(FailureReason.EMPTY, "a prompt and an output of at least one token are needed")
        if card.max_model_len is not None and length + 1 > card.max_model_len:
            raise ReferenceFailure(
                FailureReason.TOO_LONG, f"{length} tokens and one more: the reference takes {card.max_model_len}"
            )
        try:
            return await top_ids(self._server, adapter or card.id, request, self._top_k)
        except Refused as refused:
            if adapter and refused.status == 404:
                raise ReferenceFailure(FailureReason.NO_ADAPTER, str(refused)) from None
            raise

    async def _probe_now_and_then(self, card: ModelCard) -> None:
        """Raises REVISION if the server runs other weights than at the last start. The next start takes them over."""
        if time.monotonic() - self._probed_at < PROBE_SECONDS:
            return
        async with self._probing:
            if time.monotonic() - self._probed_at < PROBE_SECONDS:
                return
            far = mean_difference(self._probe, await probed_scores(self._server, card))
            if not far <= MAX_SAME_NATS:
                raise ReferenceFailure(
                    FailureReason.REVISION,
                    f"{self._server.url} gives the tokens of fixed texts under {card.id} other log-probabilities than "
                    f"when it was matched (by {far:.2f} nats on average): it has loaded other weights",
                )
            self._probed_at = time.monotonic()

    async def adapters(self) -> frozenset[str]:
        return await self._server.adapters()

    async def render(self, messages: list[dict[str, str]]) -> list[int]:
        return await self._server.render(self._started().id, messages)

    async def tokenize(self, text: str) -> list[int]:
        return await self._server.tokenize(self._started().id, text)

    async def close(self) -> None:
        await self._own_server.close()

    def _started(self) -> ModelCard:
        if self._card is None:
            raise ReferenceFailure(FailureReason.DOWN, "the reference has not been started")
        return self._card


async def top_ids(server: VllmServer, model: str, request: ScoreRequest, top_k: int) -> ReferenceScores:
    """Returns what a served model says of the request's output: its `top_k` most likely ids at each position. Raises
    ReferenceFailure; it is Refused if the server does not serve the model, or the tokens are too many.
    """
    prompt, output, length = request.prompt, request.output, request.tokens
    body = {
        "model": model,
        "prompt": [*prompt.tolist(), *output.tolist()],
        "max_tokens": 1,
        "temperature": 0.0,
        "prompt_logprobs": top_k,
    }
    limit = MAX_ANSWER_BYTES + length * (top_k + 1) * MAX_ENTRY_BYTES
    completion = await server.post("/v1/completions", body, _Completion, limit=limit)
    rows = completion.choices[0].prompt_logprobs if completion.choices else None
    if rows is None or len(rows) != length:
        got = "none" if rows is None else str(len(rows))
        raise ReferenceFailure(FailureReason.SHORT_ANSWER, f"prompt_logprobs for {got} of {length} positions")
    at = np.full(request.ids.shape, np.nan)
    top = Candidates(np.full((len(output), top_k), -1, np.int32), np.full((len(output), top_k), -np.inf))
    emitted = np.empty(len(output))
    for t, raw in enumerate(rows[len(prompt) :]):
        try:
            row = _row.decode(raw)
        except msgspec.DecodeError as error:
            text = f"prompt_logprobs at output position {t}: {error}"
            raise ReferenceFailure(FailureReason.BAD_ANSWER, text) from error
        given = row.get(int(output[t]))
        if given is None or len(row) < top_k:
            text = f"{len(row)} ids at output position {t}, or not the emitted one"
            raise ReferenceFailure(FailureReason.SHORT_ANSWER, text)
        best = sorted(row.items(), key=lambda item: -item[1].logprob)[:top_k]
        if best[0][1].logprob > MAX_LOGPROB:
            text = f"{server.url} returns no log-probabilities; start it with --logprobs-mode raw_logprobs"
            raise ReferenceFailure(FailureReason.LOGPROBS_MODE, text)
        emitted[t] = given.logprob
        top.ids[t] = [token for token, _ in best]
        top.logprobs[t] = [entry.logprob for _, entry in best]
        at[t] = [row[token].logprob if token in row else np.nan for token in request.ids[t].tolist()]
    return ReferenceScores(at=at, top=top, emitted=emitted)
