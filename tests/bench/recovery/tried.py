"""What else might win divergence back, without regard to what an engine can afford: maps of the whole hidden state, of
every rank, on the same held-out tokens as the profiles.

Each has its penalty or size chosen on a tenth of the learning prompts, and is judged once. The gain is exact, over the
full vocabulary, with the profiles' own clamp of a logit.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from hemostat_calibration.learning.contextual import hidden_states, mlp, objective

from .engine import Written
from .figures import Figures, Recovery, interval, stacked
from .log import say

Singles = npt.NDArray[np.float32]
Image = Callable[[Singles], Singles]
"""From hidden states of the compressed model to their change, [n, d], both in a basis."""

PENALTIES = (1e-1, 1e-2, 1e-3, 1e-4)
SCALES = np.array([0.6, 0.7, 0.8, 0.9, 1.0])
NEIGHBOURS = 32
MEMBERS = 3
NETWORK_ROWS = 60_000
"""That networks learn from, at most: three of them take long enough."""
JUDGED = 10_000
TUNED = 2_000
METRIC_ROWS = 1500


@dataclass(frozen=True, slots=True)
class _Rows:
    """In one basis, float32 [n, d]: states of the compressed model, and what the reference's are beside them."""

    c: Singles
    t: Singles


class _World:
    """Learning rows, a tenth of them to choose by, and held-out rows, in the basis of a metric's root."""

    def __init__(
        self,
        weight: Singles,
        root: npt.NDArray[np.float64],
        learning: tuple[Singles, Singles],
        heldout: tuple[Singles, Singles],
        kept: int,
        clamp_nats: float,
    ) -> None:
        turn = np.linalg.inv(root).T.astype(np.float32)
        self.embedding = weight @ turn
        by = root.astype(np.float32)
        self.learn, self.tune, self.judge = (
            _Rows(np.asarray(c @ by, np.float32), np.asarray((r - c) @ by, np.float32))
            for r, c in (
                (learning[0][:kept], learning[1][:kept]),
                (learning[0][kept:][:TUNED], learning[1][kept:][:TUNED]),
                heldout,
            )
        )
        self._clamp = clamp_nats

    def gains(self, rows: _Rows, images: Sequence[Singles], scales: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
        """[images, scales, n]."""
        return objective.exact_gains(self.embedding, rows.c + rows.t, rows.c, images, scales, self._clamp)

    def best(self, maps: Sequence[Image]) -> tuple[Image, float]:
        """The map, and its scale, that gains most on the rows to choose by."""
        mean = self.gains(self.tune, [map_(self.tune.c) for map_ in maps], SCALES).mean(-1)
        which, scale = np.unravel_index(int(np.argmax(mean)), mean.shape)
        return maps[int(which)], float(SCALES[scale])

    def judged(self, map_: Image, scale: float) -> npt.NDArray[np.float64]:
        found: npt.NDArray[np.float64] = self.gains(self.judge, [map_(self.judge.c)], np.array([scale]))[0, 0]
        return found


def ridges(rows: _Rows) -> list[Image]:
    """Linear maps of every rank, one a penalty."""
    x = np.column_stack([rows.c, np.ones(len(rows.c), np.float32)])
    xx, xt = (x.T @ x).astype(np.float64), (x.T @ rows.t).astype(np.float64)
    size = np.trace(xx) / len(xx)
    maps = [np.linalg.solve(xx + penalty * size * np.eye(len(xx)), xt).astype(np.float32) for penalty in PENALTIES]

    def image(map_: Singles) -> Image:
        return lambda c: np.column_stack([c, np.ones(len(c), np.float32)]) @ map_

    return [image(map_) for map_ in maps]


def network(rows: _Rows, embedding: Singles, start: Image, training: mlp.TrainingSettings) -> Image:
    """A network that begins as the linear map `start`, through no bottleneck; like the family's own otherwise."""
    d = rows.c.shape[1]
    mean = rows.c.mean(0)
    scale = np.float32(1.0 / rows.c.std())
    offset = start(mean[None])[0]
    linear = (start(mean + np.eye(d, dtype=np.float32) / scale) - offset).T
    x = ((rows.c - mean) * scale).astype(np.float16)
    everyone = np.arange(len(x))
    trained = mlp.begin(linear, offset, np.eye(d), training)

    def silent(done: float) -> None:
        del done

    t = rows.t.astype(np.float16)
    squared = objective.Squared(t)
    trained = mlp.train(trained, x, everyone, squared, training, training.epochs, training.learning_rate, silent)
    exact = objective.Softmax(embedding[: training.kl_ids], rows.c.astype(np.float16), t)
    for epochs, rate in training.kl_stages[:1]:
        trained = mlp.train(trained, x, everyone, exact, training, epochs, rate, silent)
    say(f"tried: network {training.seed} learned")
    return lambda c: trained.image((c - mean) * scale)


def memory(rows: _Rows, map_: Image) -> list[Image]:
    """The map, and on top of it what it left over at the most similar contexts seen; one for each part of that."""
    known = torch.from_numpy(rows.c)
    lengths = known.square().sum(1)
    left_over = rows.t - map_(rows.c)

    def remembered(c: Singles) -> Singles:
        found = np.empty_like(c)
        for start in range(0, len(c), 256):
            asked = torch.from_numpy(c[start : start + 256])
            far = lengths - 2.0 * asked @ known.T + asked.square().sum(1, keepdim=True)
            nearest = far.topk(NEIGHBOURS, dim=1, largest=False)
            weights = torch.softmax(-nearest.values / nearest.values[:, -1:], 1)
            found[start : start + 256] = np.einsum("nk,nkd->nd", weights.numpy(), left_over[nearest.indices.numpy()])
        return found

    def image(part: float) -> Image:
        return lambda c: map_(c) + np.float32(part) * remembered(c)

    return [map_, *(image(part) for part in (0.25, 0.5, 1.0))]


def ensemble(members: Sequence[Image]) -> Image:
    return lambda c: np.mean([member(c) for member in members], axis=0, dtype=np.float32)


def compare(
    weight: Singles,
    recovery: Recovery,
    learning: Sequence[Written],
    heldout: Sequence[Written],
    topics: npt.NDArray[np.integer],
    identity: Figures,
    clamp_nats: float,
    training: mlp.TrainingSettings,
) -> list[dict[str, Any]]:
    """A row for each: the recovered divergence with its 95 % interval. topics: of each held-out token."""
    h_r, h_c = stacked(learning, recovery)
    kept = int(np.cumsum([len(text.output) for text in learning])[-max(1, len(learning) // 10) - 1])
    some = np.unique(np.linspace(0, len(topics) - 1, min(JUDGED, len(topics))).astype(np.int64))
    judge_r, judge_c = (h[some] for h in stacked(heldout, recovery))
    metric, mean = hidden_states.fisher_metric(weight, h_r[:: max(1, len(h_r) // METRIC_ROWS)])
    likeliest = np.argsort(-mean)
    before = identity.kl[some]
    found: list[dict[str, Any]] = []

    def world(root: npt.NDArray[np.float64]) -> _World:
        return _World(weight, root, (h_r, h_c), (judge_r, judge_c), kept, clamp_nats)

    def judge(name: str, where: _World, maps: Sequence[Image], began: float, tokens: int = kept) -> Image:
        map_, scale = where.best(maps)
        won, low, high = interval(topics[some], where.judged(map_, scale), before, name)
        found.append(
            {
                "tried": name,
                "tokens": tokens,
                "kl_won_back": won,
                "ci95": [low, high],
                "seconds": time.monotonic() - began,
            }
        )
        say(f"tried: {name}: {won:.1%} ({low:.1%} to {high:.1%})")
        return map_

    began = time.monotonic()
    size = float(np.sqrt(np.trace(metric) / len(metric)))
    plain = world(size * np.eye(len(metric)))
    judge("ridge, every direction alike", plain, ridges(plain.learn), began)
    began = time.monotonic()
    root = np.asarray(np.linalg.cholesky(metric), np.float64)
    fisher = world(root)
    line = judge("ridge, Fisher-weighted", fisher, ridges(fisher.learn), began)
    judge("the ridge, and a memory of contexts", fisher, memory(fisher.learn, line), began)
    embedding = fisher.embedding[likeliest] - (mean @ weight) @ np.linalg.inv(root).T
    began = time.monotonic()
    some_rows = _Rows(fisher.learn.c[:NETWORK_ROWS], fisher.learn.t[:NETWORK_ROWS])
    count = len(some_rows.c)
    members = [
        network(some_rows, embedding.astype(np.float32), line, replace(training, seed=seed)) for seed in range(MEMBERS)
    ]
    judge("network of the whole state", fisher, members[:1], began, count)
    judge("the network, and a memory of contexts", fisher, memory(some_rows, members[0]), began, count)
    judge(f"ensemble of {MEMBERS} such networks", fisher, [ensemble(members)], began, count)
    return found
