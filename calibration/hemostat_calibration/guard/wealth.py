"""E-processes of the hypothesis "the mean is at most 0", of which no single client's observations decide.

The evidence is made by betting (Waudby-Smith & Ramdas, JRSS-B 2024). Every observation X is at least −width. If its
mean given the past is at most 0, then for a fraction f in [0, 1)

    K_t(f) = Π_{i ≤ t} (1 + f X_i / width)

is a non-negative supermartingale that starts at 1, and so is a mixture over several f. By Ville's inequality it ever
reaches 1/alpha with a probability of at most alpha. Only the lower end of the range enters, not a variance; f near 1
bets nearly all that the range allows, which is the best bet when the mean is small against the range but not against
the spread (the regime here: gains of some hundredths of a nat, of a similar spread, in a range of ±1 or ±2). Most of
the mixture is put there.

The product does not depend on the order, and whose an observation is, is known before its value. So K without the
factors of any fixed set of clients is an e-process, too: the one of the other clients' observations. With K^-a, K^-ab
without the observations of a, and of a and b, there are two kinds of evidence.

**To begin** (`log_proof`): the least of K, all K^-a, and K with all observations that were refused for their client's
share. It is valid for all traffic, and for that without any one client: what a client sends cannot prove a gain that
the others do not have, and the others' gain does not hide what one client loses, as long as the mean over all is at
most 0. A client that sends losses can prevent the proof.

**To stay, and to be taken back** (`log_evidence`): what serves must neither be taken back nor be kept because one
client sends losses, or gains, on purpose. With C clients seen it is

    min over a of  1/2 K^-a + 1/2 mean over b of K^-ab

with `MAX_CLIENTS` values of b, numbered in order of appearance and weighted by `SLOTS` (K^-ab = K^-a for b = a and for
those not seen yet).

- It is valid where the mean is at most 0 for all clients that are left when any two are left out: then each term of the
  minimum is a mixture of e-processes, also the one without the client a that sends what it likes. Where the mean is at
  most 0 only because of one client, that client's observations are what is left out.
- One client that sends the opposite on purpose cannot hide the others' evidence, up to a factor of half its `SLOTS`
  (1/30 to 1/350): every term holds one without it.

**Units that depend on each other** (`statistics.dependence`): K(f) is raised to the power 1/v̂ with v̂ the inflation of
sums of units, for each fraction and each set of clients left out, before anything is mixed.

A range of each unit's own that is known before it is scored, in place of one width, is no way to shorter proofs: bets
of X_i / width_i test the mean of the gains weighted by 1/width_i, and a profile whose plain mean is below 0 is proven
where the narrow units gain.

With fewer than `MIN_CLIENTS` clients nothing can be left out: the evidence is K, or 1/2 K + 1/2 mean over b of K^-b. It
stays valid over that change: the term of the client that appears as number `MIN_CLIENTS` is a single e-process which
the evidence never exceeds, before or after. The guarantee against one client does not hold below it: stated in
`Evidence.client_share_active`.

Clients who act together, or one client under several names, are not covered.
"""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt

from hemostat_calibration.statistics.dependence import MAX_CLIENTS

Floats = npt.NDArray[np.float64]

MIN_CLIENTS = 4
"""The number of clients that have to be seen before the evidence does without any one of them, and before their share
is limited.
"""

FRACTIONS = np.array([0.99, 0.5, 0.25, 0.1])
"""The fractions f that are bet: shares of the stake that would lose everything on the worst observation. They are below
1, so that a factor is never 0 and can be left out again.
"""
PRIOR = np.array([0.8, 0.1, 0.05, 0.05])

SLOTS = 1.0 / np.arange(5.0, 5.0 + MAX_CLIENTS)
SLOTS /= SLOTS.sum()
"""Weights of the clients to be left out, in order of appearance: fixed in advance, larger for those who come first,
since who sends much comes early."""

_OTHERS = (1.0 - np.eye(MAX_CLIENTS)) * SLOTS
_TINY = np.finfo(np.float64).tiny


def log_factors(x: float) -> Floats:
    """Returns log(1 + f x) for each fraction f, float64 [F]. x: an observation divided by the width, −1 to 1.

    >>> log_factors(0.25).round(3).tolist()
    [0.221, 0.118, 0.061, 0.025]
    """
    factors: Floats = np.log1p(FRACTIONS * x)
    return factors


def log_proof(
    by_client: Floats, clients: int, refused: Floats | float = 0.0, inflation: Floats | float = 1.0
) -> Floats:
    """Returns the logarithm of the evidence that is needed to begin, of all observations and without any one client:
    [...].

    by_client: float64 [..., C, F], as for `log_evidence`, of any number of tests at a time. clients: C. refused:
    float64 [..., F], the sum of `log_factors` of what was refused. inflation: [...], v̂, 1 or more.

    >>> logs = np.tile(log_factors(0.25), (8, 1)) * 5
    >>> logs[0] = log_factors(-0.5) * 20
    >>> bool(log_proof(logs[1:], 7) > 3.0 > 0.0 > log_proof(logs, 8)), bool(log_proof(logs[1:], 7, inflation=3.0) > 3.0)
    (True, False)
    """
    total = by_client.sum(axis=-2, keepdims=True)
    log_k = total
    if clients >= MIN_CLIENTS:
        opposed = (total[..., 0, :] + refused)[..., None, :]
        log_k = np.concatenate([total, opposed, total - by_client], axis=-2)
    log_k = log_k / np.asarray(inflation)[..., None, None]
    top = log_k.max(axis=-1)
    proof: Floats = (top + np.log(np.exp(log_k - top[..., None]) @ PRIOR)).min(axis=-1)
    return proof


def log_evidence(by_client: Floats, clients: int, inflation: float = 1.0) -> float:
    """Returns the logarithm of the evidence for what serves: to stay, and to be taken back.

    by_client: float64 [C, F], the sum of `log_factors` of each place. clients: C. inflation: v̂, 1 or more.

    >>> logs = np.tile(log_factors(0.25), (4, 1)) * 10
    >>> 2.0 < log_evidence(logs[:3], 3) < log_evidence(logs, 4) + 0.5
    True
    """
    if not clients:
        return 0.0
    by_client = by_client / inflation
    total = by_client.sum(axis=0)
    # Factors that leaving a client out gives, in units of the largest of each fraction (or 1), so that none overflows.
    log_unit = np.maximum(-by_client.min(axis=0), 0.0)
    left_out, unit = np.exp(-by_client - log_unit), np.exp(-log_unit)
    seen = SLOTS[:clients]
    unseen = 1.0 - seen.sum()
    if clients < MIN_CLIENTS:
        mean = seen @ left_out + unseen * unit
        log_k = total[None, :]
    else:
        # For each client a: the mean over b of the factors; b = a and clients not seen yet give 1.
        mean = _OTHERS[:clients, :clients] @ left_out + (unseen + seen[:, None]) * unit
        log_k = total - by_client
    # At least 1/2 where both parts are too small to tell in these units.
    log_k = log_k + np.maximum(np.log(0.5 * (unit + mean) + _TINY) + log_unit, -math.log(2.0))
    top = log_k.max(axis=1)
    return float((top + np.log(np.exp(log_k - top[:, None]) @ PRIOR)).min())


def log_bound(by_client: Floats) -> float:
    """Returns a bound that is never below `log_proof` and `log_evidence` of the same [C, F] where these are above 0,
    with any v̂, and cheaper: without the two clients that it is the largest without.

    >>> logs = np.tile(log_factors(0.25), (4, 1)) * 10
    >>> log_bound(logs) >= log_evidence(logs, 4)
    True
    """
    if not len(by_client):
        return 0.0
    lowest = np.sort(by_client, axis=0)[:2]
    return float((by_client.sum(axis=0) - np.minimum(lowest, 0.0).sum(axis=0)).max())


def without_any(values: Floats) -> Floats:
    """Returns the totals [C] without each client in turn, of values [C]; the total alone, [1], below `MIN_CLIENTS`
    clients.

    >>> without_any(np.array([5.0, 1.0, 1.0, 1.0])).tolist(), without_any(np.array([5.0, 1.0])).tolist()
    ([3.0, 7.0, 7.0, 7.0], [6.0])
    """
    total: Floats = values.sum(keepdims=True)
    return total - values if len(values) >= MIN_CLIENTS else total
