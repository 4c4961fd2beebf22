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
class SumsOverS:
    """The sums over the ids of S that divergences of r and some p are made of, [T]."""

    r: Floats
    """The mass of r on S; p: of p."""
    p: Floats
    kl_rc: Floats
    """Σ r log(r/p); kl_cr: Σ p log(p/r)."""
    kl_cr: Floats
    js: Floats
    """Σ p log(2p/(r + p)) + Σ r log(2r/(r + p))."""
    tv: Floats
    """Σ |r − p|."""

    @classmethod
    def of(cls, r: Floats, log_r: Floats, p: Floats, log_p: Floats) -> SumsOverS:
        """Returns the sums; all [T, N], 0 and -inf outside of S."""
        with np.errstate(divide="ignore", invalid="ignore"):
            log_ratio = log_r - log_p
            # Over the sum, not the mean: half of the smallest number is 0.
            both = r + p
            return cls(
                r=row_sums(r),
                p=row_sums(p),
                kl_rc=row_sums(np.where(r > 0.0, r * log_ratio, 0.0)),
                kl_cr=-row_sums(np.where(p > 0.0, p * log_ratio, 0.0)),
                js=row_sums(xlogy(p, 2.0 * p / both)) + row_sums(xlogy(r, 2.0 * r / both)),
                tv=row_sums(np.abs(p - r)),
            )

    def plus(self, other: SumsOverS) -> SumsOverS:
        """Returns the sums over S with further ids; other: over these."""
        return SumsOverS(
            self.r + other.r,
            self.p + other.p,
            self.kl_rc + other.kl_rc,
            self.kl_cr + other.kl_cr,
            self.js + other.js,
            self.tv + other.tv,
        )

    def at(self, rows: Bools) -> SumsOverS:
        """Returns the sums at some positions, [T] bool."""
        return SumsOverS(self.r[rows], self.p[rows], self.kl_rc[rows], self.kl_cr[rows], self.js[rows], self.tv[rows])


@dataclass(frozen=True, slots=True)
class Coarse:
    """The divergences of r and some p over S plus one bucket, [T]."""

    kl_rc: Floats
    kl_cr: Floats
    js: Floats
    tv: Floats
    sums: SumsOverS
    """The sums that they were made of."""


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
    return with_bucket(SumsOverS.of(view.r, view.log_r, p, log_p), exact=view.exact)


def with_bucket(sums: SumsOverS, *, exact: bool) -> Coarse:
    """Returns the divergences over S plus one bucket. exact: S is everything, so that the bucket is empty.

    >>> r, c = np.array([[0.5, 0.4]]), np.array([[0.7, 0.2]])
    >>> with_bucket(SumsOverS.of(r, np.log(r), c, np.log(c)), exact=False).kl_rc.round(6).tolist()
    [0.109023]
    """
    r_out, p_out = outside(sums.r, exact=exact), outside(sums.p, exact=exact)
    with np.errstate(divide="ignore", invalid="ignore"):
        both = r_out + p_out
        js = sums.js + (xlogy(r_out, 2.0 * r_out / both) + xlogy(p_out, 2.0 * p_out / both))
    return Coarse(
        kl_rc=np.maximum(sums.kl_rc + xlogy(r_out, r_out / np.maximum(p_out, MASS_ROUNDING)), 0.0),
        kl_cr=np.maximum(sums.kl_cr + xlogy(p_out, p_out / np.maximum(r_out, MASS_ROUNDING)), 0.0),
        js=np.clip(0.5 * js, 0.0, np.log(2.0)),
        tv=np.clip(0.5 * (sums.tv + np.abs(p_out - r_out)), 0.0, 1.0),
        sums=sums,
    )


def outside(mass: Floats, *, exact: bool) -> Floats:
    """Returns what is left of a distribution with `mass` on S, [T]; 0 if S is everything.

    >>> outside(np.array([0.75]), exact=False).tolist()
    [0.25]
    """
    return np.zeros(len(mass)) if exact else np.maximum(1.0 - mass, 0.0)


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
