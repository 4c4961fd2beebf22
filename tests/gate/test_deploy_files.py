"""The files in deploy/gate: objects for Argo Rollouts and Flagger, and workflows, whose commands are run."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml
from prometheus_client import CollectorRegistry, start_http_server
from tests.support import helm_crds
from tests.support.fake_vllm import FakeVllm
from tests.support.gate_servers import servers
from tests.support.paths import ROOT, SOURCES
from tests.support.prometheus import needs, prometheus
from tests.support.stack import wait_for

from hemostat.admin.access import ACCESS, Access
from hemostat.cli import main
from hemostat.gate.live.report import as_json
from hemostat.gate.live.stored import STATES
from hemostat.metrics import names
from hemostat.metrics.collector import HemostatCollector
from hemostat.metrics.samples import Sample
from hemostat_lab.demo.vllm_server import free_port

FOLDER = ROOT / "deploy" / "gate"
FAIL, UNDECIDED = 1, 2


def objects(name: str) -> dict[str, dict[str, Any]]:
    """Returns the objects of a file, by kind and name."""
    return {
        f"{each['kind']} {each['metadata']['name']}": each for each in yaml.safe_load_all((FOLDER / name).read_text())
    }


ARGO, FLAGGER = objects("argo-rollouts.yaml"), objects("flagger.yaml")
CANARY = FLAGGER["Canary vllm"]["spec"]["analysis"]


@pytest.mark.parametrize("named", [*ARGO, *FLAGGER])
def test_objects_fit_the_schemas_of_their_controllers(named: str) -> None:
    """The schemas have the fields that these objects may set; the controllers' own have more."""
    made = (ARGO | FLAGGER)[named]
    schema: dict[str, Any] = {
        "AnalysisTemplate": helm_crds.ANALYSIS_TEMPLATE,
        "MetricTemplate": helm_crds.METRIC_TEMPLATE,
        "Canary": helm_crds.CANARY,
    }[made["kind"]]
    jsonschema.Draft7Validator(schema).validate(made | {"metadata": made["metadata"] | {"namespace": "n"}})


def test_of_the_live_gate_only_a_pass_promotes_and_only_a_fail_aborts() -> None:
    """Every other state fulfils neither condition, which Argo Rollouts takes for an inconclusive measurement."""
    (metric,) = ARGO["AnalysisTemplate hemostat-gate-live"]["spec"]["metrics"]
    web = metric["provider"]["web"]
    assert web["jsonPath"] == "{$.state}"
    assert as_json("none", "", None, None, None)["state"] == "none"  # type: ignore[arg-type]
    assert ACCESS["GET", web["url"].removeprefix("{{args.admin-url}}")] is Access.OPEN
    assert {"pass", "fail", "undecided", "running"} <= set(STATES)
    assert [state for state in STATES if metric["successCondition"] == f'result == "{state}"'] == ["pass"]
    assert [state for state in STATES if metric["failureCondition"] == f'result == "{state}"'] == ["fail"]
    assert metric["count"] > metric["inconclusiveLimit"], "the run would succeed before it is inconclusive"
    assert (metric["consecutiveSuccessLimit"], metric["failureLimit"]) == (1, 0)


def test_the_job_runs_the_gate(prompts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    spec = ARGO["AnalysisTemplate hemostat-gate-job"]["spec"]
    pod = spec["metrics"][0]["provider"]["job"]["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    assert {mount["name"] for mount in container["volumeMounts"]} == {volume["name"] for volume in pod["volumes"]}
    with servers(FakeVllm(), FakeVllm(noise=1.0)) as (stable, other):
        given = {"stable-url": stable, "candidate-url": other}
        assert {arg["name"] for arg in spec["args"] if "value" not in arg} == given.keys()
        words = [re.sub(r"{{args\.([a-z-]+)}}", lambda match: given[match[1]], word) for word in container["args"]]
        words = [word.replace("/prompts/prompts.jsonl", str(prompts)) for word in words]
        assert main([word.replace("/evidence", str(tmp_path)) for word in words]) == FAIL
    assert capsys.readouterr().out.startswith("fail: ")
    assert (tmp_path / "gate.state").exists()


def commands() -> dict[str, str]:
    """Returns the command of each workflow that asks for the verdict."""
    steps = yaml.safe_load((FOLDER / "github.yml").read_text())["jobs"]["gate"]["steps"]
    (step,) = (each for each in steps if each.get("name") == "Ask for the verdict")
    assert {"STABLE_URL", "CANDIDATE_URL"} <= step["env"].keys()
    (script,) = yaml.safe_load((FOLDER / "gitlab.yml").read_text())["gate"]["script"]
    return {"github": step["run"], "gitlab": script}


@pytest.mark.parametrize("workflow", ["github", "gitlab"])
@pytest.mark.parametrize(("noise", "count", "code"), [(1.0, 120, FAIL), (0.0, 5, UNDECIDED)])
def test_a_workflow_ends_with_the_code_of_the_verdict(
    workflow: str, noise: float, count: int, code: int, prompts: Path, tmp_path: Path
) -> None:
    (tmp_path / "prompts.jsonl").write_text("".join(prompts.read_text().splitlines(keepends=True)[:count]))
    program = tmp_path / "bin" / "hemostat"
    program.parent.mkdir()
    program.write_text(f'#!/bin/sh\nexec {sys.executable} -m hemostat "$@"\n')
    program.chmod(0o755)
    with servers(FakeVllm(), FakeVllm(noise=noise)) as (stable, candidate):
        environment = os.environ | {"STABLE_URL": stable, "CANDIDATE_URL": candidate}
        environment["PATH"] = f"{program.parent}:{environment['PATH']}"
        environment["PYTHONPATH"] = os.pathsep.join(str(ROOT / source) for source in SOURCES)
        shell = ["bash", "-e", "-c", commands()[workflow]]
        done = subprocess.run(shell, env=environment, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == code, done.stdout + done.stderr
    assert {path.name for path in tmp_path.iterdir()} >= {"gate.json", "gate.html", "gate.state"}


def test_flagger_finds_its_webhooks() -> None:
    """tests/admin/test_app.py tests the answers to a request as Flagger documents it."""
    hooks = {hook["type"]: hook["url"] for hook in CANARY["webhooks"]}
    assert hooks.keys() == {"confirm-promotion", "rollback"}
    for kind, url in hooks.items():
        path = re.sub("^http://hemostat:8081", "", url)
        assert path.endswith(f"/gate/{kind}")
        assert ACCESS["POST", path] is Access.OPEN


STATE = ["running"]


def samples() -> Iterator[Sample]:
    for state in STATES:
        yield Sample(names.GATE_STATE, (state,), float(state == STATE[0]))


@needs("prometheus", "prometheus")
def test_the_query_of_flagger_rolls_back_once_the_gate_has_failed(tmp_path: Path) -> None:
    """The Prometheus is real. White space becomes one blank and variables are replaced, as Flagger does it."""
    template = FLAGGER["MetricTemplate hemostat-gate-failed"]["spec"]["query"]
    (metric,) = CANARY["metrics"]
    assert metric["templateRef"]["name"] == "hemostat-gate-failed"
    registry = CollectorRegistry()
    registry.register(HemostatCollector([samples]))
    port = free_port()
    server, thread = start_http_server(port, "127.0.0.1", registry)
    targets = [{"targets": [f"127.0.0.1:{port}"], "labels": {"namespace": "models"}}]
    configuration = {
        "global": {"scrape_interval": "1s"},
        "scrape_configs": [{"job_name": "hemostat", "static_configs": targets}],
    }
    try:
        with prometheus(configuration, tmp_path / "prometheus") as started:

            def value(namespace: str = "models") -> list[float]:
                query = re.sub(r"\s+", " ", template.replace("{{ namespace }}", namespace))
                return [float(each["value"][1]) for each in started.query(query)]

            accepted: Callable[[float], bool] = lambda number: number <= metric["thresholdRange"]["max"]  # noqa: E731
            wait_for("a scrape", lambda: bool(value()))
            assert [accepted(number) for number in value()] == [True]
            assert value("elsewhere") == []
            STATE[0] = "fail"
            wait_for("the failed gate", lambda: value() == [1.0])
            assert [accepted(number) for number in value()] == [False]
    finally:
        STATE[0] = "running"
        server.shutdown()
        server.server_close()
        thread.join(10)
