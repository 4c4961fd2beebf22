"""The whole service in one release (values/whole.yaml): models, TLS, Gateway, an Ingress for the console, a Secret."""

from __future__ import annotations

import asyncio
import itertools
import os
import re
import shutil
import ssl
import subprocess
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
from tests.support.certificates import certificate
from tests.support.fake_vllm import FakeVllm, serving
from tests.support.helm_api import Cluster
from tests.support.helm_chart import Helm, Manifest, Rendered, container, set_of
from tests.support.waiting import HANG_SECONDS, until

from hemostat.relay.limits import Limits
from hemostat_lab.demo.vllm_server import free_port


@pytest.fixture(scope="module")
def whole(helm: Helm) -> Rendered:
    return helm.values(set_of("whole"))


def flags(manifest: Manifest) -> dict[str, str]:
    args = manifest["args"][1:]
    return {name: value for name, value in itertools.pairwise(args) if name.startswith("--")}


def test_the_engine_has_pods_of_its_own(whole: Rendered, tmp_path: Path) -> None:
    deployment = whole.one("Deployment", "-engine")["spec"]
    pod = deployment["template"]["spec"]
    (engine,) = pod["containers"]
    assert deployment["replicas"] == 2
    assert deployment["strategy"]["rollingUpdate"]["maxSurge"] == 0, "a GPU may be all there is"
    assert (engine["command"], engine["args"][0]) == (["vllm", "serve"], "/models/my-model-W4A16")
    assert flags(engine)["--logits-processors"] == "hemostat_engine:LogitsProcessor"
    assert (flags(engine)["--max-logprobs"], flags(engine)["--max-model-len"]) == ("64", "8192")
    variables = {variable["name"]: variable for variable in engine["env"]}
    assert variables["HEMOSTAT_ADMIN_URL"]["value"] == "http://rel-hemostat-admin.models.svc:8081"
    assert variables["HEMOSTAT_ENGINE_TOKEN"]["valueFrom"]["secretKeyRef"]["key"] == "engine-token"
    assert "admin-token" not in str(deployment)
    assert (pod["nodeSelector"], engine["resources"]) == ({"gpu": "l4"}, {"limits": {"nvidia.com/gpu": 1}})
    # Each engine has an address, which the middleware looks up.
    assert whole.settings(tmp_path).upstream.url == "dns+http://rel-hemostat-engine.models.svc:8000"
    service = whole.one("Service", "-engine")["spec"]
    assert (service["clusterIP"], service["ports"][0]["port"]) == ("None", 8000)
    assert [spec["name"] for spec in whole.pod["spec"]["initContainers"]] == ["tls"], "and none is in its pod"


def test_the_reference_has_pods_of_its_own(whole: Rendered, tmp_path: Path) -> None:
    pod = whole.one("Deployment", "-reference")["spec"]["template"]["spec"]
    (reference,) = pod["containers"]
    assert reference["image"] == "vllm/vllm-openai:v0.32.0"
    assert reference["args"][-2:] == ["--runner=pooling", "--convert=embed"]
    assert flags(reference)["--max-logprobs"] == "32", "config.shadow.top_k"
    assert reference["env"] == [{"name": "HF_HOME", "value": "/tmp/hf"}], "no token of Hemostat's"
    assert pod["tolerations"] == [{"key": "gpu", "operator": "Exists"}]
    assert {"name": "models", "mountPath": "/models"} in reference["volumeMounts"]
    settings = whole.settings(tmp_path).reference
    assert (settings.backend, settings.url) == ("vllm", "http://rel-hemostat-reference.models.svc:8000")
    assert whole.one("Service", "-reference")["spec"].get("clusterIP") is None


def test_the_engines_metrics_are_scraped(whole: Rendered, helm: Helm) -> None:
    monitor = whole.one("ServiceMonitor", "-engine")
    assert monitor["metadata"]["labels"]["release"] == "prometheus"
    assert monitor["spec"]["endpoints"] == [{"port": "engine", "path": "/metrics", "interval": "15s"}]
    # Of an engine in Hemostat's pod, too; the policy of that pod lets Prometheus in.
    sidecar = helm.values(set_of("engine-ingress"))
    assert sidecar.one("ServiceMonitor", "-engine")["spec"] == monitor["spec"]
    (rule,) = (r for r in sidecar.one("NetworkPolicy")["spec"]["ingress"] if r["ports"][0]["port"] == "engine")
    assert rule["from"][0]["podSelector"] == {"matchLabels": {"app.kubernetes.io/name": "prometheus"}}


def test_routes_lead_to_the_service(whole: Rendered) -> None:
    route = whole.one("HTTPRoute")["spec"]
    assert (route["hostnames"], route["parentRefs"][0]["sectionName"]) == (["llm.example.com"], "https")
    assert route["rules"] == [
        {
            "matches": [{"path": {"type": "PathPrefix", "value": "/"}}],
            "timeouts": {"request": "1h"},
            "backendRefs": [{"name": "rel-hemostat", "port": 443}],
        }
    ]
    console = whole.one("Ingress", "-admin")["spec"]
    (rule,) = console["rules"]
    assert rule["http"]["paths"][0]["backend"]["service"] == {"name": "rel-hemostat-admin", "port": {"name": "admin"}}
    assert (console["ingressClassName"], rule["host"]) == ("internal", "console.example.com")
    assert "console.example.com" in whole.config["admin"]["allowed_hosts"], "where names are listed"


def test_further_objects_are_rendered(whole: Rendered) -> None:
    external = whole.one("ExternalSecret")
    assert external["metadata"]["name"] == external["spec"]["target"]["name"] == "hemostat-tokens"
    assert external["metadata"]["namespace"] == "models"
    assert whole.one("ConfigMap", "-motto")["data"] == {"port": "443"}


def test_the_data_port_takes_tls_only(whole: Rendered, tmp_path: Path) -> None:
    settings = whole.settings(tmp_path)
    assert (settings.listen.host, settings.admin.host) == ("127.0.0.1", "0.0.0.0")
    assert settings.limits.connections_per_client == Limits().connections, "all have the sidecar's address"
    ports = whole.one("Service", "rel-hemostat")["spec"]["ports"]
    assert ports == [{"name": "https", "port": 443, "targetPort": "https", "protocol": "TCP"}]
    data = whole.one("NetworkPolicy")["spec"]["ingress"][0]
    assert data["ports"] == [{"port": "https", "protocol": "TCP"}]
    assert {"podSelector": {"matchLabels": whole_test(whole)}} in data["from"], "helm test"
    sidecar = container(whole.pod, "tls")
    assert sidecar["restartPolicy"] == "Always", "it ends after Hemostat has drained"
    assert sidecar["securityContext"] == whole.hemostat["securityContext"]
    (secret,) = (volume["secret"] for volume in whole.pod["spec"]["volumes"] if volume["name"] == "data-tls")
    assert secret["secretName"] == "llm-tls"


def test_with_tls_an_operator_may_still_lower_the_limit_of_an_address(helm: Helm, tmp_path: Path) -> None:
    rendered = helm.render("--values", str(set_of("whole")), "--set", "config.limits.connections_per_client=7")
    assert rendered.settings(tmp_path).limits.connections_per_client == 7


def whole_test(whole: Rendered) -> dict[str, str]:
    names = ("app.kubernetes.io/name", "app.kubernetes.io/instance", "app.kubernetes.io/component")
    return {name: whole.one("Pod")["metadata"]["labels"][name] for name in names}


def test_relays_of_their_own_have_it_too(helm: Helm) -> None:
    rendered = helm.render("--values", str(set_of("whole")), "--set", "relays.enabled=true")
    relay, control = (rendered.pods[f"rel-hemostat-{which}"] for which in ("relay", "control"))
    assert container(relay, "tls") == container(helm.values(set_of("whole")).pod, "tls")
    assert {"name": "data-tls", "secret": {"secretName": "llm-tls"}} in relay["spec"]["volumes"]
    assert "initContainers" not in control["spec"]
    engine = container(rendered.pods["rel-hemostat-engine"], "engine")
    assert engine["env"][0]["value"] == "dns+http://rel-hemostat-admin.models.svc:8081", "to every control process"


def test_what_does_not_go_together_is_refused(helm: Helm) -> None:
    for given, said in (
        (("engine.separate=true", "upstream.url=http://a"), "upstream.url, upstream.urls: with engine.separate the"),
        (
            ("reference.enabled=true", "reference.model=m", "config.reference.url=http://r"),
            "config.reference.url: does",
        ),
        (
            ("reference.enabled=true", "reference.model=m", "reference.args={--port=1}"),
            "reference.args: the chart sets",
        ),
        (("tls.enabled=true",), "tls"),
        (("httpRoute.enabled=true",), "httpRoute"),
        (("reference.enabled=true",), "reference"),
        (
            ("engine.separate=true", "engine.volumeMounts[0].name=x,engine.volumeMounts[0].mountPath=/x"),
            "engine.volumes",
        ),
    ):
        engine = ("engine.enabled=true", "engine.model=m")
        assert said in helm.refusal(*(part for setting in (*engine, *given) for part in ("--set", setting))), given


def test_notes(helm: Helm, cluster: Cluster) -> None:
    notes = helm.notes(cluster, values=set_of("whole"))
    for said in (
        "https://rel-hemostat.models.svc:443/v1",
        "llm.example.com at the Gateway",
        "(or https://console.example.com/ )",
        "logs deploy/rel-hemostat-engine -f",
        "helm -n models test rel",
    ):
        assert said in notes
    assert "NOTHING IS MEASURED" not in notes
    assert "clear text" not in notes
    assert "clear text" in helm.notes(cluster, "adminIngress.enabled=true", "adminIngress.hosts[0].host=a.b")


# What the pod of `helm test` runs, and the sidecar


def helm_test(whole: Rendered, *urls: str) -> subprocess.CompletedProcess[str]:
    (spec,) = whole.one("Pod")["spec"]["containers"]
    assert spec["args"][1:] == [
        "http://rel-hemostat-admin.models.svc:8081/readyz",
        "https://rel-hemostat.models.svc:443/v1/models",
    ]
    assert spec["command"] == ["python", "-c"]
    return subprocess.run(["python3", "-c", spec["args"][0], *urls], capture_output=True, text=True, check=False)


def test_helm_test_fails_where_a_port_does_not_answer(whole: Rendered) -> None:
    with serving(FakeVllm()) as url:
        assert '"data"' in helm_test(whole, f"{url}/v1/models").stdout
        refused = helm_test(whole, f"{url}/v1/models", f"{url}/no-such-route")
    assert refused.returncode == 1
    assert "404" in refused.stderr


def stream_module() -> str:
    """The line of nginx.conf that loads it; empty where it is built in, as in nginx's own image."""
    if shutil.which("nginx") is None:
        pytest.skip("nginx is not here; on Debian: apt-get install nginx libnginx-mod-stream")
    built = subprocess.run(["nginx", "-V"], capture_output=True, text=True, check=False).stderr
    if re.search(r"--with-stream(\s|$)", built):
        return ""
    match = re.search(r"--modules-path=(\S+)", built)
    module = Path(os.environ.get("NGINX_STREAM_MODULE") or f"{match[1] if match else ''}/ngx_stream_module.so")
    if not module.exists():
        pytest.skip("nginx has no stream module; on Debian: apt-get install libnginx-mod-stream")
    return f"load_module {module};\n"


@contextmanager
def nginx(whole: Rendered, folder: Path, upstream: str, port: int) -> Iterator[None]:
    """As in the pod, with other ports and folders."""
    config = whole.one("ConfigMap", "rel-hemostat")["data"]["nginx.conf"]
    for inside, outside in (
        ("/etc/hemostat-data-tls", str(folder)),
        ("0.0.0.0:8443", f"127.0.0.1:{port}"),
        ("127.0.0.1:8080", upstream.removeprefix("http://")),
        ("/tmp/nginx.pid", str(folder / "pid")),
    ):
        assert inside in config
        config = config.replace(inside, outside)
    user = "user root;\n" if os.geteuid() == 0 else ""  # the workers' too, as the folder is of this user
    (folder / "nginx.conf").write_text(stream_module() + user + config)
    command = [*container(whole.pod, "tls")["command"][:-1], str(folder / "nginx.conf")]
    with (folder / "log").open("w") as log, subprocess.Popen(command, stderr=log) as process:
        try:
            yield
        finally:
            process.terminate()
            process.wait(HANG_SECONDS)


def test_nginx_decrypts_and_takes_a_renewed_certificate(whole: Rendered, tmp_path: Path) -> None:
    def renew(name: str) -> Path:
        made = certificate(tmp_path / name)
        shutil.copy(made.key, tmp_path / "tls.key")
        shutil.copy(made.cert, tmp_path / "tls.crt")
        return made.cert

    def get(authority: Path) -> Any:
        context = ssl.create_default_context(cafile=str(authority))
        opener = urllib.request.build_opener(
            urllib.request.ProxyHandler({}), urllib.request.HTTPSHandler(context=context)
        )
        try:
            return opener.open(f"https://127.0.0.1:{port}/v1/models", timeout=20).read()
        except OSError:
            return b""

    port, first = free_port(), renew("first")
    with serving(FakeVllm()) as url:
        plain = httpx.get(f"{url}/v1/models", trust_env=False).content
        with nginx(whole, tmp_path, url, port):
            asyncio.run(until(lambda: get(first) == plain))
            second = renew("second")
            assert get(second) == plain
            assert get(first) == b"", "it is not the former certificate"
