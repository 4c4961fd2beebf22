"""deploy/compose.yaml: valid by schema and for docker-compose, and consistent with the rest of deploy/."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import yaml
from dockerfile_parse import DockerfileParser
from tests.support.certificates import certificate
from tests.support.paths import ROOT

from hemostat.config.loading import load
from hemostat.config.operation import Admin, Listen
from hemostat.config.schema import Settings
from hemostat.reference.hidden.pooling import POOLING_ARGUMENTS
from hemostat.supervisor.role import Role
from hemostat.supervisor.serve import with_role

DEPLOY = ROOT / "deploy"
COMPOSE = DEPLOY / "compose.yaml"
ENGINES = DEPLOY / "compose.engines.yaml"
PLANES = DEPLOY / "compose.planes.yaml"
EXAMPLE = DEPLOY / ".env.example"
OF_COMPOSE_ITSELF = {"COMPOSE_PROFILES"}
PLUGIN = "hemostat_engine:LogitsProcessor"


def example() -> dict[str, str]:
    """The variables of .env.example."""
    lines = [line for line in EXAMPLE.read_text().splitlines() if line and not line.startswith("#")]
    return dict(line.partition("=")[::2] for line in lines)


def resolved(profile: str, environment: Path = EXAMPLE) -> dict[str, Any]:
    """What Compose makes of it, variables and anchors filled in; it needs no Docker for that."""
    if shutil.which("docker-compose") is None:
        pytest.skip("docker-compose is not here; on Debian or Ubuntu: apt-get install docker-compose")
    command = ["docker-compose", "--file", str(COMPOSE), "--env-file", str(environment), "--profile", profile]
    said = subprocess.run(
        [*command, "config", "--format", "json"], capture_output=True, text=True, check=False, env={"PATH": "/usr/bin"}
    )
    assert said.returncode == 0, said.stderr
    made: dict[str, Any] = json.loads(said.stdout)
    return made


@pytest.mark.parametrize("file", [COMPOSE, ENGINES, PLANES])
def test_valid_by_the_schema_of_the_specification(file: Path) -> None:
    checker = Path(sys.executable).parent / "check-jsonschema"
    command = [str(checker), "--builtin-schema", "vendor.compose-spec"]
    said = subprocess.run([*command, str(file)], capture_output=True, text=True, check=False)
    assert said.returncode == 0, said.stdout


def test_both_ends_of_the_planes_take_their_configuration(tmp_path: Path) -> None:
    """Of compose.planes.yaml: what each container gets is what its command needs."""
    made, services = certificate(tmp_path, "hemostat"), yaml.safe_load(PLANES.read_text())["services"]
    files = {"/etc/hemostat-tls/cert.pem": str(made.cert), "/etc/hemostat-tls/key.pem": str(made.key)}
    for name, role in (("hemostat", Role.SERVE), ("relay", Role.RELAY)):
        given = {"HEMOSTAT_ADMIN__TOKEN": "t"} | services[name]["environment"]
        given = {key: "t" if "TOKEN" in key else files.get(value, value) for key, value in given.items()}
        control = with_role(partial(load, DEPLOY / "hemostat.yaml", given), role).control
        assert (control.listen, control.addresses) in (("0.0.0.0:8082", []), (None, ["hemostat:8082"]))
    assert services["relay"]["command"][0] == "relay"


def test_schema_rejects_an_unknown_key(tmp_path: Path) -> None:
    wrong = tmp_path / "compose.yaml"
    wrong.write_text(COMPOSE.read_text().replace("cap_drop:", "cap_dorp:"))
    command = [str(Path(sys.executable).parent / "check-jsonschema"), "--builtin-schema", "vendor.compose-spec"]
    said = subprocess.run([*command, str(wrong)], capture_output=True, text=True, check=False)
    assert said.returncode == 1
    assert "cap_dorp" in said.stdout


def test_example_has_exactly_the_variables() -> None:
    text = re.sub(r"^\s*#.*$", "", COMPOSE.read_text(), flags=re.MULTILINE)
    used = set(re.findall(r"\$\{([A-Z0-9_]+)", text))
    assert used == set(example()) - OF_COMPOSE_ITSELF
    defaults = dict(re.findall(r"\$\{([A-Z0-9_]+):-([^}]*)\}", text))
    shown = {name: value for name, value in example().items() if name in defaults}
    assert shown == defaults, "the example shows the defaults"


def test_variables_without_a_default_are_required(tmp_path: Path) -> None:
    (tmp_path / ".env").write_text("")
    with pytest.raises(AssertionError, match=r"set \w+ in deploy/.env"):
        resolved("gpu", tmp_path / ".env")


@pytest.mark.parametrize("profile", ["gpu", "cpu"])
def test_profile_starts_one_of_each_service(profile: str) -> None:
    made = resolved(profile)
    assert set(made["services"]) == {
        f"compressed-{profile}",
        f"reference-{profile}",
        "hemostat",
        "prometheus",
        "grafana",
    }
    compressed, reference = (made["services"][f"{side}-{profile}"] for side in ("compressed", "reference"))
    given = example()
    image = given["VLLM_CPU_IMAGE" if profile == "cpu" else "VLLM_IMAGE"]
    assert compressed["build"]["args"]["VLLM"] == reference["image"] == image
    assert compressed["build"]["dockerfile"] == "deploy/Dockerfile.engine"
    for service, model in ((compressed, given["COMPRESSED_MODEL"]), (reference, given["REFERENCE_MODEL"])):
        assert service["entrypoint"] == ["vllm", "serve"]
        assert service["command"][0] == model
        flags = dict(zip(service["command"][1::2], service["command"][2::2], strict=True))
        settings = yaml.safe_load((DEPLOY / "hemostat.yaml").read_text())
        if service is compressed:
            # It must allow as many logprobs as Hemostat requests.
            assert int(flags["--max-logprobs"]) >= settings["shadow"]["top_k"]
        else:
            assert service["command"][1:] == list(POOLING_ARGUMENTS)
            assert settings["reference"]["folder"] == "/models/hub", "of the hub's cache, in the volume that both mount"
        assert flags.get("--logits-processors") == (PLUGIN if service is compressed else None)
        devices = service.get("deploy", {}).get("resources", {}).get("reservations", {}).get("devices")
        assert bool(devices) == (profile == "gpu")
    if profile == "gpu":
        cards = [s["deploy"]["resources"]["reservations"]["devices"][0]["device_ids"] for s in (compressed, reference)]
        assert cards == [[given["COMPRESSED_GPU"]], [given["REFERENCE_GPU"]]]
    else:
        assert compressed["environment"]["VLLM_CPU_INT4_W4A8"] == "0"


def test_what_the_middlewares_image_contains_is_chosen_in_the_environment_file(tmp_path: Path) -> None:
    assert resolved("gpu")["services"]["hemostat"]["build"]["args"]["EXTRAS"] == example()["HEMOSTAT_EXTRAS"] == ""
    for chosen in ("lab", "tracing,postgres", ""):
        environment = tmp_path / "env"
        environment.write_text(
            re.sub("^HEMOSTAT_EXTRAS=.*$", f"HEMOSTAT_EXTRAS={chosen}", EXAMPLE.read_text(), flags=re.MULTILINE)
        )
        assert resolved("gpu", environment)["services"]["hemostat"]["build"]["args"]["EXTRAS"] == chosen


def test_flags_from_the_environment_file(tmp_path: Path) -> None:
    text = EXAMPLE.read_text()
    (tmp_path / ".env").write_text(text.replace("REFERENCE_ARGS=", "REFERENCE_ARGS=--max-model-len 8192", 1))
    made = resolved("gpu", tmp_path / ".env")["services"]
    assert made["reference-gpu"]["command"][-2:] == ["--max-model-len", "8192"]
    assert "8192" not in made["compressed-gpu"]["command"]


@pytest.mark.parametrize("profile", ["gpu", "cpu"])
def test_one_variable_lets_the_compressed_side_serve_adapters(profile: str, tmp_path: Path) -> None:
    variables = ("HEMOSTAT_ADAPTERS", "VLLM_ALLOW_RUNTIME_LORA_UPDATING")
    plain = resolved(profile)["services"][f"compressed-{profile}"]
    assert "--enable-lora" not in plain["command"]
    assert [plain["environment"][name] for name in variables] == ["", ""]
    (tmp_path / ".env").write_text(EXAMPLE.read_text().replace("HEMOSTAT_ADAPTERS=\n", "HEMOSTAT_ADAPTERS=1\n", 1))
    made = resolved(profile, tmp_path / ".env")["services"]
    command = made[f"compressed-{profile}"]["command"]
    assert command[-5:] == ["--enable-lora", "--max-loras", "2", "--max-lora-rank", "16"]
    assert [made[f"compressed-{profile}"]["environment"][name] for name in variables] == ["1", "1"]
    assert "HEMOSTAT_ADAPTERS" not in made[f"reference-{profile}"]["environment"]


def test_middleware_service_matches_its_image() -> None:
    service = resolved("gpu")["services"]["hemostat"]
    assert service["read_only"]
    assert service["cap_drop"] == ["ALL"]
    assert service["security_opt"] == ["no-new-privileges:true"]
    assert "tmpfs" not in service, "adapters are made in /tmp, which is not to be in memory"
    assert service["build"]["dockerfile"] == "deploy/Dockerfile"
    assert not service.get("depends_on"), "a reference that is not there holds no client up"
    targets = {volume["target"] for volume in service["volumes"]}
    command = json.loads(DockerfileParser(path=str(DEPLOY / "Dockerfile")).cmd)
    assert targets == {command[-1], "/data", "/models", "/tmp"}
    assert [volume.get("read_only") for volume in service["volumes"] if volume["target"] == "/models"] == [True]


def test_drain_is_shorter_than_the_grace_period() -> None:
    grace = resolved("gpu")["services"]["hemostat"]["stop_grace_period"]
    settings = load(DEPLOY / "hemostat.yaml", {"HEMOSTAT_ADMIN__TOKEN": "t"})
    assert grace == "45s"
    assert settings.shutdown_seconds + 5 + 10 <= 45, "relays, then the control process; see hemostat.supervisor"


def test_mounted_files_exist() -> None:
    result = 0
    for service in resolved("gpu")["services"].values():
        for volume in service.get("volumes", []):
            if volume["type"] == "bind":
                assert Path(volume["source"]).exists(), volume
                assert volume["read_only"], volume
                result += 1
    assert result >= 4


def test_ports_match_and_only_the_data_port_is_public() -> None:
    services = resolved("gpu")["services"]
    published = {
        (name, port["target"]): (port.get("host_ip", ""), port["published"])
        for name, service in services.items()
        for port in service.get("ports", [])
    }
    assert published == {
        ("hemostat", Listen().port): ("", "8080"),
        ("hemostat", Admin().port): ("127.0.0.1", "8081"),
        ("prometheus", 9090): ("127.0.0.1", "9090"),
        ("grafana", 3000): ("127.0.0.1", "3000"),
    }
    environment = services["compressed-gpu"]["environment"]
    assert environment["HEMOSTAT_ADMIN_URL"] == f"http://hemostat:{Admin().port}"


def test_host_names_are_services() -> None:
    """Every host that a mounted file or an environment names is a service or an alias of the same network."""
    services = resolved("gpu")["services"]
    known = set(services)
    for service in services.values():
        for network in service["networks"].values():
            known |= set((network or {}).get("aliases", []))
    scraped = yaml.safe_load((DEPLOY / "prometheus" / "prometheus.yml").read_text())["scrape_configs"]
    targets = {t.partition(":")[0] for job in scraped for group in job["static_configs"] for t in group["targets"]}
    assert targets == {"hemostat", "compressed", "reference"} <= known
    texts = [path.read_text() for path in (DEPLOY / "hemostat.yaml", *DEPLOY.glob("grafana/provisioning/*/*.yaml"))]
    hosts = {host for text in texts for host in re.findall(r"https?://([a-z.-]+)[:/]", text)}
    assert hosts == {"compressed", "reference", "prometheus"} <= known


def test_configuration_is_valid_with_the_environment_of_the_service() -> None:
    service = resolved("gpu")["services"]["hemostat"]
    settings = load(DEPLOY / "hemostat.yaml", service["environment"])
    assert settings.admin.token is not None
    assert settings.shadow.rate == float(example()["HEMOSTAT_SHADOW_RATE"])
    assert settings.calibration.mode == example()["HEMOSTAT_CALIBRATION_MODE"]
    assert settings.store.url.startswith("sqlite:////data/")


def test_grafana_has_the_dashboards_of_the_chart() -> None:
    volumes = resolved("gpu")["services"]["grafana"]["volumes"]
    mounted = {v["target"]: v["source"] for v in volumes if v["type"] == "bind"}
    (provider,) = yaml.safe_load((DEPLOY / "grafana/provisioning/dashboards/hemostat.yaml").read_text())["providers"]
    folder = Path(mounted[provider["options"]["path"]])
    assert folder == ROOT / "helm" / "hemostat" / "dashboards"
    assert len(list(folder.glob("*.json"))) == 3
    assert mounted["/etc/grafana/provisioning"] == str(DEPLOY / "grafana" / "provisioning")


def test_prometheus_accepts_its_configuration(tmp_path: Path) -> None:
    """As mounted: the rules lie where the configuration looks for them."""
    if shutil.which("promtool") is None:
        pytest.skip("promtool is not here; on Debian or Ubuntu: apt-get install prometheus")
    for volume in resolved("gpu")["services"]["prometheus"]["volumes"]:
        if volume["type"] == "bind":
            place = tmp_path / Path(volume["target"]).relative_to("/etc/prometheus")
            place.parent.mkdir(exist_ok=True)
            shutil.copy(volume["source"], place)
    command = ["promtool", "check", "config", str(tmp_path / "prometheus.yml")]
    said = subprocess.run(command, capture_output=True, text=True, check=False)
    assert said.returncode == 0, said.stdout + said.stderr
    assert "1 rule files found" in said.stdout
    assert re.search(r"SUCCESS: \d+ rules found", said.stdout)


@pytest.mark.parametrize("kind", ["gpu", "cpu"])
def test_the_second_engine_is_started_as_the_first(kind: str) -> None:
    """But for its name and its GPU; and Hemostat looks up the name that both have."""
    first, second = yaml.safe_load(COMPOSE.read_text()), yaml.safe_load(ENGINES.read_text())
    service, other = first["services"][f"compressed-{kind}"], second["services"][f"compressed-2-{kind}"]
    assert service.keys() == other.keys()
    for key in service.keys() - {"deploy"}:
        assert service[key] == other[key], key
    (alias,) = other["networks"]["default"]["aliases"]
    url = second["services"]["hemostat"]["environment"]["HEMOSTAT_UPSTREAM__URL"]
    assert Settings.model_validate({"upstream": {"url": url}}).upstream.addresses == (f"dns+http://{alias}:8000",)
