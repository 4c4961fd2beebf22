"""The held-out choice: between scales of a map, and between maps."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from hemostat_calibration.arrays import Floats, Indices
from hemostat_calibration.learning.contextual import objective
from hemostat_calibration.learning.contextual.basis import Basis
from hemostat_calibration.learning.contextual.examples import HiddenRows
from hemostat_calibration.learning.contextual.maps import LinearMap
from hemostat_calibration.profiles.contextual import NO_KL_LIMIT

SCALES = np.array([1.0, 0.9, 0.8, 0.7, 0.6, 0.5, 0.3])
"""The factors by which a map is multiplied to choose the best: the metric belongs to the mean distribution, so that a
step may be too long.
"""


@dataclass(frozen=True, slots=True)
class ProfileLimits:
    """The limits of the profiles proposed: their rank is at most `rank`, every |Δz| at most clamp_nats, and the KL of a
    row's change at most about kl_limit.
    """

    rank: int = 192
    clamp_nats: float = 5.0
    kl_limit: float = NO_KL_LIMIT


DEFAULT_LIMITS = ProfileLimits()


def exact_gains(basis: Basis, rows: HiddenRows, maps: Sequence[LinearMap], limits: ProfileLimits) -> Floats:
    """Returns the KL gained by each map at each of `SCALES`, as a profile of it would gain it, nats, [maps, scales,
    n]."""
    most = np.float32(min(2.0 * limits.kl_limit, NO_KL_LIMIT))
    images = []
    for map_ in maps:
        image = map_.image(rows.inputs.astype(np.float32))
        twice_kl = np.square(image).sum(axis=1, keepdims=True)
        images.append(image * np.sqrt(most / np.maximum(twice_kl, most)))
    compressed = rows.compressed.astype(np.float32)
    reference = compressed + rows.target.astype(np.float32)
    return objective.exact_gains(basis.embedding, reference, compressed, images, SCALES, limits.clamp_nats)


def best_map_and_scale(gains: Floats) -> tuple[int, int]:
    """Returns the indices of the map and of the scale with the largest mean of gains [maps, scales, n].

    >>> best_map_and_scale(np.array([[[0.0, 1.0], [2.0, 2.0]], [[1.0, 1.0], [1.0, 2.0]]]))
    (0, 1)
    """
    at = np.unravel_index(int(np.argmax(gains.mean(axis=2))), gains.shape[:2])
    return int(at[0]), int(at[1])


def mean_by_prompt(values: Floats, prompt: Indices) -> tuple[float, float]:
    """Returns the mean over tokens [n], and its standard error with the prompt as the unit: tokens of one are
    correlated.

    prompt: of every token, [n].

    >>> mean_by_prompt(np.array([1.0, 1.0, 3.0, 3.0]), np.array([0, 0, 1, 1]))
    (2.0, 1.0)
    """
    mean = float(values.mean())
    sums = np.bincount(prompt, values - mean)
    prompts = len(np.unique(prompt))
    return mean, float(np.sqrt((sums**2).sum() * prompts / max(prompts - 1, 1)) / len(values))
