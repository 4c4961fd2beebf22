"""A reference in process that knows its hidden states: what it says follows from them over the full vocabulary."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import numpy.typing as npt
from tests.support.fake_vllm import encode, render
from tests.support.learner_world import logprobs

from hemostat.reference.protocol import ReferenceInfo, ReferenceScores, ScoreRequest
from hemostat_calibration.arrays import Ids
from hemostat_calibration.records import Candidates

TOP = 8
"""Ids of its own that it lists."""

Singles = npt.NDArray[np.float32]


class StateReference:
    """Implements `hemostat.reference.protocol.Reference`. A subclass says what its states and logits are."""

    def __init__(self, info: ReferenceInfo) -> None:
        self.info = info
        self.hidden_for: list[Ids] = []
        """Prompts that hidden states were asked for."""

    def states(self, prompt: Ids, output: Ids) -> Singles:
        """[T, d], before each of the output's tokens."""
        raise NotImplementedError

    def logits(self, states: Singles) -> Singles:
        """[T, V]"""
        raise NotImplementedError

    async def start(self) -> ReferenceInfo:
        return self.info

    async def score(self, request: ScoreRequest) -> ReferenceScores:
        assert request.allowed is None, "it scores unconstrained tokens only"
        prompt, output, ids, codes = request.prompt, request.output, request.ids, request.codes
        h = self.states(prompt, output)
        log_r = logprobs(self.logits(h))
        r, rows = np.exp(log_r), np.arange(len(output))[:, None]
        best = np.argsort(-log_r, 1)[:, :TOP].astype(np.int32)
        expected = {p.version: np.full(len(output), np.nan) for p in request.profiles}
        for p in request.profiles:
            if p.version in codes:
                shift = np.clip(codes[p.version] @ p.parameters["up"].T.astype(float), -p.clamp_nats, p.clamp_nats)
                expected[p.version] = (r * shift).sum(1)
        if request.hidden:
            self.hidden_for.append(prompt)
        return ReferenceScores(
            at=np.where(ids >= 0, log_r[rows, np.maximum(ids, 0)], np.nan),
            top=Candidates(best, log_r[rows, best]),
            emitted=log_r[rows[:, 0], output],
            entropy=-(r * log_r).sum(1),
            expected_shift=expected,
            hidden=h if request.hidden else None,
        )

    async def adapters(self) -> frozenset[str]:
        return frozenset()

    async def tokenize(self, text: str) -> list[int]:
        return encode(text)

    async def render(self, messages: list[dict[str, str]]) -> list[int]:
        return render(messages)

    async def close(self) -> None:
        return


def in_process(name: str, digest: str, vocab_size: int, hidden_size: int, folder: Path) -> ReferenceInfo:
    """What a reference in process says of itself, with a checkpoint's folder."""
    return ReferenceInfo(name, digest, "float32", vocab_size, True, hidden_size, "", folder)
