"""Helm on the chart in this repository, and what it renders as Kubernetes would read it."""

from __future__ import annotations

import base64
import os
import subprocess
from collections.abc import Hashable, Iterator
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import yaml
from tests.support.helm_api import Cluster

from hemostat.config.loading import load
from hemostat.config.schema import Settings

ROOT = Path(__file__).resolve().parents[2]
CHART = ROOT / "helm" / "hemostat"
VALUES = ROOT / "tests" / "helm" / "values"
VALUE_SETS = sorted(VALUES.glob("*.yaml"))
assert VALUE_SETS, "no sets of values: tests would be skipped"
UPSTREAM = "upstream.url=http://vllm:8000"
EXISTING = {
    "admin-token": "from-a-secret",
    "engine-token": "engines-secret",
    "upstream-api-key": "upstream-key",
    "reference-api-key": "reference-key",
    "store-url": "postgresql://:pw@elsewhere:5432/hemostat",
}
"""What the Secret that `existingSecret` names holds, in these tests."""

Manifest = dict[str, Any]


def set_of(name: str) -> Path:
    """The set of values of that name."""
    return VALUES / f"{name}.yaml"


class UniqueKeys(yaml.CSafeLoader):
    """A key that stands twice is an error, as it is for the API server. libyaml's: a tenth of the time."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        keys = [self.construct_object(key, deep=True) for key, _ in node.value]
        assert len(keys) == len(set(keys)), f"a key stands twice in {keys}"
        return super().construct_mapping(node, deep)


class Refused(Exception):
    """Helm would not render; the text is what it says."""


@dataclass(frozen=True)
class Helm:
    """helm: the program; home: an empty folder for its own files, so that no user's settings count."""

    helm: str
    home: Path

    def run(self, *arguments: str) -> str:
        environment = {k: v for k, v in os.environ.items() if not k.startswith("HELM_") and k != "KUBECONFIG"}
        environment |= {"HOME": str(self.home), "XDG_CACHE_HOME": "", "XDG_CONFIG_HOME": "", "XDG_DATA_HOME": ""}
        environment["GOGC"] = "off"  # a rendering ends before garbage matters: collecting it is a third of the time
        done = subprocess.run([self.helm, *arguments], check=False, capture_output=True, text=True, env=environment)
        if done.returncode:
            raise Refused(done.stdout + done.stderr)
        return done.stdout

    @cache  # noqa: B019 - a few dozen renderings, for the session's one instance
    def render(self, *arguments: str, release: str = "rel", namespace: str = "models") -> Rendered:
        """`helm template` with these arguments: `--values`, `--set` …"""
        text = self.run("template", release, str(CHART), "--namespace", namespace, *arguments)
        loaded = (yaml.load(part, UniqueKeys) for part in text.split("\n---\n"))
        return Rendered([manifest for manifest in loaded if manifest])

    def values(self, path: Path) -> Rendered:
        return self.render("--values", str(path))

    def set(self, *settings: str) -> Rendered:
        """With an upstream, and these as `--set`."""
        return self.render(*(part for setting in (UPSTREAM, *settings) for part in ("--set", setting)))

    def refusal(self, *arguments: str) -> str:
        """What helm says instead of rendering."""
        try:
            self.render(*arguments)
        except Refused as refused:
            return str(refused)
        raise AssertionError(f"rendered all the same: {arguments}")

    def notes(self, cluster: Cluster, *settings: str, values: Path | None = None) -> str:
        """What `helm install` prints at its end; values: a file in place of the upstream."""
        flags = ["--namespace", "models", "--dry-run=client", "--disable-openapi-validation"]
        flags += ["--kubeconfig", str(cluster.kubeconfig)]
        flags += ["--values", str(values)] if values else ["--set", UPSTREAM]
        flags += [part for setting in settings for part in ("--set", setting)]
        return self.run("install", "rel", str(CHART), *flags).partition("NOTES:\n")[2]


@dataclass
class Rendered:
    """What one call of helm made."""

    manifests: list[Manifest] = field(repr=False)

    def all(self, kind: str) -> list[Manifest]:
        return [m for m in self.manifests if m["kind"] == kind]

    def one(self, kind: str, suffix: str = "") -> Manifest:
        (result,) = (m for m in self.all(kind) if m["metadata"]["name"].endswith(suffix))
        return result

    @property
    def kinds(self) -> set[str]:
        return {m["kind"] for m in self.manifests}

    @property
    def pod(self) -> Manifest:
        """The pod template of the Deployment with the middleware."""
        (result,) = (pod for pod in self.pods.values() if any(spec["name"] == "hemostat" for spec in containers(pod)))
        return result

    @property
    def pods(self) -> dict[str, Manifest]:
        """Deployment -> its pod template."""
        return {deployment["metadata"]["name"]: deployment["spec"]["template"] for deployment in self.all("Deployment")}

    @property
    def hemostat(self) -> Manifest:
        """The middleware's container."""
        return container(self.pod, "hemostat")

    @property
    def secrets(self) -> dict[str, str]:
        """Of the Secret that the chart makes, in clear; empty where it makes none."""
        return {k: base64.b64decode(v).decode() for s in self.all("Secret") for k, v in s["data"].items()}

    @property
    def config(self) -> Manifest:
        """hemostat.yaml, as YAML and no more."""
        (text,) = (m["data"]["hemostat.yaml"] for m in self.all("ConfigMap") if "hemostat.yaml" in m["data"])
        parsed: Manifest = yaml.load(text, UniqueKeys)
        return parsed

    def environment(self) -> Iterator[tuple[str, str]]:
        """What the middleware sees of HEMOSTAT_…, with Secrets looked up as the kubelet does."""
        secrets = self.secrets or EXISTING
        for variable in self.hemostat["env"]:
            if not variable["name"].startswith("HEMOSTAT_"):
                continue
            if "value" in variable:
                yield variable["name"], variable["value"]
                continue
            reference = variable["valueFrom"]["secretKeyRef"]
            if reference["key"] in secrets:
                yield variable["name"], secrets[reference["key"]]
            else:
                assert reference.get("optional"), f"no pod starts without {reference['key']}"

    def settings(self, folder: Path) -> Settings:
        """What `hemostat serve` makes of the file and the environment; raises ConfigError."""
        path = folder / "hemostat.yaml"
        path.write_text(yaml.safe_dump(self.config))
        return load(path, dict(self.environment()))


def container(pod: Manifest, name: str) -> Manifest:
    (result,) = (c for c in containers(pod) if c["name"] == name)
    return result


def containers(pod: Manifest) -> list[Manifest]:
    return [*pod["spec"]["containers"], *pod["spec"].get("initContainers", [])]
