"""Recording rules, alerts and the example for Alertmanager, checked by Prometheus's own tools."""

from __future__ import annotations

import re
from importlib import resources
from pathlib import Path
from typing import Any

import pytest
import yaml
from tests.support.prometheus import ALERTMANAGER, CONFIG, RULES, RUNBOOK, command, needs, rules

from hemostat.config.operation import Admin

CASES = Path(__file__).with_name("alerts.yaml")
ALERTS = {rule["alert"]: rule for rule in rules() if "alert" in rule}
promtool, amtool = needs("promtool", "prometheus"), needs("amtool", "prometheus-alertmanager")


@promtool
def test_promtool_accepts_the_rules() -> None:
    assert f"{len(rules())} rules found" in command("promtool", "check", "rules", "--lint-fatal", RULES)
    command("promtool", "check", "config", "--syntax-only", CONFIG)


@promtool
def test_alerts_fire_when_they_should_and_only_then() -> None:
    assert "SUCCESS" in command("promtool", "test", "rules", CASES)


@promtool
def test_promtool_finds_mistakes(tmp_path: Path) -> None:
    (tmp_path / "rules.yaml").write_text(RULES.read_text().replace("sum by (job, namespace)", "sum by job", 1))
    with pytest.raises(AssertionError, match="parse error"):
        command("promtool", "check", "rules", tmp_path / "rules.yaml")
    (tmp_path / "rules.yaml").write_text(RULES.read_text().replace("== 1\n", "== 2\n", 1))
    (tmp_path / "cases.yaml").write_text(
        CASES.read_text().replace("../../helm/hemostat/rules/hemostat.yaml", "rules.yaml")
    )
    with pytest.raises(AssertionError, match="alertname: HemostatHemorrhage"):
        command("promtool", "test", "rules", tmp_path / "cases.yaml")


@pytest.mark.parametrize("alert", ALERTS)
def test_every_alert_has_cases_in_which_it_fires_and_in_which_it_does_not(alert: str) -> None:
    cases = [c for test in yaml.safe_load(CASES.read_text())["tests"] for c in test.get("alert_rule_test", [])]
    expected = [bool(case["exp_alerts"]) for case in cases if case["alertname"] == alert]
    assert True in expected
    assert False in expected


def test_every_record_has_a_case() -> None:
    cases = [c for test in yaml.safe_load(CASES.read_text())["tests"] for c in test.get("promql_expr_test", [])]
    for rule in rules():
        if "record" in rule:
            assert any(rule["record"] in case["expr"] for case in cases), rule["record"]


def anchors(page: str) -> set[str]:
    """Anchors of a Markdown page's headings, as GitHub makes them."""
    headings = re.findall(r"^#{1,6} +(.+?) *$", page, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("alert", ALERTS)
def test_every_alert_has_a_description_and_a_section_in_the_runbook(alert: str) -> None:
    rule: dict[str, Any] = ALERTS[alert]
    assert rule["labels"]["severity"] in {"critical", "warning"}
    assert set(rule["annotations"]) == {"summary", "description", "runbook_url"}
    page, _, anchor = rule["annotations"]["runbook_url"].partition("#")
    assert page == f"http://localhost:{Admin().port}/runbook"
    assert anchor == alert.lower()
    assert anchor in anchors(RUNBOOK.read_text())
    assert f'<h2 id="{anchor}">' in resources.files("hemostat.admin.console").joinpath("runbook.html").read_text()


@amtool
def test_the_alertmanager_example_is_valid_and_routes_by_severity(tmp_path: Path) -> None:
    command("amtool", "check-config", ALERTMANAGER)
    who = {"critical": "on-call", "warning": "team"}
    for name, rule in ALERTS.items():
        labels = [f"alertname={name}", f"severity={rule['labels']['severity']}"]
        told = command("amtool", "config", "routes", "test", f"--config.file={ALERTMANAGER}", *labels)
        assert told.split() == [who[rule["labels"]["severity"]]], name
    example = yaml.safe_load(ALERTMANAGER.read_text())
    for rule in example["inhibit_rules"]:
        for matcher in rule["source_matchers"] + rule["target_matchers"]:
            _, sign, value = re.split(r"(=~?)", matcher)
            pattern = value.strip('"') if sign == "=~" else re.escape(value.strip('"'))
            assert any(re.fullmatch(pattern, name) for name in ALERTS), f"no such alert: {matcher}"
    (tmp_path / "wrong.yaml").write_text(ALERTMANAGER.read_text().replace("receiver: on-call", "receiver: nobody"))
    with pytest.raises(AssertionError, match="nobody"):
        command("amtool", "check-config", tmp_path / "wrong.yaml")
