"""Dashboards and alerts on a real run: real vLLM behind Hemostat, a real Prometheus that scrapes both by our rules.

One run serves all tests here, in order: the dashboards' queries return data; no alert fires in normal operation; a
profile that is rolled back, and a model that is replaced by a worse one behind the running Hemostat, fire their alerts.
"""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from tests.support.constant_profile import constant_profile
from tests.support.dashboards import ALL, EMPTY_LIVE, Query, about_adapters, queries, used
from tests.support.prometheus import Prometheus, config, needs, prometheus, rules
from tests.support.stack import ADMIN_TOKEN, Stack, hemostat, sampling_settings, wait_for

from hemostat.openai.requests import MAX_CHOICES
from hemostat.scoring import noise_floor
from hemostat_lab.demo import vllm_server as vllm_process
from hemostat_lab.demo.checkpoints import Checkpoints, cached_checkpoints

pytestmark = [pytest.mark.vllm, pytest.mark.slow, pytest.mark.timeout(1500), needs("prometheus", "prometheus")]
"""The limits of minutes here and below are for machines that do other work, too."""

MODEL = "smollm2"
CHAT = "/v1/chat/completions"
LABEL = "sea"
HEALTHY, COMPARED, DEGRADED = 50, 20, 24
"""Requests: while all is well, with a profile on half of them, after the swap so many at a time."""
KINDS = 4
"""Of what `Run.send` sends: with the label and without it, greedy and sampled, each in turn."""
RESTRICTED = 16
"""Requests under a grammar, with a profile on half of them."""
UNSCORABLE = 2
"""Requests of more choices than are ever scored."""
TOKENS = 32
BUDGET = 0.45
"""Nats: above what four bits cost this model, below what half of its weights cost it."""
ARGUMENTS = ["--enforce-eager", "--dtype", vllm_process.dtype(), "--max-model-len", "2048", "--max-logprobs", "64"]
VALUES = {"namespace": "compose", "model": MODEL, "route": CHAT}
"""One of each, chosen by hand."""


class Run:
    """Everything that runs: `serve` swaps the model, on the same port, under the same name."""

    def __init__(self, folder: Path) -> None:
        self.port = vllm_process.free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self.admin = f"127.0.0.1:{vllm_process.free_port()}"
        self.folder = folder
        self.stack: Stack
        self.prometheus: Prometheus
        self._numbers = itertools.count()
        self._vllm: vllm_process.VllmServer | None = None

    def serve(self, checkpoint: Path) -> None:
        self.stop()
        self._vllm = vllm_process.VllmServer(
            checkpoint,
            MODEL,
            self.folder / f"{checkpoint.name}.log",
            [*ARGUMENTS, "--logits-processors", vllm_process.LOGITS_PROCESSOR],
            {"HEMOSTAT_ADMIN_URL": f"http://{self.admin}", "HEMOSTAT_ENGINE_TOKEN": ADMIN_TOKEN},
            port=self.port,
        )
        self._vllm.start()

    def wait_served(self) -> None:
        assert self._vllm is not None
        self._vllm.wait_ready(900, progress=print)

    def stop(self) -> None:
        if self._vllm is not None:
            self._vllm.stop()

    def send(self, count: int, **more: Any) -> None:
        """So many chats that nobody has sent yet, greedy and sampled in turn."""

        def send_number(n: int) -> None:
            body = {
                "model": MODEL,
                "messages": [
                    {"role": "user", "content": f"Tell me fact {n} about the sea and the {n % 7}. continent."}
                ],
                "max_tokens": TOKENS,
                "temperature": n % 2,
                "seed": n,
            } | more
            headers = {"x-hemostat-label": LABEL} if n % 4 < 2 else {}
            httpx.post(f"{self.stack.url}{CHAT}", json=body, headers=headers, timeout=300).raise_for_status()

        with ThreadPoolExecutor(8) as pool:
            list(pool.map(send_number, itertools.islice(self._numbers, count)))

    def post(self, path: str, content: str | bytes) -> Any:
        headers = {"authorization": f"Bearer {ADMIN_TOKEN}"}
        return self.stack.admin.post(path, content=content, headers=headers).raise_for_status().json()

    def floor_known(self) -> bool:
        """After a little more traffic: as much as may wait for the floor's scoring. It takes 30 to 100 requests, most
        where only few of them have any noise."""
        self.send(noise_floor.MAX_QUEUED_RECORDS)
        self.stack.wait_settled(within=300)  # what is sent faster than it is scored only makes the queue longer
        return self.stack.status()["alarm"]["floor_upper_nats"] is not None

    def promote(self, vocabulary: int) -> None:
        """A profile that hardly changes anything, on half of the requests; and another one, which is a candidate."""
        bias = np.random.default_rng(1).normal(0.0, 0.05, vocabulary)
        self.post("/api/v1/profiles", constant_profile("", -bias, 0.5).to_bytes())
        version = self.post("/api/v1/profiles", constant_profile("", bias, 0.5).to_bytes())["version"]
        wait_for("the engine to hold it", lambda: version in self.stack.status()["engines"]["acknowledged"], 120)
        self.post("/api/v1/profiles/promote", json.dumps({"version": version}))


@pytest.fixture(scope="module")
def run(checkpoints: Checkpoints, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Run]:
    folder = tmp_path_factory.mktemp("observe")
    running = Run(folder)
    host, port = running.admin.split(":")
    settings = sampling_settings(
        running.url,
        {"backend": "transformers", "model": str(checkpoints.reference), "dtype": vllm_process.dtype()},
        admin={"host": host, "port": int(port), "token": ADMIN_TOKEN},
        calibration={"mode": "auto", "control_fraction": 0.5, "held_out_fraction": 0.5},
        labels=[LABEL],
        records={"path": str(folder / "records.jsonl")},
        alarm={"budget_nats": BUDGET, "baseline_requests": 30},
    )
    settings["shadow"] |= {"floor_fraction": 1.0, "top_k": 64}
    settings["upstream"]["openai_sampling_defaults"] = True
    try:
        running.serve(checkpoints.compressed)
        with hemostat(settings, folder / "hemostat") as running.stack:
            targets = {"hemostat:8081": running.admin, "compressed:8000": f"127.0.0.1:{running.port}"}
            with prometheus(config(targets), folder / "prometheus") as running.prometheus:
                running.wait_served()
                running.stack.wait_scoring(300)
                running.send(HEALTHY)
                # Of what comes after it rates are taken, over minutes.
                wait_for("an upper limit of the noise floor", running.floor_known, 600)
                asked = {"type": "json_schema", "json_schema": {"name": "sea", "schema": {"enum": ["deep", "wide"]}}}
                running.send(KINDS, response_format=asked)
                running.send(UNSCORABLE, n=MAX_CHOICES + 1, temperature=1, max_tokens=2)
                # A profile serves what a grammar restricts only in kinds that are followed when it is promoted.
                running.stack.wait_settled(within=300)
                running.promote(json.loads((checkpoints.compressed / "config.json").read_text())["vocab_size"])
                running.send(RESTRICTED, response_format=asked)
                running.send(COMPARED)
                running.stack.wait_settled(HEALTHY + COMPARED, 600)
                scored = running.stack.requests()["scored"]
                counted = 'sum(hemostat_shadow_requests_total{outcome="scored"})'
                wait_for("the last scrape", lambda: _value(running.prometheus.query(counted)) == scored)
                yield running
    finally:
        running.stop()


def _value(series: list[dict[str, Any]]) -> float:
    return float(series[0]["value"][1]) if series else math.nan


def numbers(series: list[dict[str, Any]]) -> list[float]:
    return [value for sample in series if not math.isnan(value := float(sample["value"][1]))]


RARE = {
    "annotation Rollbacks": "nothing was rolled back yet",
    "annotation Alarms": "nothing is wrong yet",
    "annotation Promotions": "the promotion is more than two minutes ago",
}
"""Queries that are empty at first, and why; the last tests look again. At `EMPTY_LIVE`, test_rare_panels.py does."""


def returns_data(run: Run, where: str) -> None:
    result = [query for query in queries() if query.where == where]
    assert result
    for query in result:
        assert run.prometheus.query(query.with_values(VALUES)), query


@pytest.mark.parametrize("query", [query for query in queries() if not about_adapters(query)], ids=str)
def test_every_query_returns_data(run: Run, query: Query) -> None:
    """With all variables at All, and with one value chosen of each; the other values' data stay out.

    Those about adapters: test_rare_panels.py.
    """
    known = run.prometheus.labels()
    chosen = query.with_values(VALUES)
    for selected in used(chosen, query.legend):
        assert selected.metric in known, f"{selected.metric} is not exported"
        assert selected.labels <= known[selected.metric], f"{selected.metric} has no {selected.labels}"
    for expression in (query.with_values(ALL), chosen):
        series = run.prometheus.query(expression)
        assert numbers(series) or query.where in RARE | EMPTY_LIVE, f"no data: {expression}"
        assert not series or any(query.legend <= set(sample["metric"]) for sample in series), (
            f"no {query.legend}: {series}"
        )
    for variable in ("namespace", "model", "route"):
        if f"${variable}" in query.expression:
            assert run.prometheus.query(query.with_values(VALUES | {variable: "other"})) == [], variable


def test_every_record_returns_data(run: Run) -> None:
    records = [rule["record"] for rule in rules() if "record" in rule]
    assert records
    for name in records:
        assert numbers(run.prometheus.query(name)), name


def test_nothing_fires_while_all_is_well(run: Run) -> None:
    alarm = run.stack.status()["alarm"]
    begun = {test["test"]: test["begun"] for test in alarm["tests"]}
    assert begun["change"], "a baseline is complete: from now on it is tested"
    assert run.prometheus.firing() == set()


def test_a_profile_that_is_rolled_back_is_reported(run: Run) -> None:
    run.post("/api/v1/profiles/rollback", "")
    wait_for("the alert", lambda: "HemostatCalibrationRolledBack" in run.prometheus.firing(), every=0.5)
    returns_data(run, "annotation Rollbacks")  # which is of the last two minutes


def test_a_worse_model_in_its_place_is_reported(run: Run) -> None:
    """Half of the weights gone, the same port and name: the change test goes off.

    The budget test waits for the other model's noise floor, which takes minutes; its alert is promtool's.
    """
    before = run.prometheus.firing()
    run.serve(cached_checkpoints("prune50", print).compressed)
    run.wait_served()
    for _ in range(8):
        run.send(DEGRADED, temperature=1)
        if any(t["raised"] for t in run.stack.status()["alarm"]["tests"] if t["test"] == "change"):
            break
    wait_for("the alert", lambda: before | {"HemostatModelChanged"} <= run.prometheus.firing(), 120, 0.5)
    (alert,) = [a for a in run.prometheus.alerts() if a["labels"]["alertname"] == "HemostatModelChanged"]
    assert alert["labels"] | {"severity": "warning", "namespace": "compose"} == alert["labels"]
    runbook = httpx.URL(alert["annotations"]["runbook_url"])
    page = run.stack.admin.get(runbook.path).raise_for_status().text
    assert f'id="{runbook.fragment}"' in page, "where the alert leads"
    returns_data(run, "annotation Alarms")
