"""The commands of docs/runbook.md, in the environment that the chart and Compose give Hemostat's container."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import yaml
from tests.support.helm_chart import ROOT, UPSTREAM, VALUE_SETS, Helm
from tests.support.stack import FakeEngine, Stack, hemostat, wait_for

RUNBOOK = ROOT / "docs" / "runbook.md"
DEFINITIONS = "## Before you begin"
"""The section that defines, for each platform, what the commands use."""
NEEDS_MODELS = {"hemostat doctor"}
"""Commands that load two checkpoints."""
NAMES = {"hemostat check", "hemostat relay", "hemostat control", "hemostat serve"}
"""These only name a process or a command if they have no arguments."""
STATES = re.compile(r"answered 4(00|04|09): (?!.*token)")
"""The answers of the admin port if a command does not fit the state: nothing was promoted that could be rolled back."""


def commands() -> list[str]:
    """Every command of the runbook that an operator types, whether it is in a sentence or in a block."""
    before, _, rest = RUNBOOK.read_text().partition(f"\n{DEFINITIONS}\n")
    text = before + rest[rest.index("\n## ") :]
    blocks = [line for block in re.findall(r"^```\w*\n(.*?)^```", text, re.M | re.S) for line in block.splitlines()]
    prose = re.sub(r"^```\w*\n.*?^```", "", text, flags=re.M | re.S)
    spans = [" ".join(span.split()) for span in re.findall(r"`([^`]+)`", prose)]
    found = [
        match[1] for line in (*blocks, *spans) if (match := re.search(r"(?:^\s*|-- )((?:hemostat|curl) .*)", line))
    ]
    return [each for each in dict.fromkeys(found) if each not in NAMES]


@contextmanager
def serving(config: dict[str, Any], environment: dict[str, str], folder: Path) -> Iterator[tuple[Stack, str]]:
    """Hemostat with this configuration and environment, but for addresses and paths that are not here; its engine."""
    engine = FakeEngine()
    engine.start()
    own = {
        "upstream": {"url": engine.url},
        "reference": {"backend": "vllm", "url": "http://127.0.0.1:1"},
        "listen": {"host": "127.0.0.1", "port": 0},
        "admin": config.get("admin", {}) | {"host": "127.0.0.1", "port": 0},
    }
    if "HEMOSTAT_STORE__URL" in environment:
        environment = environment | {"HEMOSTAT_STORE__URL": f"sqlite:///{folder / 'store.db'}"}
    elif config.get("store", {}).get("url", "").startswith("sqlite"):
        own["store"] = {"url": f"sqlite:///{folder / 'store.db'}"}
    try:
        with hemostat(config | own, folder, environment) as stack:
            name = engine.url.removeprefix("http://")
            wait_for("the relay reports the engine", lambda: stack.status()["upstream"])
            yield stack, name
    finally:
        engine.kill()


def run(command: str, stack: Stack, engine: str, environment: dict[str, str]) -> tuple[int, str]:
    """Runs a command in the container's environment, with its placeholders filled in."""
    admin = str(stack.admin.base_url).rstrip("/")
    filled = {
        "HOST:PORT": engine,
        "http://ENGINE": f"http://{engine}",
        "VERSION": "0" * 32,
        '"NAME"': "rest",
    }
    for placeholder, value in filled.items():
        command = command.replace(placeholder, value)
    if command.startswith("hemostat profile promote"):
        command += " --yes"  # nobody is here who could confirm
    if command.startswith("curl"):
        command += " --silent --show-error --write-out '\nanswered %{http_code}'"
    done = subprocess.run(
        ["bash", "-c", command],
        capture_output=True,
        text=True,
        check=False,
        stdin=subprocess.DEVNULL,
        env={
            "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
            # What the section DEFINITIONS defines, with the addresses and the file of this test.
            "HEMOSTAT_ADMIN_URL": admin,
            "DATA_URL": stack.url,
            "CONFIG": str(stack.config),
            **{name: value for name, value in os.environ.items() if name == "PYTHONPATH"},
            **environment,
        },
    )
    return done.returncode, done.stdout + done.stderr


def definitions() -> dict[str, str]:
    """Platform -> the shell lines that define what the commands use there."""
    section = RUNBOOK.read_text().partition(f"\n{DEFINITIONS}\n")[2].partition("\n## ")[0]
    found = re.findall(r"^If .*?\*\*(.+?)\*\*.*?\n\n```sh\n(.*?)^```", section, re.M | re.S)
    return dict(found)


PLATFORMS = ("a process on the machine", "with Compose", "on Kubernetes")


@pytest.mark.parametrize("platform", PLATFORMS)
def test_the_definitions_of_a_platform_define_what_the_commands_use(platform: str, tmp_path: Path) -> None:
    """docker, kubectl and hemostat are stand-ins that print how they were called."""
    assert tuple(definitions()) == PLATFORMS
    for name in ("docker", "kubectl", "hemostat"):
        stand_in = tmp_path / name
        secret = 'case "$*" in *"get secret"*) printf Y2hhbmdlLW1l; exit;; esac\n' if name == "kubectl" else ""
        stand_in.write_text(f'#!/bin/sh\n{secret}echo {name} "$@"\n')
        stand_in.chmod(0o755)
    (tmp_path / "deploy").mkdir()
    (tmp_path / "deploy" / ".env").write_text("HEMOSTAT_ADMIN_TOKEN=change-me\n")
    used = set(re.findall(r"\$(\w+)", " ".join(commands())))
    assert used == {"HEMOSTAT_ADMIN_URL", "HEMOSTAT_ADMIN__TOKEN", "CONFIG", "DATA_URL"}
    shown = "\n".join(f'echo "{name}=${name}"' for name in sorted(used))
    script = f'set -eu\n{definitions()[platform]}\nwait\n{shown}\nhemostat check --config "$CONFIG"\n'
    done = subprocess.run(
        ["bash", "-c", script],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
        env={"PATH": f"{tmp_path}:{os.environ['PATH']}"},
    )
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    defined = dict(line.split("=", 1) for line in lines if re.match(r"[A-Z_]+=", line))
    assert defined["HEMOSTAT_ADMIN_URL"] == "http://127.0.0.1:8081"
    assert defined["DATA_URL"] == "http://127.0.0.1:8080"
    assert defined["HEMOSTAT_ADMIN__TOKEN"] == "change-me"
    check = f"hemostat check --config {defined['CONFIG']}"
    assert (
        lines[-1]
        == {
            "a process on the machine": check,
            "with Compose": f"docker compose -f deploy/compose.yaml exec hemostat {check}",
            "on Kubernetes": f"kubectl -n models exec -it deploy/hemostat -c hemostat -- {check}",
        }[platform]
    )


def test_the_definitions_name_what_the_chart_makes(helm: Helm) -> None:
    rendered = helm.render("--set", UPSTREAM, release="hemostat")
    text = definitions()["on Kubernetes"]
    assert rendered.one("Deployment")["metadata"]["name"] == "hemostat"
    services = {service["metadata"]["name"]: service for service in rendered.all("Service")}
    for name, port in re.findall(r"port-forward svc/(\S+) (\d+)", text):
        assert int(port) in {row["port"] for row in services[name]["spec"]["ports"]}
    secret = rendered.one("Secret")
    assert "get secret hemostat -o jsonpath='{.data.admin-token}'" in text
    assert (secret["metadata"]["name"], "admin-token" in (secret.get("data") or secret["stringData"])) == (
        "hemostat",
        True,
    )


def check_all(stack: Stack, engine: str, environment: dict[str, str]) -> None:
    every = commands()
    assert len(every) >= 10
    for command in every:
        if any(command.startswith(needs) for needs in NEEDS_MODELS):
            continue
        code, output = run(command, stack, engine, environment)
        if command.startswith("curl"):
            assert re.search(r"answered (200|204|400|404|409)$", output), f"{command}: {output}"
        elif command.startswith("hemostat check"):
            assert not output.startswith("hemostat: "), f"{command}: {output}"
        else:
            assert code == 0 or STATES.search(output), f"{command}: {output}"
    check_change(stack, engine, environment)


def check_change(stack: Stack, engine: str, environment: dict[str, str]) -> None:
    code, output = run("hemostat profile mode observe", stack, engine, environment)
    assert (code, stack.status()["calibration"]["mode"]) == (0, "observe"), output
    code, output = run("hemostat profile mode off", stack, engine, environment)
    assert (code, stack.status()["calibration"]["mode"]) == (0, "off"), output


@pytest.mark.parametrize("commands_run", [check_change, pytest.param(check_all, marks=pytest.mark.slow)])
def test_in_the_pod_of_the_chart(
    commands_run: Callable[[Stack, str, dict[str, str]], None], helm: Helm, tmp_path: Path
) -> None:
    """The pod's environment lets a command change something: `make test` tries one. `test_in_the_container_of_compose`
    tests that each command of the runbook is one that Hemostat has, and does what it says."""
    rendered = helm.set()
    environment = dict(rendered.environment())
    assert environment["HEMOSTAT_ADMIN__TOKEN"]
    with serving(rendered.config, environment, tmp_path) as (stack, engine):
        commands_run(stack, engine, environment)


@pytest.mark.parametrize("values", VALUE_SETS, ids=lambda path: path.stem)
def test_every_set_of_values_gives_the_commands_their_token(helm: Helm, values: Path) -> None:
    rendered = helm.values(values)
    assert dict(rendered.environment())["HEMOSTAT_ADMIN__TOKEN"]
    assert rendered.config["admin"]["port"] == 8081, "where the commands look without HEMOSTAT_ADMIN_URL"


@pytest.mark.parametrize("form", ["variable", "file"])
def test_in_the_container_of_compose(tmp_path: Path, form: str) -> None:
    services = yaml.safe_load((ROOT / "deploy" / "compose.yaml").read_text())["services"]
    example = dict(
        line.split("=", 1) for line in (ROOT / "deploy" / ".env.example").read_text().splitlines() if "=" in line[1:]
    )
    filled = re.compile(r"\$\{(\w+)[^}]*\}")
    environment = {
        name: filled.sub(lambda variable: example[variable[1]], value)
        for name, value in services["hemostat"]["environment"].items()
    }
    config = yaml.safe_load((ROOT / "deploy" / "hemostat.yaml").read_text())
    with serving(config, environment, tmp_path) as (stack, engine):
        if form == "variable":
            check_all(stack, engine, environment)
            return
        token = tmp_path / "token"
        token.write_text(environment["HEMOSTAT_ADMIN__TOKEN"] + "\n")
        with_file = {k: v for k, v in environment.items() if k != "HEMOSTAT_ADMIN__TOKEN"} | {
            "HEMOSTAT_ADMIN__TOKEN_FILE": str(token)
        }
        code, output = run("hemostat profile mode off", stack, engine, {"HEMOSTAT_ADMIN__TOKEN": ""} | with_file)
        assert (code, stack.status()["calibration"]["mode"]) == (0, "off"), output
        token.unlink()
        code, output = run("hemostat profile mode off", stack, engine, {"HEMOSTAT_ADMIN__TOKEN": ""} | with_file)
        assert (code, output.count("\n")) == (2, 1)
        assert "HEMOSTAT_ADMIN__TOKEN_FILE" in output
