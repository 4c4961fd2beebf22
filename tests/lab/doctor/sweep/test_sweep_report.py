"""What a sweep concludes from known losses, which points it measures again, and how it is shown."""

from __future__ import annotations

import io
import json
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest
from rich.console import Console
from tests.support.pages import assert_marks_inside, chromium_markup
from tests.support.sweep import LINES, POINTS, loss, results, shares

from hemostat import cli
from hemostat.report.progress import Reporter
from hemostat_lab.commands.doctor import SWEEP_AXES
from hemostat_lab.doctor import html
from hemostat_lab.doctor.main import show
from hemostat_lab.doctor.options import Axis
from hemostat_lab.doctor.sweep import terminal
from hemostat_lab.doctor.sweep.analysis import (
    equal_size,
    near_front,
    pareto_front,
    promoted,
    rungs,
    statements,
    threshold,
)
from hemostat_lab.doctor.sweep.outcomes import Task, json_object, judge, tasks
from hemostat_lab.doctor.sweep.page import Mark, Scatter, curve_plot, scatter_plot
from hemostat_lab.doctor.sweep.points import (
    PLAIN,
    STRUCTURED,
    UNCHANGED,
    UNSTRUCTURED_PRUNING,
    Change,
    Drawing,
    Point,
    grid,
    lines,
)
from hemostat_lab.doctor.sweep.report import sweep_report
from hemostat_lab.doctor.sweep.results import Results, share

MEASURED = results()
SHARES = shares()
THRESHOLDS = [one for line in LINES if (one := threshold(MEASURED, line, 0)) is not None]
STATEMENTS = statements(MEASURED, {broken.line.name: broken for broken in THRESHOLDS}, LINES, SHARES)


@pytest.fixture(scope="module")
def report() -> dict[str, Any]:
    return {
        "schema": 1,
        "hemostat": "0",
        "reference": {"name": "<b>model</b>", "digest": "0" * 32, "dtype": "bfloat16"},
        "vocab_size": 320,
        "prompt_file": "p",
        "seed": 0,
        "max_new_tokens": 16,
        "notes": ["a <note>"],
        "sweep": sweep_report(MEASURED, POINTS, THRESHOLDS, STATEMENTS, SHARES, ("given", MEASURED))
        | {"axes": list(Axis), "points": len(POINTS), "rungs": [len(POINTS)], "seconds": 1.0, "cpu_seconds": 1.0},
    }


def test_known_breaks_are_found() -> None:
    result = {broken.line.name: broken for broken in THRESHOLDS}
    for name, at in (("quantization", 12.0), (UNSTRUCTURED_PRUNING, 0.65), (STRUCTURED, 0.45)):
        interval = result[name].found
        assert interval is not None
        assert interval.low <= at <= interval.high, name
        assert result[name].leaves_floor == 0
    # 70 % unstructured loses 1.14 nats, 60 % loses 0.12; ln 2 is 0.69.
    assert result[UNSTRUCTURED_PRUNING].doubles == 6
    assert result["layers dropped"].doubles == 1
    # A loss in proportion has no break.
    dropped = result["layers dropped"].found
    assert dropped is not None
    assert dropped.existence.value == "none"


def test_the_papers_statements_are_tested() -> None:
    verdicts = {statement.text: statement.verdict.value for statement in STATEMENTS}
    assert len(verdicts) == 6
    assert set(verdicts.values()) == {"confirmed"}
    # In a world where rows lose least, the last statement is refuted.
    exchanged = Results()
    for point in POINTS:
        twin = Point(sparsity=point.sparsity, pattern={"rows": "n:4", "n:4": "rows"}.get(point.pattern, "unstructured"))  # type: ignore[arg-type]
        source = (
            results(8, [twin]).texts[twin] if point.sparsity and point.bits == 16 else results(8, [point]).texts[point]
        )
        exchanged.add(point, list(source.values()), [])
    result = statements(exchanged, {}, LINES, SHARES)
    assert (result[-1].text, result[-1].verdict.value) == (
        "at equal size semi-structured pruning loses less than structured pruning",
        "not confirmed",
    )


def test_pairs_of_equal_size() -> None:
    a, b, c, d = (Point(sparsity=s) for s in (0.1, 0.2, 0.3, 0.4))
    assert equal_size([a, b], [c, d], {a: 0.5, b: 0.48, c: 0.5, d: 0.3}) == [(a, c)]
    assert equal_size([a, b], [c, d], {a: 0.5, b: 0.48, c: 0.49, d: 0.6}) == [(b, c)]


def test_front_against_brute_force() -> None:
    points = [p for p in POINTS if p.drawing == PLAIN and p != UNCHANGED]
    value = {p: float(MEASURED.alone(p).means()[0]) for p in points}
    front = pareto_front(MEASURED, points, SHARES)
    for p in points:
        beaten = any(
            SHARES[o] <= SHARES[p] and value[o] <= value[p] and (SHARES[o], value[o]) != (SHARES[p], value[p])
            for o in points
        )
        assert (p in front) <= (not beaten)
        assert beaten or any(SHARES[o] == SHARES[p] and value[o] == value[p] for o in front)
    assert set(front) <= set(near_front(MEASURED, points, SHARES))


def test_at_most_half_of_the_points_go_on() -> None:
    result = promoted(MEASURED, POINTS, THRESHOLDS, STATEMENTS, SHARES)
    assert result[0] == UNCHANGED
    assert len(result) <= len(POINTS) // 2
    breaking = next(broken for broken in THRESHOLDS if broken.line.name == UNSTRUCTURED_PRUNING)
    between = [p for p in breaking.points if breaking.found and breaking.found.low <= p.sparsity <= breaking.found.high]
    assert set(between) <= set(result)
    # Far from the break, the floor and the front.
    assert Point(sparsity=0.9, pattern="rows") not in result
    assert Point(change=Change.DROPPED, layers=8) not in result


def test_rungs() -> None:
    assert rungs(60) == [(0, 8), (8, 16), (16, 32)]
    assert rungs(12) == [(0, 8), (8, 12)]
    assert rungs(2) == [(0, 2)]


def test_later_rungs_add_texts_to_some_settings_only() -> None:
    some = results(8)
    chosen = [POINTS[0], *LINES[0].points[3:6]]
    later = results(16, chosen)
    for point in chosen:
        some.add(point, list(later.texts[point].values())[8:], [])
    result = threshold(some, LINES[0], 0)
    assert result is not None
    assert result.found is not None
    assert result.found.low <= 12.0 <= result.found.high


def test_grid_has_every_point_once_and_names_differ() -> None:
    assert len(set(POINTS)) == len(POINTS)
    names = [point.name for point in POINTS]
    assert len(set(names)) == len(names)
    assert {"unchanged", "4 bits", "3 bits, by row", "50 % 2:4", "1 layer dropped", "greedy"} <= set(names)
    assert "4 bits + top-p 0.9" in names
    assert grid((Axis.STRUCTURE,), 2) == [UNCHANGED, *(p for line in lines((Axis.STRUCTURE,), 2) for p in line.points)]
    assert tuple(Axis) == SWEEP_AXES
    assert Point(drawing=Drawing(0.7)).only_decoding
    assert not Point(bits=4, drawing=Drawing(0.7)).only_decoding


def test_wilson() -> None:
    assert share([True] * 10)["low"] == pytest.approx(0.7225, abs=1e-3)
    assert share([]) == {"value": None, "low": None, "high": None, "count": 0, "of": 0}


def test_figures_of_a_cut_distribution_are_infinite(report: dict[str, Any]) -> None:
    row = next(row for row in report["sweep"]["table"] if row["name"] == "top-p 0.9")
    assert row["kl_rc"]["value"] is None
    assert row["unbounded_share"] == 1.0
    assert row["tv"]["value"] is not None
    assert "∞ at 100 %" in terminal.cells(row)
    json.dumps(report, allow_nan=False)


def test_a_base_that_the_reference_fails_is_named(report: dict[str, Any]) -> None:
    assert report["sweep"]["base_too_low"] == []
    failing = report | {"sweep": report["sweep"] | {"base_too_low": ["json_correct"]}}
    assert any(
        "the reference itself has JSON with the right fields in" in text for _, text in terminal.summary(failing)
    )


def test_terminal(report: dict[str, Any]) -> None:
    console = Console(width=260, file=io.StringIO())
    console.print(terminal.render(report))
    text = console.file.getvalue()  # type: ignore[attr-defined]
    for part in ("confirmed: structured pruning breaks", "at 4.0 bits", "unstructured pruning", "half-life", "given"):
        assert part in text
    assert "nan" not in text


def test_names_are_printed_as_they_are(report: dict[str, Any], capsys: pytest.CaptureFixture[str]) -> None:
    named = report | {"reference": report["reference"] | {"name": "a[/INST] [red]b :x:"}, "notes": ["[/bold]"]}
    show(terminal.render(named))
    assert "a[/INST] [red]b :x:" in capsys.readouterr().out


def test_page(report: dict[str, Any]) -> None:
    page = html.render(report)
    assert "<script" not in page
    assert "http" not in page.replace("http-equiv", "")
    assert "&lt;b&gt;model&lt;/b&gt;" in page
    assert "a &lt;note&gt;" in page
    assert "nan" not in re.sub(r"<style>.*?</style>", "", page, flags=re.DOTALL).lower()
    plots = [ElementTree.fromstring(plot) for plot in re.findall(r"<svg.*?</svg>", page, re.DOTALL)]
    assert len(plots) == len(LINES) + 1
    ids = re.findall(r' id="([^"]+)"', page)
    assert len(set(ids)) == len(ids)
    for plot in plots:
        assert_marks_inside(plot)


def test_chromium_in_both_schemes(report: dict[str, Any], tmp_path: Path) -> None:
    for scheme in ((), ("--blink-settings=preferredColorScheme=0",)):
        shown = chromium_markup(html.render(report), tmp_path, *scheme)
        assert "Size against KL(r‖c), with the front" in shown


@pytest.mark.parametrize("y", [[(1e-9, None, None)] * 2, [(1e6, 0.0, 1e7), (1.0, 0.5, 2.0)]])
def test_plots_of_extreme_values(y: list[tuple[float, float | None, float | None]]) -> None:
    ElementTree.fromstring(curve_plot("t", [8, 2], y, [Mark("m", 4.0, (3.0, 5.0))], 1e-12, "bits"))
    ElementTree.fromstring(scatter_plot("t", [Scatter("<k>", [(50.0, y[0][0], "<n>")])], [], "x"))


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ('{"name": "Anna", "age": 21, "city": "Lisbon"}', (True, True)),
        ('```json\n{"name": "Anna", "age": 21, "city": "Lisbon"}\n```', (True, True)),
        ('{"name": "Anna", "age": "21", "city": "Lisbon"}', (True, False)),
        ('Here: {"name": "Anna"}', (False, False)),
        ("[1]", (False, False)),
        ("[" * 100_000, (False, False)),
    ],
)
def test_json_outcome(text: str, expected: tuple[bool, bool]) -> None:
    result = judge(0, Task("p", fields={"name": "Anna", "age": 21, "city": "Lisbon"}), text)
    assert (result.parses, result.correct) == expected


def test_short_outcome() -> None:
    task = Task("p", answers=["Paris"])
    assert judge(0, task, "The capital is Paris.").correct
    assert not judge(0, task, "Parisian").correct
    assert judge(0, task, "Paris").parses is None


def test_packaged_tasks() -> None:
    result = tasks()
    assert [task.kind for task in result[:4]] == ["json", "short"] * 2
    assert len({task.prompt for task in result}) == len(result) == 32
    assert all(task.answers or task.fields for task in result)
    assert json_object("") is None


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--sweep", "http://x:1"], "--sweep: it changes weights, which a server does not give"),
        (["--sweep", "a/b", "--sweep-axes", "bit"], "'bit' is unknown: use some of bits, sparsity"),
        (["--sweep", "a/b", "--sweep-budget", "0"], "'0' is not a positive integer"),
        (["--sweep", "/nowhere/a"], "REFERENCE: there is no folder /nowhere/a"),
        (["--sweep"], "required: REFERENCE"),
        (["--sweep", "a/b", "--given"], "--given: the reference writes a sweep's texts"),
    ],
)
def test_bad_command_line_is_one_line_of_error(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["doctor", *arguments]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


def test_the_world_is_what_it_says() -> None:
    assert loss(UNCHANGED) == 0.0
    assert np.isclose(loss(Point(bits=2)) - loss(Point(bits=3)), 3.001)


def test_progress_says_how_long_it_takes(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    clock = iter([0.0, 0.0, 12.0, 300.0])
    monkeypatch.setattr("hemostat.report.progress.time", SimpleNamespace(monotonic=lambda: next(clock)))
    reporter = Reporter()
    for done in (0, 2, 30):
        reporter.step("points", done, 62)
    assert capsys.readouterr().err.splitlines() == [
        "points: 2 of 62, about 6 minutes left",
        "points: 30 of 62, about 5 minutes left",
    ]
