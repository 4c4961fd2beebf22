"""The verdict in words, as JSON and as a page."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from hemostat.gate.run import Result
from hemostat.gate.state import Header
from hemostat_calibration.gate.verdict import ALL, Finding, Outcome

MARKER = b"hemostat gate"


@dataclass(frozen=True, slots=True)
class Subject:
    """The models that were compared, as people name them. left_out: prompts that are variants of others'."""

    stable: str
    candidate: str
    reference: str
    expect: str
    left_out: int
    header: Header | None


def sentence(result: Result) -> str:
    """Returns the verdict in one line."""
    verdict = result.verdict
    if verdict is None:
        return f"{result.outcome}: {result.why}"
    if result.outcome is Outcome.FAIL and verdict.failed is not None:
        failed = verdict.failed
        where = "" if failed.kind == ALL else f" in the kind {failed.kind!r}"
        return (
            f"fail: the candidate is {failed.question.text}{where}: by {failed.mean:.3f} over {failed.units} prompts, "
            f"{failed.margin:g} is allowed{_cause(result)}"
        )
    if result.outcome is Outcome.PASS:
        return f"pass: after {result.units} prompts{_unseen(verdict.unseen)}{_not_required(verdict.findings)}"
    more = "no number of prompts would do at the differences so far"
    if verdict.more is not None:
        more = f"about {verdict.more} more prompts would do at the differences so far"
    return f"undecided: {result.why} after {result.units} prompts; {more}"


def lines(result: Result) -> list[str]:
    """Returns what stands below the verdict: a line for each mean, and what was met on the way."""
    findings = result.verdict.findings if result.verdict is not None else ()
    text = [
        f"  {finding.question.name:14} {finding.kind or 'all prompts':20} {finding.mean:+.4f} of {finding.margin:g} "
        f"allowed, {finding.units} prompts, {_state(finding)}"
        for finding in _shown(findings)
    ]
    if result.log_ratio is not None:
        text.append(f"  KL(stable‖candidate) {result.log_ratio:.4f} nats a token, estimated")
    text += [f"  {count} times: {note}" for note, count in result.notes]
    if result.unmeasured:
        text.append(f"  {result.unmeasured} prompts could not be measured, and are not counted")
    return text


def as_json(result: Result, subject: Subject) -> dict[str, Any]:
    """Returns the whole result, for programs."""
    verdict = result.verdict
    header = subject.header
    return {
        "verdict": result.outcome.value,
        "sentence": sentence(result),
        "expect": subject.expect,
        "stable": subject.stable,
        "candidate": subject.candidate,
        "reference": subject.reference,
        "units": result.units,
        "more": verdict.more if verdict is not None else None,
        "alpha": header.alpha if header is not None else None,
        "candidate_identity": header.candidate if header is not None else None,
        "stable_identity": header.stable if header is not None else None,
        "kinds_not_seen_enough": dict(verdict.unseen) if verdict is not None else {},
        "prompts_left_out_as_variants": subject.left_out,
        "unmeasured": result.unmeasured,
        "errors": dict(result.notes),
        "kl_stable_candidate_nats": result.log_ratio,
        "findings": [
            {
                "question": finding.question.name,
                "kind": finding.kind or None,
                "mean": finding.mean,
                "margin": finding.margin,
                "units": finding.units,
                "within_margin": finding.passed,
                "required": finding.required,
            }
            for finding in (verdict.findings if verdict is not None else ())
        ],
    }


def as_page(result: Result, subject: Subject, version: str) -> str:
    """Returns the HTML page."""
    from hemostat.report.page import Section, Table, render  # noqa: PLC0415  jinja2 is an extra

    findings = result.verdict.findings if result.verdict is not None else ()
    table = Table(
        "Differences by question; all prompts first",
        ("question", "kind", "mean", "allowed", "prompts", "state"),
        [
            (
                finding.question.text,
                finding.kind or "all prompts",
                f"{finding.mean:+.4f}",
                f"{finding.margin:g}",
                str(finding.units),
                _state(finding),
            )
            for finding in _shown(findings)
        ],
    )
    notes = [line.strip() for line in lines(result)[len(table.rows) :]]
    values = {"sentence": sentence(result), "subject": subject, "differences": table, "notes": notes}
    return render("hemostat.gate", "hemostat gate", version, [Section("gate.html.jinja", values)])


def _shown(findings: Sequence[Finding]) -> list[Finding]:
    """Returns the findings that a person reads: those over all prompts, and those in kinds that had to pass."""
    return [finding for finding in findings if finding.kind == ALL or finding.required]


def _state(finding: Finding) -> str:
    if finding.passed:
        return "within the margin"
    return "not shown to be within the margin" if finding.required else "not seen enough to be required"


def _cause(result: Result) -> str:
    """Returns what the candidate did, if it failed or said nothing; "" otherwise."""
    causes = [(note, count) for note, count in result.notes if note.startswith("the candidate")]
    return f"; {causes[0][1]} times: {causes[0][0]}" if causes else ""


def _not_required(findings: Sequence[Finding]) -> str:
    """Returns the questions that were asked of too few prompts."""
    few = [finding for finding in findings if finding.kind == ALL and not finding.required]
    return "".join(f"; {finding.question.name}, {finding.units} prompts, not seen enough" for finding in few)


def _unseen(unseen: Mapping[str, float]) -> str:
    if not unseen:
        return ""
    kinds = "1 kind" if len(unseen) == 1 else f"{len(unseen)} kinds"
    named = ", ".join(sorted(unseen))
    return f"; {kinds}, {100.0 * sum(unseen.values()):.0f} % of the prompts, not seen enough: {named}"
