"""Does a contextual profile that is shrunk where its features are far from what it was learned on keep its gain, and do
no harm on kinds of text that it has not met?

Distance is Mahalanobis', of the compressed model's hidden state from those of the learning texts. The shift Δz of a
token is multiplied by min(1, q / distance), q being the 95th percentile of the learning tokens' distances.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from tests.bench.recovery.engine import Written
from tests.bench.recovery.figures import Figures, groups, interval
from tests.support.transform import apply_to_all

from hemostat_calibration.profiles.profile import CalibrationProfile
from hemostat_engine.transform import HeldProfile

from .scores import Scorer, Singles, Tokens, distances

QUANTILE = 0.95
RIDGE = 1e-3
"""Of the covariance, as a part of its mean variance."""
_ROWS = 32


@dataclass(frozen=True, slots=True)
class Region:
    """Where texts were learned from. mean: [d]; root: [d, d], whitens; limit: the distance from which Δz is shrunk."""

    mean: Singles
    root: Singles
    limit: float

    @classmethod
    def of(cls, states: Singles) -> Region:
        """states: [T, d] of the learning tokens."""
        mean = states.mean(0)
        covariance = np.cov(states, rowvar=False)
        covariance += RIDGE * np.trace(covariance) / len(covariance) * np.eye(len(covariance))
        root = np.linalg.inv(np.linalg.cholesky(covariance)).astype(np.float32)
        result = cls(mean, root, 1.0)
        return cls(mean, root, float(np.quantile(result.distance(states), QUANTILE)))

    def distance(self, states: Singles) -> npt.NDArray[np.floating]:
        """Mahalanobis distance of every token, [T]."""
        result: npt.NDArray[np.floating] = np.linalg.norm((states - self.mean) @ self.root.T, axis=1)
        return result

    def weight(self, states: Singles) -> npt.NDArray[np.floating]:
        """Of Δz, in (0, 1], [T]."""
        result: npt.NDArray[np.floating] = np.minimum(1.0, self.limit / self.distance(states))
        return result


def shrunk_figures(
    weight: Singles, reference: Singles, compressed: Singles, profile: CalibrationProfile, factor: npt.NDArray[Any]
) -> Figures:
    """Of the profile whose Δz is multiplied by `factor` [T]; hidden states [T, d] of both models."""
    embedding, held = torch.from_numpy(weight).T.contiguous(), HeldProfile(profile)
    factors = torch.from_numpy(np.asarray(factor, np.float32))
    parts = []
    with torch.inference_mode():
        for start in range(0, len(reference), _ROWS):
            rows = slice(start, start + _ROWS)
            log_r = torch.log_softmax(torch.from_numpy(reference[rows]) @ embedding, -1)
            z = torch.from_numpy(compressed[rows]) @ embedding
            shifted = z.clone()
            apply_to_all(held, shifted)
            parts.append(distances(log_r, z.lerp_(shifted, factors[rows, None])))
    return Figures(*torch.cat(parts, -1).double().numpy())


def compare(
    weight: Singles,
    scorer: Scorer,
    profile: CalibrationProfile,
    learning: Sequence[Written],
    texts: Mapping[str, Sequence[Written]],
) -> dict[str, Any]:
    """By kind of text, KL recovered without and with shrinking, intervals by topic, or by prompt for other kinds.

    learning: what the profile was learned from. texts: by kind, "open" being of the same kind as those.
    """
    region = Region.of(scorer.states(Tokens.of(learning), None, "learned from"))
    result: dict[str, Any] = {}
    for kind, some in texts.items():
        tokens = Tokens.of(some)
        h_r, h_c = scorer.reference_states(tokens), scorer.states(tokens, None, kind)
        before = scorer.figures(tokens, {"without": None})["without"].kl
        lengths = [len(text.output) for text in some]
        cluster = groups(some)[1] if kind == "open" else np.repeat(np.arange(len(some)), lengths)
        factor = region.weight(h_c)
        said: dict[str, Any] = {"tokens": len(before), "mean_factor": float(factor.mean())}
        for name, used in (("whole", np.ones(len(before))), ("shrunk", factor)):
            after = shrunk_figures(weight, h_r, h_c, profile, used).kl
            won, low, high = interval(cluster, before - after, before, kind)
            said[name] = {"kl_won_back": won, "ci95": [low, high]}
        result[kind] = said
    return result
