"""Chooses the anchor ids, whose logits together determine the hidden state best."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from hemostat_calibration.arrays import Ids
from hemostat_calibration.errors import InvalidArgumentError


def choose_anchors(
    weight: npt.NDArray[np.floating],
    count: int,
    *,
    among: npt.NDArray[np.integer] | None = None,
) -> Ids:
    """Returns the ids whose logits together determine the hidden state best, int32 [count], the most informative first.

    The choice is greedy and deterministic: each id is the one whose logit is most uncertain given the logits of the
    earlier ones, which is Gram–Schmidt with pivoting on the centred rows of W. Once d of them span everything, it
    restarts among the rest, so that more anchors mean less noise.

    weight: W, [V, d]. among: ids to choose from; leave out ids that samplers mask (end of sequence, special ones), as a
    row with a masked anchor is not changed. Hidden states are taken to be isotropic. Raises InvalidArgumentError unless
    1 ≤ count ≤ the number of ids to choose from.

    >>> choose_anchors(np.array([[3.0, 0.0], [0.0, 1.0], [0.1, 0.1], [-3.0, -1.0]]), 2).tolist()
    [3, 0]
    """
    ids = np.arange(len(weight), dtype=np.int32) if among is None else np.unique(among).astype(np.int32)
    if not 1 <= count <= len(ids):
        raise InvalidArgumentError(f"count is {count}: there are {len(ids)} ids to choose from")
    rows = weight[ids].astype(np.float32)
    rows -= rows.mean(axis=0)
    sizes = np.square(rows).sum(axis=1)
    taken = np.zeros(len(ids), dtype=np.bool_)
    chosen: list[int] = []
    while len(chosen) < count:
        left = np.where(taken, -1.0, sizes)
        least = 1e-4 * float(left.max())
        directions = np.zeros((rows.shape[1] + 1, rows.shape[1]), dtype=np.float32)
        for at in range(min(len(directions), count - len(chosen))):
            pivot = int(np.argmax(left))
            chosen.append(pivot)
            taken[pivot] = True
            direction = rows[pivot] - directions[:at].T @ (directions[:at] @ rows[pivot])
            direction /= max(float(np.linalg.norm(direction)), 1e-30)
            directions[at] = direction
            left -= np.square(rows @ direction)
            left[taken] = -1.0
            if left.max() <= least:
                break
    return ids[chosen]
