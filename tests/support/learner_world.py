"""A small pair of models, nothing but an output embedding: z = W h, the compressed one's h a bent image of h_r."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import safetensors.numpy
from tests.support.children import children

from hemostat_calibration.records import Candidates, Features, TokenRecord

V, D, K = 160, 12, 8


@dataclass(frozen=True)
class World:
    weight: npt.NDArray[np.float32]
    bend: npt.NDArray[np.float32]
    """[D, D]: h_c = h_r + bend h_r, about."""

    def hidden(self, seed: int, tokens: int) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.float32]]:
        """(h_r, h_c), [tokens, D]."""
        rng = np.random.default_rng(seed)
        h = rng.normal(0, 1, (tokens, D)).astype(np.float32)
        return h, (h + h @ self.bend.T + 0.05 * rng.normal(0, 1, h.shape)).astype(np.float32)

    def record(self, seed: int, anchors: npt.NDArray[np.int32], digest: str, tokens: int = 16) -> TokenRecord:
        """A prompt of its own; features and hidden states as the real ones come."""
        h_r, h_c = self.hidden(seed, tokens)
        log_r, log_c = logprobs(h_r @ self.weight.T), logprobs(h_c @ self.weight.T)
        best_c, best_r = np.argsort(-log_c, 1)[:, :K], np.argsort(-log_r, 1)[:, :K]
        rows = np.arange(tokens)[:, None]
        emitted = best_c[:, 0].astype(np.int32)
        z = (h_c @ self.weight[anchors].T).astype(np.float32)
        return TokenRecord(
            vocab_size=V,
            prompt_key=seed.to_bytes(16, "little"),
            output_ids=emitted,
            compressed=Candidates(best_c.astype(np.int32), log_c[rows, best_c]),
            reference_at=log_r[rows, best_c],
            reference=Candidates(best_r.astype(np.int32), log_r[rows, best_r]),
            compressed_emitted=log_c[rows[:, 0], emitted],
            reference_emitted=log_r[rows[:, 0], emitted],
            features=Features(digest, z - z.mean(1, keepdims=True)),
            reference_hidden=h_r,
        )


def logprobs(z: npt.NDArray[np.floating]) -> npt.NDArray[np.float64]:
    z = z.astype(np.float64)
    z = z - z.max(1, keepdims=True)
    result: npt.NDArray[np.float64] = z - np.log(np.exp(z).sum(1, keepdims=True))
    return result


def kl(log_r: npt.NDArray[np.floating], log_c: npt.NDArray[np.floating]) -> float:
    return float((np.exp(log_r) * (log_r - log_c)).sum(1).mean())


def make(seed: int = 0, vocab_size: int = V) -> World:
    rng = np.random.default_rng(seed)
    weight = rng.normal(0, 0.6, (vocab_size, D)).astype(np.float32)
    return World(weight, (0.35 * rng.normal(0, 1, (D, D)) / np.sqrt(D)).astype(np.float32))


def save(world: World, folder: Path) -> Path:
    """A checkpoint that holds the output embedding."""
    folder.mkdir(parents=True, exist_ok=True)
    safetensors.numpy.save_file({"lm_head.weight": world.weight}, folder / "model.safetensors")
    return folder


def learners() -> list[int]:
    """Ids of the learner processes that this process has started."""
    return children("hemostat.learner")
