"""The one table of why sampled requests are not scored: the code, the counts and the documentation follow it."""

from __future__ import annotations

import ast
import runpy
import sys
from collections import defaultdict
from pathlib import Path
from types import ModuleType

import pytest
from tests.support.paths import ROOT

from hemostat import metrics
from hemostat.metrics import reasons
from hemostat.metrics.reasons import CONTROL, RELAY, REQUEST, CountedBy, Outcome, Unscored
from hemostat_calibration.outcomes import Outcome as AnswerOutcome
from hemostat_calibration.record_checks import InvalidReason

FINDS = {"openai": "relay", "interception": "relay", "relay": "relay", "scoring": "control", "measurement": "control"}
"""Package -> the process in which it finds reasons."""


def named(path: Path, enumeration: str) -> set[str]:
    """The members that a file names."""
    return {
        node.attr
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == enumeration
    }


def test_each_is_counted_by_whom_the_table_says() -> None:
    result = defaultdict(set)
    for package, process in FINDS.items():
        for path in (ROOT / "middleware" / "hemostat" / package).rglob("*.py"):
            for name in named(path, "Unscored"):
                result[name].add(process)
    who = {"relay": REQUEST | RELAY, "control": CONTROL}
    counted_here = [reason for reason in Unscored if reason.counted_by is not CountedBy.PLUGIN]
    said = {reason.name: {process for process, by in who.items() if by & reason.counted_by} for reason in counted_here}
    assert result == said


def test_each_has_its_own_line() -> None:
    assert len(Unscored.__members__) == len(Unscored) > 50, "equal values are aliases"
    assert {reason.outcome for reason in Unscored} == {Outcome.SKIPPED, Outcome.DROPPED}
    assert all(reason.meaning for reason in Unscored)
    assert {Unscored.INVALID_RECORD.label(reason) for reason in InvalidReason}.isdisjoint(Unscored)


def test_a_new_one_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    """It is documented for both metrics, as what is known before a request goes upstream is."""
    source = Path(reasons.__file__).read_text()
    end = "    # fmt: on\n"
    assert source.count(end) == 1
    changed = ModuleType(reasons.__name__)
    line = '    NEW = "new_one", SKIPPED, REQUEST, "what is new"\n'
    monkeypatch.setitem(sys.modules, reasons.__name__, changed)
    monkeypatch.setattr(metrics, "reasons", changed)
    exec(source.replace(end, line + end), changed.__dict__)
    page = runpy.run_path(str(ROOT / "deploy" / "metrics.py"))["page"]()
    assert "\n| `new_one` | what is new |\n" in page
    assert ", `new_one` | as for `hemostat_shadow_requests_total`" in page


def test_an_outcome_of_answers_is_a_line_and_where_it_is_found() -> None:
    """Its text is with it, and the guide explains it. The gate makes its questions from some of them."""
    result = named(ROOT / "middleware" / "hemostat" / "relay" / "outcomes.py", "Outcome")
    assert result == set(AnswerOutcome.__members__)
    elsewhere = [path for path in (ROOT / "middleware").rglob("*.py") if named(path, "Outcome") & result]
    assert {path.parent.name + "/" + path.name for path in elsewhere} == {"relay/outcomes.py", "gate/served.py"}
    assert all(outcome.meaning for outcome in AnswerOutcome)
    guide = (ROOT / "docs" / "calibration.md").read_text()
    assert [outcome for outcome in AnswerOutcome if f"\n| `{outcome}` |" not in guide] == []
