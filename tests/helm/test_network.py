"""Who may reach the pod, and what it may reach."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from tests.support.helm_chart import Helm, Manifest, Rendered, set_of

STORE = "config.store.url=postgresql://postgres.data.svc:5432/h"


def egress(rendered: Rendered) -> list[tuple[Any, set[tuple[str, Any]]]]:
    """(to, {(protocol, port)}) of every rule; to None: anywhere."""
    policy = rendered.one("NetworkPolicy")["spec"]
    assert set(policy["policyTypes"]) == {"Ingress", "Egress"}
    return [(rule.get("to"), {(p["protocol"], p["port"]) for p in rule["ports"]}) for rule in policy["egress"]]


def namespace(name: str) -> list[Manifest]:
    return [{"namespaceSelector": {"matchLabels": {"kubernetes.io/metadata.name": name}}}]


PROMETHEUS = {
    "namespaceSelector": {},
    "podSelector": {"matchLabels": {"app.kubernetes.io/name": "prometheus"}},
}
DNS = (None, {("UDP", 53), ("TCP", 53)})


def test_the_pod_may_reach_the_models_dns_and_the_store_and_nothing_else(helm: Helm) -> None:
    rendered = helm.render(
        "--set", "upstream.url=http://vllm.models.svc:8000", "--set", "networkPolicy.enabled=true",
        "--set", "config.reference.backend=vllm", "--set", "config.reference.url=https://reference.other.svc.cluster.local",
        "--set", STORE,
    )  # fmt: skip
    assert egress(rendered) == [
        DNS,
        (namespace("models"), {("TCP", 8000)}),
        (namespace("other"), {("TCP", 443)}),
        (namespace("data"), {("TCP", 5432)}),
    ]


def test_the_candidate_of_the_live_gate_may_be_reached(helm: Helm) -> None:
    on = ("--set", "upstream.url=http://vllm:8000", "--set", "networkPolicy.enabled=true")
    rendered = helm.render(*on, "--set-string", "config.gate.candidate=http://next.models.svc:8000#name")
    assert egress(rendered)[-1] == (namespace("models"), {("TCP", 8000)})
    named = helm.render(*on, "--set", "networkPolicy.candidate.ports={8000}")  # by the API
    assert egress(named)[-1] == (None, {("TCP", 8000)})


@pytest.mark.parametrize(
    ("url", "to", "port"),
    [
        ("http://vllm", [{"podSelector": {}}], 80),
        ("http://vllm:8000", [{"podSelector": {}}], 8000),
        ("http://vllm-0.vllm.models.svc:8000", namespace("models"), 8000),
        ("https://vllm.example.com", None, 443),
        ("http://svc.example.com:81", None, 81),
        ("http://10.1.2.3:8000", [{"ipBlock": {"cidr": "10.1.2.3/32"}}], 8000),
        ("http://[fd00::1]:8000", [{"ipBlock": {"cidr": "fd00::1/128"}}], 8000),
        ("http://[fd00::1]", [{"ipBlock": {"cidr": "fd00::1/128"}}], 80),
    ],
)
def test_who_is_behind_an_address(helm: Helm, url: str, to: Any, port: int) -> None:
    rendered = helm.render("--set", f"upstream.url={url}", "--set", "networkPolicy.enabled=true")
    assert egress(rendered) == [DNS, (to, {("TCP", port)})]


def test_the_operator_knows_better_who_is_behind_it(helm: Helm) -> None:
    rendered = helm.values(set_of("openshift"))
    app = [{"podSelector": {"matchLabels": {"app": "vllm"}}}]
    assert egress(rendered) == [(None, {("UDP", 5353), ("TCP", 5353)}), (app, {("TCP", "http")})]
    admin = rendered.one("NetworkPolicy")["spec"]["ingress"][1]
    assert admin["from"] == [*namespace("openshift-monitoring"), PROMETHEUS]


def test_an_engine_in_the_pod_needs_no_rule_and_a_hidden_store_one(helm: Helm) -> None:
    assert egress(helm.values(set_of("restricted"))) == [DNS, ([{"podSelector": {}}], {("TCP", 8000)})]  # the reference
    admin = helm.values(set_of("restricted")).one("NetworkPolicy")["spec"]["ingress"][1]
    assert admin["from"] == [{"podSelector": {}}, PROMETHEUS]  # and not the loopback
    hidden = helm.set(
        "networkPolicy.enabled=true", "existingSecret=s", "networkPolicy.store.to[0].ipBlock.cidr=10.0.0.9/32"
    )
    assert egress(hidden)[-1] == ([{"ipBlock": {"cidr": "10.0.0.9/32"}}], {("TCP", 5432)})
    password = helm.values(set_of("postgres"))
    assert egress(password)[-1] == (None, {("TCP", 5432)})


def test_traces_and_what_is_asked_for_may_leave_too(helm: Helm) -> None:
    rules = egress(helm.values(set_of("everything")))
    assert rules[-2] == (namespace("observability"), {("TCP", 4318)})
    assert rules[-1] == ([{"ipBlock": {"cidr": "10.1.2.3/32"}}], {("TCP", 443)})


def test_who_may_come_in(helm: Helm) -> None:
    def ingress(*settings: str) -> list[Manifest]:
        rules: list[Manifest] = helm.set("networkPolicy.enabled=true", *settings).one("NetworkPolicy")["spec"][
            "ingress"
        ]
        assert [rule["ports"] for rule in rules] == [[{"port": name, "protocol": "TCP"}] for name in ("http", "admin")]
        return rules

    assert "from" not in ingress()[0]
    first, test = ingress("networkPolicy.clients[0].podSelector.matchLabels.a=b")[0]["from"]
    assert first == {"podSelector": {"matchLabels": {"a": "b"}}}
    assert test["podSelector"]["matchLabels"]["app.kubernetes.io/component"] == "test"
    # The engine's plugin fetches profiles from wherever the upstream is.
    assert ingress()[1]["from"] == [{"podSelector": {}}, PROMETHEUS]
    gpu = ingress("upstream.url=http://vllm.gpu.svc:8000")
    assert gpu[1]["from"] == [{"podSelector": {}}, *namespace("gpu"), PROMETHEUS]


def test_the_admin_port_is_protected_by_default(helm: Helm) -> None:
    policy = helm.set("upstream.url=http://vllm.gpu.svc:8000").one("NetworkPolicy")["spec"]
    assert policy["policyTypes"] == ["Ingress"]
    assert "egress" not in policy
    data, admin = policy["ingress"]
    assert "from" not in data
    assert [port["port"] for port in admin["ports"]] == ["admin"]
    assert admin["from"] == [{"podSelector": {}}, *namespace("gpu"), PROMETHEUS]
    own = helm.set("networkPolicy.prometheus[0].podSelector.matchLabels.app=mine").one("NetworkPolicy")["spec"]
    assert own["ingress"][1]["from"] == [{"podSelector": {}}, {"podSelector": {"matchLabels": {"app": "mine"}}}]
    assert not helm.set("networkPolicy.adminIngress=false").all("NetworkPolicy")


def test_several_engines_may_be_reached_and_reach_the_admin_port(helm: Helm, tmp_path: Path) -> None:
    rendered = helm.render(
        "--set", "upstream.urls={http://a.models.svc:8000,http://b.other.svc:8001}", "--set", "upstream.url=",
        "--set", "networkPolicy.enabled=true",
    )  # fmt: skip
    assert egress(rendered) == [DNS, (namespace("models"), {("TCP", 8000)}), (namespace("other"), {("TCP", 8001)})]
    admin = rendered.one("NetworkPolicy")["spec"]["ingress"][1]["from"]
    assert admin == [{"podSelector": {}}, *namespace("models"), *namespace("other"), PROMETHEUS]
    assert rendered.settings(tmp_path).upstream.addresses == ("http://a.models.svc:8000", "http://b.other.svc:8001")


def test_the_addresses_of_a_name_may_be_reached(helm: Helm, tmp_path: Path) -> None:
    url = "dns+http://vllm-headless.models.svc:8000"
    rendered = helm.render("--set", f"upstream.url={url}", "--set", "networkPolicy.enabled=true")
    assert egress(rendered)[1] == (namespace("models"), {("TCP", 8000)})
    assert rendered.settings(tmp_path).upstream.url == url
