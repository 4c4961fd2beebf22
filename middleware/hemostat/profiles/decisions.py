"""Decisions about profiles: which there are, for which reasons, and the log of their events.

The values are stored, exported as labels of `hemostat_profile_decisions_total` and shown in the console.
"""

from __future__ import annotations

import json
import logging
import math
from collections import Counter, deque
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import asdict
from enum import StrEnum
from typing import Any

from hemostat.metrics import names
from hemostat.metrics.samples import Sample
from hemostat.store.protocol import StoreWrites
from hemostat_calibration.guard.decisions import Evidence

log = logging.getLogger("hemostat.calibration")

MAX_EVENTS = 200
"""The largest number of events held in memory; the oldest is forgotten."""


class Decision(StrEnum):
    PROPOSE = "propose"
    """A learned profile becomes a candidate."""
    IMPORT = "import"
    """A profile given by an operator becomes a candidate."""
    DROP = "drop"
    """A candidate is no longer tested."""
    PROMOTE = "promote"
    """A profile serves a kind of traffic from now on."""
    ROLL_BACK = "roll_back"
    """The profile that served a kind of traffic does not serve it any more."""
    RELEASE = "release"
    """A kind that was held at identity may be served by profiles again."""
    PIN = "pin"
    UNPIN = "unpin"
    MODE = "mode"
    """The setting `calibration.mode` was changed at run time."""


class Reason(StrEnum):
    LEARNED = "learned"
    OPERATOR = "operator"
    NEWER = "newer"
    """A newer candidate takes its place."""
    UNPROVEN = "unproven"
    """Its test was hopeless (`futility`), and others wait."""
    EVIDENCE = "evidence"
    """The profile is proven better on held-out requests."""
    HARM = "harm"
    UNSUPPORTED = "unsupported"
    OUTCOMES = "outcomes"
    """It harms what people notice of the answers, by more than the margin."""
    SLOT = "slot"
    """An adapter that is better in most of its traffic takes its slot in the engine, or engines were started with fewer
    slots than adapters serve."""
    EVICTED = "evicted"
    """Another kind of traffic is more frequent and is followed instead."""
    PROBE = "probe"
    """The engine does not apply the adapter as a copy of the model does."""
    OTHER_MODEL = "other_model"
    """The profile was learned for another model than the one that is served now."""
    LOST = "lost"
    """The store, at a restart, does not hold it, or it cannot be read."""
    SETTINGS = "settings"
    """At a restart the settings are other ones, and do not allow it."""


REASONS: Mapping[Decision, tuple[Reason, ...]] = {
    Decision.PROPOSE: (Reason.LEARNED,),
    Decision.IMPORT: (Reason.OPERATOR,),
    Decision.DROP: (Reason.NEWER, Reason.UNPROVEN, Reason.PROBE, Reason.LOST, Reason.SETTINGS),
    Decision.PROMOTE: (Reason.EVIDENCE, Reason.OPERATOR),
    Decision.ROLL_BACK: (
        Reason.HARM,
        Reason.UNSUPPORTED,
        Reason.OUTCOMES,
        Reason.PROBE,
        Reason.OPERATOR,
        Reason.SLOT,
        Reason.EVICTED,
        Reason.OTHER_MODEL,
        Reason.LOST,
        Reason.SETTINGS,
    ),
    Decision.RELEASE: (Reason.OPERATOR,),
    Decision.PIN: (Reason.OPERATOR,),
    Decision.UNPIN: (Reason.OPERATOR,),
    Decision.MODE: (Reason.OPERATOR,),
}
"""Every decision with the reasons that it may have."""

DECISIONS = tuple((decision, reason) for decision, reasons in REASONS.items() for reason in reasons)


class EventLog:
    """The last events and how many decisions of each kind were made; every event is written to the store.

    wall: Unix time, seconds.
    """

    def __init__(self, writes: StoreWrites, wall: Callable[[], float]) -> None:
        self._writes = writes
        self._wall = wall
        self._events: deque[dict[str, Any]] = deque(maxlen=MAX_EVENTS)
        self.counts: Counter[tuple[str, str]] = Counter(dict.fromkeys(DECISIONS, 0))
        """The number of events by decision and reason, since this process started."""

    def record(
        self,
        decision: Decision,
        reason: Reason,
        version: str,
        why: str,
        evidence: dict[str, Any],
        kind: str = "",
    ) -> None:
        """Counts, logs, holds and stores one decision. why: for people. evidence: JSON-ready. kind: "" if the decision
        is not about one kind of traffic."""
        self.counts[decision, reason] += 1
        event = {
            "at": self._wall(),
            "decision": decision.value,
            "reason": reason.value,
            "version": version,
            "kind": kind,
            "why": why,
            "evidence": evidence,
        }
        shown = f" {json.dumps(evidence)}" if evidence else ""
        log.info("%s %s%s: %s%s", decision, version, f" for {kind}" if kind else "", why, shown)
        self._events.append(event)
        self._writes.append_event(event)

    def samples(self) -> Iterator[Sample]:
        for labels, count in self.counts.items():
            yield Sample(names.PROFILE_DECISIONS, labels, count)

    def restore(self, events: Iterable[dict[str, Any]]) -> None:
        """Adds events of an earlier run, oldest first, without writing them again."""
        self._events.extend(events)

    def newest_first(self, version: str | None = None) -> list[dict[str, Any]]:
        """Returns the events that are held, newest first: all of them, or only the events of one profile."""
        return [event for event in reversed(self._events) if version in (None, event["version"])]


def evidence_json(evidence: Evidence | None) -> dict[str, Any]:
    """Returns the evidence of a test in one kind, JSON-ready: what is infinite or unknown is None."""
    if evidence is None:
        return {}
    result = asdict(evidence) | {"effective_units": evidence.effective_units}
    return {
        name: value if not isinstance(value, float) or math.isfinite(value) else None for name, value in result.items()
    }


def pooled_gain(parts: Collection[Evidence]) -> dict[str, Any]:
    """Returns the mean gain by unit over the tests of one profile in several kinds, and the figure that the gain is in,
    JSON-ready. Gains of different figures have no mean: then both are None.
    """
    counted = [evidence for evidence in parts if evidence.units]
    if len({evidence.figure for evidence in counted}) != 1:
        return {"mean_gain": None, "figure": None}
    units = sum(evidence.units for evidence in counted)
    gain = sum(evidence.units * evidence.mean_gain for evidence in counted) / units
    return {"mean_gain": gain, "figure": str(counted[0].figure)}
