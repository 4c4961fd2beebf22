"""The dashboards are valid by Grafana's own schema, and their queries read exported metrics only."""

from __future__ import annotations

import itertools
import json
import re
import subprocess
from pathlib import Path
from typing import Any

import pytest
from jsonschema import Draft7Validator, ValidationError
from tests.support.dashboards import ALL, EMPTY_LIVE, Query, Used, about_adapters, load, panels, queries, used
from tests.support.prometheus import RUNBOOK, needs, rules

from hemostat.metrics.catalogue import METRICS

GRAFANA = ["@grafana/schema@13.2.3", "ts-json-schema-generator@2.10.0"]
"""From npm: Grafana's types, and a generator that makes a JSON schema of them."""
TARGET = {"job", "instance", "namespace", "pod"}
"""Labels that Prometheus itself adds."""


def exported() -> dict[str, set[str]]:
    """Labels by series name, the recording rules' included."""
    result: dict[str, set[str]] = {}
    for name, metric in METRICS.items():
        labels = TARGET | set(metric.labels)
        if metric.kind == "histogram":
            result |= {f"{name}_bucket": labels | {"le"}, f"{name}_sum": labels, f"{name}_count": labels}
        else:
            result[name] = labels
    return result


@pytest.mark.parametrize("query", queries(), ids=str)
def test_every_query_reads_what_is_exported(query: Query) -> None:
    """Types and syntax, too: `used` parses it."""
    reads = used(query.with_values(ALL), query.legend)
    assert reads
    for selected in reads:
        assert selected.metric in exported(), f"{selected.metric} is not exported"
        assert selected.labels <= exported()[selected.metric], selected
        assert "namespace" in selected.labels or selected.metric == "hemostat_model_info", (
            "variables narrow every query"
        )


def test_every_rule_reads_what_is_exported() -> None:
    known = exported()
    for rule in rules():
        reads = used(rule["expr"])
        for selected in reads:
            assert selected.metric in known, f"{selected.metric} is not exported"
            assert selected.labels <= known[selected.metric], selected
        if "record" in rule:
            known[rule["record"]] = TARGET | set().union(*(known[selected.metric] for selected in reads))


def test_the_runbooks_queries_read_what_is_exported() -> None:
    spans = re.findall(r"`([^`\n]*hemostat_\w+[({\[][^`\n]*)`", RUNBOOK.read_text())
    asked = [span.replace("$NS", "n") for span in spans]
    assert asked
    for selected in (selected for expression in asked for selected in used(expression)):
        assert selected.metric in exported(), f"{selected.metric} is not exported"
        assert selected.labels <= exported()[selected.metric], selected


def test_every_metric_is_read_by_a_panel_an_alert_or_a_step_of_the_runbook() -> None:
    texts = [*(query.expression for query in queries()), *(rule["expr"] for rule in rules()), RUNBOOK.read_text()]
    read = set(re.findall(r"hemostat_\w+", " ".join(texts)))
    unread = [name for name in METRICS if not read & {name, f"{name}_bucket", f"{name}_sum", f"{name}_count"}]
    assert unread == [], "what nobody reads goes"


def test_the_query_reader_finds_mistakes() -> None:
    assert used('sum by (a) (rate(x_total{n="v"}[5m]) and on (i) y) / on (a) group_left sum by (a) (z)') == [
        Used("x_total", frozenset({"a", "n", "i"})),
        Used("y", frozenset({"i"})),
        Used("z", frozenset({"a"})),
    ]
    assert used("histogram_quantile(0.5, sum by (le) (x_bucket))") == [Used("x_bucket", frozenset({"le"}))]
    with pytest.raises(ValueError, match="expected type matrix"):
        used("rate(x)")
    with pytest.raises(ValueError, match="unclosed"):
        used("sum(x")
    for gone in ("histogram_quantile(0.5, sum(x_bucket))", "sum(x) and on (instance) y"):
        with pytest.raises(AssertionError, match="are gone after"):
            used(gone)


@pytest.mark.parametrize("name", load())
def test_every_dashboard_has_the_variables_and_every_panel_a_question(name: str) -> None:
    dashboard = load()[name]
    variables = {variable["name"] for variable in dashboard["templating"]["list"]}
    assert variables == {"DS_PROMETHEUS", *ALL}
    for variable in ALL:
        assert any(f"${variable}" in query.expression for query in queries() if query.dashboard == name), variable
    for panel in dashboard["panels"]:
        sources = [panel, *panel["targets"]] if panel["type"] != "row" else []
        assert all(source["datasource"] == {"type": "prometheus", "uid": "${DS_PROMETHEUS}"} for source in sources)
    for panel in panels(dashboard):
        title, shown = panel["title"], panel["fieldConfig"]["defaults"]
        assert "?" in panel["description"], f"{title}: the question that it answers"
        assert shown["unit"] not in {"", "none"}, title
        assert shown["thresholds"]["steps"], title
    assert len({panel["id"] for panel in dashboard["panels"]}) == len(dashboard["panels"])
    assert len({panel["title"] for panel in dashboard["panels"]}) == len(dashboard["panels"])


def test_a_panel_that_may_be_empty_says_when() -> None:
    for query in queries():
        if about_adapters(query) or query.where in EMPTY_LIVE:
            title = query.where.rpartition(" (")[0]
            (panel,) = [panel for panel in panels(load()[query.dashboard]) if panel["title"] == title]
            assert "Empty" in panel["description"], title


def test_the_overview_begins_like_the_consoles() -> None:
    """What is wrong, worst first; then traffic, cost, profile and measurement; then the divergence over time."""
    shown = sorted(panels(load()["overview"]), key=lambda panel: (panel["gridPos"]["y"], panel["gridPos"]["x"]))
    wrong = ["vLLM", "Failed requests", "Reference", "Store errors, last 15 minutes", "Alarm", "Configuration"]
    tiles = [
        "Requests",
        "KL, lower bound",
        "Same top-1",
        "Recovered divergence",
        "Profile by kind of traffic",
        "Coverage, last 30 minutes",
    ]
    assert [panel["title"] for panel in shown[:13]] == [
        *wrong,
        *tiles,
        "KL(reference‖compressed) since the start, with its interval",
    ]


def test_no_two_panels_overlap() -> None:
    for name, dashboard in load().items():
        for panel, other in itertools.combinations(dashboard["panels"], 2):
            a, b = panel["gridPos"], other["gridPos"]
            apart = (
                a["x"] + a["w"] <= b["x"]
                or b["x"] + b["w"] <= a["x"]
                or a["y"] + a["h"] <= b["y"]
                or b["y"] + b["h"] <= a["y"]
            )
            assert apart, f"{name}: {panel['title']} and {other['title']}"
            assert a["x"] + a["w"] <= 24


def test_dashboards_have_distinct_uids() -> None:
    uids = [dashboard["uid"] for dashboard in load().values()]
    assert sorted(uids) == ["hemostat-calibration", "hemostat-overview", "hemostat-shadow"]


@pytest.fixture(scope="module")
def grafana(tmp_path_factory: pytest.TempPathFactory) -> Draft7Validator:
    """The JSON schema of dashboard.ts; npm fetches Grafana's types into a temporary folder."""
    folder = tmp_path_factory.mktemp("grafana")
    (folder / "package.json").write_text("{}")
    options = {"module": "esnext", "moduleResolution": "bundler", "strict": True, "skipLibCheck": True}
    (folder / "tsconfig.json").write_text(json.dumps({"compilerOptions": options}))
    (folder / "dashboard.ts").write_text((Path(__file__).parent / "dashboard.ts").read_text())
    quiet = ["--no-audit", "--no-fund", "--no-package-lock", "--ignore-scripts"]
    fetched = _call(folder, "npm", "install", *quiet, *GRAFANA)
    if fetched.returncode != 0:
        pytest.skip(f"npm could not install {' '.join(GRAFANA)}: {fetched.stderr[-500:]}")
    flags = ["--tsconfig", "tsconfig.json", "--path", "dashboard.ts", "--type", "OurDashboard"]
    made = _call(folder, "node_modules/.bin/ts-json-schema-generator", *flags)
    assert made.returncode == 0, made.stderr
    schema = json.loads(made.stdout)
    Draft7Validator.check_schema(schema)
    return Draft7Validator(schema)


def _call(folder: Path, *command: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=120, check=False)


def complaints(grafana: Draft7Validator, dashboard: Any) -> list[str]:
    """The schema's errors; for a panel, those of the best matching kind."""

    def told(error: ValidationError) -> list[str]:
        kinds = [list(tried) for _, tried in itertools.groupby(error.context or [], lambda inner: inner.schema_path[0])]
        if not kinds:
            return [f"{error.json_path}: {error.message}"]
        return [text for inner in min(kinds, key=len) for text in told(inner)]

    return [text for error in grafana.iter_errors(dashboard) for text in told(error)]


@needs("npm", "npm")
@pytest.mark.parametrize("name", load())
def test_every_dashboard_is_valid_by_grafanas_schema(grafana: Draft7Validator, name: str) -> None:
    assert complaints(grafana, load()[name]) == []


@needs("npm", "npm")
def test_the_schema_finds_mistakes(grafana: Draft7Validator) -> None:
    for change in (
        lambda d, p: d.update(refresh=30),
        lambda d, p: d.update(tags="hemostat"),
        lambda d, p: d["templating"]["list"][0].update(hide="no"),
        lambda d, p: p["options"].update(colourMode="value"),
        lambda d, p: p["options"].update(graphMode="fancy"),
        lambda d, p: p["fieldConfig"]["defaults"]["thresholds"].update(mode="relative"),
        lambda d, p: p["fieldConfig"]["defaults"].update(units="s"),
        lambda d, p: p["targets"][0].pop("expr"),
        lambda d, p: p["gridPos"].pop("h"),
        lambda d, p: p.pop("type"),
    ):
        dashboard = load()["overview"]
        (panel,) = [panel for panel in dashboard["panels"] if panel["title"] == "Alarm"]
        change(dashboard, panel)
        assert complaints(grafana, dashboard)
