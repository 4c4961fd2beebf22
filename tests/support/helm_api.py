"""As much of a Kubernetes API server as helm asks when it renders for one: which kinds there are, and one Secret."""

from __future__ import annotations

import base64
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

SECRET = "/api/v1/namespaces/models/secrets/rel-hemostat"
KINDS = {
    "v1": ["Secret", "ConfigMap", "Service", "ServiceAccount"],
    "apps/v1": ["Deployment"],
    "monitoring.coreos.com/v1": ["ServiceMonitor"],
    "networking.k8s.io/v1": ["NetworkPolicy"],
    "policy/v1": ["PodDisruptionBudget"],
}


def _discovery() -> dict[str, Any]:
    groups = []
    for name in KINDS.keys() - {"v1"}:
        version = {"groupVersion": name, "version": "v1"}
        groups.append({"name": name.partition("/")[0], "versions": [version], "preferredVersion": version})
    answers: dict[str, Any] = {
        "/version": {"major": "1", "minor": "37", "gitVersion": "v1.37.0"},
        "/api": {"kind": "APIVersions", "versions": ["v1"]},
        "/apis": {"kind": "APIGroupList", "apiVersion": "v1", "groups": groups},
    }
    for name, kinds in KINDS.items():
        resources = [
            {
                "name": f"{kind.lower()}s",
                "singularName": kind.lower(),
                "namespaced": True,
                "kind": kind,
                "verbs": ["get"],
            }
            for kind in kinds
        ]
        path = f"/apis/{name}" if "/" in name else f"/api/{name}"
        answers[path] = {"kind": "APIResourceList", "groupVersion": name, "resources": resources}
    return answers


class Cluster:
    """kubeconfig: the file that leads helm here; secret: the release's, as it is stored."""

    def __init__(self, kubeconfig: Path) -> None:
        self.kubeconfig = kubeconfig
        self.secret: dict[str, Any] | None = None
        self.asked: list[str] = []
        self._discovery = _discovery()

    def keep(self, data: dict[str, str] | None) -> None:
        """Store the Secret with this data; None: without any."""
        metadata = {
            "name": "rel-hemostat",
            "namespace": "models",
            "labels": {"app.kubernetes.io/managed-by": "Helm"},
            "annotations": {"meta.helm.sh/release-name": "rel", "meta.helm.sh/release-namespace": "models"},
        }
        self.secret = {"apiVersion": "v1", "kind": "Secret", "metadata": metadata}
        if data is not None:
            self.secret["data"] = {key: base64.b64encode(value.encode()).decode() for key, value in data.items()}

    def answer(self, path: str) -> dict[str, Any] | None:
        """None: there is no such thing."""
        self.asked.append(path)
        return self.secret if path == SECRET else self._discovery.get(path)


@contextmanager
def running(folder: Path) -> Iterator[Cluster]:
    cluster = Cluster(folder / "kubeconfig")

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            result = cluster.answer(self.path.partition("?")[0])
            missing = {"kind": "Status", "apiVersion": "v1", "status": "Failure", "reason": "NotFound", "code": 404}
            body = json.dumps(missing if result is None else result).encode()
            self.send_response(404 if result is None else 200)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        cluster.kubeconfig.write_text(
            json.dumps(
                {
                    "apiVersion": "v1",
                    "kind": "Config",
                    "current-context": "c",
                    "contexts": [{"name": "c", "context": {"cluster": "c", "user": "u"}}],
                    "clusters": [{"name": "c", "cluster": {"server": f"http://127.0.0.1:{server.server_port}"}}],
                    "users": [{"name": "u", "user": {}}],
                }
            )
        )
        threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
        try:
            yield cluster
        finally:
            server.shutdown()
