"""What must hold of the manifests, whatever else changes in them."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from tests.support.helm_api import Cluster
from tests.support.helm_chart import (
    CHART,
    UPSTREAM,
    VALUE_SETS,
    Helm,
    Manifest,
    Rendered,
    container,
    containers,
    set_of,
)

from hemostat import __version__
from hemostat.config.schema import Adapter
from hemostat.ipc.supervised import KILL_AFTER_SECONDS, STOP_SECONDS

each = pytest.mark.parametrize("values", VALUE_SETS, ids=lambda path: path.stem)


# Security


def restricted(pod: Manifest) -> list[str]:
    """What the Pod Security Standard `restricted` objects to (the fields that this chart can set)."""
    spec = pod["spec"]
    objections = [f"spec.{key}" for key in ("hostNetwork", "hostPID", "hostIPC") if spec.get(key)]
    objections += [f"volume {v['name']}" for v in spec["volumes"] if "hostPath" in v]
    general = spec.get("securityContext", {})
    for one in containers(pod):
        own = one.get("securityContext", {})
        name = one["name"]
        if not own.get("runAsNonRoot", general.get("runAsNonRoot")):
            objections.append(f"{name}: runAsNonRoot")
        if own.get("runAsUser", general.get("runAsUser")) == 0:
            objections.append(f"{name}: runAsUser")
        if own.get("allowPrivilegeEscalation") is not False:
            objections.append(f"{name}: allowPrivilegeEscalation")
        capabilities = own.get("capabilities", {})
        if capabilities.get("drop") != ["ALL"] or set(capabilities.get("add", [])) - {"NET_BIND_SERVICE"}:
            objections.append(f"{name}: capabilities")
        if own.get("seccompProfile", general.get("seccompProfile", {})).get("type") not in (
            "RuntimeDefault",
            "Localhost",
        ):
            objections.append(f"{name}: seccompProfile")
        if own.get("privileged") or any(port.get("hostPort") for port in one.get("ports", [])):
            objections.append(f"{name}: privileged or hostPort")
    return objections


@pytest.mark.parametrize(
    "name", ["minimal", "restricted", "postgres", "existing-secrets", "sqlite", "openshift", "engine-ingress", "whole"]
)
def test_pods_pass_the_restricted_standard(helm: Helm, name: str) -> None:
    assert restricted(helm.values(set_of(name)).pod) == []


def test_the_engine_does_not_without_a_setting(helm: Helm) -> None:
    """As the README says; it also shows that `restricted` above can object."""
    pod = helm.render("--set", "engine.enabled=true", "--set", "engine.model=m").pod
    assert restricted(pod) == ["engine: runAsNonRoot", "engine: allowPrivilegeEscalation", "engine: capabilities"]


@each
def test_the_middleware_is_confined(helm: Helm, values: Path) -> None:
    rendered = helm.values(values)
    context = rendered.hemostat["securityContext"]
    assert context["runAsNonRoot"] is True
    assert context["readOnlyRootFilesystem"] is True
    assert context["allowPrivilegeEscalation"] is False
    assert context["capabilities"] == {"drop": ["ALL"]}
    spec = rendered.pod["spec"]
    assert spec["automountServiceAccountToken"] is False
    assert spec["enableServiceLinks"] is False
    assert not rendered.kinds & {"Role", "RoleBinding", "ClusterRole", "ClusterRoleBinding"}
    assert "/tmp" in {mount["mountPath"] for mount in rendered.hemostat["volumeMounts"]}


@pytest.mark.parametrize("values", [path for path in VALUE_SETS if path.stem != "whole"], ids=lambda path: path.stem)
def test_the_admin_port_stays_in_the_cluster(helm: Helm, values: Path) -> None:
    """Without adminIngress."""
    rendered = helm.values(values)
    for service in rendered.all("Service"):
        if any(port["targetPort"] == "admin" for port in service["spec"]["ports"]):
            assert service["spec"]["type"] == "ClusterIP"
            assert service["metadata"]["name"].endswith("-admin")
    for ingress in rendered.all("Ingress"):
        assert "-admin" not in json.dumps(ingress["spec"])
        assert {
            p["backend"]["service"]["port"]["name"] for r in ingress["spec"]["rules"] for p in r["http"]["paths"]
        } == {"http"}


# Secrets


def test_a_random_token_by_default(helm: Helm) -> None:
    first, second = (helm.run("template", "x", str(CHART), "--set", UPSTREAM, *more) for more in ((), ("--debug",)))
    made = {line.strip() for text in (first, second) for line in text.splitlines() if "-token: " in line}
    assert len(made) == 4
    secrets = helm.set().secrets
    assert secrets.keys() == {"admin-token", "engine-token"}
    assert min(map(len, secrets.values())) >= 32
    assert len(set(secrets.values())) == 2


def test_an_existing_secret_is_used_and_none_is_made(helm: Helm) -> None:
    rendered = helm.values(set_of("existing-secrets"))
    assert "Secret" not in rendered.kinds
    references = {v["name"]: v["valueFrom"]["secretKeyRef"] for v in rendered.hemostat["env"]}
    assert references == {
        "HEMOSTAT_ADMIN__TOKEN": {"name": "hemostat-tokens", "key": "admin-token"},
        "HEMOSTAT_ADMIN__ENGINE_TOKEN": {"name": "hemostat-tokens", "key": "engine-token"},
        "HEMOSTAT_REFERENCE__API_KEY": {"name": "hemostat-tokens", "key": "reference-api-key", "optional": True},
        "HEMOSTAT_STORE__URL": {"name": "hemostat-tokens", "key": "store-url", "optional": True},
        "HEMOSTAT_UPSTREAM__API_KEY": {"name": "hemostat-tokens", "key": "upstream-api-key", "optional": True},
    }


def test_what_an_existing_secret_holds_arrives(helm: Helm, tmp_path: Path) -> None:
    settings = helm.values(set_of("existing-secrets")).settings(tmp_path)
    assert settings.admin.token is not None
    assert settings.admin.token.get_secret_value() == "from-a-secret"
    assert settings.reference.api_key is not None
    assert settings.reference.api_key.get_secret_value() == "reference-key"
    assert settings.store.url == "postgresql://:pw@elsewhere:5432/hemostat"


def test_secrets_among_the_values_are_in_the_secret_alone(helm: Helm, tmp_path: Path) -> None:
    rendered = helm.set(
        "config.admin.token=tok3n",
        "config.admin.engine_token=eng1ne",
        "config.upstream.api_key=upkey",
        "config.reference.api_key=refkey",
        "config.store.url=postgresql://u:passw0rd@postgres:5432/h",
    )
    assert rendered.secrets == {
        "admin-token": "tok3n",
        "engine-token": "eng1ne",
        "upstream-api-key": "upkey",
        "reference-api-key": "refkey",
        "store-url": "postgresql://u:passw0rd@postgres:5432/h",
    }
    elsewhere = json.dumps([m for m in rendered.manifests if m["kind"] != "Secret"])
    assert not [word for word in ("tok3n", "eng1ne", "upkey", "refkey", "passw0rd") if word in elsewhere]
    settings = rendered.settings(tmp_path)
    assert settings.store.url == "postgresql://u:passw0rd@postgres:5432/h"
    assert settings.plain()["admin"]["token"] == "tok3n"


@each
def test_no_set_leaks_a_secret(helm: Helm, values: Path) -> None:
    rendered = helm.values(values)
    elsewhere = json.dumps([m for m in rendered.manifests if m["kind"] not in ("Secret", "PrometheusRule")])
    for secret in rendered.secrets.values():
        assert len(secret) < 5 or f'"{secret}"' not in elsewhere
        assert "://" not in secret or secret.partition("://")[2].partition("@")[0] not in elsewhere


# Serving


@each
def test_probes_do_not_ask_for_the_reference(helm: Helm, values: Path) -> None:
    rendered = helm.values(values)
    asked = {name: rendered.hemostat[name]["httpGet"] for name in ("startupProbe", "livenessProbe", "readinessProbe")}
    assert asked == {
        "startupProbe": {"path": "/livez", "port": "admin"},
        "livenessProbe": {"path": "/livez", "port": "admin"},
        "readinessProbe": {"path": "/readyz", "port": "admin"},
    }


def test_probes_are_the_same_with_and_without_a_reference(helm: Helm) -> None:
    without, with_one = helm.set(), helm.set("config.reference.backend=vllm", "config.reference.url=http://gone:1")
    for name in ("startupProbe", "livenessProbe", "readinessProbe"):
        assert without.hemostat[name] == with_one.hemostat[name]


@each
def test_the_pod_may_drain_before_it_is_killed(helm: Helm, values: Path, tmp_path: Path) -> None:
    rendered = helm.values(values)
    sleep = rendered.hemostat.get("lifecycle", {}).get("preStop", {}).get("sleep", {}).get("seconds", 0)
    # serve: the relays drain and get 5 s more, then the control process stops.
    needed = sleep + rendered.settings(tmp_path).shutdown_seconds + KILL_AFTER_SECONDS + STOP_SECONDS
    assert rendered.pod["spec"]["terminationGracePeriodSeconds"] > needed


def test_the_grace_period_follows_the_drain(helm: Helm) -> None:
    def grace(*settings: str) -> int:
        return int(helm.set(*settings).pod["spec"]["terminationGracePeriodSeconds"])

    usual = grace()
    assert grace(f"terminationGracePeriodSeconds={usual}") == usual
    assert grace("terminationGracePeriodSeconds=900") == 900
    assert grace("config.shutdown_seconds=300") == usual + 270
    assert grace("config.shutdown_seconds=30.5") == usual + 1
    assert grace("config.shutdown_seconds=0") == usual - 30
    assert grace("preStopSleepSeconds=60") == usual + 55
    assert helm.set("preStopSleepSeconds=60").hemostat["lifecycle"] == {"preStop": {"sleep": {"seconds": 60}}}


def test_pods_restart_when_the_configuration_changes_and_only_then(helm: Helm) -> None:
    def sums(*settings: str) -> tuple[str, str]:
        annotations = helm.set("config.admin.token=t", *settings).pod["metadata"]["annotations"]
        return annotations["checksum/config"], annotations["checksum/secrets"]

    usual = sums()
    for unrelated in ("service.port=80", "resources.requests.cpu=2", "podLabels.a=b"):
        assert sums(unrelated) == usual
    for changed in ("config.shadow.rate=0.5", "config.shutdown_seconds=31", "upstream.url=http://other:8000"):
        assert sums(changed)[0] != usual[0]
        assert sums(changed)[1] == usual[1]
    assert sums("config.upstream.api_key=new") == (usual[0], sums("config.upstream.api_key=new")[1])
    assert sums("config.upstream.api_key=new")[1] != usual[1]
    annotations = helm.set("podAnnotations.checksum/config=mine").pod["metadata"]["annotations"]
    assert annotations["checksum/config"] == helm.set().pod["metadata"]["annotations"]["checksum/config"]


def test_what_the_values_say_of_the_configuration_arrives(helm: Helm, tmp_path: Path) -> None:
    settings = helm.values(set_of("everything")).settings(tmp_path)
    assert settings.upstream.url == "http://vllm.models.svc.cluster.local"
    assert settings.shadow.rate == 0.02
    assert settings.evidence.client_header == "x-api-key"
    assert settings.shadow.floor_fraction == 0.05  # by extraEnv
    assert settings.calibration.min_tokens == 20_000_000
    assert settings.limits.buffered_bytes == 1_073_741_824
    assert settings.labels == ["chat", "1", "on"]
    assert settings.shutdown_seconds == 90.5
    assert settings.admin.metrics_need_token
    texts = helm.values(set_of("hostile-texts")).settings(tmp_path)
    assert texts.calibration.mode == "off"
    assert texts.labels == ["1", "on", "null", "1e3", "0x1F", "1_000", "2026-11-25", "1.0"]
    assert texts.reference.model == "1e3"
    assert texts.plain()["admin"]["token"] == "1234567890"


def test_the_admin_services_own_names_are_allowed_where_names_are_listed(helm: Helm) -> None:
    assert "allowed_hosts" not in helm.set().config["admin"]
    assert helm.set("config.admin.allowed_hosts={ops.example.com}").config["admin"]["allowed_hosts"] == [
        "ops.example.com",
        "rel-hemostat-admin",
        "rel-hemostat-admin.models",
        "rel-hemostat-admin.models.svc",
        "rel-hemostat-admin.models.svc.cluster.local",
    ]


def test_texts_stay_what_they_are(helm: Helm) -> None:
    rendered = helm.values(set_of("hostile-texts"))
    annotations = rendered.pod["metadata"]["annotations"]
    assert annotations["quote"] == "say \"hi\" and 'hi'"
    assert annotations["braces"] == "{{ .Release.Name }} {% x %}"
    assert annotations["colon"] == "a: b #c"
    assert annotations["lines"] == "first\nsecond\n\ttabbed"
    assert (annotations["number"], annotations["empty"], annotations["unicode"]) == ("1e3", "", "größer – 日本")
    labels = rendered.pod["metadata"]["labels"]
    assert (labels["version"], labels["octal"], labels["build"]) == ("1.0", "010", "20261125")
    assert (labels["app.kubernetes.io/name"], labels["app.kubernetes.io/instance"]) == ("007", "rel")
    assert rendered.hemostat["image"] == "hemostat:1.10"
    assert rendered.pod["spec"]["nodeSelector"] == {"gpu": "true", "42": "0"}
    assert {"name": "QUOTED", "value": 'a"b\\c'} in rendered.hemostat["env"]
    dashboards = rendered.one("ConfigMap", "-dashboards")["metadata"]
    assert dashboards["annotations"] == {"grafana_folder": 'My "folder": #1'}


def test_image_and_pull_secrets(helm: Helm) -> None:
    rendered = helm.values(set_of("private-registry"))
    digest = "sha256:" + "0123456789abcdef" * 4
    assert rendered.hemostat["image"] == f"123456789012.dkr.ecr.eu-central-1.amazonaws.com/ml/hemostat@{digest}"
    assert rendered.pod["spec"]["imagePullSecrets"] == [{"name": "ecr"}]
    mixed = helm.values(set_of("everything"))
    assert mixed.pod["spec"]["imagePullSecrets"] == [{"name": "registry"}, {"name": "other-registry"}]
    assert mixed.hemostat["image"] == "registry.example.com:5000/team/hemostat:1.20"
    assert helm.set().hemostat["image"] == f"hemostat:{__version__}"


def test_scheduling_is_passed_on(helm: Helm) -> None:
    spec = helm.values(set_of("everything")).pod["spec"]
    assert spec["tolerations"][0] == {"key": "dedicated", "operator": "Equal", "value": "1", "effect": "NoSchedule"}
    assert spec["affinity"]["podAntiAffinity"]["preferredDuringSchedulingIgnoredDuringExecution"][0]["weight"] == 100
    assert spec["priorityClassName"] == "system-cluster-critical"
    assert spec["runtimeClassName"] == "gvisor"
    (spread,) = spec["topologySpreadConstraints"]
    assert spread["topologyKey"] == "topology.kubernetes.io/zone"
    assert spread["labelSelector"]["matchLabels"]["app.kubernetes.io/instance"] == "rel"
    (usual,) = helm.set().pod["spec"]["topologySpreadConstraints"]
    assert (usual["topologyKey"], usual["whenUnsatisfiable"]) == ("kubernetes.io/hostname", "ScheduleAnyway")
    own = "topologySpreadConstraints[0]"
    (mine,) = helm.set(
        f"{own}.maxSkew=2", f"{own}.topologyKey=z", f"{own}.whenUnsatisfiable=ScheduleAnyway",
        f"{own}.labelSelector.matchLabels.a=b",
    ).pod["spec"]["topologySpreadConstraints"]  # fmt: skip
    assert mine["labelSelector"] == {"matchLabels": {"a": "b"}}


@pytest.mark.parametrize(
    ("settings", "limit"),
    [
        ((), {"maxUnavailable": 1}),
        (("podDisruptionBudget.minAvailable=2",), {"minAvailable": 2}),
        (("podDisruptionBudget.minAvailable=0",), {"minAvailable": 0}),
        (("podDisruptionBudget.minAvailable=50%",), {"minAvailable": "50%"}),
        (("podDisruptionBudget.maxUnavailable=0",), {"maxUnavailable": 0}),
        (("podDisruptionBudget.minAvailable=null", "podDisruptionBudget.maxUnavailable=null"), {"maxUnavailable": 1}),
    ],
)
def test_the_disruption_budget(helm: Helm, settings: tuple[str, ...], limit: dict[str, Any]) -> None:
    spec = helm.set("podDisruptionBudget.enabled=true", *settings).one("PodDisruptionBudget")["spec"]
    del spec["selector"]
    assert spec == limit
    assert "PodDisruptionBudget" not in helm.set(*settings).kinds


def test_two_pods_never_have_one_volume(helm: Helm) -> None:
    assert helm.set("persistence.enabled=true").one("Deployment")["spec"]["strategy"] == {"type": "Recreate"}
    usual = {"type": "RollingUpdate", "rollingUpdate": {"maxUnavailable": 0, "maxSurge": 1}}
    assert helm.set().one("Deployment")["spec"]["strategy"] == usual
    assert helm.values(set_of("everything")).one("Deployment")["spec"]["strategy"] == {"type": "Recreate"}
    assert "PersistentVolumeClaim" not in helm.values(set_of("sqlite")).kinds
    (claim,) = (v for v in helm.values(set_of("sqlite")).pod["spec"]["volumes"] if v["name"] == "data")
    assert claim["persistentVolumeClaim"] == {"claimName": "mine"}


# Prometheus, Grafana


def test_without_the_operator_none_of_its_kinds(helm: Helm) -> None:
    rendered = helm.values(set_of("no-prometheus-operator"))
    assert not rendered.kinds & {"ServiceMonitor", "PrometheusRule"}
    assert rendered.pod["metadata"]["annotations"]["prometheus.io/port"] == "8081"


def test_the_service_monitor_sends_the_token_only_where_it_is_asked_for(helm: Helm) -> None:
    (endpoint,) = helm.set("serviceMonitor.enabled=true").one("ServiceMonitor")["spec"]["endpoints"]
    assert endpoint == {"port": "admin", "path": "/metrics", "interval": "15s"}
    monitor = helm.values(set_of("everything")).one("ServiceMonitor")
    assert monitor["spec"]["endpoints"][0]["authorization"] == {
        "credentials": {"name": "hemostat-tokens", "key": "admin-token"}
    }
    assert monitor["metadata"]["labels"]["release"] == "kube-prometheus-stack"


def test_the_operators_kinds_may_be_in_another_namespace(helm: Helm) -> None:
    rendered = helm.set(
        "serviceMonitor.enabled=true", "serviceMonitor.namespace=monitoring",
        "prometheusRule.enabled=true", "prometheusRule.namespace=monitoring",
    )  # fmt: skip
    for kind in ("ServiceMonitor", "PrometheusRule"):
        assert rendered.one(kind)["metadata"]["namespace"] == "monitoring"
    assert rendered.one("ServiceMonitor")["spec"]["namespaceSelector"] == {"matchNames": ["models"]}


def test_what_is_common_is_everywhere(helm: Helm) -> None:
    for manifest in helm.values(set_of("everything")).manifests:
        assert manifest["metadata"]["annotations"]["owner"] == 'team "serving" #1'
        assert manifest["metadata"]["labels"]["cost-centre"] == "0042"


def test_the_rules_are_the_files_own_and_lead_to_the_runbook(helm: Helm) -> None:
    import yaml

    groups = yaml.safe_load((CHART / "rules" / "hemostat.yaml").read_text())["groups"]
    assert helm.set("prometheusRule.enabled=true").one("PrometheusRule")["spec"]["groups"] == groups
    alerts = [rule for group in groups for rule in group["rules"] if "alert" in rule]
    theirs = helm.values(set_of("everything")).one("PrometheusRule")["spec"]["groups"]
    led = [rule["annotations"]["runbook_url"] for group in theirs for rule in group["rules"] if "alert" in rule]
    assert led == [
        r"https://wiki.example.com/hemostat/$1\runbook#" + alert["annotations"]["runbook_url"].partition("#")[2]
        for alert in alerts
    ]
    assert len(led) > 5


def test_dashboards_for_the_sidecar(helm: Helm) -> None:
    rendered = helm.set("dashboards.enabled=true")
    config = rendered.one("ConfigMap", "-dashboards")
    assert config["metadata"]["labels"]["grafana_dashboard"] == "1"
    assert config["metadata"]["annotations"]["grafana_folder"] == "Hemostat"
    files = sorted((CHART / "dashboards").glob("*.json"))
    assert config["data"].keys() == {f"hemostat-{file.name}" for file in files}
    for file in files:
        assert json.loads(config["data"][f"hemostat-{file.name}"]) == json.loads(file.read_text())
    assert sum(len(text.encode()) for text in config["data"].values()) < 1_000_000
    assert helm.values(set_of("everything")).one("ConfigMap", "-dashboards")["metadata"]["namespace"] == "monitoring"
    assert not [m for m in helm.set().all("ConfigMap") if m["metadata"]["name"].endswith("-dashboards")]


# The engine


def test_the_engine_is_a_sidecar_that_outlives_the_drain(helm: Helm, tmp_path: Path) -> None:
    rendered = helm.values(set_of("restricted"))
    engine = container(rendered.pod, "engine")
    assert engine in rendered.pod["spec"]["initContainers"]
    assert engine["restartPolicy"] == "Always"
    assert rendered.settings(tmp_path).upstream.url == "http://127.0.0.1:8000"
    command = [*engine["command"], *engine["args"]]
    assert command[:3] == ["vllm", "serve", "my-org/my-model-W4A16"]
    for flag, value in (
        ("--port", "8000"),
        ("--max-logprobs", "64"),
        ("--logits-processors", "hemostat_engine:LogitsProcessor"),
        ("--max-model-len", "8192"),
    ):
        assert command[command.index(flag) + 1] == value
    variables = {v["name"]: v for v in engine["env"]}
    assert variables["HEMOSTAT_ADMIN_URL"]["value"] == "http://127.0.0.1:8081"
    token = next(v for v in rendered.hemostat["env"] if v["name"] == "HEMOSTAT_ADMIN__ENGINE_TOKEN")["valueFrom"]
    assert variables["HEMOSTAT_ENGINE_TOKEN"]["valueFrom"] == token
    assert "admin-token" not in str(engine), "the engine has no token that changes anything"
    assert engine["resources"] == {"limits": {"nvidia.com/gpu": 1}}
    assert {"name": "models", "mountPath": "/models"} in engine["volumeMounts"]
    assert "initContainers" not in helm.set().pod["spec"]
    assert "--enable-lora" not in command
    assert "HEMOSTAT_ADAPTERS" not in variables


def test_the_engine_can_serve_adapters(helm: Helm) -> None:
    given = ("engine.enabled=true", "engine.model=m", "engine.adapters.enabled=true", "engine.adapters.maxLoraRank=64")
    engine = container(helm.render(*(part for value in given for part in ("--set", value))).pod, "engine")
    at = engine["args"].index("--enable-lora")
    assert engine["args"][at : at + 5] == ["--enable-lora", "--max-loras", "2", "--max-lora-rank", "64"]
    variables = {v["name"]: v.get("value") for v in engine["env"]}
    assert (variables["HEMOSTAT_ADAPTERS"], variables["VLLM_ALLOW_RUNTIME_LORA_UPDATING"]) == ("1", "True")


def room(rendered: Rendered) -> tuple[Any, Any]:
    """Limits of memory and of /tmp."""
    (tmp,) = [volume["emptyDir"] for volume in rendered.pod["spec"]["volumes"] if volume["name"] == "tmp"]
    return rendered.hemostat.get("resources", {}).get("limits", {}).get("memory"), tmp.get("sizeLimit")


def test_a_pod_that_makes_adapters_has_room_for_a_build(helm: Helm) -> None:
    adapters = "config.adapter.enabled=true"
    assert room(helm.set()) == room(helm.set("config.adapter.enabled=false")) == ("2Gi", "64Mi")
    assert room(helm.set(adapters)) == (f"{4096 + Adapter().memory_mib}Mi", "8Gi")
    assert room(helm.set(adapters, "config.adapter.memory_mib=1000")) == ("5096Mi", "8Gi")
    # What is given is used, also where nothing is wanted.
    assert room(helm.set(adapters, "resources.limits.memory=2Gi", "tmpSizeLimit=64Mi")) == ("2Gi", "64Mi")
    assert room(helm.set(adapters, "resources.limits.memory=null", "tmpSizeLimit=null")) == (None, None)
    assert room(helm.set(adapters, "resources=null")) == (None, "8Gi")
    assert room(helm.set("config.adapter=null")) == ("2Gi", "64Mi")


def test_notes_say_what_adapters_need(helm: Helm, cluster: Cluster) -> None:
    assert "--build-arg EXTRAS=lab" in helm.notes(cluster, "config.adapter.enabled=true")


def test_an_ipv6_cluster(helm: Helm, tmp_path: Path) -> None:
    rendered = helm.values(set_of("ipv6"))
    settings = rendered.settings(tmp_path)
    assert (settings.listen.host, settings.admin.host) == ("::", "::")
    for service in rendered.all("Service"):
        assert (service["spec"]["ipFamilyPolicy"], service["spec"]["ipFamilies"]) == ("SingleStack", ["IPv6"])
    engine = helm.values(set_of("ipv6-engine"))
    assert engine.settings(tmp_path).upstream.url == "http://[::1]:8000"
    assert {"name": "HEMOSTAT_ADMIN_URL", "value": "http://[::1]:8081"} in container(engine.pod, "engine")["env"]


def test_ports_of_the_service(helm: Helm) -> None:
    rendered = helm.set("service.port=80", "service.adminPort=9000", "service.type=NodePort", "service.nodePort=30080")
    ours = rendered.one("Service", "rel-hemostat")["spec"]
    assert ours["type"] == "NodePort"
    assert ours["ports"] == [{"name": "http", "port": 80, "targetPort": "http", "protocol": "TCP", "nodePort": 30080}]
    assert rendered.one("Service", "-admin")["spec"]["ports"][0]["port"] == 9000


def test_ingress(helm: Helm) -> None:
    first, second = helm.values(set_of("everything")).one("Ingress")["spec"]["rules"]
    (path,) = first["http"]["paths"]
    assert (first["host"], path["path"], path["pathType"]) == ("llm.example.com", "/", "Prefix")
    assert path["backend"]["service"] == {"name": "rel-hemostat", "port": {"name": "http"}}
    assert (second["host"], second["http"]["paths"][0]["pathType"]) == ("llm.example.org", "Exact")


# What helm prints


def test_notes_say_what_to_do_next(helm: Helm, cluster: Cluster) -> None:
    notes = helm.notes(cluster)
    for said in (
        "http://rel-hemostat.models.svc:8080/v1",
        "kubectl -n models port-forward svc/rel-hemostat-admin 8081:8081",
        "kubectl -n models get secret rel-hemostat -o jsonpath='{.data.admin-token}'",
        "hemostat check --config /etc/hemostat/hemostat.yaml",
        "--max-logprobs 20 --logits-processors hemostat_engine:LogitsProcessor",
        "HEMOSTAT_ADMIN_URL=http://rel-hemostat-admin.models.svc:8081",
        "NOTHING IS MEASURED YET",
        "--set serviceMonitor.enabled=true",
        "existingSecret",
    ):
        assert said in notes


@each
def test_notes_of_every_set_are_whole(helm: Helm, cluster: Cluster, values: Path) -> None:
    notes = helm.notes(cluster, values=values)
    assert f"is a proxy in front of {helm.values(values).config['upstream']['url']}." in notes
    assert not [line for line in notes.splitlines() if re.search(r"<no value>|<nil>|%!|\s$", line)]


def test_notes_say_that_nothing_outlasts_a_restart_without_a_store(helm: Helm, cluster: Cluster) -> None:
    lost = "NOTHING IS KEPT OVER A RESTART"
    assert lost in helm.notes(cluster)
    assert lost in helm.notes(cluster, "config.store.url=null")
    file = ("persistence.enabled=true", "config.store.url=sqlite:////data/hemostat.db")
    assert lost not in helm.notes(cluster, *file)
    assert lost not in helm.notes(cluster, "config.store.url=postgresql://postgres.data.svc/hemostat")


def test_notes_follow_the_values(helm: Helm, cluster: Cluster) -> None:
    notes = helm.notes(
        cluster, "existingSecret=mine", "config.reference.backend=vllm", "config.reference.url=http://r:8000",
        "serviceMonitor.enabled=true", "networkPolicy.enabled=true", "service.adminPort=9000", "config.shadow.top_k=50",
        "podDisruptionBudget.enabled=true", "podDisruptionBudget.minAvailable=1",
        "config.tracing.endpoint=http://collector:4318",
    )  # fmt: skip
    assert "get secret mine " in notes
    assert "EXTRAS" not in notes
    torch = helm.notes(cluster, "config.reference.backend=transformers", "config.reference.model=/models/m")
    assert "--build-arg EXTRAS=transformers" in torch
    assert "8081:9000" in notes
    assert "--max-logprobs 50" in notes
    assert "NOTHING IS MEASURED" not in notes
    assert "admin token is random" not in notes
    assert "networkPolicy.admins" in notes
    assert "the pod's node cannot be drained" in notes
    engine = helm.notes(cluster, "upstream.url=", "engine.enabled=true", "engine.model=my/model")
    assert "is a proxy in front of http://127.0.0.1:8000" in engine
    assert "-c engine" in engine
    assert "--logits-processors" not in engine
