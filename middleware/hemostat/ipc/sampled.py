"""Counts, in a relay, the sampled requests that never became a capture, until the counts are sent."""

from __future__ import annotations

from hemostat.ipc.messages import ID_BYTES, REST_KIND, Capture, SampledCount, SampledCounts

MAX_COUNTS = 1024
"""The largest number of combinations of kind and ending that are counted at a time; the kinds of all further ones are
counted as `REST_KIND`. Reasons are an enumeration, so that these are bounded, too."""


def counted(capture: Capture) -> tuple[float, int | None]:
    """Returns what a capture counts as: requests (1/n for one of n choices) and generated tokens, None if not known."""
    if capture.from_tap and not capture.output_token_ids:
        # It stands for all choices until the plugin's report is there.
        return 1.0, capture.generated if capture.generated >= 0 else None
    return 1.0 / capture.choices, len(capture.output_token_ids) // ID_BYTES


class SampledTally:
    """Counts by kind, outcome and reason. Nothing is lost while there is no control process: it is sent later."""

    def __init__(self, limit: int = MAX_COUNTS) -> None:
        self._limit = limit
        self._counts: dict[tuple[str, str, str], tuple[float, float, int]] = {}

    def update(self, kind: str, outcome: str, reason: str, tokens: int | None, requests: float = 1.0) -> None:
        """Counts a sampled request that has ended. tokens: what was generated; None: not known. requests: see
        `SampledCount`."""
        key = kind, outcome, reason
        if key not in self._counts and len(self._counts) >= self._limit:
            key = REST_KIND, outcome, reason
        ended, unknown, known = self._counts.get(key, (0.0, 0.0, 0))
        self._counts[key] = ended + requests, unknown + (requests if tokens is None else 0.0), known + (tokens or 0)

    def take(self) -> SampledCounts | None:
        """Returns what was counted since the last call; None: nothing."""
        if not self._counts:
            return None
        counts, self._counts = self._counts, {}
        return SampledCounts([SampledCount(*key, *values) for key, values in counts.items()])
