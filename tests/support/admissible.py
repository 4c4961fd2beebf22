"""The compressed distributions that a list of ids allows: the one nearest to a reference r that is known whole, and one
that is about as far from it as any. One position at a time, over the whole vocabulary."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from hemostat_calibration.divergence.bounds import cap
from hemostat_calibration.records import TokenRecord


@dataclass(frozen=True)
class Tail:
    """Of one position: r [V]; c [V], 0 where it is not known; `open` bool [V], where that is; the mass of c there; the
    largest that c can be at an id there."""

    r: np.ndarray
    c: np.ndarray
    open: np.ndarray
    mass: float
    cap: float


def tail(record: TokenRecord, log_r: np.ndarray, row: int) -> Tail:
    """log_r: [V]. Of a record whose reference gave all of `reference_at`."""
    ids, logprobs = record.compressed.ids[row], record.compressed.logprobs[row]
    given = ids >= 0
    c = np.zeros(len(log_r))
    c[ids[given]] = np.exp(logprobs[given])
    c[record.output_ids[row]] = np.exp(record.compressed_emitted[row])
    unknown = np.ones(len(log_r), dtype=bool)
    unknown[ids[given]] = False
    unknown[record.output_ids[row]] = False
    most = float(np.exp(cap(record.compressed, record.output_ids)[row]))
    return Tail(np.exp(log_r), c, unknown, max(1.0 - c.sum(), 0.0), most)


def nearest(tail: Tail) -> tuple[np.ndarray, np.ndarray]:
    """log c [V] of the nearest c, for every f-divergence at once: min(cap, μ r); and the ids at the cap."""
    at = np.flatnonzero(tail.open)
    order = at[np.argsort(-tail.r[at], kind="stable")]
    r = tail.r[order]
    left_r = np.cumsum(r[::-1])[::-1]  # not by subtraction, which leaves rounding where little is left
    left_c, capped = tail.mass, 0
    while capped < len(r) and r[capped] * left_c > tail.cap * left_r[capped]:
        left_c, capped = left_c - tail.cap, capped + 1
    c = tail.c.copy()
    c[order[:capped]] = tail.cap
    if capped < len(r):
        c[order[capped:]] = r[capped:] * max(left_c, 0.0) / left_r[capped]
    with np.errstate(divide="ignore"):
        return np.log(c), order[:capped]


def far(tail: Tail, floor: float) -> tuple[np.ndarray, float]:
    """log c [V] of a c that is far from r within the cap and the floor (neither probability less than `floor` times the
    other): as much as allowed at the ids that r finds least likely, as little as allowed elsewhere; and r's mass at the
    first."""
    at = np.flatnonzero(tail.open)
    order = at[np.argsort(tail.r[at], kind="stable")]
    least, most = floor * tail.r[order], np.minimum(tail.cap, tail.r[order] / max(floor, 1e-300))
    room = np.cumsum(most - least)
    slack = max(tail.mass - least.sum(), 0.0)
    full = int(np.searchsorted(room, slack))
    c = tail.c.copy()
    c[order] = least
    c[order[:full]] = most[:full]
    if full < len(order):
        c[order[full]] += slack - (room[full - 1] if full else 0.0)
    with np.errstate(divide="ignore"):
        return np.log(c), float(tail.r[order[: full + 1]].sum())
