"""The data that tests of profiles need of one scored, held-out request."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from hemostat_calibration.records import ExactDistances

Interval = tuple[float, float]
"""The lower and the upper end of an interval, in nats."""


@dataclass(frozen=True, slots=True)
class HeldOutUnit:
    """A request that is judged by. kind: of traffic. unit, client: digests. fresh: see `hemostat.scoring.seen_units`.

    time: when it was judged, Unix seconds.
    adapted: its lists are of an adapter, not of the compressed model itself.
    gain: (version) -> its mean gain over identity on the request's tokens, by `judging.gain_interval`; None if
        nothing is known of it.
    """

    kind: str
    unit: bytes
    client: bytes
    tokens: int
    fresh: bool
    adapted: bool
    gain: Callable[[str], Interval | None]
    distances: Mapping[str, ExactDistances] = field(default_factory=dict)
    time: float = 0.0
