"""The Dockerfiles: linted, their structure checked, and the images built where buildah is allowed to."""

from __future__ import annotations

import io
import json
import re
import resource
import shutil
import subprocess
import sys
import tarfile
import tomllib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest
from dockerfile_parse import DockerfileParser
from tests.support import compiled, rootfs
from tests.support.dist_module import dist_module
from tests.support.fake_vllm import FakeVllm, serving
from tests.support.paths import ROOT

from hemostat import __version__
from hemostat.config.operation import Admin, Listen
from hemostat_lab.demo.vllm_server import free_port

MIDDLEWARE, ENGINE = ROOT / "deploy" / "Dockerfile", ROOT / "deploy" / "Dockerfile.engine"
BOTH = pytest.mark.parametrize("path", [MIDDLEWARE, ENGINE], ids=lambda path: path.name)

Step = tuple[str, str]
"""Instruction, value."""


def stages(path: Path) -> tuple[dict[str, str], list[list[Step]]]:
    """The arguments before the first FROM, with their defaults, and each stage's steps."""
    parsed = DockerfileParser(fileobj=io.BytesIO(path.read_bytes()))
    arguments: dict[str, str] = {}
    result: list[list[Step]] = []
    for step in parsed.structure:
        instruction, value = step["instruction"], step["value"]
        if instruction == "COMMENT":
            continue
        if instruction == "FROM":
            result.append([])
        elif not result:
            name, _, default = value.partition("=")
            arguments[name] = default
            continue
        result[-1].append((instruction, value))
    return arguments, result


def values(stage: list[Step], instruction: str) -> list[str]:
    return [value for name, value in stage if name == instruction]


@BOTH
def test_hadolint(path: Path) -> None:
    linter = Path(sys.executable).parent / "hadolint"
    said = subprocess.run([linter, "--no-color", str(path)], capture_output=True, text=True, check=False)
    assert (said.returncode, said.stdout) == (0, "")


@BOTH
def test_copied_paths_exist_and_are_not_ignored(path: Path) -> None:
    kept = {
        line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")
    }  # after `*`, which ignores all
    assert (ROOT / ".dockerignore").read_text().startswith("*\n")
    _, (build, _) = stages(path)
    copied = {source for value in values(build, "COPY") for source in value.split()[:-1]}
    assert copied
    assert copied == (kept if path == MIDDLEWARE else {"LICENSE", "calibration"})
    assert copied <= kept
    assert all((ROOT / source).exists() for source in copied)


def test_middleware() -> None:
    arguments, (build, final) = stages(MIDDLEWARE)
    assert re.fullmatch(r"python:3\.\d+-slim", arguments["BASE"])
    assert [stage[0][1] for stage in (build, final)] == ["${BASE} AS build", "${BASE}"]
    # No torch by default.
    given = {name: value.strip('"') for name, _, value in (text.partition("=") for text in values(build, "ARG"))}
    assert (given["BASIC_EXTRAS"], given["EXTRAS"]) == ("tracing,postgres", "")
    # What is documented to be added exists.
    known = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    named = re.findall(r"EXTRAS=([\w,]+)", MIDDLEWARE.read_text())
    assert {"lab", "transformers"} <= {extra for given in named for extra in given.split(",")} <= set(known)
    # Only the first stage compiles, Hemostat's own wheel and no other, and it can leave that out; the last one installs
    # nothing.
    assert ("ARG", "COMPILE=1") in build
    assert "--only-binary :all:" in " ".join(values(build, "RUN"))
    installs, makes = values(build, "RUN")
    assert re.search(r'^if \[ "\$\{COMPILE\}" = 1 \] .*gcc libc6-dev', installs)
    assert makes.startswith(f'{compiled.SWITCH}="${{COMPILE}}" python -m pip wheel ')
    # What is added leaves in what the image always has.
    (joined,) = re.findall(r"extras=\S+", makes)
    (wheel,) = re.findall(r'"\$\{wheel\}[^"]*"', makes)
    for basic, added, expected in (
        ("a,b", "", "w.whl[a,b]"),
        ("a,b", "c", "w.whl[a,b,c]"),
        ("", "c", "w.whl[c]"),
        ("", "", "w.whl"),  # pip does not take w.whl[]
        ("a,b", "a,b,c", "w.whl[a,b,a,b,c]"),
    ):
        program = f"wheel=w.whl; {joined}; printf %s {wheel}"
        shell = subprocess.run(
            ["sh", "-c", program], env={"BASIC_EXTRAS": basic, "EXTRAS": added}, capture_output=True, check=True
        )
        assert shell.stdout.decode() == expected
    assert not re.search(r"apt|apk|gcc|build-essential|curl|wget", makes + " ".join(values(final, "RUN")))
    assert "pip" not in " ".join(values(final, "RUN"))
    # Not root, as a number: Kubernetes' runAsNonRoot needs a number.
    assert values(final, "USER") == ["65532:65532"]
    assert final.index(("USER", "65532:65532")) > max(n for n, (name, _) in enumerate(final) if name == "RUN")
    assert values(final, "EXPOSE") == [f"{Listen().port} {Admin().port}"]
    (health,) = values(final, "HEALTHCHECK")
    assert f"http://127.0.0.1:{Admin().port}/livez" in json.loads(health.partition(" CMD ")[2])[-1]
    assert [json.loads(value) for value in values(final, "ENTRYPOINT")] == [["hemostat"]]
    assert [json.loads(value) for value in values(final, "CMD")] == [
        ["serve", "--config", "/etc/hemostat/hemostat.yaml"]
    ]


def test_engine() -> None:
    arguments, (build, final) = stages(ENGINE)
    assert re.fullmatch(r"vllm/vllm-openai:v[\d.]+", arguments["VLLM"])
    assert [stage[0][1] for stage in (build, final)] == ["${BASE} AS build", "${VLLM}"]
    (run,) = values(final, "RUN")
    (install,) = re.findall(r"pip install[^&]*", run)
    assert "--no-deps" in install.split()
    assert "--no-index" in install.split()
    # Everything else is from the base image.
    assert {name for name, _ in final} == {"FROM", "RUN"}
    assert "numpy" not in run
    assert "torch" not in run


# --- built ------------------------------------------------------------------------------------------------------------


class BuildahError(Exception):
    pass


@dataclass(frozen=True)
class Buildah:
    """buildah with its own store; it needs no daemon."""

    folder: Path
    wheelhouse: Path

    def __call__(self, *arguments: str) -> str:
        command = ["buildah", "--root", str(self.folder / "root"), "--runroot", str(self.folder / "run")]
        command += ["--storage-driver", "vfs", *arguments]
        ended = subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT)
        if ended.returncode:
            raise BuildahError(f"buildah {' '.join(arguments[:2])}: {ended.stdout[-3000:]}{ended.stderr[:3000]}")
        return ended.stdout.strip()

    @property
    def limits(self) -> list[str]:
        """This process's own: buildah would ask for more than it may be given."""
        kinds = {"nofile": resource.RLIMIT_NOFILE, "nproc": resource.RLIMIT_NPROC}
        most = {name: resource.getrlimit(kind)[1] for name, kind in kinds.items()}
        return [part for name, n in most.items() for part in ("--ulimit", f"{name}={n}:{n}")]

    def build(self, path: Path, tag: str, **arguments: str) -> None:
        given = [part for name, value in arguments.items() for part in ("--build-arg", f"{name}={value}")]
        common = ["--isolation", "chroot", "--pull=never", "--format", "docker", "--quiet", *self.limits]
        common += ["--volume", f"{self.wheelhouse}:{rootfs.WHEELHOUSE}:ro"]
        self("build", *common, *given, "--file", str(path), "--tag", tag, ".")

    @contextmanager
    def container(self, image: str) -> Iterator[Callable[..., str]]:
        """Runs commands in one, as the image's user; keywords are their environment."""
        name = self("from", "--pull=never", *self.limits, image)

        def run(*command: str, **environment: str) -> str:
            given = [part for key, value in environment.items() for part in ("--env", f"{key}={value}")]
            return self("run", "--isolation", "chroot", *given, name, "--", *command)

        try:
            yield run
        finally:
            self("rm", name)


@pytest.fixture(scope="module")
def buildah(wheelhouse: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Buildah]:
    """With `localhost/base`, out of this machine's own files. Skipped, with the reason, where that cannot be."""
    if shutil.which("buildah") is None:
        pytest.skip("buildah is not here; on Debian or Ubuntu: apt-get install buildah netavark")
    folder = tmp_path_factory.mktemp("buildah")
    builder = Buildah(folder, rootfs.wheels_of(wheelhouse, folder / "wheels"))
    rootfs.make(folder / "tree", builder.wheelhouse, ["click", "h11"])
    try:
        container = builder("from", *builder.limits, "scratch")
        builder("add", "--quiet", container, str(folder / "tree"), "/")
        builder("config", "--env", "PATH=/usr/local/bin:/usr/bin", container)
        builder(
            "run", "--isolation", "chroot", container, "--", "python", "-c", "import ssl, sqlite3, ctypes, venv, pip"
        )
    except BuildahError as error:
        if re.search("mount|unshare|chroot|clone|_map", str(error)) and "permitted" in str(error):
            pytest.skip(f"no image is built: this machine does not let buildah mount or unshare ({error})")
        raise
    builder("commit", "--quiet", "--rm", container, "localhost/base")
    yield builder
    builder("rmi", "--all", "--force")


@pytest.fixture(scope="module")
def middleware(buildah: Buildah) -> str:
    buildah.build(MIDDLEWARE, "localhost/hemostat", BASE="localhost/base", COMPILE="0")  # it has no C compiler
    return "localhost/hemostat"


SERVES = """
import os, subprocess, sys, time, urllib.request as u
port, admin = sys.argv[1:]
def get(url, **more):
    return u.urlopen(u.Request(url, **more), timeout=20).read().decode()
process = subprocess.Popen(["hemostat", "serve"])
deadline = time.monotonic() + 240
try:
    while True:
        try:
            get(f"http://127.0.0.1:{admin}/readyz")
            break
        except OSError:
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.2)
    assert "<html" in get(f"http://127.0.0.1:{admin}/")
    body = b'{"prompt": "Hi", "max_tokens": 2}'
    kind = {"content-type": "application/json"}
    print(get(f"http://127.0.0.1:{port}/v1/completions", data=body, headers=kind))
finally:
    process.terminate()
    assert process.wait(60) == 0
print(os.getuid(), sorted(os.listdir("/data")))
"""


@pytest.mark.timeout(600)
@pytest.mark.slow
def test_middleware_image_serves(buildah: Buildah, middleware: str) -> None:
    made = json.loads(buildah("inspect", "--type", "image", middleware))["Docker"]["config"]
    assert made["User"] == "65532:65532"
    assert made["Entrypoint"] == ["hemostat"]
    assert made["Healthcheck"]["Test"][:2] == ["CMD", "python"]
    assert set(made["ExposedPorts"]) == {"8080/tcp", "8081/tcp"}
    port, admin = str(free_port()), str(free_port())
    with buildah.container(middleware) as run, serving(FakeVllm()) as upstream:
        assert run("hemostat", "--version") == f"hemostat {__version__}"
        # All that its user could write to: with a read-only root, that and no more has to be mounted.
        search = "find / -xdev -type d ( -path /proc -o -path /dev -o -path /sys ) -prune -o -type d -writable -print"
        assert set(run(*search.split()).split()) == {"/data", "/tmp"}
        assert run("find", "/opt/hemostat", "/usr", "-name", "gcc*", "-o", "-name", "torch") == ""
        assert run("find", "/opt/hemostat", "-maxdepth", "5", "-name", "pip*") == ""
        environment = {
            "HEMOSTAT_UPSTREAM__URL": upstream,
            "HEMOSTAT_LISTEN__PORT": port,
            "HEMOSTAT_ADMIN__PORT": admin,
            "HEMOSTAT_STORE__URL": "sqlite:////data/hemostat.db",
            "HEMOSTAT_TRACING__ENDPOINT": "http://127.0.0.1:9",
        }
        answer, end = run("python", "-c", SERVES, port, admin, **environment).splitlines()[-2:]
    assert json.loads(answer)["choices"]
    assert end == "65532 ['hemostat.db', 'hemostat.db.lock']"


@pytest.mark.timeout(600)
@pytest.mark.slow
def test_engine_image_adds_only_the_plugin(buildah: Buildah) -> None:
    buildah.build(ENGINE, "localhost/engine", BASE="localhost/base", VLLM="localhost/base")
    site = next(buildah.folder.glob("tree/usr/local/lib/python*/site-packages"))
    before = {path.name for path in site.glob("*.dist-info")}
    with buildah.container("localhost/engine") as run:
        run("python", "-c", "import hemostat_engine")
        listing = 'from importlib.metadata import distributions as d; print(*(p._path.name for p in d()), sep="\\n")'
        after = set(run("python", "-c", listing).splitlines())
    assert after - before == {f"hemostat_vllm-{__version__}.dist-info"}
    assert before <= after
    assert len(before) > 1


@pytest.mark.timeout(900)
@pytest.mark.slow
def test_make_dist_writes_both_images(buildah: Buildah, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    storage = {"driver": "vfs", "graphroot": str(buildah.folder / "root"), "runroot": str(buildah.folder / "run")}
    lines = [f'{key} = "{value}"' for key, value in storage.items()]
    (tmp_path / "storage.conf").write_text("\n".join(["[storage]", *lines]))
    monkeypatch.setenv("CONTAINERS_STORAGE_CONF", str(tmp_path / "storage.conf"))
    (tmp_path / "dist").mkdir()
    mount = f"--volume={buildah.wheelhouse}:{rootfs.WHEELHOUSE}:ro"
    bases = ["BASE=localhost/base", "VLLM=localhost/base", "COMPILE=0"]
    dist_module(tmp_path).Distribution(bases, ["--isolation=chroot", mount, *buildah.limits]).images()
    for name in ("hemostat", "hemostat-engine"):
        with tarfile.open(tmp_path / "dist" / f"{name}-{__version__}.image.tar") as archive:
            manifest = archive.extractfile("manifest.json")
            assert manifest is not None
            (image,) = json.load(manifest)
        assert f"docker.io/library/{name}:{__version__}" in image["RepoTags"]
