"""The tokens that the chart makes are kept over upgrades: helm asks the cluster for the Secret of last time."""

from __future__ import annotations

import base64

import pytest
import yaml
from tests.support.helm_api import SECRET, Cluster
from tests.support.helm_chart import CHART, UPSTREAM, Helm


def token(helm: Helm, cluster: Cluster, *settings: str, key: str = "admin-token") -> str:
    """What an upgrade of the release would make it."""
    text = helm.run(
        *("template", "rel", str(CHART), "--namespace", "models", "--show-only", "templates/secret.yaml"),
        *("--dry-run=server", "--disable-openapi-validation", "--kubeconfig", str(cluster.kubeconfig)),
        *(part for setting in (UPSTREAM, *settings) for part in ("--set", setting)),
    )
    assert SECRET in cluster.asked
    data = yaml.safe_load(text)["data"]
    return base64.b64decode(data[key]).decode()


def test_the_first_time_it_is_random(helm: Helm, cluster: Cluster) -> None:
    first, second = token(helm, cluster), token(helm, cluster)
    assert first != second
    assert min(len(first), len(second)) >= 32


def test_then_it_stays(helm: Helm, cluster: Cluster) -> None:
    cluster.keep({"admin-token": "made-last-time", "engine-token": "made-too"})
    assert token(helm, cluster) == "made-last-time"
    assert token(helm, cluster, key="engine-token") == "made-too"


def test_a_release_of_before_engines_had_one_gets_theirs(helm: Helm, cluster: Cluster) -> None:
    cluster.keep({"admin-token": "made-last-time"})
    assert len(token(helm, cluster, key="engine-token")) >= 32


@pytest.mark.parametrize("data", [None, {}, {"other": "x"}], ids=repr)
def test_a_secret_without_one_gets_one(helm: Helm, cluster: Cluster, data: dict[str, str] | None) -> None:
    cluster.keep(data)
    assert len(token(helm, cluster)) >= 32


def test_the_operators_own_wins(helm: Helm, cluster: Cluster) -> None:
    cluster.keep({"admin-token": "made-last-time"})
    assert token(helm, cluster, "config.admin.token=mine") == "mine"
