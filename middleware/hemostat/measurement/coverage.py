"""Coverage: which part of what sampled requests generated is scored, by kind, and what becomes of the rest.

Every sampled request is counted once, when it ends: scored, skipped (it can never be scored) or dropped (it could have
been at another time). What is in the queue is in no count yet. The figures are counts of what was sampled, not
estimates: they have no interval.

Generated tokens are counted by the ids that were captured, else by the response's usage. Where neither says how many
there were (a stream whose client did not ask for usage, an error, a response that ended early), the request counts as
one with unknown tokens, and the share of tokens is a share of the known ones.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from hemostat.ipc.messages import REST_KIND, Capture, SampledCount
from hemostat.ipc.sampled import counted
from hemostat.metrics import names
from hemostat.metrics.reasons import Unscored
from hemostat.metrics.samples import Sample
from hemostat_calibration.statistics.kind_table import KindTable

SCORED, SKIPPED, DROPPED = OUTCOMES = ("scored", "skipped", "dropped")
UNREAD_KIND = "unread"
"""The kind of requests whose body was not read: another route, too large, opted out by a header."""
MAX_KINDS = 104
"""The largest number of kinds with counts of their own. There are more than can be followed at a time: one that is not
followed any more keeps its counts until others need the place."""
MAX_REASONS = 256


@dataclass(slots=True)
class Tally:
    """The count of requests with one outcome.

    requests: the number of requests, where each of n choices counts 1/n. unknown: how many of these have an unknown
    number of tokens. tokens: the number of tokens of the others.
    """

    requests: float = 0.0
    unknown: float = 0.0
    tokens: int = 0

    def update(self, requests: float, unknown: float, tokens: int) -> None:
        self.requests += requests
        self.unknown += unknown
        self.tokens += tokens


class Coverage:
    """Owns the counts of sampled requests and their tokens, since this process started. kinds: followed at a time, the
    most frequent ones of the last days (`KindTable`). clock: monotonic seconds."""

    def __init__(self, kinds: int, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._table = KindTable(min(kinds, MAX_KINDS - 4))
        self._by_kind: OrderedDict[str, dict[str, Tally]] = OrderedDict()
        self._by_reason: dict[tuple[str, str], Tally] = {(SCORED, ""): Tally()}

    def _update(self, kind: str, outcome: str, reason: str, requests: float, unknown: float, tokens: int) -> None:
        """Counts sampled requests that have ended. kind: full name; "" if the body was not read."""
        if (outcome, reason) not in self._by_reason and len(self._by_reason) >= MAX_REASONS:
            return  # reasons are enumerations: only a message of another version can get here
        self._by_reason.setdefault((outcome, reason), Tally()).update(requests, unknown, tokens)
        name = UNREAD_KIND
        if kind:
            self._table = self._table.update(kind, now=self._clock())
            name = kind if kind in self._table else REST_KIND
        tallies = self._by_kind.pop(name, None) or {outcome: Tally() for outcome in OUTCOMES}
        self._by_kind[name] = tallies
        if outcome in tallies:
            tallies[outcome].update(requests, unknown, tokens)
        while len(self._by_kind) > MAX_KINDS:
            self._by_kind.popitem(last=False)

    def update_relayed(self, count: SampledCount) -> None:
        """Adds what a relay counted: requests that never became a capture."""
        self._update(count.kind, count.outcome, count.reason, count.requests, count.unknown, count.tokens)

    def update(self, capture: Capture, outcome: str, reason: str, left_out: int = 0) -> None:
        """Counts a capture that has ended. left_out: of a scored one, output tokens that were not scored."""
        requests, tokens = counted(capture)
        unknown = requests if tokens is None else 0.0
        self._update(capture.kind, outcome, reason, requests, unknown, (tokens or 0) - left_out)
        if left_out:
            self._update(capture.kind, SKIPPED, Unscored.OUTSIDE_SUFFIX.value, 0.0, 0.0, left_out)

    def report(self) -> dict[str, Any]:
        """Returns the coverage, JSON-ready. `scored_share`: the scored share of the known tokens, and of the requests;
        None before the first request.
        """
        kinds = [
            {"kind": name, **_shares(tallies)}
            for name, tallies in sorted(
                self._by_kind.items(), key=lambda item: (-sum(tally.requests for tally in item[1].values()), item[0])
            )
        ]
        totals = {outcome: Tally() for outcome in OUTCOMES}
        for (outcome, _), tally in self._by_reason.items():
            if outcome in totals:
                totals[outcome].update(tally.requests, tally.unknown, tally.tokens)
        unscored = [
            {"outcome": outcome, "reason": reason, **_to_json(tally)}
            for (outcome, reason), tally in sorted(
                self._by_reason.items(), key=lambda item: (-item[1].requests, -item[1].tokens, item[0])
            )
            if outcome != SCORED
        ]
        return {**_shares(totals), "by_kind": kinds, "not_scored": unscored}

    def samples(self) -> Iterator[Sample]:
        for labels, tally in self._by_reason.items():
            yield Sample(names.SAMPLED_TOKENS, labels, tally.tokens)
            yield Sample(names.SAMPLED_REQUESTS, (*labels, "known"), tally.requests - tally.unknown)
            yield Sample(names.SAMPLED_REQUESTS, (*labels, "unknown"), tally.unknown)
        for kind, tallies in self._by_kind.items():
            for outcome, tally in tallies.items():
                yield Sample(names.KIND_SAMPLED_TOKENS, (kind, outcome), tally.tokens)


def _to_json(tally: Tally) -> dict[str, Any]:
    return {
        "requests": round(tally.requests, 6),
        "requests_of_unknown_tokens": round(tally.unknown, 6),
        "tokens": tally.tokens,
    }


def _shares(by_outcome: dict[str, Tally]) -> dict[str, Any]:
    requests = sum(tally.requests for tally in by_outcome.values())
    tokens = sum(tally.tokens for tally in by_outcome.values())
    scored = by_outcome[SCORED]
    return {
        "scored_share": {
            "tokens": scored.tokens / tokens if tokens else None,
            "requests": scored.requests / requests if requests else None,
        },
        "requests": round(requests, 6),
        "tokens": tokens,
        "requests_of_unknown_tokens": round(sum(tally.unknown for tally in by_outcome.values()), 6),
        "by_outcome": {outcome: _to_json(tally) for outcome, tally in by_outcome.items()},
    }
