"""Both models' values from a record, side by side, and divergences over them with everything else merged into one
bucket.

S are the ids for which both values are known. Merging everything outside S into one bucket is a map applied to both
distributions, and a map cannot increase an f-divergence (data processing inequality; Cover & Thomas, 2006, ch. 2.8), so
what is computed here are lower bounds, exact when S is the whole vocabulary (see `bounds`). In a constrained record
both distributions are conditional on the allowed ids (`TokenRecord.support`), and "the whole vocabulary" is all of
these.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from hemostat_calibration.arrays import Bools, Floats, Ids
from hemostat_calibration.records import TokenRecord

MASS_ROUNDING = 1e-6
"""The error of a sum of float32 probabilities near 1."""


@dataclass(frozen=True, slots=True)
class View:
    """A record's candidates with the emitted token among them, [T, N]; S is where `inside`."""

    ids: Ids
    log_candidates: Floats
    """The logarithm log c of every candidate; -inf where padded."""
    inside: Bools
    log_c: Floats
    """The logarithm log c on S, and -inf outside. The fields c, log_r and r are alike."""
    c: Floats
    log_r: Floats
    r: Floats
    exact: bool
    """It is True if S is the whole vocabulary, or every allowed id, in every row."""


def view_of(record: TokenRecord) -> View:
    """Returns both models of a validated record, side by side.

    >>> from hemostat_calibration.records import Candidates
    >>> ids, log_c, log_r = np.array([[0, 1, 2]], np.int32), np.log([[0.7, 0.2, 0.1]]), np.log([[0.5, 0.4, 0.1]])
    >>> record = TokenRecord(
    ...     3, b"", ids[0, :1], Candidates(ids, log_c), log_r, Candidates(ids, log_r), log_c[:, 0], log_r[:, 0]
    ... )
    >>> view = view_of(record)
    >>> view.exact, view.r.round(6).tolist()
    (True, [[0.5, 0.4, 0.1]])
    """
    ids, log_c, log_r = record.compressed.ids, record.compressed.logprobs, record.reference_at
    emitted = ids == record.output_ids[:, None]
    # The emitted token is known on both sides even where the reference gave only its own list.
    log_r = np.where(emitted, record.reference_emitted[:, None], log_r)
    missing = ~emitted.any(axis=1)
    if missing.any():
        ids = np.column_stack([ids, np.where(missing, record.output_ids, -1)]).astype(np.int32)
        log_c = np.column_stack([log_c, np.where(missing, record.compressed_emitted, -np.inf)])
        log_r = np.column_stack([log_r, np.where(missing, record.reference_emitted, np.nan)])
    inside = (ids >= 0) & ~np.isnan(log_r)
    log_r = np.where(inside, log_r, -np.inf)
    log_s = np.where(inside, log_c, -np.inf)
    return View(
        ids=ids,
        log_candidates=log_c,
        inside=inside,
        log_c=log_s,
        c=np.exp(log_s),
        log_r=log_r,
        r=np.exp(log_r),
        exact=bool((row_counts(inside) == record.domain).all()),
    )


@dataclass(frozen=True, slots=True)
class Coarse:
    """The divergences of r and some p over S plus one bucket, [T]."""

    kl_rc: Floats
    kl_cr: Floats
    js: Floats
    tv: Floats


def coarse(view: View, p: Floats, log_p: Floats) -> Coarse:
    """Returns the divergences of r and p over S plus one bucket; p and log_p (natural) on S, float64 [T, N].

    >>> from hemostat_calibration.records import Candidates
    >>> ids, log_c, log_r = np.array([[0, 1]], np.int32), np.log([[0.7, 0.2]]), np.log([[0.5, 0.4]])
    >>> record = TokenRecord(
    ...     9, b"", ids[0, :1], Candidates(ids, log_c), log_r, Candidates(ids, log_r), log_c[:, 0], log_r[:, 0]
    ... )
    >>> view = view_of(record)
    >>> coarse(view, view.c, view.log_c).kl_rc.round(6).tolist()
    [0.109023]
    """
    r_out, p_out = bucket(view, view.r), bucket(view, p)
    with np.errstate(divide="ignore", invalid="ignore"):
        log_ratio = view.log_r - log_p
        kl_rc = row_sums(np.where(view.r > 0.0, view.r * log_ratio, 0.0))
        kl_cr = -row_sums(np.where(p > 0.0, p * log_ratio, 0.0))
    return Coarse(
        kl_rc=np.maximum(kl_rc + xlogy(r_out, r_out / np.maximum(p_out, MASS_ROUNDING)), 0.0),
        kl_cr=np.maximum(kl_cr + xlogy(p_out, p_out / np.maximum(r_out, MASS_ROUNDING)), 0.0),
        js=jensen_shannon(view, p)[0],
        tv=total_variation(view, p)[0],
    )


def bucket(view: View, p: Floats) -> Floats:
    """Returns the mass of p outside S, [T]; p on S, [T, N].

    >>> from hemostat_calibration.records import Candidates
    >>> ids, log_c, log_r = np.array([[0, 1]], np.int32), np.log([[0.7, 0.2]]), np.log([[0.5, 0.4]])
    >>> record = TokenRecord(
    ...     9, b"", ids[0, :1], Candidates(ids, log_c), log_r, Candidates(ids, log_r), log_c[:, 0], log_r[:, 0]
    ... )
    >>> bucket(view_of(record), np.exp(log_c)).round(6).tolist()
    [0.1]
    """
    return np.zeros(p.shape[0]) if view.exact else np.maximum(1.0 - row_sums(p), 0.0)


def row_sums(x: Floats) -> Floats:
    """Returns x.sum(axis=1), several times as fast if rows are short.

    >>> row_sums(np.array([[1.0, 2.0], [3.0, 4.0]])).tolist()
    [3.0, 7.0]
    """
    sums: Floats = np.einsum("ij->i", x)
    return sums


def row_counts(x: Bools) -> npt.NDArray[np.intp]:
    """Returns the number of True in each row.

    >>> row_counts(np.array([[True, False], [True, True]])).tolist()
    [1, 2]
    """
    counts: npt.NDArray[np.intp] = np.einsum("ij->i", x.astype(np.intp))
    return counts


def xlogy(x: Floats, y: Floats) -> Floats:
    """Returns x log y, and 0 where x is 0.

    >>> xlogy(np.array([0.0, 2.0]), np.array([0.0, 1.0])).tolist()
    [0.0, 0.0]
    """
    # Not np.log(where=...): numpy's loop with a mask takes one value at a time.
    product: Floats = x * np.log(np.where(x > 0.0, y, 1.0))
    return product


def jensen_shannon(view: View, p: Floats) -> tuple[Floats, Floats]:
    """Returns the Jensen–Shannon divergence of r and p over S plus one bucket, and its derivative by log w where p = a
    w on S; both [T].

    >>> from hemostat_calibration.records import Candidates
    >>> ids, log_c, log_r = np.array([[0, 1]], np.int32), np.log([[0.7, 0.2]]), np.log([[0.5, 0.4]])
    >>> record = TokenRecord(
    ...     9, b"", ids[0, :1], Candidates(ids, log_c), log_r, Candidates(ids, log_r), log_c[:, 0], log_r[:, 0]
    ... )
    >>> value, slope = jensen_shannon(view_of(record), np.exp(log_c))
    >>> value.round(6).tolist()
    [0.025362]
    """
    r_out, p_out = bucket(view, view.r), bucket(view, p)
    # Over the sum, not the mean: half of the smallest number is 0.
    both, both_out = view.r + p, r_out + p_out
    with np.errstate(divide="ignore", invalid="ignore"):
        of_p = row_sums(xlogy(p, 2.0 * p / both))
        value = of_p + row_sums(xlogy(view.r, 2.0 * view.r / both))
        value += xlogy(r_out, 2.0 * r_out / both_out) + xlogy(p_out, 2.0 * p_out / both_out)
    least_out = np.maximum(p_out, MASS_ROUNDING)
    slope = of_p - row_sums(p) * np.log(least_out / (0.5 * (r_out + least_out)))
    return np.clip(0.5 * value, 0.0, np.log(2.0)), 0.5 * slope


def total_variation(view: View, p: Floats) -> tuple[Floats, Floats]:
    """Returns the total variation of r and p over S plus one bucket, and its derivative by log w where p = a w on S;
    both [T].

    >>> from hemostat_calibration.records import Candidates
    >>> ids, log_c, log_r = np.array([[0, 1]], np.int32), np.log([[0.7, 0.2]]), np.log([[0.5, 0.4]])
    >>> record = TokenRecord(
    ...     9, b"", ids[0, :1], Candidates(ids, log_c), log_r, Candidates(ids, log_r), log_c[:, 0], log_r[:, 0]
    ... )
    >>> value, slope = total_variation(view_of(record), np.exp(log_c))
    >>> value.round(6).tolist()
    [0.2]
    """
    r_out, p_out = bucket(view, view.r), bucket(view, p)
    difference = p - view.r
    value = row_sums(np.abs(difference)) + np.abs(p_out - r_out)
    slope = row_sums(p * np.sign(difference)) - row_sums(p) * np.sign(p_out - r_out)
    return np.clip(0.5 * value, 0.0, 1.0), 0.5 * slope
