"""The gate as JSON and in words."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import msgspec

from hemostat.config.schema import Gate
from hemostat.gate.live.stored import RUNNING, StoredGate
from hemostat.reference.identity import Identity
from hemostat_calibration.gate.live import LiveFinding, LiveVerdict
from hemostat_calibration.gate.verdict import ALL, Outcome

COMPARED = (
    "both models without profiles and adapters; of kinds of traffic in which these serve, only requests of the control "
    "arm are compared"
)
WAIVED = "two cycles of the traffic: the verdict is about traffic like in the hours that were seen"


def sentence(stored: StoredGate) -> str:
    """Returns the state in one line."""
    return f"{stored.state}: {stored.why}"


def of_verdict(verdict: LiveVerdict, stored: StoredGate) -> str:
    """Returns why the gate has passed or failed."""
    if verdict.failed is not None:
        note = max(stored.notes, key=stored.notes.__getitem__, default="")
        return f"the candidate is {_above(verdict.failed)}{f'; {stored.notes[note]} times: {note}' if note else ''}"
    waived = " Waived: two cycles of the traffic." if stored.evidence.rules.waived else ""
    return f"after {stored.evidence.units} requests{_unseen(verdict.unseen)}.{waived}"


def waits_for(verdict: LiveVerdict, stored: StoredGate) -> str:
    """Returns what a running gate waits for."""
    evidence = stored.evidence
    if not evidence.units:
        return "no request has been compared yet"
    needed = evidence.rules.needed_seconds(ALL)
    if verdict.early is not None:
        would = "pass" if verdict.early is Outcome.PASS or verdict.failed is None else f"fail: {_above(verdict.failed)}"
        return (
            f"by what was seen so far it would {would}; a verdict waits for whole cycles of the traffic "
            f"({verdict.seconds / 3600.0:.1f} h of {needed / 3600.0:.1f} h)"
        )
    means = ", ".join(
        f"{finding.question.name}{f' in {finding.kind}' if finding.kind else ''}" for finding in verdict.waiting[:3]
    )
    more = f" and {len(verdict.waiting) - 3} more" if len(verdict.waiting) > 3 else ""
    return f"after {evidence.units} requests, not shown to be within the margin yet: {means}{more}"


def as_json(
    state: str, why: str, stored: StoredGate | None, verdict: LiveVerdict | None, settings: Gate
) -> dict[str, Any]:
    """Returns the whole gate. stored, verdict: None if there is none."""
    if stored is None or verdict is None:
        return {"state": state, "why": why, "candidate": None, "expect": None}
    rules, (log_ratio, units) = stored.evidence.rules, stored.log_ratio
    return {
        "state": state,
        "why": why,
        "candidate": stored.subject.candidate,
        "expect": stored.subject.expect,
        "began": stored.subject.began,
        "decided": stored.decided if state != RUNNING and stored.decided else None,
        "so_far": verdict.early.value if verdict.early is not None and state == RUNNING else None,
        "compared": COMPARED,
        "waived": [WAIVED] if rules.waived else [],
        "alpha": rules.alpha,
        "units": stored.evidence.units,
        "cycles": {"seconds_seen": verdict.seconds, "seconds_needed": rules.needed_seconds(ALL)},
        "questions": [_finding(finding) for finding in verdict.findings],
        "waiting_for": [[finding.question.name, finding.kind or None] for finding in verdict.waiting],
        "kinds_not_seen_enough": dict(verdict.unseen),
        "traffic_not_seen_enough": sum(verdict.unseen.values()),
        "kl_stable_candidate_nats": log_ratio / units if units else None,
        "budget": {
            "tokens_per_hour": settings.tokens_per_hour,
            "tokens": stored.tokens,
            "own_answers": settings.own_answers,
        },
        "failures": dict(stored.failures),
        "notes": dict(stored.notes),
        "identity": _identity(stored.identity),
    }


def _finding(finding: LiveFinding) -> dict[str, Any]:
    return {
        "question": finding.question.name,
        "text": finding.question.text,
        "kind": finding.kind or None,
        "units": finding.units,
        "mean": finding.mean,
        "low": finding.low,
        "high": finding.high,
        "margin": finding.margin,
        "inflation": finding.inflation if math.isfinite(finding.inflation) else None,
        "required": finding.required,
        "within_margin": finding.passed,
    }


def _identity(stored: str) -> dict[str, Any] | None:
    """Returns the marks that people can read."""
    if not stored:
        return None
    marks: dict[str, Any] = msgspec.to_builtins(msgspec.json.decode(stored, type=Identity))
    del marks["probe"]
    return marks


def _above(finding: LiveFinding) -> str:
    where = f" in the kind {finding.kind!r}" if finding.kind else ""
    return (
        f"{finding.question.text}{where}: by {finding.mean:.3f} over {finding.units} requests, {finding.margin:g} is "
        "allowed"
    )


def _unseen(unseen: Mapping[str, float]) -> str:
    if not unseen:
        return ""
    kinds = "1 kind" if len(unseen) == 1 else f"{len(unseen)} kinds"
    named = ", ".join(sorted(unseen)[:5]) + (" and others" if len(unseen) > 5 else "")
    return f"; {kinds}, {100.0 * sum(unseen.values()):.0f} % of the traffic, not seen enough: {named}"
