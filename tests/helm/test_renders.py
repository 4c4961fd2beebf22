"""Every set of values in values/ makes manifests that an API server takes, and a configuration that Hemostat takes."""

from __future__ import annotations

import re
from pathlib import Path

import jsonschema
import kubernetes_validate
import pytest
from tests.support.helm_chart import CHART, UPSTREAM, VALUE_SETS, Helm, Manifest, containers
from tests.support.helm_crds import SCHEMAS

KUBERNETES = ("1.30", "1.37")
"""The oldest that Chart.yaml admits, and the newest that the validator knows."""

each = pytest.mark.parametrize("values", VALUE_SETS, ids=lambda path: path.stem)


@each
def test_lint_strict(helm: Helm, values: Path) -> None:
    assert "0 chart(s) failed" in helm.run("lint", "--strict", str(CHART), "--values", str(values))


@each
@pytest.mark.parametrize("version", KUBERNETES)
def test_core_objects_are_valid(helm: Helm, values: Path, version: str) -> None:
    rendered = helm.render("--values", str(values), "--kube-version", version)
    core = [m for m in rendered.manifests if m["kind"] not in SCHEMAS]
    assert len(core) >= 4
    for manifest in core:
        kubernetes_validate.validate(manifest, version, strict=True)


@each
def test_custom_resources_are_valid(helm: Helm, values: Path) -> None:
    for manifest in helm.values(values).manifests:
        if manifest["kind"] in SCHEMAS:
            jsonschema.Draft202012Validator(SCHEMAS[manifest["kind"]]).validate(manifest)


def test_the_custom_resources_schemas_are_strict(helm: Helm) -> None:
    rendered = helm.set("serviceMonitor.enabled=true", "prometheusRule.enabled=true")
    monitor, rule = rendered.one("ServiceMonitor"), rendered.one("PrometheusRule")
    monitor["spec"]["endpoints"][0]["scrape_timeout"] = "1s"
    rule["spec"]["groups"][0]["rules"][0]["for"] = 5
    for manifest in (monitor, rule):
        with pytest.raises(jsonschema.ValidationError):
            jsonschema.Draft202012Validator(SCHEMAS[manifest["kind"]]).validate(manifest)


@each
def test_hemostat_takes_the_configuration(helm: Helm, values: Path, tmp_path: Path) -> None:
    rendered = helm.values(values)
    settings = rendered.settings(tmp_path)
    assert settings.admin.token, "the admin port is bound to the pod's address"
    assert settings.listen.port == 8080
    assert settings.admin.port == 8081
    ports = {port["name"]: port["containerPort"] for port in rendered.hemostat["ports"]}
    assert ports == {"http": 8080, "admin": 8081}


@each
def test_names_and_labels_fit(helm: Helm, values: Path) -> None:
    for manifest in helm.values(values).manifests:
        pattern = (
            r"[a-z]([-a-z0-9]{0,61}[a-z0-9])?"
            if manifest["kind"] == "Service"
            else r"[a-z0-9]([-a-z0-9.]{0,251}[a-z0-9])?"
        )
        assert re.fullmatch(pattern, manifest["metadata"]["name"])
        assert manifest["metadata"]["namespace"]
        for key, value in manifest["metadata"]["labels"].items():
            assert re.fullmatch(r"([A-Za-z0-9]([-A-Za-z0-9_.]{0,61}[A-Za-z0-9])?)?", value), key


@each
def test_every_selector_finds_the_pods_and_nothing_else_of_the_release(helm: Helm, values: Path) -> None:
    """Of each Deployment its own, of a Service those with its port, and never the pod of `helm test`."""
    rendered = helm.values(values)
    pods = rendered.pods | {manifest["metadata"]["name"]: manifest for manifest in rendered.all("Pod")}
    (ours,) = (name for name, pod in pods.items() if pod is rendered.pod)

    def found(selector: dict[str, str]) -> list[str]:
        assert selector["app.kubernetes.io/instance"] == "rel"
        return [name for name, pod in pods.items() if selector.items() <= pod["metadata"]["labels"].items()]

    for deployment in rendered.all("Deployment"):
        assert found(deployment["spec"]["selector"]["matchLabels"]) == [deployment["metadata"]["name"]]
    for service in rendered.all("Service"):
        (name,) = found(service["spec"]["selector"])
        ports = {port["name"] for container in containers(pods[name]) for port in container.get("ports", [])}
        assert {port["targetPort"] for port in service["spec"]["ports"]} <= ports
    others = [budget["spec"]["selector"]["matchLabels"] for budget in rendered.all("PodDisruptionBudget")]
    others += [policy["spec"]["podSelector"]["matchLabels"] for policy in rendered.all("NetworkPolicy")]
    others += [c["labelSelector"]["matchLabels"] for c in rendered.pod["spec"]["topologySpreadConstraints"]]
    assert all(found(selector) == [ours] for selector in others)
    for monitor in rendered.all("ServiceMonitor"):
        wanted = monitor["spec"]["selector"]["matchLabels"].items()
        (service,) = (s for s in rendered.all("Service") if wanted <= s["metadata"]["labels"].items())
        (endpoint,) = monitor["spec"]["endpoints"]
        assert [port["name"] for port in service["spec"]["ports"]] == [endpoint["port"]]


@each
def test_what_a_pod_refers_to_exists(helm: Helm, values: Path) -> None:
    rendered = helm.values(values)
    spec = rendered.pod["spec"]
    for pod in rendered.pods.values():
        volumes = {volume["name"] for volume in pod["spec"]["volumes"]}
        assert len(volumes) == len(pod["spec"]["volumes"])
        for container in containers(pod):
            assert {mount["name"] for mount in container.get("volumeMounts", [])} <= volumes
    made = {m["metadata"]["name"] for m in rendered.all("ConfigMap")}
    assert {v["configMap"]["name"] for v in spec["volumes"] if "configMap" in v} <= made
    secret = _secret_of(rendered.hemostat)
    assert [m["metadata"]["name"] for m in rendered.all("Secret")] == ([] if secret == "hemostat-tokens" else [secret])
    account = spec["serviceAccountName"]
    assert [m["metadata"]["name"] for m in rendered.all("ServiceAccount")] == [account]


def _secret_of(middleware: Manifest) -> str:
    (name,) = {
        v["valueFrom"]["secretKeyRef"]["name"] for v in middleware["env"] if "secretKeyRef" in v.get("valueFrom", {})
    }
    return str(name)


@pytest.mark.parametrize(
    "release", ["a", "hemostat", "r.with.dots", "a" * 53, "hemostat-" + "b" * 44, "a" * 46 + ".b.c.de"]
)
def test_release_names(helm: Helm, release: str) -> None:
    rendered = helm.render("--set", UPSTREAM, "--set", "dashboards.enabled=true", release=release)
    for manifest in rendered.manifests:
        kubernetes_validate.validate(manifest, KUBERNETES[-1], strict=True)
    for service in rendered.all("Service"):
        assert re.fullmatch(r"[a-z]([-a-z0-9]{0,61}[a-z0-9])?", service["metadata"]["name"])
    assert len({(m["kind"], m["metadata"]["name"]) for m in rendered.manifests}) == len(rendered.manifests)
    for value in rendered.pod["metadata"]["labels"].values():
        assert len(value) <= 63


def test_it_packages(helm: Helm, tmp_path: Path) -> None:
    helm.run("package", str(CHART), "--destination", str(tmp_path))
    (package,) = tmp_path.glob("hemostat-*.tgz")
    assert "alert: HemostatHemorrhage" in helm.run(
        "template", "x", str(package), "--set", UPSTREAM, "--set", "prometheusRule.enabled=true"
    )
    assert package.stat().st_size < 1_000_000, "a release is stored in a Secret, of 1 MiB at most"


def test_a_spool_in_an_object_store_keeps_its_journals_on_the_volume(helm: Helm, tmp_path: Path) -> None:
    """The root file system is read-only, and what is not on a volume is lost with the pod."""
    spool = ("config.spool.path=s3://bucket/spool", "config.spool.key=plain")
    rendered = helm.set(UPSTREAM, "persistence.enabled=true", *spool)
    assert rendered.settings(tmp_path).spool.path == "s3://bucket/spool"
    given = {each["name"]: each.get("value") for each in rendered.hemostat["env"]}
    assert given["XDG_STATE_HOME"] == "/data/state"
    assert "/data" in {mount["mountPath"] for mount in rendered.hemostat["volumeMounts"]}
    without = helm.set(UPSTREAM, "persistence.enabled=true", "config.spool.path=/data/spool", "config.spool.key=plain")
    assert "XDG_STATE_HOME" not in {each["name"] for each in without.hemostat["env"]}
