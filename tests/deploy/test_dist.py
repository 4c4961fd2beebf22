"""`make dist`: what is made, what is said of the rest, and that what was made can be installed."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tarfile
import tomllib
import venv
import zipfile
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
import yaml
from tests.support.adapter_models import random_texts, save, tiny_model
from tests.support.dist_module import dist_module
from tests.support.fake_vllm import FakeVllm, serving
from tests.support.paths import ROOT
from tests.support.uv import install

from hemostat import __version__


@pytest.fixture
def dist(tmp_path: Path) -> ModuleType:
    (tmp_path / "dist").mkdir()
    return dist_module(tmp_path)


def program(folder: Path, name: str, text: str) -> None:
    folder.mkdir(exist_ok=True)
    path = folder / name
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)


def test_each_supported_python_is_compiled_for_or_said_to_be_missing(
    dist: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    monkeypatch.setenv("PYENV_ROOT", str(tmp_path / "pyenv"))
    program(tmp_path / "bin", "cc", "")
    program(tmp_path / "bin", "python3.11", "exit 127")  # as pyenv's for a version that is not chosen
    (tmp_path / "pyenv" / "versions" / "3.11.9").mkdir(parents=True)
    answer = r"printf 'cpython\n{}\n/usr/bin/python{}\n{}\n'".format
    program(tmp_path / "pyenv" / "versions" / "3.11.9" / "bin", "python3.11", answer("3.11", "3.11", "True"))
    program(tmp_path / "bin", "python3.12", answer("3.12", "3.12", "False"))
    versions = [(interpreter.version, interpreter.lacks) for interpreter in dist.interpreters()]
    assert versions == [("3.11", ""), ("3.12", "it has no Python.h")]
    assert dist.supported() == ["3.11", "3.12", "3.13"]
    (tmp_path / "bin" / "cc").unlink()
    assert {interpreter.lacks for interpreter in dist.interpreters()} == {"there is no C compiler"}


BUILDAH = """
[ "$1" = pull ] || { echo "$@" >> CALLS; exit 0; }
[ "$5" = here ] || { echo "Error: no such host" >&2; exit 125; }
"""


def test_an_image_whose_base_cannot_be_had_is_said_to_be_missing(
    dist: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    made = dist.Distribution(["BASE=here", "COMPILE=0"], ["--isolation=chroot"])
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    made.images()
    assert "missing: the images: buildah is not installed" in capsys.readouterr().out
    program(tmp_path / "bin", "buildah", BUILDAH.replace("CALLS", str(tmp_path / "calls")))
    made.images()
    build, push = (tmp_path / "calls").read_text().splitlines()
    assert "--build-arg=BASE=here --build-arg=COMPILE=0 --isolation=chroot" in build
    assert push.endswith(f"docker-archive:{tmp_path}/dist/hemostat-{__version__}.image.tar:hemostat:{__version__}")
    assert "the image hemostat-engine: its base image cannot be had: Error: no such host" in capsys.readouterr().out


def test_the_sbom_is_of_the_extras_that_the_image_is_built_with(
    dist: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    commands: list[tuple[str, ...]] = []
    monkeypatch.setattr(dist.environment, "create", lambda folder: folder.mkdir())
    monkeypatch.setattr(dist.environment, "run", lambda command, *_, **__: commands.append(command) or True)
    for given, extras in (([], "tracing,postgres"), (["EXTRAS=transformers"], "tracing,postgres,transformers")):
        dist.Distribution(given, []).sbom()
        assert commands[-3][-1].endswith(f"py3-none-any.whl[{extras}]")


def test_a_build_argument_that_no_file_has_is_refused(dist: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    assert dist.main(["--build-arg", "BAES=here"]) == 1
    said = capsys.readouterr().err
    assert said.startswith("dist: --build-arg BAES: no Dockerfile has it: they have BASE, ")
    assert said.count("\n") == 1


def test_checksums(dist: ModuleType, tmp_path: Path) -> None:
    for name in ("b", "a"):
        (tmp_path / "dist" / name).write_text(name)
    text = dist.checksums(tmp_path / "dist")
    assert [line.split()[1] for line in text.splitlines()] == ["a", "b"]
    (tmp_path / "sums").write_text(text)
    check = ["sha256sum", "--check", "--quiet", str(tmp_path / "sums")]
    assert subprocess.run(check, cwd=tmp_path / "dist", check=False).returncode == 0
    (tmp_path / "dist" / "a").write_text("other")
    assert subprocess.run(check, cwd=tmp_path / "dist", check=False, capture_output=True).returncode == 1


# Made for real


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All of it, compiled without optimization."""
    folder = tmp_path_factory.mktemp("dist")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MYPYC_OPT_LEVEL", "0")
        patch.delenv("PYTHONPATH", raising=False)
        assert dist_module(folder).main([]) == 0
    return folder / "dist"


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_what_make_dist_makes(made: Path) -> None:
    names = {path.name for path in made.iterdir()}
    assert {"SHA256SUMS", *(f"hemostat-{__version__}{end}" for end in (".tar.gz", ".cdx.json"))} <= names
    check = ["sha256sum", "--check", "--quiet", "SHA256SUMS"]
    assert subprocess.run(check, cwd=made, check=False).returncode == 0
    with tarfile.open(made / f"hemostat-{__version__}.tar.gz") as archive:
        sources = {name.partition("/")[2] for name in archive.getnames()}
    assert {"pyproject.toml", "deploy/hatch_build.py", "middleware/hemostat/cli.py", "tests/conftest.py"} <= sources
    assert not [name for name in sources if name.startswith((".venv", "build/"))]
    this = f"cp3{sys.version_info.minor}"
    (compiled,) = made.glob(f"hemostat-{__version__}-{this}-{this}-linux_*.whl")
    with zipfile.ZipFile(made / f"hemostat-{__version__}-py3-none-any.whl") as pure, zipfile.ZipFile(compiled) as other:
        added = set(other.namelist()) - set(pure.namelist())
        assert set(pure.namelist()) <= set(other.namelist())
    assert any(re.fullmatch(r"hemostat/relay/exchange\..*\.so", name) for name in added)
    of_chart = yaml.safe_load((ROOT / "helm" / "hemostat" / "Chart.yaml").read_text())["version"]
    with tarfile.open(made / f"hemostat-{of_chart}.tgz") as archive:
        chart = archive.extractfile("hemostat/Chart.yaml")
        assert chart is not None
        assert yaml.safe_load(chart.read())["appVersion"] == __version__
    listed = json.loads((made / f"hemostat-{__version__}.cdx.json").read_text())
    assert (listed["bomFormat"], listed["specVersion"]) == ("CycloneDX", "1.6")
    components = {
        component["name"].lower().replace("_", "-"): component["version"] for component in listed["components"]
    }
    assert components["hemostat"] == __version__
    required = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]
    assert {"hemostat_vllm", "hemostat_lab"} == {
        name.partition("-")[0] for name in names if name.startswith("hemostat_")
    }
    assert {re.split("[>=<]", requirement)[0] for requirement in required} | {
        "psycopg",
        "opentelemetry-sdk",
    } <= components.keys()
    assert not {"pip", "torch", "pytest"} & components.keys()
    assert "file://" not in json.dumps(listed), "a path of the machine that made it"


class Installed:
    """An empty environment, outside of the repository, into which uv installs what it is given, in one command.

    sources: the folder in which that command is given.
    """

    def __init__(self, folder: Path, *given: str, sources: Path | None = None) -> None:
        self.folder = folder
        venv.create(folder / "venv", symlinks=True)
        install(folder / "venv" / "bin" / "python", *given, folder=sources)

    @classmethod
    def with_wheel(cls, folder: Path, wheel: Path, extras: str) -> Installed:
        wanted = f"{wheel}[{extras}]" if extras else str(wheel)
        return cls(folder, "--find-links", str(wheel.parent), wanted)

    def __call__(self, *command: str, code: int = 0) -> str:
        """What the command says."""
        kept = {name: value for name, value in os.environ.items() if not name.startswith(("HEMOSTAT_", "PYTHON"))}
        path = f"{self.folder / 'venv' / 'bin'}:/usr/bin:/bin"
        ended = subprocess.run(
            command, cwd=self.folder, env=kept | {"PATH": path}, capture_output=True, text=True, check=False
        )
        said = ended.stdout + ended.stderr
        assert ended.returncode == code, said
        assert "Traceback" not in said
        return said


@pytest.fixture(scope="module")
def wheel(made: Path) -> Path:
    return made / f"hemostat-{__version__}-py3-none-any.whl"


@pytest.fixture(scope="module")
def servers() -> Iterator[list[str]]:
    """Two models, as flags."""
    with serving(FakeVllm()) as upstream, serving(FakeVllm()) as reference:
        yield ["--upstream", upstream, "--reference", reference]


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_the_first_commands_without_an_extra(wheel: Path, servers: list[str], tmp_path: Path) -> None:
    run = Installed.with_wheel(tmp_path, wheel, "")
    assert run("hemostat", "--version") == f"hemostat {__version__}\n"
    assert "serve" in run("hemostat", "--help")
    run("hemostat", "init", *servers)
    assert re.search("^ok +same tokens", run("hemostat", "check", "--config", "hemostat.yaml"), re.MULTILINE)
    assert "hemostat.yaml exists" in run("hemostat", "init", *servers, code=2)
    for extra, given in {
        "tracing": "tracing.endpoint=http://127.0.0.1:9",
        "postgres": "store.url=postgresql://127.0.0.1:1/h",
        "transformers": "reference.backend=transformers,reference.model=org/m",
    }.items():
        flags = [part for setting in given.split(",") for part in ("--set", setting)]
        refused = run("hemostat", "check", *servers[:2], *flags, code=1 if extra == "transformers" else 2)
        assert "pip install '" in refused, extra
    assert "pip install ./middleware/lab" in run("hemostat", "doctor", servers[3], servers[1], code=2)


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_the_first_command_with_tracing(wheel: Path, servers: list[str], tmp_path: Path) -> None:
    run = Installed.with_wheel(tmp_path, wheel, "tracing")
    run("hemostat", "check", *servers, "--set", "tracing.endpoint=http://127.0.0.1:9")


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_the_first_command_with_postgres(wheel: Path, servers: list[str], tmp_path: Path) -> None:
    run = Installed.with_wheel(tmp_path, wheel, "postgres")
    said = run("hemostat", "check", *servers, "--set", "store.url=postgresql://127.0.0.1:1/h", code=1)
    assert re.search("^NO +store .*refused", said, re.MULTILINE), said


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_the_first_command_with_report(wheel: Path, servers: list[str], tmp_path: Path) -> None:
    run = Installed.with_wheel(tmp_path, wheel, "report,lab")
    (tmp_path / "prompts").write_text("one\ntwo\n")
    run("hemostat", "doctor", servers[3], servers[1], "--prompts", "prompts", "--html", "report.html")
    assert "<html" in (tmp_path / "report.html").read_text()


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_the_first_command_with_transformers(wheel: Path, servers: list[str], tmp_path: Path) -> None:
    save(tiny_model(num_hidden_layers=2), tmp_path / "model")
    run = Installed.with_wheel(tmp_path, wheel, "transformers")
    said = run("hemostat", "check", *servers[:2], "--reference", "./model", code=1)
    assert re.search("^ok +reference +transformers: ", said, re.MULTILINE), said
    assert re.search("^NO +same tokens", said, re.MULTILINE), "it is another model than the fake one"


@pytest.fixture(scope="module")
def sources(made: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The unpacked sources, which are what a clone has."""
    folder = tmp_path_factory.mktemp("sources")
    with tarfile.open(made / f"hemostat-{__version__}.tar.gz") as archive:
        archive.extractall(folder, filter="data")
    return folder / f"hemostat-{__version__}"


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_one_line_installs_the_proxy_from_the_sources(sources: Path, servers: list[str], tmp_path: Path) -> None:
    run = Installed(tmp_path, "./calibration", ".", sources=sources)
    assert run("hemostat", "--version") == f"hemostat {__version__}\n"
    assert re.search("^ok +same tokens", run("hemostat", "check", *servers), re.MULTILINE)
    absent = "import importlib.util as u; assert not any(map(u.find_spec, ('torch', 'transformers', 'vllm')))"
    run("python", "-c", absent)


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_the_first_command_with_the_laboratory(sources: Path, tmp_path: Path) -> None:
    """Installed from the sources in one line; `test_the_first_command_with_report` has it from the wheels."""
    save(tiny_model(num_hidden_layers=2), tmp_path / "model")
    texts = (
        {"prompt_token_ids": text.prompt.tolist(), "output_token_ids": text.output.tolist()}
        for text in random_texts(12)
    )
    (tmp_path / "records").write_text("".join(json.dumps(text) + "\n" for text in texts))
    run = Installed(tmp_path, "./calibration", ".", "./middleware/lab", sources=sources)
    command = ["compress", "model", "packed", "--scheme", "w4a16", "--group-size", "32", "--records", "records"]
    assert "digest " in run("hemostat", *command)
    assert (tmp_path / "packed" / "model.safetensors").exists()
