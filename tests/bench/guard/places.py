"""Which kinds of traffic have a place of their own: a new one soon gets one, and none changes hands by chance.

1,000 requests an hour, of which 2 % are scored, of more kinds than there are places: their shares fall like 1/k^1.2.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from tests.bench.guard import Row

from hemostat_calibration.statistics.kind_table import KindTable

NAME = "places"
TAKES = "2 minutes on one core (a twentieth of the lives)"
TEST_LIVES = 40

PLACES, KINDS = 24, 30
UNITS_PER_DAY = 20 * 24
DAY = 86_400.0
MONTHS = 90
"""Days of traffic before the new kind comes."""


def rows(lives: int, seed: int) -> Iterator[Row]:
    lives = max(lives // 20, 1)
    for share, days in ((0.05, 2.0), (0.2, 0.5)):
        waits = [days_until_followed(share, np.random.default_rng([seed, 35, life])) for life in range(lives)]
        late = sum(wait > days for wait in waits)
        yield Row(
            f"after three months, a new kind of {100 * share:g} %: days until it has a place, 95 % quantile",
            f"{np.quantile(waits, 0.95):.2f}",
            f"<= {days:g}",
            late <= max(0.05 * lives, 0),
        )
    changes = sum(handed_over(np.random.default_rng([seed, 36, life])) for life in range(lives))
    yield Row(
        f"{PLACES + 6} kinds of equal shares, {PLACES} places: changes of hands in a month",
        f"{changes / lives:g}",
        "<= 0.1",
        changes <= 0.1 * lives,
    )


def _shares() -> np.ndarray:
    shares = np.arange(1, KINDS + 1) ** -1.2
    return shares / shares.sum()


def days_until_followed(share: float, rng: np.random.Generator) -> float:
    """Infinite where it takes more than 40 days."""
    table = KindTable(PLACES)
    shares = _shares()
    now = 0.0
    for kind in rng.choice(KINDS, MONTHS * UNITS_PER_DAY, p=shares).tolist():
        now += DAY / UNITS_PER_DAY
        table = table.update(f"kind {kind}", now=now)
    began = now
    mixed = np.append((1.0 - share) * shares, share)
    for kind in rng.choice(KINDS + 1, 40 * UNITS_PER_DAY, p=mixed).tolist():
        now += DAY / UNITS_PER_DAY
        table = table.update(f"kind {kind}", now=now)
        if f"kind {KINDS}" in table:
            return (now - began) / DAY
    return float("inf")


def handed_over(rng: np.random.Generator) -> int:
    """How often a place changes hands in a month, after a month."""
    table, changes = KindTable(PLACES), 0
    for n, kind in enumerate(rng.integers(0, PLACES + 6, 60 * UNITS_PER_DAY).tolist()):
        before, table = table, table.update(f"kind {kind}", now=n * DAY / UNITS_PER_DAY)
        changes += n > 30 * UNITS_PER_DAY and table.followed != before.followed
    return changes
