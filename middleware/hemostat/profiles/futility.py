"""When the test of a candidate is hopeless, so that another candidate that waits may take its place.

A test ends without a promotion, which no guarantee of the guard depends on: whoever is not promoted is not promoted
wrongly, and the alpha that the test has spent stays spent. So the rule may look at the evidence as often as it likes.

A candidate is hopeless as soon as none of the kinds in which it is tested can still decide. A kind cannot

- once it has met `MAX_UNPROVEN_UNITS` units, and gains that span a cycle, without a proof. Units that were refused for
  their client's share count, too: a test whose other clients are gone would else never end; or
- once it has counted `MIN_FUTILE_UNITS` units and the evidence of the gain is not above what it was at the start.

What is left then are kinds that are rare: they may decide until `MAX_SEEN_UNITS` held-out units of any kind were met,
since the test began, or since the candidate was promoted last, and the gains of one of its kinds span a cycle.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping

MAX_UNPROVEN_UNITS = 500
"""The largest number of held-out units of a kind after which it is not expected to decide any more, where a candidate
of the same priority or a better one waits."""
MAX_UNPROVEN_UNITS_BEFORE_LOWER = 4 * MAX_UNPROVEN_UNITS
"""The same where only candidates of a lower priority wait."""
MIN_FUTILE_UNITS = 96
"""The least number of units from which on a kind without evidence of a gain is given up. Simulated with a spread of
gains of 0.2: of 100 profiles each that gain 0.08, 0.05 and nothing, 1, 24 and 100 are."""
MAX_SEEN_UNITS = 4 * MAX_UNPROVEN_UNITS
"""The number of held-out units of any kind after which a candidate is dropped whatever its kinds have shown."""


def why_hopeless(
    units: Mapping[str, tuple[int, int]],
    log_e: Callable[[str], float],
    *,
    seen: int,
    for_equal: bool,
    decides: Collection[str],
) -> str:
    """Returns why a candidate's test is hopeless, in words; "" if it is not.

    units: of each kind in which it is tested, how many counted, and how many were refused. log_e: (kind) -> evidence
    that it gains there; asked for few of them. seen: held-out units of any kind, see `MAX_SEEN_UNITS`. for_equal:
    whether a candidate of the same priority or a better one waits. decides: the kinds in which it could be promoted by
    now if its evidence were enough; elsewhere only a lack of evidence counts against it, and not the number of units.
    """
    limit = MAX_UNPROVEN_UNITS if for_equal else MAX_UNPROVEN_UNITS_BEFORE_LOWER
    others = {kind: each for kind, each in units.items() if not (kind in decides and sum(each) >= limit)}
    futile = for_equal and all(counted >= MIN_FUTILE_UNITS for counted, _ in others.values())
    if units and not others:
        return f"not proven by {max(map(sum, units.values()))} held-out requests of its most frequent kind"
    if units and futile and all(log_e(kind) <= 0.0 for kind in others):
        most = max(counted for counted, _ in others.values())
        return f"no evidence of a gain in {most} held-out requests of its most frequent kind"
    never_counted = not any(counted for counted, _ in units.values())
    if (decides or never_counted) and seen >= MAX_SEEN_UNITS:
        return f"not proven in another kind during {seen} held-out requests"
    return ""
