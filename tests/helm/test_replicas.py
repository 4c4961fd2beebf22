"""Several pods: engines find every one of them."""

from __future__ import annotations

import pytest
from tests.support.helm_api import Cluster
from tests.support.helm_chart import Helm

from hemostat_engine.settings import Settings

HA = "config.store.url=redis://valkey.data.svc:6379/0"


@pytest.mark.parametrize("more", ["replicaCount=3", "autoscaling.enabled=true"])
def test_engines_are_told_of_every_pod(helm: Helm, cluster: Cluster, more: str) -> None:
    service = helm.set(HA, more).one("Service", "-replicas")
    spec = service["spec"]
    assert (spec["clusterIP"], spec["publishNotReadyAddresses"]) == ("None", True)
    assert [(port["port"], port["targetPort"]) for port in spec["ports"]] == [(8081, 8081)]
    notes = helm.notes(cluster, HA, more, "service.adminPort=9000")
    [said] = [line.partition("=")[2] for line in notes.splitlines() if "HEMOSTAT_ADMIN_URL=" in line]
    assert said == "dns+http://rel-hemostat-replicas.models.svc:8081"
    assert Settings.from_environment({"HEMOSTAT_ADMIN_URL": said}).admin_url == said


def test_one_pod_needs_no_such_service(helm: Helm) -> None:
    names = {service["metadata"]["name"] for service in helm.set().all("Service")}
    assert names == {"rel-hemostat", "rel-hemostat-admin"}
