"""A real Prometheus on the project's own configuration and rules."""

from __future__ import annotations

import shutil
import subprocess
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml
from tests.support.minutes import starting
from tests.support.waiting import HANG_SECONDS

from hemostat_lab.demo.vllm_server import free_port, with_parent

ROOT = Path(__file__).parents[2]
CONFIG = ROOT / "deploy" / "prometheus" / "prometheus.yml"
ALERTMANAGER = ROOT / "deploy" / "prometheus" / "alertmanager.yaml"
RULES = ROOT / "helm" / "hemostat" / "rules" / "hemostat.yaml"
RUNBOOK = ROOT / "docs" / "runbook.md"

EVERY = "1s"
"""Scrapes and evaluations, so that tests need not wait; users have 15 s."""


def needs(command: str, package: str) -> pytest.MarkDecorator:
    """Skips where `command` is missing, and says how to get it."""
    reason = f"no {command} here: apt-get install {package} (CI does)"
    return pytest.mark.skipif(shutil.which(command) is None, reason=reason)


def command(*words: str | Path) -> str:
    """Its output; an AssertionError with all that it said when the command fails."""
    done = subprocess.run(list(map(str, words)), capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def rules() -> list[dict[str, Any]]:
    """All of the file, recording rules first."""
    return [rule for group in yaml.safe_load(RULES.read_text())["groups"] for rule in group["rules"]]


def config(targets: Mapping[str, str]) -> dict[str, Any]:
    """deploy/prometheus/prometheus.yml on other addresses, hurried; what `targets` does not name is left out."""
    made: dict[str, Any] = yaml.safe_load(CONFIG.read_text())
    made["global"] = {"scrape_interval": EVERY, "evaluation_interval": EVERY}
    made["rule_files"] = [str(RULES)]
    for job in made["scrape_configs"]:
        job["static_configs"] = [
            group | {"targets": [targets[name] for name in group["targets"] if name in targets]}
            for group in job["static_configs"]
        ]
    return made


class Prometheus:
    """A running server's API."""

    def __init__(self, url: str) -> None:
        self._client = httpx.Client(base_url=url, timeout=10)

    def ready(self) -> bool:
        try:
            return self._client.get("/-/ready").status_code == 200
        except httpx.TransportError:
            return False

    def _get(self, path: str, **parameters: str) -> Any:
        answer = self._client.get(f"/api/v1/{path}", params=parameters).json()
        assert answer["status"] == "success", f"{parameters}: {answer}"
        return answer["data"]

    def query(self, expression: str) -> list[dict[str, Any]]:
        """Series of an instant vector: `metric`, and `value` as (time, text)."""
        data = self._get("query", query=expression)
        assert data["resultType"] == "vector", expression
        result: list[dict[str, Any]] = data["result"]
        return result

    def labels(self) -> dict[str, set[str]]:
        """Label names by metric, of all that Hemostat exports."""
        result: dict[str, set[str]] = {}
        for series in self._get("series", **{"match[]": '{__name__=~"hemostat.+"}'}):
            result.setdefault(series["__name__"], set()).update(series)
        return result

    def firing(self) -> set[str]:
        """Names of the alerts."""
        return {alert["labels"]["alertname"] for alert in self.alerts() if alert["state"] == "firing"}

    def alerts(self) -> list[dict[str, Any]]:
        result: list[dict[str, Any]] = self._get("alerts")["alerts"]
        return result

    def close(self) -> None:
        self._client.close()


@contextmanager
def prometheus(configuration: Mapping[str, Any], folder: Path) -> Iterator[Prometheus]:
    """Serve with this configuration."""
    folder.mkdir()
    (folder / "prometheus.yml").write_text(yaml.safe_dump(dict(configuration)))
    port = free_port()
    log = folder / "prometheus.log"
    flags = [f"--config.file={folder}/prometheus.yml", f"--storage.tsdb.path={folder}/data", "--log.level=warn"]
    with log.open("wb") as out:
        process = subprocess.Popen(
            with_parent([shutil.which("prometheus") or "prometheus", *flags, f"--web.listen-address=127.0.0.1:{port}"]),
            stdin=subprocess.DEVNULL,
            stdout=out,
            stderr=out,
        )
    server = Prometheus(f"http://127.0.0.1:{port}")
    try:
        ends = time.monotonic() + HANG_SECONDS
        with starting("Prometheus"):
            while not server.ready():
                assert process.poll() is None, log.read_text()
                assert time.monotonic() < ends, log.read_text()
                time.sleep(0.1)
        yield server
    finally:
        server.close()
        process.terminate()
        process.wait(HANG_SECONDS)
