"""The chart with relays in pods of their own, apart from the control process."""

from __future__ import annotations

import base64
import json
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml
from tests.support.helm_chart import Helm, Rendered

from hemostat.config.loading import load
from hemostat.config.schema import Settings
from hemostat.supervisor.role import Role
from hemostat.supervisor.serve import with_role

UPSTREAM = "upstream.url=http://vllm.models.svc:8000"
PLANES = (UPSTREAM, "relays.enabled=true")
POSTGRES = "config.store.url=postgresql://postgres.models.svc:5432/hemostat"
SQLITE = ("config.store.url=sqlite:////data/hemostat.db", "persistence.enabled=true")


def deployment(rendered: Rendered, which: str) -> dict[str, Any]:
    (result,) = (
        manifest for manifest in rendered.all("Deployment") if manifest["metadata"]["name"].endswith(f"-{which}")
    )
    return result


def settings(rendered: Rendered, which: str, folder: Path) -> Settings:
    """As the command in the pod reads them: its file, its variables, the files that it mounts."""
    spec = deployment(rendered, which)["spec"]["template"]["spec"]
    (container,) = spec["containers"]
    assert container["args"] == [which, "--config", "/etc/hemostat/hemostat.yaml"]
    secrets = {name: value for manifest in rendered.all("Secret") for name, value in manifest["data"].items()}
    (tls,) = (volume["secret"] for volume in spec["volumes"] if volume["name"] == "tls")
    for key in [item["key"] for item in tls.get("items", [])] or ["ca.crt", "tls.crt", "tls.key"]:
        (folder / key).write_bytes(base64.b64decode(secrets[key]))
    text = rendered.one("ConfigMap")["data"]["hemostat.yaml"].replace("/etc/hemostat-tls", str(folder))
    (folder / "hemostat.yaml").write_text(text)
    environment = {}
    for variable in container["env"]:
        reference = variable.get("valueFrom", {}).get("secretKeyRef")
        environment[variable["name"]] = (
            base64.b64decode(secrets[reference["key"]]).decode() if reference else variable["value"]
        )
    return with_role(lambda: load(folder / "hemostat.yaml", environment), Role(which))


@pytest.mark.parametrize("more", [(), SQLITE, ("relays.autoscaling.enabled=true", "podDisruptionBudget.enabled=true")])
def test_every_object_is_valid(helm: Helm, more: tuple[str, ...]) -> None:
    rendered = helm.set(*PLANES, "networkPolicy.enabled=true", *more)
    for manifest in rendered.manifests:
        kubernetes_validate.validate(manifest, "1.34", strict=True)


def test_both_commands_take_their_configuration(helm: Helm, tmp_path: Path) -> None:
    """With the certificate that the chart made: it is of the host that relays connect to."""
    rendered = helm.set(*PLANES)
    result = {}
    for which in ("control", "relay"):
        (tmp_path / which).mkdir()
        result[which] = settings(rendered, which, tmp_path / which)
    control, relay = result["control"].control, result["relay"].control
    assert control.listen == "0.0.0.0:8082"
    assert relay.addresses == ["rel-hemostat-control.models.svc:8082"]
    assert relay.token is not None
    assert relay.token == control.token
    assert (relay.listen, relay.cert, relay.key) == (None, None, None), "the key is not in the relays' pods"
    assert not (tmp_path / "relay" / "tls.key").exists()
    (service,) = (
        manifest for manifest in rendered.all("Service") if manifest["metadata"]["name"] == "rel-hemostat-control"
    )
    assert service["spec"]["clusterIP"] == "None", "a name for all control processes"


def test_selectors_tell_the_pods_apart(helm: Helm) -> None:
    rendered = helm.set(*PLANES, "podDisruptionBudget.enabled=true")
    labels = {w: deployment(rendered, w)["spec"]["template"]["metadata"]["labels"] for w in ("control", "relay")}

    def selects(selector: dict[str, str]) -> list[str]:
        return [which for which, of in labels.items() if selector.items() <= of.items()]

    for which in labels:
        assert selects(deployment(rendered, which)["spec"]["selector"]["matchLabels"]) == [which]
    by_name = {
        manifest["metadata"]["name"]: selects(manifest["spec"]["selector"]) for manifest in rendered.all("Service")
    }
    assert by_name == {
        "rel-hemostat": ["relay"],
        "rel-hemostat-admin": ["control"],
        "rel-hemostat-control": ["control"],
    }
    assert selects(rendered.one("PodDisruptionBudget")["spec"]["selector"]["matchLabels"]) == ["relay"]
    policy = rendered.one("NetworkPolicy")["spec"]
    assert selects(policy["podSelector"]["matchLabels"]) == ["control", "relay"]
    (rule,) = (rule for rule in policy["ingress"] if rule["ports"][0]["port"] == "control")
    assert selects(rule["from"][0]["podSelector"]["matchLabels"]) == ["relay"]


@pytest.mark.parametrize(
    ("more", "replicas", "strategy"),
    [(SQLITE, 1, "Recreate"), ((POSTGRES,), 2, "RollingUpdate"), ((), 1, "RollingUpdate")],
)
def test_a_second_control_process_waits_where_postgresql_decides(
    helm: Helm, more: tuple[str, ...], replicas: int, strategy: str
) -> None:
    spec = deployment(helm.set(*PLANES, *more), "control")["spec"]
    assert (spec["replicas"], spec["strategy"]["type"]) == (replicas, strategy)


def test_the_number_of_relays_is_a_value_or_the_autoscalers(helm: Helm) -> None:
    assert deployment(helm.set(*PLANES, "relays.replicas=7"), "relay")["spec"]["replicas"] == 7
    scaled = helm.set(*PLANES, "relays.autoscaling.enabled=true", "relays.autoscaling.maxReplicas=30")
    assert "replicas" not in deployment(scaled, "relay")["spec"]
    spec = scaled.one("HorizontalPodAutoscaler")["spec"]
    assert (spec["scaleTargetRef"]["name"], spec["minReplicas"], spec["maxReplicas"]) == ("rel-hemostat-relay", 2, 30)


def test_the_certificate_may_come_from_elsewhere(helm: Helm) -> None:
    rendered = helm.set(*PLANES, "relays.tlsSecret=from-cert-manager")
    assert not [manifest for manifest in rendered.all("Secret") if manifest["metadata"]["name"].endswith("-tls")]
    for which in ("control", "relay"):
        assert '"from-cert-manager"' in json.dumps(deployment(rendered, which))


def test_an_engine_in_the_pod_is_refused(helm: Helm) -> None:
    said = helm.refusal("--set", "relays.enabled=true,engine.enabled=true,engine.model=m")
    assert "relays.enabled: does not go with an engine in the pod" in said


def test_without_relays_of_their_own_nothing_of_it_is_there(helm: Helm) -> None:
    text = yaml.safe_dump_all(helm.set(UPSTREAM).manifests)
    assert "hemostat-tls" not in text
    assert "relay-token" not in text
    assert "app.kubernetes.io/component: control" not in text
