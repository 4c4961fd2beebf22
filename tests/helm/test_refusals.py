"""Wrong values do not render, and what helm says names the value."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from tests.support.helm_chart import UPSTREAM, Helm

ENGINE = ("--set", "engine.enabled=true", "--set", "engine.model=m")

WRONG = {
    # value(s) -> what helm has to name
    "servce.port=2": "servce",
    "replicaCount=2": "replicaCount",
    "upstream.url=vllm:8000": "upstream.url",
    "upstream.urls={vllm:8000}": "upstream.urls",
    "upstream.url=http://vllm:8000/v1": "upstream.url",
    "upstream.url=http://me:secret@vllm:8000": "upstream.url",
    "upstream.uri=http://vllm:8000": "uri",
    "image.pullPolicy=Sometimes": "image.pullPolicy",
    "image.digest=sha256:abc": "image.digest",
    "image.repository=hemostat:1.0": "image.repository",
    "image.tag=7": "image.tag",
    "image.tag=a b": "image.tag",
    "imagePullSecrets[0]=Has_Capitals": "imagePullSecrets.0",
    "fullnameOverride=Has_Capitals": "fullnameOverride",
    "nameOverride=-x": "nameOverride",
    "nameOverride=Has_Capitals": "nameOverride",
    "existingSecret=a/b": "existingSecret",
    "existingSecret.name=tokens": "existingSecret",
    "bindAddress=localhost": "bindAddress",
    "bindAddress=10.0.0.300": "bindAddress",
    "service.type=Loadbalancer": "service.type",
    "service.port=70000": "service.port",
    "service.port=http": "service.port",
    "service.adminPort=0": "service.adminPort",
    "service.annotations.a=1": "service.annotations.a",
    "podLabels.a=has spaces": "podLabels.a",
    "podLabels.a b=c": "podLabels",
    "podAnnotations=on": "podAnnotations",
    "podAnnotations.a/b/c=d": "podAnnotations",
    "ingress.enabled=true": "ingress.hosts",
    "ingress.enabled=true,ingress.hosts[0].hots=a": "host",
    "ingress.enabled=true,ingress.hosts[0].host=https://a": "ingress.hosts.0.host",
    "serviceAccount.create=maybe": "serviceAccount.create",
    "resources.limit.cpu=1": "limit",
    "resources.limits.memory=2GB": "resources.limits.memory",
    "preStopSleepSeconds=-5": "preStopSleepSeconds",
    "livenessProbe.httpGet.path=/": "httpGet",
    "livenessProbe.successThreshold=2": "livenessProbe.successThreshold",
    "podSecurityContext.runAsNonroot=true": "runAsNonroot",
    "securityContext.readOnlyRootFileSystem=true": "readOnlyRootFileSystem",
    "engine.securityContext.runAsUser=root": "engine.securityContext.runAsUser",
    "strategy.type=Recreate,strategy.rollingUpdate.maxSurge=1": "strategy.rollingUpdate",
    "strategy.rollingUpdate.maxSurg=1": "maxSurg",
    "topologySpreadConstraints[0].maxSkew=1": "topologySpreadConstraints.0",
    "tolerations.key=a": "tolerations",
    "tolerations[0].efect=NoSchedule": "efect",
    "affinity.nodeAfinity.x=1": "nodeAfinity",
    "nodeSelector.gpu=true": "nodeSelector.gpu",
    "extraEnv[0].value=x": "name",
    "extraEnv[0].name=X,extraEnv[0].value=1": "extraEnv.0.value",
    "extraVolumeMounts[0].name=x": "mountPath",
    "persistence.size=10Gb": "persistence.size",
    "podDisruptionBudget.enabled=yes please": "podDisruptionBudget.enabled",
    "podDisruptionBudget.minAvailable=half": "podDisruptionBudget.minAvailable",
    "podDisruptionBudget.minAvailable=101%": "podDisruptionBudget.minAvailable",
    "serviceMonitor.interval=often": "serviceMonitor.interval",
    "serviceMonitor.enable=true": "enable",
    "prometheusRule.runbookUrl=wiki": "prometheusRule.runbookUrl",
    "dashboards.label=": "dashboards.label",
    "networkPolicy.clients=everybody": "networkPolicy.clients",
    "networkPolicy.upstream.ports[0]=99999": "networkPolicy.upstream.ports.0",
    "engine.enabled=true": "engine.model",
    "config=everything": "config",
    "config.calibration.mode=fast": "config.calibration.mode",
    "config.calibration.alpha=1": "config.calibration.alpha",
    "config.reference.backend=tgi": "config.reference.backend",
    "config.reference.backend=vllm": "config.reference",
    "config.reference.backend=transformers": "config.reference",
    "config.shadow.rate=5": "config.shadow.rate",
    "config.shadow.rate=1.5": "config.shadow.rate",  # a text, as --set has it
    "config.shadow.seed=1": "seed",
    "config.evidence.client_header=X Client": "config.evidence.client_header",
    "config.evidence.kinds=0": "config.evidence.kinds",
    "config.shadow.rat=0.5": "rat",
    "config.shadwo.rate=0.5": "shadwo",
    "config.listen.port=80": "listen",
    "config.admin.host=127.0.0.1": "host",
    "config.upstream.url=http://other": "url",
    "config.store.url=mysql://x": "config.store.url",
    "config.labels[0]=a b": "config.labels.0",
}


@pytest.mark.parametrize("values", WRONG)
def test_a_wrong_value_is_named(helm: Helm, values: str) -> None:
    said = helm.refusal("--set", UPSTREAM, *(f"--set={setting}" for setting in values.split(",")))
    assert names(said, WRONG[values])


def names(said: str, key: str) -> bool:
    """Whether a schema's error names it: as '/a/b' in helm 4, as a.b in helm 3."""
    assert "don't meet the specifications of the schema" in said
    return re.search(rf"(?<!\w){re.escape(key)}(?!\w)", said.replace("/", ".")) is not None


def test_without_an_upstream_nothing_is_rendered(helm: Helm) -> None:
    assert names(helm.refusal(), "upstream.url")
    assert "upstream" in helm.refusal("--set", "upstream=null")


UNFIT = {
    # what each alone may be, and together not -> what the templates say
    ("config.admin.token=abc", "existingSecret=mine"): "config: admin-token: must be in the Secret mine",
    ("config.admin.engine_token=abc", "existingSecret=mine"): "config: engine-token: must be in the Secret mine",
    ("config.upstream.api_key=k", "existingSecret=mine"): "config: upstream-api-key: must be in the Secret mine",
    (
        "config.store.url=postgresql://:pw@v/h",
        "existingSecret=mine",
    ): "config: store-url: must be in the Secret mine",
    (
        "podDisruptionBudget.minAvailable=0",
        "podDisruptionBudget.maxUnavailable=1",
    ): "podDisruptionBudget: minAvailable and",
    ("engine.enabled=true", "engine.model=m"): "upstream.url: http://vllm:8000 is not the engine in the pod",
    ("config.store.url=sqlite:////data/x.db",): "config.store.url: /data/x.db is not on a volume",
    ("config.store.url=sqlite:///x.db", "persistence.enabled=true"): "config.store.url: x.db is not on a volume",
    ("service.nodePort=30080",): "service.nodePort: has no effect with service.type ClusterIP",
    ("service.externalTrafficPolicy=Local",): "service.externalTrafficPolicy: has no effect",
    ("extraVolumes[0].name=tmp",): "extraVolumes: tmp is used by the chart",
    ("extraVolumeMounts[0].name=x", "extraVolumeMounts[0].mountPath=/tmp/"): "extraVolumeMounts: /tmp/: duplicate",
    ("terminationGracePeriodSeconds=54",): "terminationGracePeriodSeconds: 54 is less than",
    (
        "serviceMonitor.enabled=true",
        "serviceMonitor.namespace=monitoring",
        "config.admin.metrics_need_token=true",
    ): "serviceMonitor.namespace: monitoring has no Secret with the token",
    ("config.records.path=/var/records",): "config.records.path: /var/records is not on a volume",
    ("config.spool.path=/var/spool", "config.spool.key=plain"): "config.spool.path: /var/spool is not on a volume",
    (
        "config.spool.path=s3://bucket/spool",
        "config.spool.key=plain",
    ): "config.spool.path: until they are in the",
    ("bindAddress=127.0.0.1",): "bindAddress: 127.0.0.1 is the pod's loopback address",
    ("upstream.url=http://vllm:80000",): "upstream.url: 80000 is not a port number",
    ("config.store.url=postgresql://u:p@v:65536/h",): "config.store.url: 65536 is not a port number",
    ("config.reference.backend=vllm", "config.reference.url=http://r:0"): "config.reference.url: 0 is not a port",
    ("config.tracing.endpoint=http://c:99999",): "config.tracing.endpoint: 99999 is not a port number",
    ("extraEnv[0].name=HEMOSTAT_ADMIN__PORT",): "extraEnv: HEMOSTAT_ADMIN__PORT: set by the chart; use service",
    ("extraEnv[0].name=HEMOSTAT_ADMIN__TOKEN",): "extraEnv: HEMOSTAT_ADMIN__TOKEN: set by the chart",
    ("extraEnv[0].name=HEMOSTAT_STORE__URL", "existingSecret=s"): "use store-url in the Secret",
    ("extraVolumes[0].name=a", "extraVolumes[1].name=a"): "extraVolumes: a: duplicate name",
    ("extraVolumeMounts[0].name=x", "extraVolumeMounts[0].mountPath=/x"): "extraVolumeMounts: there is no volume x",
    ("extraContainers[0].name=hemostat", "extraContainers[0].image=i"): "hemostat: duplicate container name",
    (
        *("extraContainers[0].name=a", "extraContainers[0].image=i"),
        *("initContainers[0].name=a", "initContainers[0].image=i"),
    ): "a: duplicate container name",
}


@pytest.mark.parametrize("values", UNFIT, ids=" ".join)
def test_values_that_do_not_go_together(helm: Helm, values: tuple[str, ...]) -> None:
    said = helm.refusal("--set", UPSTREAM, *(f"--set={value}" for value in values))
    assert UNFIT[values] in said


def test_fewer_logprobs_than_are_asked_for(helm: Helm) -> None:
    said = helm.refusal(*ENGINE, "--set", "config.shadow.top_k=65")
    assert "engine.maxLogprobs: 64 is less than config.shadow.top_k, 65" in said
    helm.render(*ENGINE, "--set", "config.shadow.top_k=64")


def test_flags_that_the_chart_gives_the_engine_for_adapters(helm: Helm) -> None:
    flags = ("--set", "engine.args={--enable-lora}")
    said = helm.refusal(*ENGINE, *flags, "--set", "engine.adapters.enabled=true")
    assert "engine.args: the chart sets --enable-lora (from engine.adapters)" in said
    helm.render(*ENGINE, *flags)


@pytest.mark.parametrize("flag", ["--port", "--max_logprobs=5", "--logits-processors", "--host"])
def test_flags_that_the_chart_gives_the_engine(helm: Helm, flag: str) -> None:
    said = helm.refusal(*ENGINE, "--set", f"engine.args={{--enforce-eager,{flag}}}")
    assert f"engine.args: the chart sets {flag.partition('=')[0].replace('_', '-')} " in said


def test_the_engines_volumes(helm: Helm) -> None:
    mount = "engine.volumeMounts[0]"
    said = helm.refusal(*ENGINE, f"--set={mount}.name=m,{mount}.mountPath=/m")
    assert "engine.volumeMounts: there is no volume m; add it to extraVolumes" in said
    said = helm.refusal(*ENGINE, f"--set={mount}.name=shm,{mount}.mountPath=/dev/shm/")
    assert "engine.volumeMounts: /dev/shm/: duplicate mount path" in said


def test_a_release_whose_services_could_not_exist(helm: Helm) -> None:
    with pytest.raises(Exception, match="fullnameOverride: required"):
        helm.render("--set", UPSTREAM, release="1st")
    helm.render("--set", UPSTREAM, "--set", "fullnameOverride=first", release="1st")


def test_an_old_kubernetes(helm: Helm) -> None:
    assert "1.30.0" in helm.refusal("--set", UPSTREAM, "--kube-version", "1.29.0")


def test_as_a_part_of_another_chart(helm: Helm, tmp_path: Path) -> None:
    """A parent sets `enabled` (its condition) and `global` in our values."""
    (tmp_path / "Chart.yaml").write_text("apiVersion: v2\nname: parent\nversion: 1.0.0\n")
    (tmp_path / "values.yaml").write_text(
        "global: {a: 1}\nhemostat: {enabled: true, upstream: {url: 'http://vllm:8000'}}\n"
    )
    (tmp_path / "charts").mkdir()
    (tmp_path / "charts" / "hemostat").symlink_to(Path(__file__).resolve().parents[2] / "helm" / "hemostat")
    assert "kind: Deployment" in helm.run("template", "x", str(tmp_path))
