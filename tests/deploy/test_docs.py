"""The documentation matches the code: generated pages are current, every name exists, no link is broken."""

from __future__ import annotations

import ast
import functools
import html
import importlib
import json
import re
import shutil
import subprocess
import textwrap
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import jsonschema
import pytest
import yaml
from tests.support.paths import ROOT

from hemostat.admin.access import ACCESS
from hemostat.admin.alerts import ALERTS
from hemostat.cli import commands
from hemostat.config.schema import LEAVES
from hemostat.engines.messages import EVENTS
from hemostat.interception.profile_choice import ArmReason
from hemostat.ipc.ends import OUTCOMES
from hemostat.measurement.figures import HEADLINE
from hemostat.metrics.catalogue import METRICS
from hemostat.metrics.reasons import UNJUDGED
from hemostat.openai.requests import Uncalibrated
from hemostat.openai.routes import ADAPTER_ROUTE_REFUSED
from hemostat.profiles.decisions import Decision, Reason
from hemostat.relay.request_budget import MEMORY_EXHAUSTED, UPLOADS_EXHAUSTED

DEPLOY = ROOT / "deploy"
DOCS = ROOT / "docs"
NOT_METRICS = {
    *(
        "hemostat_calibration",
        "hemostat_engine",
        "hemostat_lab",
        "hemostat_shadow",
        "hemostat_tap",
        "hemostat_tap_top",
        "hemostat_force",
    ),
    *("hemostat_checksums", "hemostat_kv_precision", "hemostat_mac", "hemostat_shadow", "hemostat_vllm"),
}
"""Names with the prefix of metrics that are not metrics: packages, keys of `vllm_xargs`, and a wheel."""


def script(name: str) -> ModuleType:
    """A Python file of deploy/."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(DEPLOY))
        return importlib.import_module(name)


@pytest.fixture(scope="module")
def reference() -> ModuleType:
    """deploy/metrics.py"""
    return script("metrics")


@functools.cache
def generated() -> dict[Path, str]:
    """The pages of docs/reference/ as the code makes them now."""
    return {DOCS / "reference" / name: page() for name, page in script("reference").PAGES.items()}


def text_of(path: Path) -> str:
    return path.read_text()


# --- the reference ----------------------------------------------------------------------------------------------------


def test_the_committed_reference_is_what_the_code_makes() -> None:
    committed = {path: path.read_text() for path in (DOCS / "reference").glob("*")}
    stale = sorted(path.name for path in committed | generated() if committed.get(path) != generated().get(path))
    assert stale == [], "run `make docs`, and commit docs/reference/"


def test_every_item_of_the_reference_has_a_text() -> None:
    """A setting, a route, an error, a metric, the value of a label: the last cell of its row."""
    rows = [line for page in generated().values() for line in page.splitlines() if line.startswith("| `")]
    assert len(rows) > 400
    assert [row for row in rows if re.search(r"\| *\|$", row)] == []


def test_the_reference_has_every_setting_route_command_and_alert() -> None:
    pages = {path.stem: text for path, text in generated().items()}
    keys = {
        f"{section}.{key}" if section.islower() and " " not in section else key
        for part in pages["settings"].split("\n## ")[1:]
        for section in [part.partition("\n")[0]]
        for key in re.findall(r"^\| `(\w+)` \|", part.partition("\n### ")[0], re.MULTILINE)
    }
    assert keys == set(LEAVES)
    routes = re.findall(r"^\| `(\w+) (/\S*)` \|", pages["http-api"], re.MULTILINE)
    assert routes == list(ACCESS)
    assert set(commands()) <= set(re.findall(r"^## hemostat (.+)$", pages["command-line"], re.MULTILINE))
    assert re.findall(r"^## (.+)$", pages["alerts"], re.MULTILINE) == list(alerts())


def test_every_argument_of_the_command_line_has_a_help() -> None:
    actions = [(name, action) for name, parser in script("reference").parsers() for action in parser._actions]
    assert [(name, action.dest) for name, action in actions if not action.help and not action.choices] == []


def test_errors_that_clients_can_get_are_in_the_reference() -> None:
    page = text_of(DOCS / "reference" / "errors.md")
    statuses = set(map(int, re.findall(r"^\| (\d{3}) \|", page, re.MULTILINE)))
    assert statuses >= {400, 403, 408, 413, 429, 431, 501, 502, 503}
    for message in (MEMORY_EXHAUSTED, UPLOADS_EXHAUSTED, ADAPTER_ROUTE_REFUSED):
        assert f" | {message} |" in page


def test_units_are_those_of_the_names() -> None:
    for name, metric in METRICS.items():
        match = re.search(r"_(seconds|nats|tokens|ratio|info)(_total)?$", name)
        if match and name != "hemostat_top1_agreement_tokens_total":
            assert metric.unit.startswith({"info": "1"}.get(match[1], match[1])), name


def test_every_label_is_explained(reference: ModuleType) -> None:
    for name, metric in METRICS.items():
        for label in metric.labels:
            assert reference.meaning(name, label), (name, label)
    assert set(reference.LABELS) == {label for metric in METRICS.values() for label in metric.labels}
    assert set(reference.meaning("hemostat_requests_total", "outcome")) == set(OUTCOMES)
    assert set(reference.HEADLINES) == set(HEADLINE)
    assert set(reference.meaning("hemostat_profile_decisions_total", "decision")) == set(Decision)
    assert set(reference.meaning("hemostat_profile_decisions_total", "reason")) == set(Reason)


def calls(path: Path, *names: str) -> Iterator[ast.Call]:
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Call):
            called = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
            if called in names:
                yield node


def texts(node: ast.AST) -> Iterator[str]:
    """What an expression may be: a constant, or either branch of a conditional; of an f-string the start."""
    match node:
        case ast.Constant(value=str(text)):
            yield text
        case ast.IfExp():
            yield from texts(node.body)
            yield from texts(node.orelse)
        case ast.JoinedStr(values=[ast.Constant(value=str(text)), *_]):
            yield f"{text}…"


def test_every_reason_of_an_arm_is_explained(reference: ModuleType) -> None:
    explained = {reason for name in reference.CALIBRATION_REASONS for reason in name.split(", ")}
    assert explained == {*ArmReason, *Uncalibrated, *UNJUDGED}


def test_every_event_of_the_engine_is_explained(reference: ModuleType) -> None:
    engine = ROOT / "calibration" / "hemostat_engine"
    result = {
        text
        for path in engine.rglob("*.py")
        for call in calls(path, "add")
        for text in texts(call.args[0])
        if call.args
    }
    # What is counted on the device is named where the tally is made.
    result |= {name.value for call in calls(engine / "core.py", "DeviceCounters") for name in call.args[1].elts}
    assert set(reference.ENGINE_EVENTS) == EVENTS == result


# --- the runbook ------------------------------------------------------------------------------------------------------


def alerts() -> dict[str, dict[str, Any]]:
    rules = yaml.safe_load((ROOT / "helm" / "hemostat" / "rules" / "hemostat.yaml").read_text())
    return {rule["alert"]: rule for group in rules["groups"] for rule in group["rules"] if "alert" in rule}


def test_the_runbook_has_a_section_for_every_alert_and_no_other() -> None:
    page = (DOCS / "runbook.md").read_text()
    sections = re.findall(r"^## (Hemostat\w+)$", page, re.MULTILINE)
    assert sections == list(alerts())
    for name, rule in alerts().items():
        assert rule["annotations"]["runbook_url"].partition("#")[2] == name.lower() in anchors(DOCS / "runbook.md")
        body = page.split(f"## {name}\n")[1].split("\n## ")[0]
        titles = re.findall(r"^\*\*(.+?)\*\*", body, re.MULTILINE)
        assert titles == [
            "Are clients affected? Act now or tomorrow?",
            "What it means.",
            "What to look at.",
            "What to do.",
            "What not to conclude.",
        ], name
        first = " ".join(body.strip().partition("\n\n")[0].split())
        assert first == f"**{titles[0]}** {ALERTS[name].clients} {ALERTS[name].act}", name


def test_the_console_serves_the_whole_runbook() -> None:
    """All of its text, every heading with its anchor, and no link to a file, because the admin port serves no files."""
    made = script("runbook")
    page = made.PAGE.read_text()
    assert page == made.page(), "run `make docs`"
    assert set(re.findall(r'<h[12] id="([^"]+)">', page)) == anchors(DOCS / "runbook.md")
    leading = set(re.findall(r'href="([^"]+)"', page)) - {"data:,", "console/console.css", "."}
    assert {link for link in leading if not link.startswith("https://")} <= {
        f"#{anchor}" for anchor in anchors(DOCS / "runbook.md")
    }
    words = re.findall(r"\w{4,}", re.sub(r"\]\([^)]*\)", "]", (DOCS / "runbook.md").read_text()))
    shown = re.findall(r"\w{4,}", html.unescape(re.sub(r"<[^>]*>", "", page.partition("<main")[2])))
    assert shown[shown.index("Runbook") :] == words


def test_panels_that_pages_name_exist() -> None:
    titles: set[str] = set()
    for path in (ROOT / "helm" / "hemostat" / "dashboards").glob("*.json"):
        board = json.loads(path.read_text())
        titles |= {board["title"].removeprefix("Hemostat / "), *(panel["title"] for panel in board["panels"])}
    for name in ("runbook.md", "reading-the-figures.md"):
        named = set(re.findall(r"(?<!\*)\*([A-Z][^*\n]+)\*(?!\*)", (DOCS / name).read_text()))
        assert named, name
        assert named <= titles, name


# --- metrics that pages name ------------------------------------------------------------------------------------------


def tracked(pattern: str) -> list[Path]:
    listed = subprocess.run(
        ["git", "-C", str(ROOT), "ls-files", "--cached", "--others", "--exclude-standard", pattern],
        capture_output=True,
        text=True,
        check=False,
    )
    if listed.returncode:  # no clone: an archive of it
        return [path for path in ROOT.rglob(pattern) if not {".venv", "build"} & set(path.relative_to(ROOT).parts)]
    return [ROOT / line for line in listed.stdout.splitlines() if (ROOT / line).is_file()]


PAGES = tracked("*.md")
REMOVED_METRICS = {
    *("hemostat_position_kl_nats_total", "hemostat_position_kl_tokens_total", "hemostat_context_kl_nats_total"),
    *("hemostat_context_kl_tokens_total", "hemostat_phase_kl_nats_total", "hemostat_phase_kl_tokens_total"),
    *("hemostat_kind_recovered_divergence_ratio", "hemostat_profile_rollbacks_total"),
    *("hemostat_calibration_errors_total", "hemostat_outcome_errors_total", "hemostat_tracing_errors_total"),
    "hemostat_adapter_judge_dropped_total",
}
"""The metrics of earlier versions, which the changelog names."""


@pytest.mark.parametrize("path", PAGES, ids=lambda path: str(path.relative_to(ROOT)))
def test_metrics_that_a_page_names_exist(path: Path) -> None:
    suffixes = r"(_bucket|_sum|_count)?$"
    known = set(METRICS) | {name.removesuffix("_total") for name in METRICS} | NOT_METRICS
    if path.name == "CHANGELOG.md" or path.parent.name == "changelog":
        assert not REMOVED_METRICS & set(METRICS)
        known |= REMOVED_METRICS
    for name in re.findall(r"\bhemostat_[a-z0-9_]*[a-z0-9]\b", path.read_text()):
        assert re.sub(suffixes, "", name) in known, name


# --- links ------------------------------------------------------------------------------------------------------------


def anchors(path: Path) -> set[str]:
    """Of a page's headings, as GitHub makes them."""
    result: set[str] = set()
    text = re.sub(r"^(```|~~~).*?^\1", "", text_of(path), flags=re.MULTILINE | re.DOTALL)
    for heading in re.findall(r"^#{1,6} +(.*?) *#*$", text, re.MULTILINE):
        plain = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading)
        anchor = re.sub(r"[^\w\- ]", "", plain.lower()).replace(" ", "-")
        n = 0
        while (anchor if not n else f"{anchor}-{n}") in result:
            n += 1
        result.add(anchor if not n else f"{anchor}-{n}")
    return result


def links(path: Path) -> list[str]:
    """Targets of a page's links and images, without code."""
    text = re.sub(r"^(```|~~~).*?^\1", "", text_of(path), flags=re.MULTILINE | re.DOTALL)
    text = re.sub(r"`[^`\n]*`", "", text)
    inline = re.findall(r"\]\(<?([^)\s>]+)>?(?:\s+\"[^\"]*\")?\)", text)
    return [
        *inline,
        *re.findall(r"^\[[^\]]+\]:\s+(\S+)", text, re.MULTILINE),
        *re.findall(r'(?:href|src)="([^"]+)"', text),
    ]


def dead(path: Path, root: Path = ROOT) -> list[str]:
    result = []
    for link in links(path):
        if re.match(r"[a-z]+:", link):
            continue
        target, _, anchor = link.partition("#")
        to = (path.parent / target).resolve() if target else path
        # A folder has no page on the site.
        exists = to.is_file()
        if not exists or not to.is_relative_to(root) or (anchor and anchor not in anchors(to)):
            result.append(link)
    return result


@pytest.mark.parametrize("path", PAGES, ids=lambda path: str(path.relative_to(ROOT)))
def test_every_link_has_a_target(path: Path) -> None:
    assert dead(path) == []


def test_every_link_of_the_reference_has_a_target() -> None:
    assert [link for path in generated() for link in dead(path)] == []


def test_a_broken_link_is_found(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text(
        "# A heading: with `code`\n[a](#a-heading-with-code) [b](#b) [c](c.md)\n```\n[d](d.md)\n```\n`[e](e)`\n"
    )
    assert dead(page, tmp_path) == ["#b", "c.md"]
    assert anchors(page) == {"a-heading-with-code"}
    page.write_text("[a folder](.)")
    assert dead(page, tmp_path) == ["."]


def test_every_page_of_the_documentation_is_linked_from_the_index() -> None:
    pages = {path.name for path in DOCS.glob("*.md")}
    assert {DOCS / name for name in pages} <= set(PAGES)
    assert "docs/index.md" in links(ROOT / "README.md")
    assert {link.partition("#")[0] for link in links(DOCS / "index.md")} >= pages - {"index.md"}


def test_each_kind_of_broken_link_ends_the_build_of_the_site() -> None:
    """MkDocs only logs some of them unless it is told to warn; with `--strict` a warning is an error."""
    links = yaml.safe_load((ROOT / "mkdocs.yml").read_text())["validation"]["links"]
    assert links == dict.fromkeys(("not_found", "anchors", "absolute_links", "unrecognized_links"), "warn")
    assert '"--strict"' in (ROOT / "deploy" / "site.py").read_text()


def test_the_laboratory_notes_are_not_among_the_pages_of_the_site() -> None:
    assert "not_in_nav: /docs/lab/" in (ROOT / "mkdocs.yml").read_text()


def test_the_readme_shows_the_two_commands_and_the_console() -> None:
    text = (ROOT / "README.md").read_text()
    assert max(map(len, text.splitlines())) <= 120
    assert re.search(r"^make demo\b", text, re.MULTILINE)
    assert re.search(r"^make test\b", text, re.MULTILINE)
    assert "docs/console/alarm.png" in links(ROOT / "README.md")


# --- examples ---------------------------------------------------------------------------------------------------------


def shown(name: str) -> list[str]:
    """The YAML that a page shows, in order."""
    text = (ROOT / name).read_text()
    blocks = re.findall(r"^ *```yaml\n(.*?)^ *```", text, re.MULTILINE | re.DOTALL)
    return [textwrap.dedent(block) for block in blocks] + re.findall(
        r"<<'END'\n(.*?)^END$", text, re.MULTILINE | re.DOTALL
    )


def test_the_step_for_kubernetes_keeps_what_is_learned_and_has_the_references_checkpoint() -> None:
    (values,) = (text for text in shown("docs/operations.md") if "claimName: models" in text)
    given = yaml.safe_load(values)
    assert given["persistence"]["enabled"]
    assert given["config"]["store"]["url"].startswith("sqlite:////data/")
    mounts = [mount["mountPath"] for mount in given["extraVolumeMounts"]]
    assert any(given["config"]["reference"]["folder"].startswith(f"{mount}/") for mount in mounts)
    (command,) = re.findall(
        r"^python -m vllm.entrypoints.openai.api_server --model /models/my-model .*\n.*$",
        text_of(DOCS / "operations.md"),
        re.MULTILINE,
    )
    assert "--runner pooling" in command


def test_the_pages_values_are_valid() -> None:
    """Of the chart: as shown, with an upstream where the page leaves that to the reader."""
    schema = json.loads((ROOT / "helm" / "hemostat" / "values.schema.json").read_text())
    defaults = yaml.safe_load((ROOT / "helm" / "hemostat" / "values.yaml").read_text())
    pages = (*shown("docs/operations.md"), *shown("helm/hemostat/README.md"))
    blocks = [block for text in pages for block in yaml.safe_load_all(text)]
    values = [block for block in blocks if block.keys() <= defaults.keys()]
    assert len(values) == 9
    for block in values:
        engine = {"engine": {"enabled": True, "model": "m"}}
        given = engine if "engine" in block else {"upstream": {"url": "http://vllm:8000"}}
        jsonschema.validate(merged(merged(defaults, given), block), schema)


def test_the_pages_scrape_configuration_is_valid(tmp_path: Path) -> None:
    if shutil.which("promtool") is None:
        pytest.skip("promtool is not here; on Debian or Ubuntu: apt-get install prometheus")
    (block,) = (block for block in shown("docs/operations.md") if "scrape_configs" in block)
    (tmp_path / "prometheus.yml").write_text(block)
    shutil.copy(ROOT / "helm" / "hemostat" / "rules" / "hemostat.yaml", tmp_path)
    command = ["promtool", "check", "config", str(tmp_path / "prometheus.yml")]
    said = subprocess.run(command, capture_output=True, text=True, check=False)
    assert said.returncode == 0, said.stdout + said.stderr
    assert "1 rule files found" in said.stdout


def test_operations_lists_exactly_the_variables_of_compose() -> None:
    example = re.findall(r"^([A-Z_]+)=", (DEPLOY / ".env.example").read_text(), re.MULTILINE)
    page = (DOCS / "operations.md").read_text()
    section = page.partition("### What to change")[2].partition("In [`deploy/hemostat.yaml`]")[0]
    named = set(re.findall(r"`([A-Z]+(?:_[A-Z]+)+)`", section))
    assert named == set(example)


def test_where_does_it_go_names_files_that_exist() -> None:
    section = (ROOT / "CONTRIBUTING.md").read_text().partition("## Where does it go\n")[2].partition("\n## ")[0]
    named = [name for name in re.findall(r"`([^`\s]+)`", section) if "/" in name or name.endswith(".py")]
    assert len(named) > 20
    tops = ("calibration/", "deploy/", "docs/", "helm/", "middleware/", "tests/")
    laboratory = ROOT / "middleware" / "lab"
    paths = [
        ROOT / name
        if name.startswith(tops)
        else (laboratory if name.startswith("hemostat_lab/") else ROOT / "middleware" / "hemostat") / name
        for name in named
    ]
    assert [path for path in paths if not path.exists()] == []


def test_the_way_of_a_request_names_files_that_exist() -> None:
    section = (ROOT / "CONTRIBUTING.md").read_text().partition("## One request, from the relay to the metrics\n")[2]
    named = re.findall(r"`([a-z_/]+(?:\.py|/))`", section.partition("\n## ")[0])
    assert len(named) > 20
    known = [
        ROOT / name if name.startswith(("middleware/", "calibration/")) else ROOT / "middleware" / "hemostat" / name
        for name in named
    ]
    assert [path for path in known if not path.exists()] == []


def test_the_tree_in_contributing_has_every_package_and_module() -> None:
    """The tree has one line per folder, and below the packages one line per group of their parts."""
    lines = (ROOT / "CONTRIBUTING.md").read_text().partition("```\n")[2].partition("```")[0].splitlines()
    named: dict[Path, set[str]] = {}
    for line in lines:
        names = re.split(r" {2,}", line.strip(), maxsplit=1)[0].split(", ")
        if line.startswith(" "):
            named[list(named)[-1]] |= set(names)
        else:
            named[ROOT / names[0]] = set()
    assert [folder for folder in named if not folder.is_dir()] == []
    for package in ("middleware/hemostat", "middleware/lab/hemostat_lab", "calibration/hemostat_calibration"):
        inside = {f"{path.parent.name}/" for path in (ROOT / package).glob("*/__init__.py")}
        inside |= {path.stem for path in (ROOT / package).glob("[!_.]*.py")}
        assert named[ROOT / package] == inside, package


def merged(below: dict[str, Any], above: dict[str, Any]) -> dict[str, Any]:
    """Merged as helm merges values into those of a chart."""
    both = {key: merged(below[key], above[key]) for key in below.keys() & above.keys() if isinstance(below[key], dict)}
    return below | above | both
